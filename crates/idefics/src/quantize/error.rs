//! Why weights could not be quantized.

use std::{
    fmt::Display,
    io,
    path::{Path, PathBuf},
};

use crate::checkpoint::CheckpointError;

/// Why weights could not be quantized.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The model cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The weights are packed already.
    #[error("the model is quantized already ({format}): start from the unquantized one")]
    AlreadyQuantized {
        /// How.
        format: String,
    },
    /// The model has no linear layer in any of the chosen parts.
    #[error("no linear layer of this model belongs to the chosen parts ({parts})")]
    NothingChosen {
        /// The parts.
        parts: String,
    },
    /// A weight that is not a number everywhere.
    #[error("tensor `{name}` holds values that are not finite and cannot be quantized")]
    NotFinite {
        /// The tensor.
        name: String,
    },
    /// A weight whose elements do not pair up.
    #[error("tensor `{name}` has shape {shape:?}: nf4 needs [N, K] of an even number of elements")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The model would be written over itself.
    #[error("`{path}` is the model's own directory: name another one to write to")]
    SameDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// A directory of somebody else's files.
    #[error("`{path}` is not empty and holds no unfinished output: name an empty or a new directory")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// An unfinished output of something else.
    #[error(
        "`{path}` holds unfinished output of another {what}: repeat that command, or remove the directory"
    )]
    OtherOutput {
        /// The directory.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// Too little room on the disk.
    #[error("`{path}` needs {needed} more bytes, but its disk has {available} left")]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// Bytes still to be written.
        needed: u64,
        /// Bytes that can be.
        available: u64,
    },
    /// A file that cannot be read or written.
    #[error("cannot {verb} `{path}`")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A configuration or index that is no JSON object.
    #[error("`{path}` is not a JSON object")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// What was read back is not what was written.
    #[error("`{path}` does not read back as it was written ({problem}): is the disk sound")]
    Verify {
        /// The file.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
}

/// Wraps what the system says about a file.
pub(super) fn io_error(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> QuantizeError {
    let path = path.to_owned();
    move |source| QuantizeError::Io { verb, path, source }
}

/// Words with commas.
pub(super) fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}
