//! What a model remembers while it runs, in bytes, known before anything is loaded.

use super::IdeficsConfig;
use crate::checkpoint::DType;

/// How much is to run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of each sequence, prompt and answer together.
    pub context: usize,
    /// Sequences at once.
    pub batch: usize,
    /// Different pictures in each sequence.
    pub images: usize,
    /// Element type that is computed in.
    pub compute: DType,
}

/// Bytes that a workload keeps beside the weights; the scratch of a step comes on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// Keys and values of all tokens in the decoder layers.
    pub kv_cache: u128,
    /// Keys and values of all pictures in the gated cross-attention blocks.
    pub cross_attention: u128,
    /// What the text model sees of the pictures.
    pub image_states: u128,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> u128 {
        self.kv_cache + self.cross_attention + self.image_states
    }
}

impl IdeficsConfig {
    /// Bytes that one token takes in the key-value cache: `2 · layers · D` elements.
    pub fn kv_bytes_per_token(&self, compute: DType) -> u128 {
        (2 * self.num_hidden_layers * self.hidden_size * compute.size()) as u128
    }

    /// Bytes that a workload keeps beside the weights.
    pub fn memory(&self, workload: Workload) -> Memory {
        let tokens = workload.context as u128 * workload.batch as u128;
        let pictures = workload.images as u128 * workload.batch as u128;
        // Vectors that the text model sees, of all pictures: [N·L].
        let vectors = pictures * self.image_seq_len() as u128;
        let values = (2 * self.num_cross_layers() * self.hidden_size * workload.compute.size()) as u128;
        Memory {
            kv_cache: tokens * self.kv_bytes_per_token(workload.compute),
            cross_attention: vectors * values,
            // Between products everything is f32, these states too.
            image_states: vectors * (self.image_dim() * DType::F32.size()) as u128,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VisionConfig;

    #[test]
    fn the_9b_model_in_bf16() {
        let config = IdeficsConfig {
            cross_layer_interval: 4,
            use_resampler: true,
            vision_config: VisionConfig { embed_dim: 1280, ..VisionConfig::default() },
            ..IdeficsConfig::default()
        };
        let workload = Workload { context: 2048, batch: 2, images: 3, compute: DType::Bf16 };
        let memory = config.memory(workload);
        // 512 KiB a token; 64 · 1280 values of four bytes an image; 8 blocks of 64 · 4096 keys and as many values.
        assert_eq!(config.kv_bytes_per_token(DType::Bf16), 512 << 10);
        assert_eq!(memory.kv_cache, 2 << 30);
        assert_eq!(memory.image_states, 6 * 64 * 1280 * 4);
        assert_eq!(memory.cross_attention, 6 * (8 << 20));
        let wide = config.memory(Workload { compute: DType::F32, ..workload });
        assert_eq!(wide.total(), 2 * memory.total() - memory.image_states);
    }
}
