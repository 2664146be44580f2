//! The CLIP vision tower: a picture in, one vector per patch and one for the class token out.
//!
//! Reference: `IdeficsVisionTransformer` in transformers `vision.py`.
//! Surprising: the output is the last layer's hidden state of all tokens without `post_layernorm`, which
//! checkpoints carry all the same; the norm before the first layer is spelled `pre_layrnorm` there.

use std::sync::Arc;

use super::{
    ModelError, Observer, Stage,
    loader::{Loader, Trained},
    training::Tape,
};
use crate::{
    config::VisionConfig,
    ops::{
        self, Activation, AttentionGroup, Context, Embedding, Heads, Input, LayerNorm, Linear, Run, Segment,
        Tensor, Visible,
    },
    processor::PixelValues,
};

pub(super) struct VisionTransformer {
    embeddings: Trained<Embeddings>,
    pre_layer_norm: Trained<LayerNorm>,
    layers: Vec<Trained<Layer>>,
}

/// What comes out of the tower: the vectors of all pictures laid end to end.
pub(super) struct VisionOutput {
    /// `[ΣP, E]`.
    pub(super) hidden: Tensor,
    /// Vectors of each picture, class token included.
    pub(super) lengths: Vec<usize>,
}

struct Embeddings {
    /// The patch convolution, whose stride is its size, as a product `[E, 3·p·p]`.
    patch_embedding: Linear,
    /// `[1, E]`.
    class_embedding: Embedding,
    position_embedding: Embedding,
    patch_size: usize,
    image_size: usize,
}

struct Layer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: Heads,
    activation: Activation,
}

/// What to do with a picture of another size than the tower was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OtherSizes {
    /// Refuse it.
    #[default]
    Refuse,
    /// Interpolate the position embeddings, as `interpolate_pos_encoding=True` does in the reference.
    Interpolate,
}

impl VisionTransformer {
    pub(super) fn new(config: &VisionConfig, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let layers = loader.at("encoder").at("layers");
        Ok(Self {
            embeddings: loader.trained(|| Embeddings::new(config, &loader.at("embeddings")))?,
            pre_layer_norm: loader
                .trained(|| loader.layer_norm("pre_layrnorm", config.embed_dim, config.layer_norm_eps))?,
            layers: (0..config.num_hidden_layers)
                .map(|layer| loader.trained(|| Layer::new(config, &layers.at(layer))))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Whether any of its weights is trained.
    pub(super) fn is_trained(&self) -> bool {
        self.embeddings.is_trained
            || self.pre_layer_norm.is_trained
            || self.layers.iter().any(|layer| layer.is_trained)
    }

    pub(super) fn forward(
        &self,
        ctx: Context,
        images: &[&PixelValues],
        other_sizes: OtherSizes,
        observe: &mut Observer<'_>,
    ) -> Result<VisionOutput, ModelError> {
        let mut lengths = Vec::with_capacity(images.len());
        let mut parts = Vec::with_capacity(images.len());
        for image in images {
            let tokens = self.embeddings.forward(ctx, image, other_sizes)?; // [P, E]
            lengths.push(ops::dims2(&tokens)?.0);
            parts.push(tokens);
        }
        let embedded = ops::concat_rows(&parts.iter().collect::<Vec<_>>())?; // [ΣP, E]
        observe(Stage::VisionEmbeddings, &embedded);
        let mut hidden = self.pre_layer_norm.forward(ctx, &embedded)?;
        let groups = groups(&lengths);
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = layer.forward(ctx, &hidden, &groups)?;
            observe(Stage::VisionLayer(index), &hidden);
        }
        Ok(VisionOutput { hidden, lengths })
    }

    /// As [`forward`](Self::forward), keeping what the backward pass needs; it reaches down to the lowest layer
    /// that is trained and no further.
    pub(super) fn forward_for_training<'a>(
        &'a self,
        ctx: Context,
        images: &[&PixelValues],
        tape: Tape,
    ) -> Result<(VisionOutput, VisionTape<'a>), ModelError> {
        let keeps = tape == Tape::Keep;
        let side = self.embeddings.image_size / self.embeddings.patch_size;
        let lengths = vec![1 + side * side; images.len()];
        let mut kept = VisionTape { tower: self, layers: Vec::new(), embeddings: None };
        let embeddings = &self.embeddings;
        for image in images {
            embeddings.check(image, OtherSizes::Refuse)?;
        }
        let patches = embeddings.unfold(images)?; // [Σ(P - 1), 3·p·p]
        let (class, positions) =
            (embeddings.class_embedding.to_tensor()?, embeddings.position_embedding.to_tensor()?);
        let n_images = images.len();
        let mut hidden = if embeddings.is_trained {
            let inputs = [(patches, Input::Fixed), (class, Input::Followed), (positions, Input::Followed)];
            let (segment, tokens) = Segment::forward(&inputs, keeps, move |x| {
                embeddings.embed(ctx, &x[0], &x[1], &x[2], n_images)
            })?;
            kept.embeddings = Some(segment);
            tokens
        } else {
            embeddings.embed(ctx, &patches, &class, &positions, n_images)?
        }; // [ΣP, E]
        let groups = groups(&lengths);
        let followed_if = |is_needed| if is_needed { Input::Followed } else { Input::Fixed };
        let mut is_needed = embeddings.is_trained || self.pre_layer_norm.is_trained;
        hidden = if is_needed {
            let inputs = [(hidden, followed_if(embeddings.is_trained))];
            let (segment, out) =
                Segment::forward(&inputs, keeps, move |x| self.pre_layer_norm.forward(ctx, &x[0]))?;
            kept.layers.push(segment);
            out
        } else {
            self.pre_layer_norm.forward(ctx, &hidden)?
        };
        for layer in &self.layers {
            let inputs = [(hidden, followed_if(is_needed))];
            is_needed |= layer.is_trained;
            let [(hidden_before, _)] = &inputs;
            hidden = if is_needed {
                let groups = Arc::clone(&groups);
                let (segment, out) =
                    Segment::forward(&inputs, keeps, move |x| layer.forward(ctx, &x[0], &groups))?;
                kept.layers.push(segment);
                out
            } else {
                layer.forward(ctx, hidden_before, &groups)?
            };
        }
        Ok((VisionOutput { hidden, lengths }, kept))
    }
}

/// What the backward pass of the tower needs: the layers from the lowest that is trained on.
pub(super) struct VisionTape<'a> {
    tower: &'a VisionTransformer,
    layers: Vec<Segment<'a>>,
    /// If the embeddings are trained.
    embeddings: Option<Segment<'a>>,
}

impl VisionTape<'_> {
    /// Takes the gradient of the output `[ΣP, E]` down to the lowest trained layer.
    pub(super) fn backward(self, dy: Tensor) -> ops::Result<()> {
        let mut dy = Some(dy);
        for segment in self.layers.into_iter().rev() {
            let Some(above) = dy else { break };
            dy = segment.backward(&above)?.swap_remove(0);
        }
        if let (Some(segment), Some(dy)) = (self.embeddings, dy) {
            let embeddings = &self.tower.embeddings;
            let tables = [&embeddings.class_embedding, &embeddings.position_embedding];
            for (table, gradient) in tables.into_iter().zip(segment.backward(&dy)?.into_iter().flatten()) {
                table.add_gradient(&gradient)?;
            }
        }
        Ok(())
    }
}

/// Pictures of `lengths` vectors each, which see themselves alone.
fn groups(lengths: &[usize]) -> Arc<[AttentionGroup]> {
    let mut first = 0;
    lengths
        .iter()
        .map(|length| {
            let rows = (first, *length);
            first += length;
            AttentionGroup { queries: rows, keys: rows, visible: Visible::All }
        })
        .collect()
}

impl Layer {
    fn new(config: &VisionConfig, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let (width, inner, eps) = (config.embed_dim, config.intermediate_size, config.layer_norm_eps);
        let (attention, mlp) = (loader.at("self_attn"), loader.at("mlp"));
        let head_dim = width / config.num_attention_heads;
        Ok(Self {
            layer_norm1: loader.layer_norm("layer_norm1", width, eps)?,
            q_proj: attention.biased_linear("q_proj", width, width)?,
            k_proj: attention.biased_linear("k_proj", width, width)?,
            v_proj: attention.biased_linear("v_proj", width, width)?,
            out_proj: attention.biased_linear("out_proj", width, width)?,
            layer_norm2: loader.layer_norm("layer_norm2", width, eps)?,
            fc1: mlp.biased_linear("fc1", inner, width)?,
            fc2: mlp.biased_linear("fc2", width, inner)?,
            heads: Heads {
                n_heads: config.num_attention_heads,
                head_dim,
                scale: (head_dim as f32).powf(-0.5),
            },
            activation: config.hidden_act.into(),
        })
    }

    /// `[ΣP, E] -> [ΣP, E]`; attention stays inside each picture.
    fn forward(&self, ctx: Context, x: &Tensor, groups: &Arc<[AttentionGroup]>) -> ops::Result<Tensor> {
        let normed = self.layer_norm1.forward(ctx, x)?;
        let layers = [&self.q_proj, &self.k_proj, &self.v_proj];
        let [q, k, v] = Linear::forward_all(layers, ctx, &normed)?; // [ΣP, H·K]
        let attended = ops::attention_within(ctx, self.heads, &q, &k, &v, groups)?;
        let x = ops::add(x, &self.out_proj.forward(ctx, &attended)?)?;

        let inner = self.fc1.forward(ctx, &self.layer_norm2.forward(ctx, &x)?)?; // [ΣP, F]
        ops::add(&x, &self.fc2.forward_activated(ctx, self.activation, &inner)?)
    }
}

impl Embeddings {
    fn new(config: &VisionConfig, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let (width, patch, channels) = (config.embed_dim, config.patch_size, config.num_channels);
        let kernel = loader.weight("patch_embedding.weight", &[width, channels, patch, patch])?;
        let positions = loader.weight("position_embedding.weight", &[config.num_positions(), width])?;
        Ok(Self {
            patch_embedding: Linear::new(kernel.reshape([width, channels * patch * patch]), None)
                .with_gradients(loader.gradient("patch_embedding.weight"), None),
            class_embedding: Embedding::new(
                loader.weight("class_embedding", &[width])?.reshape([1, width]),
                loader.gradient("class_embedding"),
            ),
            position_embedding: Embedding::new(positions, loader.gradient("position_embedding.weight")),
            patch_size: patch,
            image_size: config.image_size,
        })
    }

    /// One picture to `[P, E]`, class token first.
    fn forward(
        &self,
        ctx: Context,
        image: &PixelValues,
        other_sizes: OtherSizes,
    ) -> Result<Tensor, ModelError> {
        self.check(image, other_sizes)?;
        let (rows, columns) = (image.height / self.patch_size, image.width / self.patch_size);
        let positions = self.positions(rows, columns, image.height == image.width)?;
        Ok(self.embed(ctx, &self.unfold(&[image])?, &self.class_embedding.to_tensor()?, &positions, 1)?)
    }

    /// Patches `[N·(P - 1), 3·p·p]` of `N` pictures to `[N·P, E]`, each with the same positions `[P, E]`.
    fn embed(
        &self,
        ctx: Context,
        patches: &Tensor,
        class: &Tensor,
        positions: &Tensor,
        n_images: usize,
    ) -> ops::Result<Tensor> {
        let patches = self.patch_embedding.forward(ctx, patches)?; // [N·(P - 1), E]
        let count = ops::dims2(positions)?.0 - 1;
        let runs = (0..n_images).flat_map(|image| {
            [Run { part: 0, first: 0, count: 1 }, Run { part: 1, first: image * count, count }]
        });
        let tokens = ops::arrange_rows(&[class, &patches], &runs.collect())?; // [N·P, E]
        ops::add(&tokens, &ops::concat_rows(&vec![positions; n_images])?)
    }

    fn unfold(&self, images: &[&PixelValues]) -> ops::Result<Tensor> {
        unfold(images, self.patch_size)
    }

    /// Refuses a picture that the tower cannot read.
    fn check(&self, image: &PixelValues, other_sizes: OtherSizes) -> Result<(), ModelError> {
        let PixelValues { height, width, .. } = *image;
        let patch = self.patch_size;
        if other_sizes == OtherSizes::Refuse && (height, width) != (self.image_size, self.image_size) {
            return Err(ModelError::ImageSize { expected: self.image_size, height, width });
        }
        if image.data.len() != 3 * height * width || height < patch || width < patch {
            return Err(ModelError::BadImage { values: image.data.len(), height, width, patch });
        }
        Ok(())
    }

    /// Position embeddings of a grid of patches, `[1 + rows·columns, E]`.
    ///
    /// Reference: `IdeficsVisionEmbeddings.interpolate_pos_encoding`.
    fn positions(&self, rows: usize, columns: usize, square: bool) -> ops::Result<Tensor> {
        let table = self.position_embedding.to_tensor()?; // [1 + side², E]
        let side = self.image_size / self.patch_size;
        if rows * columns == side * side && square {
            return Ok(table);
        }
        let width = self.position_embedding.width();
        let grid = ops::to_vec(&ops::rows(&table, 1, side * side)?)?;
        let grid = bicubic(&grid, side, width, rows, columns);
        let grid = ops::tensor(grid, &[rows * columns, width])?;
        ops::concat_rows(&[&ops::rows(&table, 0, 1)?, &grid])
    }
}

/// Patches as rows in the order of the convolution's kernel: each `[3, height, width]` to `[patches, 3·p·p]`.
fn unfold(images: &[&PixelValues], patch: usize) -> ops::Result<Tensor> {
    let n_patches = |image: &&PixelValues| image.height / patch * (image.width / patch);
    let total: usize = images.iter().map(n_patches).sum();
    let mut out = Vec::with_capacity(total * 3 * patch * patch);
    for image in images {
        for row in 0..image.height / patch {
            for column in 0..image.width / patch {
                for channel in 0..3 {
                    for y in 0..patch {
                        let start = (channel * image.height + row * patch + y) * image.width + column * patch;
                        out.extend_from_slice(&image.data[start..start + patch]);
                    }
                }
            }
        }
    }
    ops::tensor(out, &[total, 3 * patch * patch])
}

/// A square grid `[side, side, E]` resampled to `[rows, columns, E]` as `torch.nn.functional.interpolate` does
/// in `bicubic` mode (a = -0.75, no antialias), by the scale factors `(n + 0.1) / side` of the reference.
fn bicubic(grid: &[f32], side: usize, width: usize, rows: usize, columns: usize) -> Vec<f32> {
    let (down, across) = (taps(side, rows), taps(side, columns));
    let mut out = Vec::with_capacity(rows * columns * width);
    for (ys, wy) in &down {
        for (xs, wx) in &across {
            for channel in 0..width {
                let row = |y: usize| -> f32 {
                    xs.iter().zip(wx).map(|(x, w)| grid[(y * side + x) * width + channel] * w).sum()
                };
                out.push(ys.iter().zip(wy).map(|(y, w)| row(*y) * w).sum());
            }
        }
    }
    out
}

/// For each output position, the four inputs it reads (clamped at the border) and their weights.
fn taps(side: usize, n: usize) -> Vec<([usize; 4], [f32; 4])> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    // The factor itself, not the ratio of the sizes, gives the coordinates.
    let scale = (side as f64 / (n as f64 + 0.1)) as f32;
    (0..n)
        .map(|i| {
            let at = scale * (i as f32 + 0.5) - 0.5;
            let (base, t) = (at.floor(), at - at.floor());
            let index = |offset: i64| (base as i64 + offset).clamp(0, side as i64 - 1) as usize;
            ([index(-1), index(0), index(1), index(2)], [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)])
        })
        .collect()
}
