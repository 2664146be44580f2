//! A model of a real shape with random weights, made in memory.

use std::collections::HashMap;

use half::bf16;
use idefics_kernels::{nf4, q8};

use crate::{
    checkpoint::{LinearWeight, Nf4Weight, PackedWeight, Q8Weight, Weight, expected_tensors},
    config::{Activation, AlphaType, IdeficsConfig, PerceiverConfig, VisionConfig},
    model::WeightSource,
};

/// How the weights of the text model and the gated blocks are stored. The rest is bf16, or `f32` under `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 32 bits an element.
    F32,
    /// 16 bits an element.
    Bf16,
    /// 8 bits an element and a scale for every 64.
    Q8,
    /// 4 bits an element and a scale for every 64.
    Nf4,
}

/// Lends random weights of the shapes that a configuration calls for. Every weight has memory of its own, as in
/// a real model; only the numbers repeat.
pub struct RandomWeights {
    shapes: HashMap<String, Vec<usize>>,
    format: Format,
    /// Numbers that all weights are filled from.
    noise: Vec<f32>,
}

/// The configuration of a published size: `9b` or `80b`.
pub fn shape(name: &str) -> Option<IdeficsConfig> {
    let (hidden_size, intermediate_size, layers, heads, rms_norm_eps) = match name {
        "9b" => (4096, 11008, 32, 32, 1e-6),
        "80b" => (8192, 22016, 80, 64, 1e-5),
        _ => return None,
    };
    Some(IdeficsConfig {
        additional_vocab_size: 2,
        hidden_size,
        intermediate_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        rms_norm_eps,
        cross_layer_interval: 4,
        qk_layer_norms: true,
        use_resampler: true,
        alpha_type: AlphaType::Float,
        vision_config: VisionConfig {
            embed_dim: 1280,
            hidden_act: Activation::Gelu,
            ..VisionConfig::default()
        },
        perceiver_config: PerceiverConfig { qk_layer_norms_perceiver: true, ..PerceiverConfig::default() },
        ..IdeficsConfig::default()
    })
}

impl RandomWeights {
    /// Weights for `config`.
    pub fn new(config: &IdeficsConfig, format: Format) -> Self {
        // A linear congruential generator (Knuth's MMIX constants) is random enough for a timing.
        let mut state = 1u64;
        let noise = (0..1 << 16)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / 8_388_608.0 - 1.0) * 0.02
            })
            .collect();
        Self { shapes: expected_tensors(config).into_iter().collect(), format, noise }
    }

    fn fill<T: Copy + Default>(&self, n: usize, of: impl Fn(f32) -> T) -> Vec<T> {
        let block: Vec<T> = self.noise.iter().map(|value| of(*value)).collect();
        let mut out = Vec::with_capacity(n);
        while out.len() < n {
            out.extend_from_slice(&block[..block.len().min(n - out.len())]);
        }
        out
    }

    /// Whether the format applies: linear layers of the text model and the gated blocks.
    fn is_packed(&self, name: &str) -> bool {
        matches!(self.format, Format::Q8 | Format::Nf4)
            && (name.starts_with("model.layers.") || name.starts_with("model.gated_cross_attn_layers."))
    }
}

impl WeightSource for RandomWeights {
    fn weight(&self, name: &str) -> Option<Weight> {
        let shape = self.shapes.get(name)?.clone();
        let n: usize = shape.iter().product();
        let is_norm = shape.len() == 1 && name.ends_with(".weight");
        Some(if is_norm || name.contains("alpha_") {
            Weight::from_f32(vec![if is_norm { 1.0 } else { 0.1 }; n], shape)
        } else if self.format == Format::F32 {
            Weight::from_f32(self.fill(n, |value| value), shape)
        } else {
            Weight::from_bf16(self.fill(n, bf16::from_f32), shape)
        })
    }

    fn linear_weight(&self, name: &str) -> Option<LinearWeight> {
        let shape = self.shapes.get(name)?;
        let &[n, k] = shape.as_slice() else { return self.weight(name).map(LinearWeight::Dense) };
        if !self.is_packed(name) {
            return self.weight(name).map(LinearWeight::Dense);
        }
        Some(LinearWeight::Packed(if self.format == Format::Nf4 {
            let codes = self.fill(n * k / 2, |value| (value * 1e5) as i32 as u8);
            PackedWeight::Nf4(Nf4Weight::new([n, k], codes, vec![0.03; (n * k).div_ceil(nf4::BLOCK)]))
        } else {
            let codes = self.fill(n * k, |value| (value * 6000.0) as i8);
            PackedWeight::Q8(Q8Weight::new([n, k], codes, vec![1.6e-4; n * k.div_ceil(q8::BLOCK)]))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_have_the_published_parameter_counts() {
        for (name, parameters) in [("9b", 8_929_679_632), ("80b", 79_967_843_624)] {
            let config = shape(name).expect("a published size");
            let total: usize =
                expected_tensors(&config).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(total, parameters, "{name}");
        }
        assert_eq!(shape("7b"), None);
    }
}
