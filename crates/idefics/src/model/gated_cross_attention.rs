//! The gated cross-attention block (Flamingo, "GATED XATTN-DENSE"), which runs before a decoder layer.
//!
//! text `[T, D]` + each token's image `[L, E]` `->` `[T, D]`.
//! Reference: `IdeficsGatedCrossAttentionLayer` in transformers `modeling_idefics.py`.
//! Surprising: the reference masks attention over all images of a sequence, but its mask is one-hot, so a token
//! attends to the latents of one image or of none. A token with none skips the attention half and still goes
//! through the MLP half. There is no rotary embedding here, and the query and key norms come after the
//! projection, over each head.

use std::sync::Arc;

use super::{
    ModelError, Observer, Stage, cache::ImageStates, decoder::text_heads, loader::Loader, mlp::Mlp,
    unobserved,
};
use crate::{
    config::{AlphaType, IdeficsConfig},
    ops::{self, AttentionGroup, Context, Gate, Heads, KeyValues, Linear, RmsNorm, Span, Tensor, Visible},
};

pub(super) struct GatedCrossAttention {
    block: usize,
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_layer_norm: Option<RmsNorm>,
    k_layer_norm: Option<RmsNorm>,
    gate_cross_attn: Gate,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
    gate_dense: Gate,
    heads: Heads,
}

/// A run of neighbouring tokens that see the same image.
pub(super) struct ImageRun {
    pub(super) n_tokens: usize,
    pub(super) image: Arc<ImageStates>,
}

/// Which tokens of a step see an image, and which one.
pub(super) struct ImageView {
    /// Rows of the step whose token sees an image, ascending: `[T']`.
    pub(super) rows: Arc<[usize]>,
    /// Their images, in the same order; the runs' lengths sum to `T'`.
    pub(super) runs: Vec<ImageRun>,
}

impl GatedCrossAttention {
    pub(super) fn new(config: &IdeficsConfig, block: usize, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let (width, image_width, eps) =
            (config.hidden_size, config.vision_config.embed_dim, config.rms_norm_eps);
        let attention = loader.at("cross_attn");
        let head_norm = |name: &str| {
            config.qk_layer_norms.then(|| attention.rms_norm(name, config.head_dim(), eps)).transpose()
        };
        let alpha_shape: &[usize] = match config.alpha_type {
            AlphaType::Float => &[1],
            AlphaType::Vector => &[1, 1, width],
        };
        // Both forms of alpha flatten to what scales a row.
        let gate = |name: &str| -> Result<Gate, ModelError> {
            Ok(Gate::new(&loader.weight(name, alpha_shape)?, loader.gradient(name)))
        };
        Ok(Self {
            block,
            input_layernorm: loader.rms_norm("input_layernorm", width, eps)?,
            q_proj: attention.linear("q_proj", width, width)?,
            k_proj: attention.linear("k_proj", width, image_width)?,
            v_proj: attention.linear("v_proj", width, image_width)?,
            o_proj: attention.linear("o_proj", width, width)?,
            q_layer_norm: head_norm("q_layer_norm")?,
            k_layer_norm: head_norm("k_layer_norm")?,
            gate_cross_attn: gate("alpha_cross_attn")?,
            post_attention_layernorm: loader.rms_norm("post_attention_layernorm", width, eps)?,
            mlp: Mlp::new(config, &loader.at("mlp"))?,
            gate_dense: gate("alpha_dense")?,
            heads: text_heads(config),
        })
    }

    /// The products of a step for tokens that look at an image; keys and values of images are computed before.
    pub(super) fn attention_linears(&self) -> [&Linear; 2] {
        [&self.q_proj, &self.o_proj]
    }

    /// Those for every token.
    pub(super) fn mlp_linears(&self) -> [&Linear; 3] {
        self.mlp.linears()
    }

    /// Keys and values of one image `[L, E]`: they depend on nothing else, so they are computed once.
    pub(super) fn image_keys_values(&self, ctx: Context, image: &Tensor) -> ops::Result<KeyValues> {
        let (k, v) = self.keys_values(ctx, image)?;
        let mut memory = KeyValues::new(ctx);
        memory.append(&k, &v, 0, ops::dims2(&k)?.0)?;
        Ok(memory)
    }

    /// Keys and values of images `[ΣL, E]`, `[ΣL, H·K]` each.
    fn keys_values(&self, ctx: Context, images: &Tensor) -> ops::Result<(Tensor, Tensor)> {
        let [k, v] = Linear::forward_all([&self.k_proj, &self.v_proj], ctx, images)?;
        Ok((normed_heads(ctx, self.k_layer_norm.as_ref(), k)?, v))
    }

    /// `[T, D] -> [T, D]`.
    pub(super) fn forward(
        &self,
        ctx: Context,
        x: &Tensor,
        view: &ImageView,
        observe: &mut Observer<'_>,
    ) -> ops::Result<Tensor> {
        let spans = || -> Vec<_> {
            view.runs
                .iter()
                .map(|run| Span {
                    n_queries: run.n_tokens,
                    memory: &run.image.cross_attention[self.block],
                    visible: Visible::All,
                })
                .collect()
        };
        self.forward_with(ctx, x, &view.rows, observe, |q| {
            ops::attention_with_cache(ctx, self.heads, q, &spans())
        })
    }

    /// `[T, D] -> [T, D]`, keys and values computed from `images` `[ΣL, E]` on the way. `rows` are the tokens that
    /// see an image, `groups` what they see.
    pub(super) fn forward_whole(
        &self,
        ctx: Context,
        x: &Tensor,
        images: Option<&Tensor>,
        rows: &Arc<[usize]>,
        groups: &Arc<[AttentionGroup]>,
    ) -> ops::Result<Tensor> {
        self.forward_with(ctx, x, rows, &mut unobserved, |q| {
            let images = images.expect("a token sees an image only where there is one");
            let (k, v) = self.keys_values(ctx, images)?;
            ops::attention_within(ctx, self.heads, q, &k, &v, groups)
        })
    }

    /// The block around its attention, which `attend` computes from the queries of the tokens that see an image.
    fn forward_with(
        &self,
        ctx: Context,
        x: &Tensor,
        rows: &Arc<[usize]>,
        observe: &mut Observer<'_>,
        attend: impl FnOnce(&Tensor) -> ops::Result<Tensor>,
    ) -> ops::Result<Tensor> {
        let x = if rows.is_empty() { x.clone() } else { self.look(ctx, x, rows, observe, attend)? };
        let normed = self.post_attention_layernorm.forward(ctx, &x)?;
        ops::add_scaled(ctx, &x, &self.mlp.forward(ctx, &normed)?, &self.gate_dense)
    }

    /// The attention half, computed for the tokens that see an image and added to their rows alone.
    fn look(
        &self,
        ctx: Context,
        x: &Tensor,
        rows: &Arc<[usize]>,
        observe: &mut Observer<'_>,
        attend: impl FnOnce(&Tensor) -> ops::Result<Tensor>,
    ) -> ops::Result<Tensor> {
        let (n_tokens, _) = ops::dims2(x)?;
        let all = rows.len() == n_tokens;
        let seeing = if all { x.clone() } else { ops::select_rows(x, rows)? }; // [T', D]

        let normed = self.input_layernorm.forward(ctx, &seeing)?;
        let q = self.q_proj.forward(ctx, &normed)?; // [T', H·K]
        let q = normed_heads(ctx, self.q_layer_norm.as_ref(), q)?;
        let attended = attend(&q)?; // [T', H·K]
        let branch = self.o_proj.forward(ctx, &attended)?; // [T', D]
        observe(Stage::CrossAttention(self.block), &branch);
        let seeing = ops::add_scaled(ctx, &seeing, &branch, &self.gate_cross_attn)?;
        if all { Ok(seeing) } else { ops::replace_rows(x, rows, &seeing) }
    }
}

fn normed_heads(ctx: Context, norm: Option<&RmsNorm>, x: Tensor) -> ops::Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(ctx, &x),
        None => Ok(x),
    }
}
