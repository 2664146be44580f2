//! Why weights could not be quantized.

use std::{fmt::Display, path::PathBuf};

use crate::checkpoint::{CheckpointError, WriteError};

/// Why weights could not be quantized.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The model cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
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
    /// What was read back is not what was written.
    #[error("`{path}` does not read back as it was written ({problem}): is the disk sound")]
    Verify {
        /// The file.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
}

/// Words with commas.
pub(super) fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}
