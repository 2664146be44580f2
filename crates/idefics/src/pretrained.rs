//! A model and what its checkpoint says of it, opened in one call.

use std::sync::Arc;

use crate::{
    adapter::{Adapted, AdapterError, AdapterSource, Adapters},
    checkpoint::{Checkpoint, CheckpointError, DType, GenerationConfigFile, Weights},
    config::IdeficsConfig,
    files::ModelFiles,
    generate::{Row, StepModel, available_bytes},
    model::{ImageStates, Model, ModelError, OtherSizes, SequenceCache},
    ops::{Compute, Context, Isa},
    processor::{PixelValues, Processor},
    quantize::{QuantizeError, Recipe, quantize_weights},
};

/// What the factors of matrix products are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeType {
    /// By the checkpoint: bf16 where most of its numbers are bf16, `f32` otherwise. Checkpoints in f16 compute
    /// in `f32`, since activations of the published models overflow f16.
    #[default]
    Auto,
    /// Products of `f32` numbers; weights are widened exactly.
    F32,
    /// Products of bf16 numbers with `f32` sums; everything between products stays `f32`.
    Bf16,
    /// As `Bf16`, but where the weights are packed both factors are rounded to 8 bits: faster, and less exact.
    Int8,
}

/// How to open a model.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// What products are rounded to.
    pub compute: ComputeType,
    /// What to do with pictures of another size than the configured one.
    pub other_sizes: OtherSizes,
    /// The instruction tier; the strongest of this processor if none is named.
    pub isa: Option<Isa>,
    /// Packs the weights in memory while the model is loaded, if asked to.
    pub quantize: Option<Recipe>,
    /// Adapters to use beside the weights.
    pub adapters: Vec<AdapterSource>,
}

/// Why a model could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The files are missing, broken or do not fit together.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The weights cannot be quantized.
    #[error(transparent)]
    Quantize(#[from] QuantizeError),
    /// An adapter is missing, broken or made for another model.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The weights do not make the model that the configuration describes.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tokenizer with more tokens than the model: it belongs to another one.
    #[error("the tokenizer has {tokenizer} token ids, but the model has embeddings for {model}")]
    Vocabulary {
        /// One more than the tokenizer's largest id.
        tokenizer: usize,
        /// Base and additional vocabulary together.
        model: usize,
    },
}

/// IDEFICS, ready to read and write.
///
/// Results do not depend on the number of threads; to bound them, run calls inside a `rayon` pool of your own or
/// configure the global one.
pub struct Idefics {
    model: Model,
    generation_config: GenerationConfigFile,
}

impl Idefics {
    /// Opens a model in a directory or in memory. Weights stay in the files and are read as they are needed; the
    /// files must not be changed meanwhile.
    pub fn from_pretrained(files: impl Into<ModelFiles>, options: &LoadOptions) -> Result<Self, LoadError> {
        Self::from_checkpoint(Checkpoint::open(files)?, options)
    }

    /// Builds the model of an opened checkpoint.
    pub fn from_checkpoint(mut checkpoint: Checkpoint, options: &LoadOptions) -> Result<Self, LoadError> {
        let compute = match options.compute {
            ComputeType::F32 => Compute::F32,
            ComputeType::Bf16 => Compute::Bf16,
            ComputeType::Int8 => Compute::Int8,
            ComputeType::Auto => compute_type_of(&checkpoint.weights),
        };
        if let Some(recipe) = &options.quantize {
            quantize_weights(&mut checkpoint.weights, recipe)?;
        }
        let ctx = Context { isa: options.isa.unwrap_or_else(Isa::best), compute };
        let adapters = Adapters::open(&options.adapters, &checkpoint.config)?;
        let weights = Adapted { weights: &checkpoint.weights, adapters: &adapters };
        let mut model = Model::new(checkpoint.config, &weights, ctx)?.with_other_sizes(options.other_sizes);
        let available = available_bytes().map(|bytes| bytes as u64);
        if let Some(resident_bytes) = resident_bytes(model.step_weight_bytes(true) as u64, available) {
            model = model.with_read_ahead(resident_bytes);
        }
        Ok(Self { model, generation_config: checkpoint.generation_config })
    }

    /// Refuses a processor whose tokenizer has ids that the model lacks. One with fewer is fine: embeddings are
    /// often padded.
    pub fn check_processor(&self, processor: &Processor) -> Result<(), LoadError> {
        let (tokenizer, model) = (processor.tokenizer().id_bound() as usize, self.model.vocab_size());
        if tokenizer > model { Err(LoadError::Vocabulary { tokenizer, model }) } else { Ok(()) }
    }

    /// The forward pass by itself: image features, hidden states, logits.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The configuration of the model.
    pub fn config(&self) -> &IdeficsConfig {
        self.model.config()
    }

    /// What the checkpoint proposes for generation.
    pub fn generation_config(&self) -> &GenerationConfigFile {
        &self.generation_config
    }
}

impl StepModel for Idefics {
    type Image = Arc<ImageStates>;
    type Cache = SequenceCache;
    type Error = ModelError;

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn max_positions(&self) -> usize {
        self.model.max_positions()
    }

    fn encode_images(&self, images: &[&PixelValues]) -> Result<Vec<Arc<ImageStates>>, ModelError> {
        self.model.encode_images(images)
    }

    fn new_cache(&self, images: Vec<Arc<ImageStates>>) -> SequenceCache {
        self.model.new_cache(images)
    }

    fn truncate(&self, cache: &mut SequenceCache, tokens: usize) {
        self.model.truncate(cache, tokens);
    }

    fn copy_prefix(&self, cache: &SequenceCache, tokens: usize) -> SequenceCache {
        self.model.copy_prefix(cache, tokens)
    }

    fn set_images(&self, cache: &mut SequenceCache, images: Vec<Arc<ImageStates>>) {
        self.model.set_images(cache, images);
    }

    fn cache_bytes(&self, tokens: usize) -> usize {
        self.model.cache_bytes(tokens)
    }

    fn image_bytes(&self, image: &PixelValues) -> usize {
        self.model.image_bytes(image)
    }

    fn weight_bytes(&self) -> usize {
        self.model.weight_bytes()
    }

    fn step(&self, rows: &mut [Row<'_, SequenceCache>]) -> Result<Vec<Vec<f32>>, ModelError> {
        self.model.step(rows)
    }
}

/// How much of the weights may stay in memory, if not all of them can: three quarters of what is available; the rest
/// is for what is read ahead, caches and activations.
fn resident_bytes(weights: u64, available: Option<u64>) -> Option<u64> {
    available.filter(|available| weights > available / 10 * 9).map(|available| available / 4 * 3)
}

/// bf16 if that is what most of the numbers are stored as that are not packed.
fn compute_type_of(weights: &Weights) -> Compute {
    let elements = |of: fn(DType) -> bool| -> usize {
        weights.iter().filter(|(_, weight)| of(weight.dtype())).map(|(_, weight)| weight.len()).sum()
    };
    let bf16 = elements(|dtype| dtype == DType::Bf16);
    if bf16 > elements(|dtype| dtype != DType::Bf16) { Compute::Bf16 } else { Compute::F32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_fit_are_left_to_the_system() {
        for (weights, available, expected) in [
            (5, None, None),
            (8 << 30, Some(10 << 30), None),
            (10 << 30, Some(10 << 30), Some(15 << 29)),
            (45 << 30, Some(20 << 30), Some(15 << 30)),
        ] {
            assert_eq!(resident_bytes(weights, available), expected, "{weights} of {available:?}");
        }
    }
}
