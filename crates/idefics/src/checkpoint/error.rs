//! Why a model directory cannot be used.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{compare::Mismatch, header::HeaderError, index::IndexError};
use crate::config::ConfigError;

/// How to turn pickled weights into safetensors, as it stands in an error message.
const CONVERT: &str = "python -c \"from transformers import IdeficsForVisionText2Text as M; \
    M.from_pretrained('IN').save_pretrained('OUT', safe_serialization=True)\"";

/// Why a model directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file that cannot be read.
    #[error("cannot read `{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A directory that is not one.
    #[error("`{path}` is not a directory")]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// A file that is a directory, a pipe or a device.
    #[error("`{path}` is not a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A text file larger than any real one.
    #[error("`{path}` has more than {limit} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// A bad `config.json`.
    #[error("`{path}`")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
    /// A bad `generation_config.json`.
    #[error("`{path}`: not a usable generation configuration")]
    GenerationConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A bad index of shards.
    #[error("`{path}`")]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// An index that does not describe its shards.
    #[error("`{path}` does not describe its shards: {tensors}")]
    IndexDisagrees {
        /// The index.
        path: PathBuf,
        /// Tensors that are not where it says, shortened.
        tensors: String,
    },
    /// A malformed safetensors file.
    #[error("`{path}`")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: HeaderError,
    },
    /// The same tensor in two shards.
    #[error("tensor `{name}` is both in `{first}` and in `{second}`")]
    TwoFiles {
        /// The tensor, made printable.
        name: String,
        /// One file.
        first: PathBuf,
        /// Another file.
        second: PathBuf,
    },
    /// Weights that are no floats of 16 or 32 bits.
    #[error("`{path}`: tensor `{name}` has element type {dtype}, expected F32, F16 or BF16")]
    ElementType {
        /// The file.
        path: PathBuf,
        /// The tensor, made printable.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// Weights that are quantized in another way than the supported ones.
    #[error(
        "`{path}`: the weights are quantized ({method}), which is not supported: use the unquantized model, \
         bitsandbytes nf4, or what `idefics quantize` makes of it"
    )]
    Quantized {
        /// The file that shows it.
        path: PathBuf,
        /// Whose format.
        method: String,
    },
    /// Quantized weights in a directory whose configuration does not say so.
    #[error(
        "`{path}` holds the bitsandbytes tensor `{name}`, but `config.json` has no `quantization_config`: \
         take the configuration that was saved with the weights"
    )]
    Undeclared {
        /// The file.
        path: PathBuf,
        /// One of the tensors, made printable.
        name: String,
    },
    /// Pickled weights and nothing else.
    #[error(
        "`{path}` is a pickle, which can run code when it is loaded, and there is no safetensors file beside it: convert it with {CONVERT}"
    )]
    Pickle {
        /// One of the files.
        path: PathBuf,
    },
    /// No weights.
    #[error("`{path}` holds neither `model.safetensors` nor `model.safetensors.index.json`")]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },
    /// Configuration and tensors have another number of additional tokens.
    #[error(
        "`config.json` says `additional_vocab_size` is {config}, but `{tensor}` has {rows} rows: \
         correct the configuration or take the matching weights"
    )]
    AdditionalVocab {
        /// What the configuration says.
        config: usize,
        /// The tensor that says otherwise.
        tensor: &'static str,
        /// What it says; 0 where it does not exist.
        rows: usize,
    },
    /// Tensors that the configuration does not call for, or calls for in vain.
    #[error("the tensors do not fit the configuration: {0}")]
    Mismatch(Box<Mismatch>),
    /// A weight was asked for that is not there; impossible after a successful check.
    #[error("no tensor `{name}`")]
    NoSuchTensor {
        /// The name.
        name: String,
    },
}

/// Wraps what the system says about a file.
pub(super) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { path, source }
}
