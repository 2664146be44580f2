//! What a model remembers, in bytes: what the engine counts before it starts a sequence.

use super::Model;
use crate::{checkpoint::DType, config::Workload, ops, processor::PixelValues};

impl Model {
    /// Bytes of keys and values of so many tokens; they grow in blocks.
    pub(super) fn bytes_of_tokens(&self, tokens: usize) -> usize {
        let per_token = self.config().kv_bytes_per_token(self.cache_dtype());
        saturating(tokens.next_multiple_of(ops::GROWTH_ROWS) as u128 * per_token)
    }

    /// Bytes of the states of a picture, with its keys and values in every gated block.
    pub(super) fn bytes_of_image(&self, image: &PixelValues) -> usize {
        let config = self.config();
        let one = Workload { context: 0, batch: 1, images: 1, compute: self.cache_dtype() };
        let configured = config.memory(one).total();
        if config.use_resampler {
            return saturating(configured);
        }
        // Without the resampler the text model sees every patch, and there are more of them in a larger picture.
        let patch = config.vision_config.patch_size.max(1);
        let patches = (image.height / patch) * (image.width / patch) + 1;
        saturating(configured.div_ceil(config.image_seq_len().max(1) as u128) * patches as u128)
    }

    /// What keys and values are kept as.
    fn cache_dtype(&self) -> DType {
        match self.context().compute {
            ops::Compute::F32 => DType::F32,
            ops::Compute::Bf16 | ops::Compute::Int8 => DType::Bf16,
        }
    }
}

fn saturating(bytes: u128) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
