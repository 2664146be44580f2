//! Small checkpoints whose every weight follows from its name, so that they need no file to compare against.
//!
//! A value is a hash of the tensor's name and the flat index: `splitmix64(fnv1a_64(name) + index)`, its upper 24
//! bits mapped to `base ± amp`. Two configurations cover the model's switches between them: [`Golden::A`] has
//! the resampler, query and key norms, scalar gates and a block before every second layer; [`Golden::B`] has
//! none of these and gates per channel. The expected values were printed by transformers 4.57.6 and 5.23.0.

use std::path::Path;

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// The two configurations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Golden {
    /// Interval 2, query and key norms, resampler, one gate per block.
    A,
    /// Interval 1, no query and key norms, no resampler, one gate per channel.
    B,
}

const VOCAB: usize = 40;
const ADDITIONAL_VOCAB: usize = 3;
const HIDDEN: usize = 16;
const INTERMEDIATE: usize = 24;
const LAYERS: usize = 4;
const HEADS: usize = 4;
const VISION: usize = 12;
const VISION_INTERMEDIATE: usize = 20;
const VISION_LAYERS: usize = 2;
const VISION_HEADS: usize = 3;
const IMAGE: usize = 8;
const PATCH: usize = 4;
const LATENTS: usize = 3;
const DEPTH: usize = 2;
const RESAMPLER_HEADS: usize = 2;
const RESAMPLER_HEAD_DIM: usize = 5;

/// Values of the tensor `name` of the given shape.
///
/// `alpha_…` values lie in 0.5 ± 0.1, one-dimensional `….weight` (the norms) in 1 ± 0.1, names that begin with
/// `pixel_values` in 0 ± 1, everything else in 0 ± 0.3.
pub fn golden_fill(name: &str, shape: &[usize]) -> Vec<f32> {
    let (base, amp) = if name.contains("alpha_") {
        (0.5, 0.1)
    } else if shape.len() == 1 && name.ends_with(".weight") {
        (1.0, 0.1)
    } else if name.starts_with("pixel_values") {
        (0.0, 1.0)
    } else {
        (0.0, 0.3)
    };
    let seed = fnv1a_64(name);
    (0..shape.iter().product::<usize>() as u64)
        .map(|index| {
            let upper = (splitmix64(seed.wrapping_add(index)) >> 40) as f64 / f64::from(1_u32 << 24);
            (base + amp * (2.0 * upper - 1.0)) as f32
        })
        .collect()
}

/// Writes `config.json` and `model.safetensors` (f32) of a golden configuration into an existing directory.
///
/// # Panics
/// When a file cannot be written.
pub fn write_golden_checkpoint(dir: &Path, golden: Golden) {
    let config = serde_json::to_string_pretty(&golden.config()).expect("a json value has a text form");
    let path = dir.join("config.json");
    std::fs::write(&path, config).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));

    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = golden
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let bytes = golden_fill(&name, &shape).iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("shape and bytes agree");
        (name.as_str(), view)
    });
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path)
        .unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
}

impl Golden {
    /// `config.json` in the reference's field names.
    pub fn config(self) -> Value {
        let with_resampler = self == Self::A;
        json!({
            "architectures": ["IdeficsForVisionText2Text"],
            "model_type": "idefics",
            "vocab_size": VOCAB,
            "additional_vocab_size": ADDITIONAL_VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": false,
            "cross_layer_interval": self.cross_layer_interval(),
            "qk_layer_norms": self == Self::A,
            "alpha_type": match self { Self::A => "float", Self::B => "vector" },
            "freeze_text_layers": false,
            "freeze_vision_layers": false,
            "use_resampler": with_resampler,
            "vision_config": {
                "embed_dim": VISION,
                "image_size": IMAGE,
                "patch_size": PATCH,
                "num_hidden_layers": VISION_LAYERS,
                "num_attention_heads": VISION_HEADS,
                "intermediate_size": VISION_INTERMEDIATE,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,
            },
            "perceiver_config": {
                "use_resampler": with_resampler,
                "resampler_n_latents": LATENTS,
                "resampler_depth": DEPTH,
                "resampler_n_heads": RESAMPLER_HEADS,
                "resampler_head_dim": RESAMPLER_HEAD_DIM,
                "qk_layer_norms_perceiver": true,
            },
        })
    }

    /// Every tensor of the checkpoint with its shape, in the reference's key names.
    pub fn tensors(self) -> Vec<(String, Vec<usize>)> {
        let mut list = TensorList::default();
        list.add("model.embed_tokens.weight", &[VOCAB, HIDDEN]);
        list.add("model.embed_tokens.additional_embedding.weight", &[ADDITIONAL_VOCAB, HIDDEN]);
        list.vision_tower();
        if self == Self::A {
            list.perceiver();
        }
        for layer in 0..LAYERS {
            list.decoder_layer(layer);
        }
        for block in 0..LAYERS.div_ceil(self.cross_layer_interval()) {
            list.gated_cross_attention(self, block);
        }
        list.add("model.norm.weight", &[HIDDEN]);
        list.add("lm_head.weight", &[VOCAB, HIDDEN]);
        list.add("lm_head.additional_fc.weight", &[ADDITIONAL_VOCAB, HIDDEN]);
        list.0
    }

    fn cross_layer_interval(self) -> usize {
        match self {
            Self::A => 2,
            Self::B => 1,
        }
    }
}

#[derive(Default)]
struct TensorList(Vec<(String, Vec<usize>)>);

impl TensorList {
    fn add(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push((name.into(), shape.to_vec()));
    }

    /// A linear layer or layer norm with a bias as long as the weight's first dimension.
    fn add_with_bias(&mut self, prefix: &str, shape: &[usize]) {
        self.add(format!("{prefix}.weight"), shape);
        self.add(format!("{prefix}.bias"), &shape[..1]);
    }

    fn vision_tower(&mut self) {
        let tower = "model.vision_model";
        self.add(format!("{tower}.embeddings.class_embedding"), &[VISION]);
        self.add(format!("{tower}.embeddings.patch_embedding.weight"), &[VISION, 3, PATCH, PATCH]);
        let positions = (IMAGE / PATCH).pow(2) + 1;
        self.add(format!("{tower}.embeddings.position_embedding.weight"), &[positions, VISION]);
        self.add_with_bias(&format!("{tower}.pre_layrnorm"), &[VISION]);
        for layer in 0..VISION_LAYERS {
            let layer = format!("{tower}.encoder.layers.{layer}");
            for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                self.add_with_bias(&format!("{layer}.self_attn.{projection}"), &[VISION, VISION]);
            }
            self.add_with_bias(&format!("{layer}.layer_norm1"), &[VISION]);
            self.add_with_bias(&format!("{layer}.layer_norm2"), &[VISION]);
            self.add_with_bias(&format!("{layer}.mlp.fc1"), &[VISION_INTERMEDIATE, VISION]);
            self.add_with_bias(&format!("{layer}.mlp.fc2"), &[VISION, VISION_INTERMEDIATE]);
        }
        self.add_with_bias(&format!("{tower}.post_layernorm"), &[VISION]);
    }

    fn perceiver(&mut self) {
        let perceiver = "model.perceiver_resampler";
        let inner = RESAMPLER_HEADS * RESAMPLER_HEAD_DIM;
        self.add(format!("{perceiver}.latents"), &[LATENTS, VISION]);
        for block in 0..DEPTH {
            let attention = format!("{perceiver}.blocks.{block}.0");
            self.add_with_bias(&format!("{attention}.context_layer_norm"), &[VISION]);
            self.add_with_bias(&format!("{attention}.latents_layer_norm"), &[VISION]);
            self.add_with_bias(&format!("{attention}.q_layer_norm"), &[RESAMPLER_HEAD_DIM]);
            self.add_with_bias(&format!("{attention}.k_layer_norm"), &[RESAMPLER_HEAD_DIM]);
            for projection in ["q_proj", "k_proj", "v_proj"] {
                self.add(format!("{attention}.{projection}.weight"), &[inner, VISION]);
            }
            self.add(format!("{attention}.output_proj.weight"), &[VISION, inner]);
            let mlp = format!("{perceiver}.blocks.{block}.1");
            self.add_with_bias(&format!("{mlp}.ln"), &[VISION]);
            self.add(format!("{mlp}.fc.weight"), &[4 * VISION, VISION]);
            self.add(format!("{mlp}.c_proj.weight"), &[VISION, 4 * VISION]);
        }
        self.add_with_bias(&format!("{perceiver}.layer_norm"), &[VISION]);
    }

    fn decoder_layer(&mut self, layer: usize) {
        let layer = format!("model.layers.{layer}");
        for projection in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            self.add(format!("{layer}.self_attn.{projection}.weight"), &[HIDDEN, HIDDEN]);
        }
        self.gated_mlp_and_norms(&layer);
    }

    fn gated_cross_attention(&mut self, golden: Golden, block: usize) {
        let block = format!("model.gated_cross_attn_layers.{block}");
        for alpha in ["alpha_cross_attn", "alpha_dense"] {
            let shape: &[usize] = match golden {
                Golden::A => &[1],
                Golden::B => &[1, 1, HIDDEN],
            };
            self.add(format!("{block}.{alpha}"), shape);
        }
        self.add(format!("{block}.cross_attn.q_proj.weight"), &[HIDDEN, HIDDEN]);
        self.add(format!("{block}.cross_attn.k_proj.weight"), &[HIDDEN, VISION]);
        self.add(format!("{block}.cross_attn.v_proj.weight"), &[HIDDEN, VISION]);
        self.add(format!("{block}.cross_attn.o_proj.weight"), &[HIDDEN, HIDDEN]);
        if golden == Golden::A {
            self.add(format!("{block}.cross_attn.q_layer_norm.weight"), &[HIDDEN / HEADS]);
            self.add(format!("{block}.cross_attn.k_layer_norm.weight"), &[HIDDEN / HEADS]);
        }
        self.gated_mlp_and_norms(&block);
    }

    fn gated_mlp_and_norms(&mut self, prefix: &str) {
        self.add(format!("{prefix}.mlp.gate_proj.weight"), &[INTERMEDIATE, HIDDEN]);
        self.add(format!("{prefix}.mlp.up_proj.weight"), &[INTERMEDIATE, HIDDEN]);
        self.add(format!("{prefix}.mlp.down_proj.weight"), &[HIDDEN, INTERMEDIATE]);
        self.add(format!("{prefix}.input_layernorm.weight"), &[HIDDEN]);
        self.add(format!("{prefix}.post_attention_layernorm.weight"), &[HIDDEN]);
    }
}

/// The 64-bit FNV-1a hash of the name's UTF-8 bytes.
pub fn fnv1a_64(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn splitmix64(state: u64) -> u64 {
    let z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{Tensors, assert_close, fixture_json, tolerance};

    #[test]
    fn hash_of_a_name() {
        assert_eq!(fnv1a_64("lm_head.weight"), 0xab67_eb51_5e1b_6f0d);
    }

    #[test]
    fn first_values() {
        for (name, shape, expected) in [
            ("model.norm.weight", &[HIDDEN][..], [0.909_738, 0.964_26, 0.932_04]),
            ("lm_head.weight", &[VOCAB, HIDDEN], [0.295_668, -0.142_197, -0.154_253]),
        ] {
            assert_close(name, &golden_fill(name, shape)[..3], &expected, tolerance::PRINTED);
        }
    }

    /// Keys and shapes as listed from the instantiated reference model by `reference/make_fixtures.py`.
    #[test]
    fn tensors_are_the_reference_models() {
        let listed = fixture_json("golden_keys.json");
        for (golden, name) in [(Golden::A, "A"), (Golden::B, "B")] {
            let ours: BTreeMap<_, _> = golden.tensors().into_iter().collect();
            let reference: BTreeMap<String, Vec<usize>> =
                serde_json::from_value(listed[name].clone()).unwrap();
            assert_eq!(ours, reference, "configuration {name}");
        }
    }

    #[test]
    fn written_checkpoint_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        write_golden_checkpoint(dir.path(), Golden::B);
        let tensors = Tensors::load(dir.path().join("model.safetensors"));
        assert_eq!(tensors.names().count(), Golden::B.tensors().len());
        let name = "model.gated_cross_attn_layers.3.alpha_dense";
        assert_eq!(tensors.f32(name), (&[1, 1, HIDDEN][..], &golden_fill(name, &[1, 1, HIDDEN])[..]));
        let config: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["alpha_type"], "vector");
    }
}
