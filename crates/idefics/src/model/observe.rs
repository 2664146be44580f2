//! Intermediate values by name, for comparison with the reference.

use std::fmt;

use crate::ops::Tensor;

/// A place in the forward pass whose value can be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Patches, class token and positions, before the first norm: `[ΣP, E]`.
    VisionEmbeddings,
    /// Output of one layer of the tower: `[ΣP, E]`.
    VisionLayer(usize),
    /// Latents after one block of the resampler: `[N·L, E]`.
    PerceiverBlock(usize),
    /// What the text model sees of the pictures: `[ΣL, E]`.
    ImageHiddenStates,
    /// Token embeddings: `[T, D]`.
    Embeddings,
    /// The attention branch of one gated block before its gate, rows of tokens that see a picture: `[T', D]`.
    CrossAttention(usize),
    /// Output of one gated block: `[T, D]`.
    GatedBlock(usize),
    /// Output of one decoder layer: `[T, D]`.
    DecoderLayer(usize),
    /// After the last norm: `[T, D]`.
    Norm,
}

/// Is shown every stage as it is computed.
pub type Observer<'a> = dyn FnMut(Stage, &Tensor) + 'a;

/// An observer that looks away.
pub fn unobserved(_: Stage, _: &Tensor) {}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VisionEmbeddings => f.write_str("vision.embeddings"),
            Self::VisionLayer(layer) => write!(f, "vision.layers.{layer}"),
            Self::PerceiverBlock(block) => write!(f, "perceiver.blocks.{block}"),
            Self::ImageHiddenStates => f.write_str("image_hidden_states"),
            Self::Embeddings => f.write_str("embeddings"),
            Self::CrossAttention(block) => write!(f, "cross.{block}.attn"),
            Self::GatedBlock(block) => write!(f, "cross.{block}.out"),
            Self::DecoderLayer(layer) => write!(f, "layers.{layer}.out"),
            Self::Norm => f.write_str("norm"),
        }
    }
}
