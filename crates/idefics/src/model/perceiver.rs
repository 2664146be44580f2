//! The perceiver resampler: any number of image vectors in, `L` latents out.
//!
//! Reference: `IdeficsPerceiverResampler` in transformers `perceiver.py`; Flamingo, figure 5.
//! Surprising: every block reads the same raw context, each through a norm of its own; keys and values cover
//! the context and the latents, context first; the MLP uses ReLU and four times the vision width.

use std::sync::Arc;

use super::{ModelError, Observer, Stage, loader::Loader};
use crate::{
    config::IdeficsConfig,
    ops::{
        self, Activation, AttentionGroup, Context, Embedding, Heads, LayerNorm, Linear, Run, Tensor, Visible,
    },
};

/// Epsilon of every LayerNorm here; the configuration has no field for it.
const EPS: f64 = 1e-5;

pub(super) struct PerceiverResampler {
    /// The learned queries `[L, E]`.
    latents: Embedding,
    blocks: Vec<Block>,
    layer_norm: LayerNorm,
}

struct Block {
    context_layer_norm: LayerNorm,
    latents_layer_norm: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    output_proj: Linear,
    q_layer_norm: Option<LayerNorm>,
    k_layer_norm: Option<LayerNorm>,
    heads: Heads,
    ln: LayerNorm,
    fc: Linear,
    c_proj: Linear,
}

impl PerceiverResampler {
    pub(super) fn new(config: &IdeficsConfig, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let (width, perceiver) = (config.vision_config.embed_dim, &config.perceiver_config);
        let blocks = loader.at("blocks");
        Ok(Self {
            latents: Embedding::new(
                loader.weight("latents", &[perceiver.resampler_n_latents, width])?,
                loader.gradient("latents"),
            ),
            blocks: (0..perceiver.resampler_depth)
                .map(|block| Block::new(config, &blocks.at(block)))
                .collect::<Result<_, _>>()?,
            layer_norm: loader.layer_norm("layer_norm", width, EPS)?,
        })
    }

    /// Context `[ΣP, E]` of images with `lengths` vectors each `->` `[N·L, E]`.
    pub(super) fn forward(
        &self,
        ctx: Context,
        context: &Tensor,
        lengths: &[usize],
        observe: &mut Observer<'_>,
    ) -> ops::Result<Tensor> {
        self.forward_from(ctx, context, &self.latents.to_tensor()?, lengths, observe)
    }

    /// The same from `latents` `[L, E]` that are given.
    pub(super) fn forward_from(
        &self,
        ctx: Context,
        context: &Tensor,
        latents: &Tensor,
        lengths: &[usize],
        observe: &mut Observer<'_>,
    ) -> ops::Result<Tensor> {
        let n_latents = self.latents.len();
        let mut latents = ops::concat_rows(&vec![latents; lengths.len()])?; // [N·L, E]
        for (index, block) in self.blocks.iter().enumerate() {
            latents = block.forward(ctx, context, &latents, lengths, n_latents)?;
            observe(Stage::PerceiverBlock(index), &latents);
        }
        self.layer_norm.forward(ctx, &latents)
    }

    /// The learned queries.
    pub(super) fn latents(&self) -> &Embedding {
        &self.latents
    }
}

impl Block {
    fn new(config: &IdeficsConfig, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let (width, perceiver) = (config.vision_config.embed_dim, &config.perceiver_config);
        let (attention, mlp) = (loader.at(0), loader.at(1));
        let head_dim = perceiver.resampler_head_dim;
        let inner = perceiver.resampler_n_heads * head_dim;
        let head_norm = |name: &str| {
            perceiver.qk_layer_norms_perceiver.then(|| attention.layer_norm(name, head_dim, EPS)).transpose()
        };
        Ok(Self {
            context_layer_norm: attention.layer_norm("context_layer_norm", width, EPS)?,
            latents_layer_norm: attention.layer_norm("latents_layer_norm", width, EPS)?,
            q_proj: attention.linear("q_proj", inner, width)?,
            k_proj: attention.linear("k_proj", inner, width)?,
            v_proj: attention.linear("v_proj", inner, width)?,
            output_proj: attention.linear("output_proj", width, inner)?,
            q_layer_norm: head_norm("q_layer_norm")?,
            k_layer_norm: head_norm("k_layer_norm")?,
            heads: Heads {
                n_heads: perceiver.resampler_n_heads,
                head_dim,
                scale: (head_dim as f32).powf(-0.5),
            },
            ln: mlp.layer_norm("ln", width, EPS)?,
            fc: mlp.linear("fc", 4 * width, width)?,
            c_proj: mlp.linear("c_proj", width, 4 * width)?,
        })
    }

    fn forward(
        &self,
        ctx: Context,
        context: &Tensor,
        latents: &Tensor,
        lengths: &[usize],
        n_latents: usize,
    ) -> ops::Result<Tensor> {
        let normed_context = self.context_layer_norm.forward(ctx, context)?; // [ΣP, E]
        let normed_latents = self.latents_layer_norm.forward(ctx, latents)?; // [N·L, E]
        // Products before rows are put together, so that going backward those of a context that nobody trains end here.
        let interleave = interleave(lengths, n_latents);
        let both = |linear: &Linear| {
            let (context, latents) =
                (linear.forward(ctx, &normed_context)?, linear.forward(ctx, &normed_latents)?);
            ops::arrange_rows(&[&context, &latents], &interleave)
        };
        let q = self.q_proj.forward(ctx, &normed_latents)?; // [N·L, H·K]
        let k = both(&self.k_proj)?; // [Σ(P+L), H·K]
        let v = both(&self.v_proj)?;
        let q = normed_heads(ctx, self.q_layer_norm.as_ref(), q)?;
        let k = normed_heads(ctx, self.k_layer_norm.as_ref(), k)?;
        let mut first = 0;
        let groups = lengths
            .iter()
            .enumerate()
            .map(|(image, length)| {
                let keys = (first, length + n_latents);
                first += keys.1;
                AttentionGroup { queries: (image * n_latents, n_latents), keys, visible: Visible::All }
            })
            .collect();
        let attended = ops::attention_within(ctx, self.heads, &q, &k, &v, &groups)?; // [N·L, H·K]
        let latents = ops::add(&self.output_proj.forward(ctx, &attended)?, latents)?;

        let inner = self.fc.forward(ctx, &self.ln.forward(ctx, &latents)?)?; // [N·L, 4E]
        ops::add(&self.c_proj.forward_activated(ctx, Activation::Relu, &inner)?, &latents)
    }
}

/// Each image's context followed by its latents: rows of `[ΣP, ·]` and `[N·L, ·]` as those of `[Σ(P+L), ·]`.
fn interleave(lengths: &[usize], n_latents: usize) -> Arc<[Run]> {
    let mut first = 0;
    let mut runs = Vec::with_capacity(2 * lengths.len());
    for (image, count) in lengths.iter().enumerate() {
        runs.push(Run { part: 0, first, count: *count });
        runs.push(Run { part: 1, first: image * n_latents, count: n_latents });
        first += count;
    }
    runs.into()
}

fn normed_heads(ctx: Context, norm: Option<&LayerNorm>, x: Tensor) -> ops::Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(ctx, &x),
        None => Ok(x),
    }
}
