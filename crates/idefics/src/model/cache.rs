//! What is remembered of a sequence between steps.

use std::sync::Arc;

use crate::ops::{KeyValues, Tensor};

/// One picture after the vision tower and the resampler, with what every gated block makes of it.
#[derive(Debug)]
pub struct ImageStates {
    /// What the text model sees of the picture: `[L, E]`.
    pub hidden: Tensor,
    /// Keys and values of each gated block, `[L, H·K]`.
    pub(super) cross_attention: Vec<KeyValues>,
}

/// Keys and values of a sequence's tokens, layer by layer, and its pictures. A clone is a branch of its own:
/// pictures are shared, keys and values copied.
#[derive(Debug, Clone)]
pub struct SequenceCache {
    pub(super) n_tokens: usize,
    /// One for each decoder layer.
    pub(super) layers: Vec<KeyValues>,
    pub(super) images: Vec<Arc<ImageStates>>,
}

impl SequenceCache {
    /// Tokens read so far.
    pub fn len(&self) -> usize {
        self.n_tokens
    }

    /// Whether no token has been read.
    pub fn is_empty(&self) -> bool {
        self.n_tokens == 0
    }

    /// The pictures of the sequence, in order.
    pub fn images(&self) -> &[Arc<ImageStates>] {
        &self.images
    }

    /// Forgets all but the first `tokens` tokens, whose keys and values have `width` elements each.
    pub(super) fn truncate(&mut self, tokens: usize, width: usize) {
        self.n_tokens = self.n_tokens.min(tokens);
        for layer in &mut self.layers {
            layer.truncate(self.n_tokens, width);
        }
    }

    /// A cache of the first `tokens` tokens, whose keys and values have `width` elements each.
    pub(super) fn copy_prefix(&self, tokens: usize, width: usize) -> Self {
        let n_tokens = self.n_tokens.min(tokens);
        let layers = self.layers.iter().map(|layer| layer.copy_rows(n_tokens, width)).collect();
        Self { n_tokens, layers, images: self.images.clone() }
    }

    /// Bytes of keys and values of the tokens; pictures not counted.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(KeyValues::bytes).sum()
    }
}
