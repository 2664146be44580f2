//! The forward pass with a backward pass behind it, layer by layer.
//!
//! Whole sequences lie end to end, `[T, D]`, with no padding and no cache. Each layer keeps its input and either
//! the tape of its operations or nothing; going backward it runs again where the tape was not kept. Gradients
//! of weights are added to where the [`WeightSource`](super::WeightSource) says; the pass goes down to the lowest
//! part that has one.

use std::{collections::HashMap, sync::Arc};

use super::{KeptImages, Model, ModelError, OtherSizes, decoder::Positions, unobserved, vision::VisionTape};
use crate::{
    ops::{self, AttentionGroup, Input, LossSum, Segment, Tensor, Visible, next_token_loss},
    processor::PixelValues,
};

/// A sequence to learn from.
#[derive(Debug, Clone, Default)]
pub struct TrainingSequence {
    /// Tokens `[T]`.
    pub token_ids: Vec<u32>,
    /// The picture each token sees: `[T]`.
    pub image_index: Vec<Option<u32>>,
    /// The pictures.
    pub images: Vec<Arc<PixelValues>>,
    /// What each position is to predict, as a rule the next token: `[T]`. None where nothing counts.
    pub targets: Vec<Option<u32>>,
}

/// How the loss of a batch is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossOptions {
    /// Weight of the squared logarithm of the softmax's sum (m4's z-loss).
    pub z_loss: f32,
    /// Factor on every gradient: one over the number of targets for the gradient of a mean.
    pub gradient_scale: f32,
    /// What is kept for the backward pass.
    pub tape: Tape,
}

/// What a layer keeps between its forward and its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tape {
    /// Its input; it runs again before it goes backward. Memory is that of one layer.
    #[default]
    Recompute,
    /// All intermediate values: a quarter less work, and memory that grows with the depth.
    Keep,
}

/// The sequences of a batch laid end to end.
struct Packed {
    token_ids: Vec<u32>,
    positions: Arc<[u32]>,
    sequences: Arc<[AttentionGroup]>,
    /// Pictures, each once however many sequences show it.
    images: Vec<Arc<PixelValues>>,
    /// Runs of neighbouring tokens that see the same picture: the first token, their number, the picture.
    runs: Vec<(usize, usize, usize)>,
    /// Positions that have a target, and the targets.
    wanted: Arc<[usize]>,
    targets: Vec<u32>,
}

/// Which tokens see pictures, and which vectors they see.
struct Seen {
    rows: Arc<[usize]>,
    groups: Arc<[AttentionGroup]>,
}

impl Model {
    /// The loss of a batch; adds the gradients of all trained weights where they go.
    pub fn accumulate_gradients(
        &self,
        batch: &[TrainingSequence],
        options: &LossOptions,
    ) -> Result<LossSum, ModelError> {
        self.accumulate_gradients_with(batch, options, &mut KeptImages::new(0))
    }

    /// As [`accumulate_gradients`](Self::accumulate_gradients), with the same bits, reading pictures that a frozen
    /// tower has read before from `kept`. Those that are new are added to it.
    pub fn accumulate_gradients_with(
        &self,
        batch: &[TrainingSequence],
        options: &LossOptions,
        kept: &mut KeptImages,
    ) -> Result<LossSum, ModelError> {
        ops::in_pool(|| self.forward_and_backward(batch, options, kept))
    }

    fn forward_and_backward(
        &self,
        batch: &[TrainingSequence],
        options: &LossOptions,
        kept: &mut KeptImages,
    ) -> Result<LossSum, ModelError> {
        let packed = self.pack(batch)?;
        if packed.targets.is_empty() {
            return Ok(LossSum::default());
        }
        let ctx = self.context();
        let keeps = options.tape == Tape::Keep;

        let images = ImageTape::forward(self, &packed.images, options.tape, kept)?;
        let seen = packed.seen(&images.lengths);
        let image_states = images.hidden.as_ref();

        let embedded = self.embed_tokens.forward(&packed.token_ids)?; // [T, D]
        // Nothing below the lowest trained layer needs its input kept.
        let images_trained = images.is_trained();
        let mut is_needed = self.embed_tokens.is_trained;
        let mut x = embedded;
        let positions =
            Positions { table: Arc::clone(&self.rotary), of_tokens: Arc::clone(&packed.positions) };
        let mut segments: Vec<Segment<'_>> = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if index.is_multiple_of(self.config().cross_layer_interval) {
                let block = &self.gated_cross_attn_layers[index / self.config().cross_layer_interval];
                let reads_images = !seen.rows.is_empty();
                let is_x_needed = is_needed;
                is_needed |= block.is_trained || (images_trained && reads_images);
                let run = |x: &Tensor, images: Option<&Tensor>| {
                    block.forward_whole(ctx, x, images, &seen.rows, &seen.groups)
                };
                x = match (is_needed, image_states.filter(|_| reads_images)) {
                    (false, images) => run(&x, images)?,
                    (true, None) => {
                        let inputs = [(x, followed_if(is_x_needed))];
                        let (segment, out) = Segment::forward(&inputs, keeps, move |x| run(&x[0], None))?;
                        segments.push(segment);
                        out
                    }
                    (true, Some(images)) => {
                        let inputs =
                            [(x, followed_if(is_x_needed)), (images.clone(), followed_if(images_trained))];
                        let (segment, out) =
                            Segment::forward(&inputs, keeps, move |x| run(&x[0], Some(&x[1])))?;
                        segments.push(segment);
                        out
                    }
                };
            }
            let is_x_needed = is_needed;
            is_needed |= layer.is_trained;
            let run = |x: &Tensor| layer.forward_whole(ctx, x, &positions, &packed.sequences);
            x = if is_needed {
                let inputs = [(x, followed_if(is_x_needed))];
                let (segment, out) = Segment::forward(&inputs, keeps, move |x| run(&x[0]))?;
                segments.push(segment);
                out
            } else {
                run(&x)?
            };
        }

        let (segment, hidden) = Segment::forward(&[(x, followed_if(is_needed))], keeps, |x| {
            self.norm.forward(ctx, &ops::select_rows(&x[0], &packed.wanted)?) // [n, D]
        })?;
        let heads: Vec<_> = self.lm_head.linears().collect();
        let (loss, gradient) = next_token_loss(
            ctx,
            &hidden,
            &packed.targets,
            &heads,
            options.z_loss,
            Some(options.gradient_scale),
        )?;
        drop(hidden);

        let mut dy = segment.backward(&asked_for(gradient))?.swap_remove(0); // [T, D]
        let mut image_gradient: Option<Tensor> = None; // [ΣL, E]
        for segment in segments.into_iter().rev() {
            let mut gradients = segment.backward(&asked_for(dy))?.into_iter();
            dy = gradients.next().flatten();
            if let Some(gradient) = gradients.next().flatten() {
                image_gradient = Some(match image_gradient {
                    Some(sum) => ops::add(&sum, &gradient)?,
                    None => gradient,
                });
            }
        }
        if self.embed_tokens.is_trained {
            self.embed_tokens.backward(&packed.token_ids, &asked_for(dy))?;
        }
        if let Some(gradient) = image_gradient {
            images.backward(gradient)?;
        }
        Ok(loss)
    }

    /// The loss of a batch alone.
    pub fn evaluate_loss(&self, batch: &[TrainingSequence]) -> Result<LossSum, ModelError> {
        self.evaluate_loss_with(batch, &mut KeptImages::new(0))
    }

    /// As [`evaluate_loss`](Self::evaluate_loss), with the same bits, reading pictures that a frozen tower has read
    /// before from `kept`. Those that are new are added to it.
    pub fn evaluate_loss_with(
        &self,
        batch: &[TrainingSequence],
        kept: &mut KeptImages,
    ) -> Result<LossSum, ModelError> {
        ops::in_pool(|| self.loss_alone(batch, kept))
    }

    fn loss_alone(&self, batch: &[TrainingSequence], kept: &mut KeptImages) -> Result<LossSum, ModelError> {
        let packed = self.pack(batch)?;
        if packed.targets.is_empty() {
            return Ok(LossSum::default());
        }
        let ctx = self.context();
        let images = ImageTape::forward(self, &packed.images, Tape::Recompute, kept)?;
        let seen = packed.seen(&images.lengths);
        let image_states = images.hidden.as_ref(); // [ΣL, E]
        let positions =
            Positions { table: Arc::clone(&self.rotary), of_tokens: Arc::clone(&packed.positions) };
        let mut x = self.embed_tokens.forward(&packed.token_ids)?; // [T, D]
        for (index, layer) in self.layers.iter().enumerate() {
            if index.is_multiple_of(self.config().cross_layer_interval) {
                let block = &self.gated_cross_attn_layers[index / self.config().cross_layer_interval];
                x = block.forward_whole(ctx, &x, image_states, &seen.rows, &seen.groups)?;
            }
            x = layer.forward_whole(ctx, &x, &positions, &packed.sequences)?;
        }
        let x = self.norm.forward(ctx, &ops::select_rows(&x, &packed.wanted)?)?; // [n, D]
        let heads: Vec<_> = self.lm_head.linears().collect();
        Ok(next_token_loss(ctx, &x, &packed.targets, &heads, 0.0, None)?.0)
    }

    /// Lays the sequences of a batch end to end, and checks them.
    fn pack(&self, batch: &[TrainingSequence]) -> Result<Packed, ModelError> {
        let vocab_size = self.config().vocab_size + self.config().additional_vocab_size;
        let limit = self.config().max_position_embeddings;
        let (mut token_ids, mut positions, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
        let (mut images, mut places) = (Vec::new(), HashMap::new());
        let mut runs: Vec<(usize, usize, usize)> = Vec::new();
        let (mut wanted, mut targets) = (Vec::new(), Vec::new());
        for sequence in batch {
            let (first, tokens) = (token_ids.len(), sequence.token_ids.len());
            if sequence.image_index.len() != tokens {
                return Err(ModelError::RaggedRow { tokens, indices: sequence.image_index.len() });
            }
            if sequence.targets.len() != tokens {
                return Err(ModelError::RaggedTargets { tokens, targets: sequence.targets.len() });
            }
            if tokens > limit {
                return Err(ModelError::TooLong { asked: tokens, limit });
            }
            if tokens == 0 {
                continue;
            }
            for (offset, index) in sequence.image_index.iter().enumerate() {
                let Some(index) = *index else { continue };
                let Some(image) = sequence.images.get(index as usize) else {
                    return Err(ModelError::UnknownImage { index, n_images: sequence.images.len() });
                };
                let place = *places.entry(Arc::as_ptr(image)).or_insert_with(|| {
                    images.push(Arc::clone(image));
                    images.len() - 1
                });
                let at = first + offset;
                match runs.last_mut() {
                    Some(run) if run.2 == place && run.0 + run.1 == at => run.1 += 1,
                    _ => runs.push((at, 1, place)),
                }
            }
            for (offset, target) in sequence.targets.iter().enumerate() {
                let Some(id) = *target else { continue };
                if id as usize >= vocab_size {
                    return Err(ModelError::UnknownToken { id, vocab_size });
                }
                wanted.push(first + offset);
                targets.push(id);
            }
            token_ids.extend_from_slice(&sequence.token_ids);
            positions.extend(0..tokens as u32);
            let rows = (first, tokens);
            sequences.push(AttentionGroup {
                queries: rows,
                keys: rows,
                visible: Visible::Causal { past: 0 },
            });
        }
        Ok(Packed {
            token_ids,
            positions: positions.into(),
            sequences: sequences.into(),
            images,
            runs,
            wanted: wanted.into(),
            targets,
        })
    }
}

impl Packed {
    /// What the tokens see of pictures with `lengths` vectors each. Tokens are sorted by their picture, so that
    /// groups with the same keys stand together.
    fn seen(&self, lengths: &[usize]) -> Seen {
        let firsts: Vec<usize> = lengths
            .iter()
            .scan(0, |first, length| {
                *first += length;
                Some(*first - length)
            })
            .collect();
        let mut runs = self.runs.clone();
        runs.sort_by_key(|(first, _, image)| (*image, *first));
        let mut rows = Vec::new();
        let groups = runs
            .into_iter()
            .map(|(first, count, image)| {
                let queries = (rows.len(), count);
                rows.extend(first..first + count);
                AttentionGroup { queries, keys: (firsts[image], lengths[image]), visible: Visible::All }
            })
            .collect();
        Seen { rows: rows.into(), groups }
    }
}

fn followed_if(is_needed: bool) -> Input {
    if is_needed { Input::Followed } else { Input::Fixed }
}

/// A gradient that there is by construction: of the loss where a scale is given, of an input that is followed.
fn asked_for(gradient: Option<Tensor>) -> Tensor {
    gradient.expect("a gradient that was asked for is there")
}

/// The pictures of a batch on their way to the text model.
struct ImageTape<'a> {
    model: &'a Model,
    vision: Option<VisionTape<'a>>,
    perceiver: Option<Segment<'a>>,
    /// `[ΣL, E]`, if there are pictures.
    hidden: Option<Tensor>,
    lengths: Vec<usize>,
}

impl<'a> ImageTape<'a> {
    fn forward(
        model: &'a Model,
        images: &[Arc<PixelValues>],
        tape: Tape,
        kept: &mut KeptImages,
    ) -> Result<Self, ModelError> {
        let ctx = model.context();
        if images.is_empty() {
            return Ok(Self { model, vision: None, perceiver: None, hidden: None, lengths: Vec::new() });
        }
        let images: Vec<&PixelValues> = images.iter().map(AsRef::as_ref).collect();
        let trained_perceiver = model.perceiver.as_ref().filter(|perceiver| perceiver.is_trained);
        if !model.vision.is_trained() && trained_perceiver.is_none() {
            let read =
                |images: &[&PixelValues]| model.image_states(images, OtherSizes::Refuse, &mut unobserved);
            let (hidden, lengths) = kept.of(&images, read)?;
            return Ok(Self { model, vision: None, perceiver: None, hidden: Some(hidden), lengths });
        }
        let (seen, patches, vision) = if model.vision.is_trained() {
            let (seen, vision) = model.vision.forward_for_training(ctx, &images, tape)?;
            (seen.hidden, seen.lengths, Some(vision))
        } else {
            let (seen, patches) = kept.of(&images, |images| {
                let seen = model.vision.forward(ctx, images, OtherSizes::Refuse, &mut unobserved)?;
                Ok((seen.hidden, seen.lengths))
            })?;
            (seen, patches, None)
        }; // [ΣP, E]
        let Some(perceiver) = &model.perceiver else {
            return Ok(Self { model, vision, perceiver: None, hidden: Some(seen), lengths: patches });
        };
        let latents = perceiver.latents();
        let lengths = vec![latents.len(); images.len()];
        let inputs = [(seen, followed_if(vision.is_some())), (latents.to_tensor()?, Input::Followed)];
        let (segment, hidden) = Segment::forward(&inputs, tape == Tape::Keep, move |x| {
            perceiver.forward_from(ctx, &x[0], &x[1], &patches, &mut unobserved)
        })?;
        Ok(Self { model, vision, perceiver: Some(segment), hidden: Some(hidden), lengths })
    }

    /// Whether anything that made the states is trained.
    fn is_trained(&self) -> bool {
        self.perceiver.is_some() || self.vision.is_some()
    }

    /// Takes the gradient of the states `[ΣL, E]` back to the weights.
    fn backward(self, dy: Tensor) -> ops::Result<()> {
        let mut dy = Some(dy);
        if let (Some(segment), Some(perceiver)) = (self.perceiver, &self.model.perceiver) {
            let mut gradients = segment.backward(&asked_for(dy))?.into_iter();
            dy = gradients.next().flatten();
            if let Some(latents) = gradients.next().flatten() {
                perceiver.latents().add_gradient(&latents)?;
            }
        }
        match self.vision {
            Some(vision) => vision.backward(asked_for(dy)),
            None => Ok(()),
        }
    }
}
