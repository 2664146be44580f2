//! The whole model: pictures to image states, tokens to hidden states, hidden states to logits.

use std::sync::Arc;

pub use super::vision::OtherSizes;
use super::{
    ImageStates, ModelError, Observer, SequenceCache, Stage, WeightSource,
    decoder::{DecoderLayer, Positions, Segment},
    embedding::{DecoupledEmbedding, DecoupledLmHead},
    gated_cross_attention::{GatedCrossAttention, ImageRun, ImageView},
    loader::{Loader, Trained},
    perceiver::PerceiverResampler,
    read_ahead::{Part, ReadAhead},
    unobserved,
    vision::VisionTransformer,
};
use crate::{
    config::IdeficsConfig,
    generate::{LogitsOf, Row, StepModel},
    ops::{self, Context, KeyValues, Linear, RmsNorm, RotaryTable, Tensor},
    processor::PixelValues,
};

/// Pictures that go through the tower together: enough rows for the products, few enough for the memory.
const IMAGES_AT_ONCE: usize = 4;

/// IDEFICS with its weights.
pub struct Model {
    config: IdeficsConfig,
    ctx: Context,
    other_sizes: OtherSizes,
    pub(super) vision: VisionTransformer,
    pub(super) perceiver: Option<Trained<PerceiverResampler>>,
    pub(super) embed_tokens: Trained<DecoupledEmbedding>,
    pub(super) gated_cross_attn_layers: Vec<Trained<GatedCrossAttention>>,
    pub(super) layers: Vec<Trained<DecoderLayer>>,
    pub(super) norm: RmsNorm,
    pub(super) lm_head: DecoupledLmHead,
    pub(super) rotary: Arc<RotaryTable>,
    read_ahead: Option<ReadAhead>,
}

impl Model {
    /// Builds the model that `config` describes from the weights of `source`.
    pub fn new(config: IdeficsConfig, source: &dyn WeightSource, ctx: Context) -> Result<Self, ModelError> {
        let root = Loader::new(source);
        let model = root.at("model");
        let (cross_layers, layers) = (model.at("gated_cross_attn_layers"), model.at("layers"));
        Ok(Self {
            ctx,
            other_sizes: OtherSizes::Refuse,
            vision: VisionTransformer::new(&config.vision_config, &model.at("vision_model"))?,
            perceiver: config
                .use_resampler
                .then(|| root.trained(|| PerceiverResampler::new(&config, &model.at("perceiver_resampler"))))
                .transpose()?,
            embed_tokens: root.trained(|| DecoupledEmbedding::new(&config, &model.at("embed_tokens")))?,
            gated_cross_attn_layers: (0..config.num_cross_layers())
                .map(|block| {
                    root.trained(|| GatedCrossAttention::new(&config, block, &cross_layers.at(block)))
                })
                .collect::<Result<_, _>>()?,
            layers: (0..config.num_hidden_layers)
                .map(|layer| root.trained(|| DecoderLayer::new(&config, &layers.at(layer))))
                .collect::<Result<_, _>>()?,
            norm: model.rms_norm("norm", config.hidden_size, config.rms_norm_eps)?,
            lm_head: DecoupledLmHead::new(&config, &root)?,
            rotary: Arc::new(RotaryTable::new(
                config.head_dim(),
                config.rope_theta(),
                config.max_position_embeddings,
            )),
            read_ahead: None,
            config,
        })
    }

    /// Says what to do with pictures of another size than the configured one.
    #[must_use]
    pub fn with_other_sizes(mut self, other_sizes: OtherSizes) -> Self {
        self.other_sizes = other_sizes;
        self
    }

    /// Reads mapped weights ahead of the layers that need them, and lets those behind the first `resident_bytes` of
    /// a step go again: for a model that is larger than the memory. Numbers do not depend on it.
    #[must_use]
    pub fn with_read_ahead(mut self, resident_bytes: u64) -> Self {
        let mut parts: Vec<Part> = (0..self.layers.len())
            .map(|index| {
                let block = index.is_multiple_of(self.config.cross_layer_interval);
                let block =
                    block.then(|| &self.gated_cross_attn_layers[index / self.config.cross_layer_interval]);
                part(
                    block
                        .into_iter()
                        .flat_map(|block| block.attention_linears().into_iter().chain(block.mlp_linears()))
                        .chain(self.layers[index].linears()),
                )
            })
            .collect();
        parts.push(part(self.lm_head.linears()));
        self.read_ahead = Some(ReadAhead::start(parts, resident_bytes));
        self
    }

    /// Says that a part of a step begins: a layer by its index, behind the last the head.
    fn reach(&self, part: usize) {
        if let Some(read_ahead) = &self.read_ahead {
            read_ahead.reach(part);
        }
    }

    /// The configuration the model was built by.
    pub fn config(&self) -> &IdeficsConfig {
        &self.config
    }

    /// How operations are computed.
    pub fn context(&self) -> Context {
        self.ctx
    }

    /// Pictures to image states, each with the keys and values of every gated block.
    pub fn encode_images(&self, images: &[&PixelValues]) -> Result<Vec<Arc<ImageStates>>, ModelError> {
        ops::in_pool(|| self.encode_images_observed(images, &mut unobserved))
    }

    /// As [`encode_images`](Self::encode_images), showing every intermediate value.
    pub fn encode_images_observed(
        &self,
        images: &[&PixelValues],
        observe: &mut Observer<'_>,
    ) -> Result<Vec<Arc<ImageStates>>, ModelError> {
        let mut states = Vec::with_capacity(images.len());
        for images in images.chunks(IMAGES_AT_ONCE) {
            let (hidden, lengths) = self.image_states(images, self.other_sizes, observe)?;
            observe(Stage::ImageHiddenStates, &hidden);
            let mut first = 0;
            for length in lengths {
                // A copy: a part of the whole would keep the other pictures. [L, E]
                let hidden = ops::concat_rows(&[&ops::rows(&hidden, first, length)?])?;
                first += length;
                let cross_attention = self
                    .gated_cross_attn_layers
                    .iter()
                    .map(|block| block.image_keys_values(self.ctx, &hidden))
                    .collect::<Result<_, _>>()?;
                states.push(Arc::new(ImageStates { hidden, cross_attention }));
            }
        }
        Ok(states)
    }

    /// What the text model sees of pictures, `[ΣL, E]`, and how many vectors each has: the resampler's, or the tower's
    /// where there is none.
    pub(super) fn image_states(
        &self,
        images: &[&PixelValues],
        other_sizes: OtherSizes,
        observe: &mut Observer<'_>,
    ) -> Result<(Tensor, Vec<usize>), ModelError> {
        let seen = self.vision.forward(self.ctx, images, other_sizes, observe)?;
        let Some(perceiver) = &self.perceiver else { return Ok((seen.hidden, seen.lengths)) };
        let latents = perceiver.forward(self.ctx, &seen.hidden, &seen.lengths, observe)?;
        Ok((latents, vec![perceiver.latents().len(); images.len()]))
    }

    /// The empty cache of a sequence that looks at `images`.
    pub fn new_cache(&self, images: Vec<Arc<ImageStates>>) -> SequenceCache {
        let layers = self.layers.iter().map(|_| KeyValues::new(self.ctx)).collect();
        SequenceCache { n_tokens: 0, layers, images }
    }

    /// Feeds the tokens of all rows; returns their hidden states after the last norm, `[T, D]`, rows in order.
    pub fn forward(&self, rows: &mut [Row<'_, SequenceCache>]) -> Result<Tensor, ModelError> {
        self.forward_observed(rows, &mut unobserved)
    }

    /// As [`forward`](Self::forward), showing every intermediate value.
    pub fn forward_observed(
        &self,
        rows: &mut [Row<'_, SequenceCache>],
        observe: &mut Observer<'_>,
    ) -> Result<Tensor, ModelError> {
        let view = self.check(rows)?;
        let token_ids: Vec<u32> = rows.iter().flat_map(|row| row.token_ids).copied().collect();
        let positions = Positions {
            table: Arc::clone(&self.rotary),
            of_tokens: rows
                .iter()
                .flat_map(|row| (row.cache.n_tokens..).take(row.token_ids.len()))
                .map(|position| position as u32)
                .collect(),
        };
        let mut x = self.embed_tokens.forward(&token_ids)?; // [T, D]
        observe(Stage::Embeddings, &x);
        for (index, layer) in self.layers.iter().enumerate() {
            self.reach(index);
            if index.is_multiple_of(self.config.cross_layer_interval) {
                let block = index / self.config.cross_layer_interval;
                x = self.gated_cross_attn_layers[block].forward(self.ctx, &x, &view, observe)?;
                observe(Stage::GatedBlock(block), &x);
            }
            let mut segments: Vec<_> = rows
                .iter_mut()
                .map(|row| Segment {
                    n_tokens: row.token_ids.len(),
                    past: row.cache.n_tokens,
                    memory: &mut row.cache.layers[index],
                })
                .collect();
            x = layer.forward(self.ctx, &x, &positions, &mut segments)?;
            observe(Stage::DecoderLayer(index), &x);
        }
        for row in rows.iter_mut() {
            row.cache.n_tokens += row.token_ids.len();
        }
        let x = self.norm.forward(self.ctx, &x)?;
        observe(Stage::Norm, &x);
        Ok(x)
    }

    /// Hidden states `[n, D]` to logits `[n, V + A]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        self.reach(self.layers.len());
        Ok(self.lm_head.forward(self.ctx, hidden)?)
    }

    /// Bytes of weights that a step reads, norms not counted. Attention of gated blocks is read when some token looks
    /// at an image.
    pub fn step_weight_bytes(&self, looks: bool) -> usize {
        self.step_linears(looks).map(Linear::num_bytes).sum()
    }

    /// Weights that a token of a prompt is multiplied with which looks at an image: all but the head's, which only the
    /// last one meets.
    pub fn prompt_parameters(&self) -> usize {
        self.block_linears(true).map(Linear::parameters).sum()
    }

    fn step_linears(&self, looks: bool) -> impl Iterator<Item = &Linear> {
        self.block_linears(looks).chain(self.lm_head.linears())
    }

    fn block_linears(&self, looks: bool) -> impl Iterator<Item = &Linear> {
        let gated = self.gated_cross_attn_layers.iter().flat_map(move |block| {
            let attention = looks.then(|| block.attention_linears()).into_iter().flatten();
            attention.chain(block.mlp_linears())
        });
        self.layers.iter().flat_map(|layer| layer.linears()).chain(gated)
    }

    /// Checks all rows before any cache is touched; returns which token sees which image.
    fn check(&self, rows: &[Row<'_, SequenceCache>]) -> Result<ImageView, ModelError> {
        let (mut seeing, mut runs) = (Vec::new(), Vec::<ImageRun>::new());
        let mut first = 0;
        for row in rows {
            let (tokens, indices) = (row.token_ids.len(), row.image_index.len());
            if tokens != indices {
                return Err(ModelError::RaggedRow { tokens, indices });
            }
            let (asked, limit) = (row.cache.n_tokens + tokens, self.config.max_position_embeddings);
            if asked > limit {
                return Err(ModelError::TooLong { asked, limit });
            }
            for (offset, index) in row.image_index.iter().enumerate() {
                let Some(index) = *index else { continue };
                let n_images = row.cache.images.len();
                let Some(image) = row.cache.images.get(index as usize) else {
                    return Err(ModelError::UnknownImage { index, n_images });
                };
                seeing.push(first + offset);
                match runs.last_mut() {
                    Some(run) if Arc::ptr_eq(&run.image, image) => run.n_tokens += 1,
                    _ => runs.push(ImageRun { n_tokens: 1, image: Arc::clone(image) }),
                }
            }
            first += tokens;
        }
        Ok(ImageView { rows: seeing.into(), runs })
    }
}

fn part<'a>(linears: impl Iterator<Item = &'a Linear>) -> Part {
    let weights: Vec<_> = linears.map(|linear| linear.weight().clone()).collect();
    let bytes = weights.iter().map(|weight| weight.num_bytes() as u64).sum();
    Part { weights, bytes }
}

impl StepModel for Model {
    type Image = Arc<ImageStates>;
    type Cache = SequenceCache;
    type Error = ModelError;

    fn vocab_size(&self) -> usize {
        self.config.vocab_size + self.config.additional_vocab_size
    }

    fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    fn encode_images(&self, images: &[&PixelValues]) -> Result<Vec<Arc<ImageStates>>, ModelError> {
        self.encode_images(images)
    }

    fn new_cache(&self, images: Vec<Arc<ImageStates>>) -> SequenceCache {
        self.new_cache(images)
    }

    fn truncate(&self, cache: &mut SequenceCache, tokens: usize) {
        cache.truncate(tokens, self.config.hidden_size);
    }

    fn copy_prefix(&self, cache: &SequenceCache, tokens: usize) -> SequenceCache {
        cache.copy_prefix(tokens, self.config.hidden_size)
    }

    fn set_images(&self, cache: &mut SequenceCache, images: Vec<Arc<ImageStates>>) {
        cache.images = images;
    }

    fn cache_bytes(&self, tokens: usize) -> usize {
        self.bytes_of_tokens(tokens)
    }

    fn image_bytes(&self, image: &PixelValues) -> usize {
        self.bytes_of_image(image)
    }

    fn weight_bytes(&self) -> usize {
        self.step_weight_bytes(true)
    }

    fn step(&self, rows: &mut [Row<'_, SequenceCache>]) -> Result<Vec<Vec<f32>>, ModelError> {
        ops::in_pool(|| self.wanted_logits(rows))
    }
}

impl Model {
    /// Feeds the tokens of all rows; returns the logits that each asks for.
    fn wanted_logits(&self, rows: &mut [Row<'_, SequenceCache>]) -> Result<Vec<Vec<f32>>, ModelError> {
        let hidden = self.forward(rows)?; // [T, D]
        let mut wanted = Vec::new();
        let mut counts = Vec::with_capacity(rows.len());
        let mut first = 0;
        for row in rows.iter() {
            let end = first + row.token_ids.len();
            let from = match row.logits {
                LogitsOf::Nothing => end,
                LogitsOf::Last => end.saturating_sub(1).max(first),
                LogitsOf::All => first,
            };
            wanted.extend(from..end);
            counts.push(end - from);
            first = end;
        }
        if wanted.is_empty() {
            return Ok(vec![Vec::new(); rows.len()]);
        }
        let logits = ops::to_vec(&self.logits(&ops::select_rows(&hidden, &wanted)?)?)?;
        let mut rest = logits.as_slice();
        Ok(counts
            .into_iter()
            .map(|count| {
                let (row, tail) = rest.split_at(count * self.vocab_size());
                rest = tail;
                row.to_vec()
            })
            .collect())
    }
}
