//! Writing model directories that this library and transformers load.
//!
//! All files of a directory are written beside it, under a name that begins with a dot, and the directory gets its
//! own name when everything has reached the disk: at any moment it is whole or not there.

mod error;
mod file;
mod layout;

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

pub use error::WriteError;
pub(crate) use error::io_error;
pub(crate) use file::{check_space, partial_path, write_bytes, write_json, write_whole};
pub use layout::TensorSpec;
pub(crate) use layout::{ALIGN, MAX_SHARD_BYTES, Piece, file_header, index, shard_name, split};

use super::{INDEX_FILE, MAX_CONFIG_BYTES, Weight, weight::DType};
use crate::{
    config::IdeficsConfig,
    files::{ModelFiles, ReadError},
};
use file::sync_directory;

/// Files that are copied as they are from one model to another made of it, where the model has them.
pub(crate) const SIDE_FILES: [&str; 14] = [
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
];

/// Room for configuration and tokenizer.
pub(crate) const SIDE_FILES_BYTES: u64 = 16 << 20;

/// A directory that is being written. Dropped before [`finish`](Self::finish), it leaves nothing behind.
#[derive(Debug)]
pub struct CheckpointWriter {
    out: PathBuf,
    /// Where the files lie until all are there.
    partial: PathBuf,
    max_shard_bytes: u64,
}

impl CheckpointWriter {
    /// Begins to write `out`, a directory that is not there yet, or empty. What an earlier run that was killed
    /// left beside it is removed.
    pub fn create(out: impl AsRef<Path>) -> Result<Self, WriteError> {
        let out = out.as_ref();
        if out.file_name().is_none() {
            return Err(WriteError::NoName { path: out.to_owned() });
        }
        let mut entries = if_there(fs::read_dir(out)).map_err(io_error("read", out))?.into_iter().flatten();
        if entries.next().is_some() {
            return Err(WriteError::NotEmpty { path: out.to_owned() });
        }
        let partial = partial_path(out);
        if_there(fs::remove_dir_all(&partial)).map_err(io_error("remove", &partial))?;
        fs::create_dir_all(&partial).map_err(io_error("create", &partial))?;
        Ok(Self { out: out.to_owned(), partial, max_shard_bytes: MAX_SHARD_BYTES })
    }

    /// Splits the weights into files of about so many bytes instead of 5 GB; no tensor is split.
    #[must_use]
    pub fn with_max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = bytes;
        self
    }

    /// Where the files lie until [`finish`](Self::finish), for what else belongs into the directory.
    pub fn directory(&self) -> &Path {
        &self.partial
    }

    /// Writes all weights. `weight` is asked for one tensor at a time, in the order of `tensors`; it is rounded to
    /// the type that the tensor will have, and let go of before the next.
    ///
    /// # Panics
    /// If a weight has another shape than its tensor.
    pub fn write_weights<E: From<WriteError>>(
        &self,
        tensors: &[TensorSpec],
        mut weight: impl FnMut(&TensorSpec) -> Result<Weight, E>,
    ) -> Result<(), E> {
        let needed = tensors.iter().map(TensorSpec::num_bytes).sum::<u64>() + SIDE_FILES_BYTES;
        check_space(&self.partial, needed)?;
        let shards = split(tensors, self.max_shard_bytes, |tensor| tensor.num_bytes());
        let names: Vec<String> = (0..shards.len()).map(|index| shard_name(index, shards.len())).collect();
        for (name, shard) in names.iter().zip(&shards) {
            self.write_shard(name, shard, &mut weight)?;
        }
        if shards.len() > 1 {
            let pieces = |shard: &Vec<&TensorSpec>| shard.iter().map(|tensor| tensor.piece()).collect();
            let files = names.iter().zip(&shards).map(|(name, shard)| (name.as_str(), pieces(shard)));
            write_json(&self.partial.join(INDEX_FILE), &index(files))?;
        }
        Ok(())
    }

    /// Writes one file of weights that is called otherwise than a model's; `weight` is asked as in
    /// [`write_weights`](Self::write_weights).
    pub fn write_file_of_weights<E: From<WriteError>>(
        &self,
        name: &str,
        tensors: &[TensorSpec],
        mut weight: impl FnMut(&TensorSpec) -> Result<Weight, E>,
    ) -> Result<(), E> {
        let tensors: Vec<&TensorSpec> = tensors.iter().collect();
        self.write_shard(name, &tensors, &mut weight)
    }

    fn write_shard<E: From<WriteError>>(
        &self,
        name: &str,
        tensors: &[&TensorSpec],
        weight: &mut impl FnMut(&TensorSpec) -> Result<Weight, E>,
    ) -> Result<(), E> {
        let path = self.partial.join(name);
        let write = |file: &mut BufWriter<File>| -> Result<(), E> {
            let header = file_header(tensors.iter().map(|tensor| tensor.piece()));
            file.write_all(&header).map_err(io_error("write", &path))?;
            for tensor in tensors {
                let weight = weight(tensor)?;
                assert_eq!(weight.shape(), tensor.shape, "{}: shape", tensor.name);
                let rounded = weight.to_dtype(tensor.dtype);
                file.write_all(rounded.bytes()).map_err(io_error("write", &path))?;
                weight.release_pages();
            }
            Ok(())
        };
        write_whole(&path, write, |_| Ok(()))
    }

    /// Writes one of the other files.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        write_bytes(&self.partial.join(name), bytes)
    }

    /// Writes one of the other files as JSON.
    pub fn write_json(&self, name: &str, value: &Value) -> Result<(), WriteError> {
        write_json(&self.partial.join(name), value)
    }

    /// Copies tokenizer, processor, generation and licence files from the model that this one is made of.
    pub fn copy_side_files(&self, from: &ModelFiles) -> Result<(), WriteError> {
        copy_side_files(from, &self.partial)
    }

    /// Writes `config.json` as that of another model with changes, so that fields which this library does not
    /// read stay as they are.
    pub fn copy_config(
        &self,
        from: &ModelFiles,
        change: impl FnOnce(&mut Map<String, Value>),
    ) -> Result<(), WriteError> {
        let mut config = read_object(from, "config.json")?;
        change(&mut config);
        self.write_json("config.json", &Value::Object(config))
    }

    /// Gives the directory its name, with everything in it on the disk.
    pub fn finish(self) -> Result<PathBuf, WriteError> {
        sync_directory(&self.partial)?;
        fs::rename(&self.partial, &self.out).map_err(io_error("rename", &self.partial))?;
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_directory(parent.unwrap_or(Path::new(".")))?;
        Ok(self.out.clone())
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        // Nothing to be done about a failure; after `finish` there is nothing of that name.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// Nothing where there is no such file.
fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// Refuses to write a model over the one that it is made of.
pub fn check_not_same(from: &Path, out: &Path) -> Result<(), WriteError> {
    match (from.canonicalize(), out.canonicalize()) {
        (Ok(from), Ok(same)) if from == same => Err(WriteError::SameDirectory { path: out.to_owned() }),
        _ => Ok(()),
    }
}

/// Copies those of [`SIDE_FILES`] that are there.
pub(crate) fn copy_side_files(from: &ModelFiles, to: &Path) -> Result<(), WriteError> {
    for name in SIDE_FILES {
        match from.read(name, u64::MAX) {
            Ok(bytes) => write_bytes(&to.join(name), &bytes)?,
            Err(ReadError::Io(error)) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("read", &from.path(name))(error));
            }
            Err(_) => {}
        }
    }
    Ok(())
}

/// Reads a file of JSON whose value is an object.
pub(crate) fn read_object(files: &ModelFiles, name: &str) -> Result<Map<String, Value>, WriteError> {
    let path = files.path(name);
    let bytes = files.read(name, MAX_CONFIG_BYTES).map_err(|error| {
        io_error("read", &path)(match error {
            ReadError::Io(error) => error,
            ReadError::NotAFile => io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"),
            ReadError::TooLarge => io::ErrorKind::FileTooLarge.into(),
        })
    })?;
    serde_json::from_slice(&bytes).map_err(|source| WriteError::Json { path, source })
}

/// `config.json` of a model in that element type, as transformers writes it.
pub fn config_json(config: &IdeficsConfig, dtype: DType) -> Value {
    let Ok(Value::Object(mut object)) = serde_json::to_value(config) else {
        unreachable!("a configuration is an object of numbers and texts")
    };
    object.remove("torch_dtype");
    object.insert("architectures".to_owned(), json!(["IdeficsForVisionText2Text"]));
    object.insert("model_type".to_owned(), json!("idefics"));
    object.insert("dtype".to_owned(), json!(super::torch_name(dtype)));
    Value::Object(object)
}

#[cfg(test)]
mod tests;
