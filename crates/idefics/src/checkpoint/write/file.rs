//! How any file comes to be: written under another name, synced, renamed.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{WriteError, error::io_error};

/// The name of a file that is being written.
pub(crate) fn partial_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

/// Writes a file that is either whole or not there: `check` looks at it before it gets its name.
pub(crate) fn write_whole<T, E: From<WriteError>>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
    check: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let partial = partial_path(path);
    let file = File::create(&partial).map_err(io_error("create", &partial))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    write(&mut file)?;
    let file = file.into_inner().map_err(|error| io_error("write", &partial)(error.into_error()))?;
    file.sync_all().map_err(io_error("write", &partial))?;
    drop(file);
    let checked = check(&partial)?;
    fs::rename(&partial, path).map_err(io_error("rename", &partial))?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))?;
    Ok(checked)
}

/// Writes bytes that are in memory.
pub(crate) fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    write_whole(path, |file| file.write_all(bytes).map_err(io_error("write", path)), |_| Ok(()))
}

/// Writes a text of JSON.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<(), WriteError> {
    write_bytes(path, format!("{value:#}\n").as_bytes())
}

/// Makes renames last.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), WriteError> {
    #[cfg(unix)]
    File::open(directory).and_then(|file| file.sync_all()).map_err(io_error("sync", directory))?;
    let _ = directory;
    Ok(())
}

/// An output that does not fit is not begun.
pub(crate) fn check_space(directory: &Path, needed: u64) -> Result<(), WriteError> {
    match available_bytes(directory) {
        Some(available) if available < needed => {
            Err(WriteError::NoSpace { path: directory.to_owned(), needed, available })
        }
        _ => Ok(()),
    }
}

/// Bytes that may still be written to the disk of a directory, where the system tells.
fn available_bytes(directory: &Path) -> Option<u64> {
    #[cfg(unix)]
    return rustix::fs::statvfs(directory).ok().map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    #[cfg(not(unix))]
    return {
        _ = directory;
        None
    };
}
