//! The decoupled embedding and head: the LLaMA vocabulary, and a few rows behind it for the added tokens.
//!
//! Reference: `IdeficsDecoupledEmbedding` and `IdeficsDecoupledLinear` in transformers `modeling_idefics.py`.

use super::{ModelError, loader::Loader};
use crate::{
    config::IdeficsConfig,
    ops::{self, Context, Embedding, Linear, Tensor},
};

/// Ids below `V` are rows of the base table, the `A` ids from `V` on rows of the additional one.
pub(super) struct DecoupledEmbedding {
    base: Embedding,
    additional: Option<Embedding>,
}

/// Logits of the base vocabulary, then those of the additional one.
pub(super) struct DecoupledLmHead {
    base: Linear,
    additional: Option<Linear>,
}

impl DecoupledEmbedding {
    pub(super) fn new(config: &IdeficsConfig, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let (additional, width) = (config.additional_vocab_size, config.hidden_size);
        Ok(Self {
            base: Embedding::new(
                loader.weight("weight", &[config.vocab_size, width])?,
                loader.gradient("weight"),
            ),
            additional: (additional > 0)
                .then(|| {
                    let loader = loader.at("additional_embedding");
                    let weight = loader.weight("weight", &[additional, width])?;
                    Ok::<_, ModelError>(Embedding::new(weight, loader.gradient("weight")))
                })
                .transpose()?,
        })
    }

    /// `[T] -> [T, D]`.
    pub(super) fn forward(&self, token_ids: &[u32]) -> Result<Tensor, ModelError> {
        let (base, additional) = (self.base.len(), self.additional.as_ref().map_or(0, Embedding::len));
        let mut rows = Vec::with_capacity(token_ids.len() * self.base.width());
        for id in token_ids {
            let index = *id as usize;
            match &self.additional {
                _ if index < base => self.base.append_row(index, &mut rows),
                Some(table) if index < base + additional => table.append_row(index - base, &mut rows),
                _ => return Err(ModelError::UnknownToken { id: *id, vocab_size: base + additional }),
            }
        }
        Ok(ops::tensor(rows, &[token_ids.len(), self.base.width()])?)
    }

    /// Adds the gradient of the rows `[T, D]` of `token_ids`, which are known, where it goes.
    pub(super) fn backward(&self, token_ids: &[u32], dy: &Tensor) -> ops::Result<()> {
        let dy = ops::to_vec(dy)?;
        for (id, row) in token_ids.iter().zip(dy.chunks_exact(self.base.width())) {
            let index = *id as usize;
            match &self.additional {
                Some(table) if index >= self.base.len() => {
                    table.add_row_gradient(index - self.base.len(), row);
                }
                _ => self.base.add_row_gradient(index, row),
            }
        }
        Ok(())
    }
}

impl DecoupledLmHead {
    /// With `tie_word_embeddings` both heads are the embeddings, base with base and additional with additional.
    pub(super) fn new(config: &IdeficsConfig, root: &Loader<'_>) -> Result<Self, ModelError> {
        let (base, additional) = if config.tie_word_embeddings {
            (root.at("model").at("embed_tokens"), "additional_embedding")
        } else {
            (root.at("lm_head"), "additional_fc")
        };
        let (n, width) = (config.additional_vocab_size, config.hidden_size);
        Ok(Self {
            base: Linear::new(base.weight("weight", &[config.vocab_size, width])?, None)
                .with_gradients(base.gradient("weight"), None),
            additional: (n > 0).then(|| base.linear(additional, n, width)).transpose()?,
        })
    }

    /// The products of a step.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        std::iter::once(&self.base).chain(&self.additional)
    }

    /// Hidden states `[n, D]` to logits `[n, V + A]`.
    pub(super) fn forward(&self, ctx: Context, x: &Tensor) -> ops::Result<Tensor> {
        let base = self.base.forward(ctx, x)?; // [n, V]
        match &self.additional {
            Some(additional) => ops::concat_columns(&base, &additional.forward(ctx, x)?), // [n, V + A]
            None => Ok(base),
        }
    }
}
