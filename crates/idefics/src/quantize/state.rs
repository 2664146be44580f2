//! What an unfinished output directory remembers: of what and how it is made, and which files are whole.

use std::{
    fs::{self, File},
    io::{Read, Seek},
    path::Path,
    time::UNIX_EPOCH,
};

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::{QuantizeError, Recipe};
use crate::{
    checkpoint::{
        Checkpoint, WeightFile,
        write::{io_error, partial_path, write_json},
    },
    files::{ModelFiles, hex, sha256},
};

/// Lies in the output directory until everything is done.
const STATE_FILE: &str = ".idefics-quantize.json";
/// Changes whenever the same recipe would give other files.
const VERSION: u32 = 1;

/// The state of an output directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    /// Fingerprint of the model's files.
    source: String,
    recipe: Recipe,
    max_shard_bytes: u64,
    /// Files that are whole.
    finished: Vec<Finished>,
}

/// A file that is whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Finished {
    name: String,
    bytes: u64,
    sha256: String,
}

impl State {
    /// The state of an output that has just begun.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        max_shard_bytes: u64,
    ) -> Result<Self, QuantizeError> {
        let source = fingerprint(checkpoint)?;
        Ok(Self { version: VERSION, source, recipe: recipe.clone(), max_shard_bytes, finished: Vec::new() })
    }

    /// Takes up what a directory remembers of an earlier run of the same work. A directory with files that no
    /// such run left is refused.
    pub(super) fn resume(mut self, directory: &Path) -> Result<Self, QuantizeError> {
        let path = directory.join(STATE_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                // A run that ended before it had anything to remember.
                let begun = partial_path(&path);
                let mut entries = fs::read_dir(directory).map_err(io_error("read", directory))?.flatten();
                return match entries.find(|entry| entry.path() != begun) {
                    None => Ok(self),
                    Some(_) => Err(QuantizeError::NotEmpty { path: directory.to_owned() }),
                };
            }
            Err(error) => return Err(io_error("read", &path)(error).into()),
        };
        let other = |what| QuantizeError::OtherOutput { path: directory.to_owned(), what };
        let earlier: Self = serde_json::from_str(&text).map_err(|_| other("program"))?;
        if earlier.version != self.version {
            return Err(other("version of this program"));
        }
        if earlier.source != self.source {
            return Err(other("model, or of one that has changed since"));
        }
        if earlier.recipe != self.recipe || earlier.max_shard_bytes != self.max_shard_bytes {
            return Err(other("format, size of files or set of parts"));
        }
        self.finished = earlier.finished;
        Ok(self)
    }

    /// Whether a file of this name is there with the bytes that were once verified.
    pub(super) fn is_finished(&self, directory: &Path, name: &str) -> Result<bool, QuantizeError> {
        let Some(finished) = self.finished.iter().find(|finished| finished.name == name) else {
            return Ok(false);
        };
        let path = directory.join(name);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() && metadata.len() == finished.bytes => {
                Ok(sha256(&path).map_err(io_error("read", &path))? == finished.sha256)
            }
            _ => Ok(false),
        }
    }

    /// Remembers that a file is whole; `path` is where it lies now.
    pub(super) fn finish(&mut self, name: &str, path: &Path) -> Result<(), QuantizeError> {
        let bytes = fs::metadata(path).map_err(io_error("read", path))?.len();
        self.finished.retain(|finished| finished.name != name);
        self.finished.push(Finished {
            name: name.to_owned(),
            bytes,
            sha256: sha256(path).map_err(io_error("read", path))?,
        });
        Ok(())
    }

    /// Writes the state.
    pub(super) fn save(&self, directory: &Path) -> Result<(), QuantizeError> {
        let value = serde_json::to_value(self).expect("the state is made of texts and numbers");
        Ok(write_json(&directory.join(STATE_FILE), &value)?)
    }

    /// Forgets everything: the output is done.
    pub(super) fn remove(directory: &Path) -> Result<(), QuantizeError> {
        let path = directory.join(STATE_FILE);
        Ok(fs::remove_file(&path).map_err(io_error("remove", &path))?)
    }
}

/// A digest of the configuration, and of name, length, time of change and header of each weight file; of everything
/// where it is in memory.
fn fingerprint(checkpoint: &Checkpoint) -> Result<String, QuantizeError> {
    let mut context = Context::new(&SHA256);
    if let ModelFiles::Memory(memory) = &checkpoint.origin {
        memory.files.iter().for_each(|(_, bytes)| context.update(bytes));
        return Ok(hex(context.finish().as_ref()));
    }
    let config = checkpoint.origin.path("config.json");
    context.update(&fs::read(&config).map_err(io_error("read", &config))?);
    for WeightFile { path, .. } in &checkpoint.files {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(path)?;
            let metadata = file.metadata()?;
            let changed = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            let mut length = [0; 8];
            file.read_exact(&mut length)?;
            file.rewind()?;
            let mut found = format!("{:?} {} {changed:?}", path.file_name(), metadata.len()).into_bytes();
            file.take(u64::from_le_bytes(length).saturating_add(8)).read_to_end(&mut found)?;
            Ok(found)
        };
        context.update(&read().map_err(io_error("read", path))?);
    }
    Ok(hex(context.finish().as_ref()))
}

/// Where the state of a directory lies.
#[cfg(test)]
pub(super) fn state_path(directory: &Path) -> std::path::PathBuf {
    directory.join(STATE_FILE)
}
