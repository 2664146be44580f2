//! One LLaMA layer: pre-norm self-attention with rotary positions, pre-norm gated MLP, no biases.
//!
//! Reference: `IdeficsDecoderLayer` in transformers `modeling_idefics.py`. The query and key norms of the
//! configuration do not apply here, only to the cross-attention.

use std::sync::Arc;

use super::{ModelError, loader::Loader, mlp::Mlp};
use crate::{
    config::IdeficsConfig,
    ops::{
        self, AttentionGroup, Context, Heads, KeyValues, Linear, RmsNorm, RotaryTable, Span, Tensor, Visible,
    },
};

pub(super) struct DecoderLayer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
    heads: Heads,
}

/// Positions of the tokens of a step, and the table that turns them into rotations.
pub(super) struct Positions {
    pub(super) table: Arc<RotaryTable>,
    /// Position of each token in its own sequence: `[T]`.
    pub(super) of_tokens: Arc<[u32]>,
}

/// One sequence's part of a step: how many tokens it feeds, how many came before, and its memory of one layer.
pub(super) struct Segment<'a> {
    pub(super) n_tokens: usize,
    pub(super) past: usize,
    pub(super) memory: &'a mut KeyValues,
}

impl DecoderLayer {
    pub(super) fn new(config: &IdeficsConfig, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let width = config.hidden_size;
        let attention = loader.at("self_attn");
        Ok(Self {
            input_layernorm: loader.rms_norm("input_layernorm", width, config.rms_norm_eps)?,
            q_proj: attention.linear("q_proj", width, width)?,
            k_proj: attention.linear("k_proj", width, width)?,
            v_proj: attention.linear("v_proj", width, width)?,
            o_proj: attention.linear("o_proj", width, width)?,
            post_attention_layernorm: loader.rms_norm(
                "post_attention_layernorm",
                width,
                config.rms_norm_eps,
            )?,
            mlp: Mlp::new(config, &loader.at("mlp"))?,
            heads: text_heads(config),
        })
    }

    /// The products of a step.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj].into_iter().chain(self.mlp.linears())
    }

    /// `[T, D] -> [T, D]`; the segments divide the `T` tokens in order, and their memories grow by them.
    pub(super) fn forward(
        &self,
        ctx: Context,
        x: &Tensor,
        positions: &Positions,
        segments: &mut [Segment<'_>],
    ) -> ops::Result<Tensor> {
        self.forward_with(ctx, x, positions, |q, k, v| {
            let mut first = 0;
            for segment in &mut *segments {
                segment.memory.append(k, v, first, segment.n_tokens)?;
                first += segment.n_tokens;
            }
            let spans: Vec<_> = segments
                .iter()
                .map(|segment| Span {
                    n_queries: segment.n_tokens,
                    memory: &*segment.memory,
                    visible: Visible::Causal { past: segment.past },
                })
                .collect();
            ops::attention_with_cache(ctx, self.heads, q, &spans)
        })
    }

    /// `[T, D] -> [T, D]` of whole sequences, which `groups` tell apart, with nothing remembered.
    pub(super) fn forward_whole(
        &self,
        ctx: Context,
        x: &Tensor,
        positions: &Positions,
        groups: &Arc<[AttentionGroup]>,
    ) -> ops::Result<Tensor> {
        self.forward_with(ctx, x, positions, |q, k, v| {
            ops::attention_within(ctx, self.heads, q, k, v, groups)
        })
    }

    /// The layer around its attention, which `attend` computes from rotated queries and keys and the values.
    fn forward_with(
        &self,
        ctx: Context,
        x: &Tensor,
        positions: &Positions,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> ops::Result<Tensor>,
    ) -> ops::Result<Tensor> {
        let normed = self.input_layernorm.forward(ctx, x)?;
        let layers = [&self.q_proj, &self.k_proj, &self.v_proj];
        let [q, k, v] = Linear::forward_all(layers, ctx, &normed)?; // [T, H·K]
        let q = ops::rotate(&q, &positions.table, &positions.of_tokens)?;
        let k = ops::rotate(&k, &positions.table, &positions.of_tokens)?;
        let attended = attend(&q, &k, &v)?; // [T, H·K]
        let x = ops::add(x, &self.o_proj.forward(ctx, &attended)?)?;

        let normed = self.post_attention_layernorm.forward(ctx, &x)?;
        ops::add(&x, &self.mlp.forward(ctx, &normed)?)
    }
}

/// The heads of the text model, which the gated blocks share.
pub(super) fn text_heads(config: &IdeficsConfig) -> Heads {
    let head_dim = config.head_dim();
    Heads { n_heads: config.num_attention_heads, head_dim, scale: (head_dim as f32).powf(-0.5) }
}
