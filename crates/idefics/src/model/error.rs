//! What can go wrong in the forward pass.

use crate::ops::TensorError;

/// Why a model could not be built or a step not be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A tensor that the configuration calls for is not there.
    #[error("tensor `{name}` is missing")]
    MissingTensor {
        /// Its full checkpoint name.
        name: String,
    },
    /// A tensor has another shape than the configuration calls for.
    #[error("tensor `{name}`: expected {expected:?}, got {got:?}")]
    WrongShape {
        /// Its full checkpoint name.
        name: String,
        /// The shape by the configuration.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A token id that neither vocabulary has.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Base and additional vocabulary together.
        vocab_size: usize,
    },
    /// A token names a picture that its sequence does not have.
    #[error("a token sees image {index}, but its sequence has {n_images}")]
    UnknownImage {
        /// The index asked for.
        index: u32,
        /// Pictures of the sequence.
        n_images: usize,
    },
    /// Token ids and image indices of a row differ in number.
    #[error("{tokens} tokens came with {indices} image indices")]
    RaggedRow {
        /// Number of token ids.
        tokens: usize,
        /// Number of image indices.
        indices: usize,
    },
    /// A picture of another size than the model was built for.
    #[error(
        "the vision tower takes pictures of {expected}x{expected} pixels, got {height}x{width}; other sizes need \
         interpolated positions"
    )]
    ImageSize {
        /// Side of the configured square.
        expected: usize,
        /// Rows of the picture.
        height: usize,
        /// Columns of the picture.
        width: usize,
    },
    /// A picture smaller than one patch, or whose values do not fill it.
    #[error(
        "{values} values do not make a picture of {height}x{width} pixels and 3 channels with patches of {patch}"
    )]
    BadImage {
        /// Number of values.
        values: usize,
        /// Rows of the picture.
        height: usize,
        /// Columns of the picture.
        width: usize,
        /// Side of a patch.
        patch: usize,
    },
    /// A sequence would grow past the positions of the model.
    #[error("a sequence of {asked} tokens does not fit the {limit} positions of the model")]
    TooLong {
        /// Tokens that the sequence would have.
        asked: usize,
        /// The most it may have.
        limit: usize,
    },
    /// Low-rank factors that do not fit their layer.
    #[error("low-rank factors of `{name}` `[{n}, {k}]`: expected [r, {k}] and [{n}, r], got {a:?} and {b:?}")]
    LowRankShape {
        /// The layer's full name.
        name: String,
        /// Shape of `A`.
        a: Vec<usize>,
        /// Shape of `B`.
        b: Vec<usize>,
        /// Outputs of the layer.
        n: usize,
        /// Inputs of the layer.
        k: usize,
    },
    /// Targets and tokens of a training sequence differ in number.
    #[error("{tokens} tokens came with {targets} targets")]
    RaggedTargets {
        /// Number of token ids.
        tokens: usize,
        /// Number of targets.
        targets: usize,
    },
    /// An operation on tensors failed.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}
