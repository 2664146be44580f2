//! Why an adapter cannot be used.

use std::path::PathBuf;

use crate::checkpoint::{CheckpointError, WriteError};

/// Why an adapter cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file that cannot be read or written.
    #[error(transparent)]
    File(#[from] WriteError),
    /// The weights, or those of the base model, cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A configuration that is no JSON of the expected fields.
    #[error("`{path}` is not a usable adapter configuration")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Pickled weights and nothing else.
    #[error(
        "`{path}` is a pickle, which can run code when it is loaded: save the adapter again with \
         `save_pretrained(…, safe_serialization=True)`"
    )]
    Pickle {
        /// The file.
        path: PathBuf,
    },
    /// A setting that changes what the adapter computes, and is not supported.
    #[error("`{path}`: `{field}` is {got}, expected {expected}")]
    Setting {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What the file says.
        got: String,
        /// What is supported.
        expected: &'static str,
    },
    /// A regular expression that cannot be read.
    #[error("`{field}`: `{pattern}` is not a regular expression: {problem}")]
    Pattern {
        /// The field.
        field: &'static str,
        /// The expression.
        pattern: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor of another kind than LoRA's.
    #[error("`{path}`: tensor `{name}` is {what}, which is not supported")]
    Kind {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What it is.
        what: &'static str,
    },
    /// A tensor whose name is no part of any adapter of this model.
    #[error(
        "`{path}`: tensor `{name}` belongs to no linear layer and is no weight of the model: is the adapter made for it"
    )]
    UnknownTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// One of two factors alone.
    #[error("`{path}`: `{module}` has `{there}`, but no `{missing}`")]
    Unpaired {
        /// The file.
        path: PathBuf,
        /// The linear layer.
        module: String,
        /// The factor that is there.
        there: &'static str,
        /// The other one.
        missing: &'static str,
    },
    /// A shape that does not fit the model.
    #[error("`{path}`: tensor `{name}` has shape {got:?}, expected {expected} for the model")]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape that fits.
        expected: String,
        /// The file's shape.
        got: Vec<usize>,
    },
    /// No tensor of use.
    #[error("`{path}` holds no tensor of an adapter")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A module that was trained whole, asked for in part.
    #[error(
        "`{path}` replaces the weight `{name}`, which can only be done as a whole: expected weight 1, got {weight}"
    )]
    PartOfWhole {
        /// The file.
        path: PathBuf,
        /// One of the weights.
        name: String,
        /// The share asked for.
        weight: f32,
    },
    /// Two adapters that replace the same module.
    #[error("both `{first}` and `{second}` replace the weight `{name}`: use one of them")]
    TwoWholes {
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
        /// The weight.
        name: String,
    },
    /// A share that is no number.
    #[error("adapter `{path}`: expected a finite weight, got {weight}")]
    Weight {
        /// The directory.
        path: PathBuf,
        /// The share.
        weight: f32,
    },
}
