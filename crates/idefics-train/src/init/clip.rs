//! The vision tower: a `CLIPVisionModel` of transformers, or the vision half of a `CLIPModel`.
//!
//! Surprising: IDEFICS uses the tower's last hidden states without `post_layernorm`, but its checkpoints carry that
//! norm, so it is taken along.

use std::path::{Path, PathBuf};

use idefics::{
    checkpoint::{TensorSpec, Weight, Weights, read_tensors},
    config::{Activation, IdeficsConfig, VisionConfig},
    processor::Normalize,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{InitError, read_json};

/// What every name in IDEFICS's tower begins with.
const TOWER: &str = "model.vision_model.";
/// What every name begins with in files of a `CLIPModel`, and of a `CLIPVisionModel` that transformers 4 wrote.
const PREFIX: &str = "vision_model.";

/// `vision_config`, with transformers' defaults (`configuration_clip.py`), which are not IDEFICS's.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct ClipVisionConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_channels: usize,
    image_size: usize,
    patch_size: usize,
    hidden_act: Activation,
    layer_norm_eps: f64,
    attention_dropout: f64,
    initializer_range: f64,
    initializer_factor: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            initializer_factor: 1.0,
        }
    }
}

/// A tower whose weights are still in their files.
pub(super) struct VisionTower {
    directory: PathBuf,
    pub(super) config: VisionConfig,
    weights: Weights,
    /// What the names in the files begin with.
    prefix: &'static str,
}

impl VisionTower {
    pub(super) fn open(directory: &Path) -> Result<Self, InitError> {
        let path = directory.join("config.json");
        let json: Value = read_json(&path)?;
        let vision = match json["model_type"].as_str() {
            Some("clip_vision_model") => json,
            Some("clip") => json["vision_config"].clone(),
            other => {
                let expected = "`clip` or `clip_vision_model`";
                return Err(InitError::ModelType {
                    path,
                    expected,
                    got: other.unwrap_or("nothing").to_owned(),
                });
            }
        };
        let config: ClipVisionConfig =
            serde_json::from_value(vision).map_err(|source| InitError::Json { path, source })?;
        // Of a whole CLIP only the tower is read; what is none of it ends in no other tensor's place.
        let parts = ["embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."];
        let of_tower = |name: &str| {
            let name = name.strip_prefix(PREFIX).unwrap_or(name);
            parts.iter().any(|part| name.starts_with(part)) && !name.ends_with("position_ids")
        };
        let weights = read_tensors(directory, of_tower)?;
        let prefixed = weights.iter().any(|(name, _)| name.starts_with(PREFIX));
        Ok(Self {
            directory: directory.to_owned(),
            config: config.into(),
            weights,
            prefix: if prefixed { PREFIX } else { "" },
        })
    }

    /// The numbers of one tensor of the new model's tower.
    pub(super) fn weight(&self, spec: &TensorSpec) -> Result<Weight, InitError> {
        let rest = spec.name.strip_prefix(TOWER).expect("only names of the tower are asked for");
        let name = format!("{}{rest}", self.prefix);
        let path = || self.directory.clone();
        match self.weights.get(&name) {
            None => Err(InitError::MissingTensor { path: path(), name }),
            Some(weight) if weight.shape() != spec.shape => Err(InitError::WrongShape {
                path: path(),
                name,
                expected: spec.shape.clone(),
                got: weight.shape().to_vec(),
            }),
            Some(weight) => Ok(weight.clone()),
        }
    }
}

impl From<ClipVisionConfig> for VisionConfig {
    fn from(clip: ClipVisionConfig) -> Self {
        Self {
            embed_dim: clip.hidden_size,
            image_size: clip.image_size,
            intermediate_size: clip.intermediate_size,
            patch_size: clip.patch_size,
            num_hidden_layers: clip.num_hidden_layers,
            num_attention_heads: clip.num_attention_heads,
            num_channels: clip.num_channels,
            hidden_act: clip.hidden_act,
            layer_norm_eps: clip.layer_norm_eps,
            attention_dropout: clip.attention_dropout,
            initializer_range: clip.initializer_range,
            initializer_factor: clip.initializer_factor,
        }
    }
}

/// `preprocessor_config.json`: the tower's mean and deviation where it has its own, and its size. IDEFICS resizes to
/// the whole square where CLIP cuts a square out, so nothing else of CLIP's file is of use.
pub(super) fn preprocessor(tower: Option<&VisionTower>, config: &IdeficsConfig) -> Value {
    let own: Value = tower
        .and_then(|tower| read_json(&tower.directory.join("preprocessor_config.json")).ok())
        .unwrap_or(Value::Null);
    let of_channels = |field: &str, default: [f32; 3]| match own.get(field) {
        Some(Value::Array(values)) if values.len() == 3 => own[field].clone(),
        // As the shortest decimals that read back as the same numbers.
        _ => default
            .map(|value| value.to_string().parse::<f64>().expect("a number's own text"))
            .into_iter()
            .collect(),
    };
    json!({
        "image_num_channels": config.vision_config.num_channels,
        "image_mean": of_channels("image_mean", Normalize::CLIP.mean),
        "image_std": of_channels("image_std", Normalize::CLIP.std),
        "image_size": config.vision_config.image_size,
        "image_processor_type": "IdeficsImageProcessor",
        "processor_class": "IdeficsProcessor",
    })
}
