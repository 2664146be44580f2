//! Why a model could not be built.

use std::path::PathBuf;

use idefics::{
    checkpoint::{CheckpointError, WriteError},
    config::ConfigError,
    processor::TokenizerError,
};

/// Why a model could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// The files of a model cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The new model cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The tokenizer cannot be read, or is of no use.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The options give no model.
    #[error("the new model's configuration")]
    Config(#[from] ConfigError),
    /// A configuration of the source models is no JSON of the expected fields.
    #[error("`{path}` is not a usable configuration")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Another kind of model.
    #[error("`{path}`: `model_type` is `{got}`, expected {expected}")]
    ModelType {
        /// The file.
        path: PathBuf,
        /// What would do.
        expected: &'static str,
        /// What the file says.
        got: String,
    },
    /// The source model has something that IDEFICS has no place for.
    #[error("`{path}`: `{field}` is {got}, but IDEFICS has {why}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What the file says.
        got: String,
        /// What stands against it.
        why: &'static str,
    },
    /// A tensor that the configuration calls for is in no file.
    #[error("`{path}` has no tensor `{name}`")]
    MissingTensor {
        /// The directory.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor of another shape.
    #[error("`{path}`: tensor `{name}` has shape {got:?}, expected {expected:?}")]
    WrongShape {
        /// The directory.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What follows from the configuration.
        expected: Vec<usize>,
        /// What the file says.
        got: Vec<usize>,
    },
    /// Tensors that would be lost.
    #[error("`{path}` has {count} tensors that IDEFICS has no place for, the first of them `{first}`")]
    Unused {
        /// The directory.
        path: PathBuf,
        /// How many.
        count: usize,
        /// One of them.
        first: String,
    },
    /// Gated blocks that do not come out even.
    #[error(
        "{layers} layers cannot have a gated block before every {interval}: transformers needs an interval that \
         divides the number of layers (possible: {possible})"
    )]
    Interval {
        /// Layers of the text model.
        layers: usize,
        /// The interval asked for.
        interval: usize,
        /// Those that do, as a list.
        possible: String,
    },
    /// More tokens than embeddings.
    #[error("the tokenizer in `{path}` has {tokens} tokens, but there are {rows} embeddings")]
    Vocabulary {
        /// The directory.
        path: PathBuf,
        /// Tokens.
        tokens: usize,
        /// Rows of the base embedding, or of both where the tokenizer has IDEFICS's tokens already.
        rows: usize,
    },
    /// Some of IDEFICS's tokens are there, but not as they must be.
    #[error("the tokenizer in `{path}`: {problem}")]
    AddedTokens {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}
