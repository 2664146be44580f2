//! How weights start.
//!
//! The new blocks by m4's rules (huggingface/smollm, `vision/m4/models/idefics/modeling_idefics.py`,
//! `_init_weights`): scaled to the width of their input, and those that write to the residual stream also to the
//! number of layers. A text model from scratch starts as transformers' LLaMA does, a tower as its CLIP does, but for
//! embeddings, which are m4's.

use idefics::{
    checkpoint::{Component, TensorSpec, Weight},
    config::IdeficsConfig,
};

use crate::random::Stream;

/// Where the values of a tensor come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// All the same.
    Constant(f32),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
}

impl Rule {
    /// The rule for a tensor of that name and shape.
    pub fn of(config: &IdeficsConfig, name: &str, shape: &[usize]) -> Self {
        let (module, field) = name.rsplit_once('.').unwrap_or(("", name));
        let layer = module.rsplit('.').next().unwrap_or_default();
        let part = Component::of(name);
        if name.contains(".alpha_") {
            return gate(config);
        }
        if field == "bias" {
            return Self::Constant(0.0);
        }
        if shape.len() == 1 && field == "weight" {
            // Every vector that is a weight is a norm's.
            return Self::Constant(1.0);
        }
        let std = match part {
            Component::Embedding => (1.0 / config.hidden_size as f64).sqrt(),
            Component::Head if name.contains("additional_fc") => (1.0 / fan_in(shape)).sqrt(),
            Component::Decoder | Component::Head | Component::Norm | Component::Unknown => {
                config.initializer_range
            }
            Component::GatedCrossAttention => scaled(fan_in(shape), layer == "down_proj", config),
            Component::Perceiver if field == "latents" => (1.0 / config.image_dim() as f64).sqrt(),
            // The tower's width, also for the two layers whose input has another.
            Component::Perceiver => scaled(config.image_dim() as f64, layer == "c_proj", config),
            Component::Vision => tower(config, layer, field),
        };
        if std == 0.0 { Self::Constant(0.0) } else { Self::Normal { std } }
    }
}

/// The numbers of a new tensor.
pub(super) fn draw(config: &IdeficsConfig, spec: &TensorSpec, seed: u64) -> Weight {
    let n = spec.shape.iter().product();
    let values = match Rule::of(config, &spec.name, &spec.shape) {
        Rule::Constant(value) => vec![value; n],
        Rule::Normal { std } => Stream::new(seed, &spec.name).normal(n, std),
    };
    Weight::from_f32(values, spec.shape.clone())
}

fn gate(config: &IdeficsConfig) -> Rule {
    match config.alpha_initializer.as_str() {
        "zeros" => Rule::Constant(0.0),
        "ones" => Rule::Constant(1.0),
        // The configuration knows no other words than `normal`, `gaussian` and `random`, which are one thing.
        _ if config.alphas_initializer_range == 0.0 => Rule::Constant(0.0),
        _ => Rule::Normal { std: config.alphas_initializer_range },
    }
}

/// m4's deviation for linear layers.
fn scaled(width: f64, writes_residual: bool, config: &IdeficsConfig) -> f64 {
    let factor = if writes_residual { 2.0 * config.num_hidden_layers as f64 } else { 1.0 };
    (0.4 / (width * factor)).sqrt()
}

/// transformers `CLIPPreTrainedModel._init_weights`.
fn tower(config: &IdeficsConfig, layer: &str, field: &str) -> f64 {
    let vision = &config.vision_config;
    let (width, factor) = (vision.embed_dim as f64, vision.initializer_factor);
    let by_depth = (2.0 * vision.num_hidden_layers as f64).powf(-0.5);
    match layer {
        _ if field == "class_embedding" => width.powf(-0.5) * factor,
        "q_proj" | "k_proj" | "v_proj" | "fc2" => width.powf(-0.5) * by_depth * factor,
        "out_proj" => width.powf(-0.5) * factor,
        "fc1" => (2.0 * width).powf(-0.5) * factor,
        _ => vision.initializer_range * factor,
    }
}

/// The width of a linear layer's input.
fn fan_in(shape: &[usize]) -> f64 {
    shape.last().copied().unwrap_or(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use idefics::{
        checkpoint::{DType, expected_tensors},
        config::{AlphaType, PerceiverConfig, VisionConfig},
    };

    fn config() -> IdeficsConfig {
        IdeficsConfig {
            additional_vocab_size: 2,
            cross_layer_interval: 4,
            qk_layer_norms: true,
            use_resampler: true,
            vision_config: VisionConfig { embed_dim: 1280, ..VisionConfig::default() },
            perceiver_config: PerceiverConfig {
                qk_layer_norms_perceiver: true,
                ..PerceiverConfig::default()
            },
            ..IdeficsConfig::default()
        }
    }

    /// Deviations of the 9B shape, from m4's formulas.
    #[test]
    fn deviations_of_new_blocks() {
        let config = config();
        let shapes: std::collections::BTreeMap<_, _> = expected_tensors(&config).into_iter().collect();
        let block = "model.gated_cross_attn_layers.0";
        let perceiver = "model.perceiver_resampler";
        for (name, squared) in [
            (format!("{block}.cross_attn.q_proj.weight"), 0.4 / 4096.0),
            (format!("{block}.cross_attn.k_proj.weight"), 0.4 / 1280.0),
            (format!("{block}.mlp.up_proj.weight"), 0.4 / 4096.0),
            (format!("{block}.mlp.down_proj.weight"), 0.4 / (11008.0 * 64.0)),
            (format!("{perceiver}.latents"), 1.0 / 1280.0),
            (format!("{perceiver}.blocks.0.0.output_proj.weight"), 0.4 / 1280.0),
            (format!("{perceiver}.blocks.5.1.fc.weight"), 0.4 / 1280.0),
            (format!("{perceiver}.blocks.5.1.c_proj.weight"), 0.4 / (1280.0 * 64.0)),
            ("model.embed_tokens.additional_embedding.weight".to_owned(), 1.0 / 4096.0),
            ("lm_head.additional_fc.weight".to_owned(), 1.0 / 4096.0),
            ("model.layers.0.mlp.down_proj.weight".to_owned(), 0.02 * 0.02),
        ] {
            let Rule::Normal { std } = Rule::of(&config, &name, &shapes[&name]) else { panic!("{name}") };
            assert!((std * std / squared - 1.0).abs() < 1e-12, "{name}: {std}");
        }
        for (name, value) in [
            (format!("{block}.alpha_dense"), 0.0),
            (format!("{block}.cross_attn.q_layer_norm.weight"), 1.0),
            (format!("{block}.input_layernorm.weight"), 1.0),
            (format!("{perceiver}.blocks.0.0.k_layer_norm.bias"), 0.0),
            (format!("{perceiver}.blocks.0.1.ln.weight"), 1.0),
            ("model.norm.weight".to_owned(), 1.0),
        ] {
            assert_eq!(Rule::of(&config, &name, &shapes[&name]), Rule::Constant(value), "{name}");
        }
    }

    #[test]
    fn gates_start_as_the_configuration_says() {
        let name = "model.gated_cross_attn_layers.0.alpha_dense";
        for (word, range, expected) in [
            ("zeros", 0.5, Rule::Constant(0.0)),
            ("ones", 0.5, Rule::Constant(1.0)),
            ("gaussian", 0.5, Rule::Normal { std: 0.5 }),
            ("random", 0.0, Rule::Constant(0.0)),
        ] {
            let config = IdeficsConfig {
                alpha_initializer: word.to_owned(),
                alphas_initializer_range: range,
                alpha_type: AlphaType::Vector,
                ..config()
            };
            assert_eq!(Rule::of(&config, name, &[1, 1, 4096]), expected, "{word}");
        }
    }

    #[test]
    fn drawn_numbers_have_the_deviation() {
        let config = config();
        let spec = TensorSpec::new(
            "model.gated_cross_attn_layers.0.cross_attn.k_proj.weight",
            DType::F32,
            [64, 1280],
        );
        let values = draw(&config, &spec, 3).to_f32_vec();
        let variance = values.iter().map(|value| f64::from(value * value)).sum::<f64>() / values.len() as f64;
        assert!((variance * 1280.0 / 0.4 - 1.0).abs() < 0.03, "{variance}");
    }
}
