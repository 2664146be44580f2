//! The text model: a `LlamaForCausalLM` of transformers.

use std::path::{Path, PathBuf};

use idefics::{
    checkpoint::{DType, TensorSpec, Weight, Weights, read_tensors},
    config::{Activation, IdeficsConfig, RopeParameters},
};
use serde::Deserialize;

use super::{InitError, read_json};

/// `config.json` of a LLaMA, with transformers' defaults (`configuration_llama.py`).
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct LlamaConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Activation,
    max_position_embeddings: usize,
    initializer_range: f64,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    rope_theta: f64,
    rope_scaling: Option<serde_json::Value>,
    rope_parameters: Option<RopeParameters>,
    attention_bias: bool,
    mlp_bias: bool,
    quantization_config: Option<serde_json::Value>,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            model_type: String::new(),
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 2048,
            initializer_range: 0.02,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            rope_theta: 10_000.0,
            rope_scaling: None,
            rope_parameters: None,
            attention_bias: false,
            mlp_bias: false,
            quantization_config: None,
        }
    }
}

/// A LLaMA whose weights are still in their files.
pub(super) struct TextModel {
    directory: PathBuf,
    config: LlamaConfig,
    weights: Weights,
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

impl TextModel {
    pub(super) fn open(directory: &Path) -> Result<Self, InitError> {
        let path = directory.join("config.json");
        let config: LlamaConfig = read_json(&path)?;
        config.check(&path)?;
        let weights = read_tensors(directory, |name| !name.ends_with(".rotary_emb.inv_freq"))?;
        let model = Self { directory: directory.to_owned(), config, weights };
        model.check_names()?;
        Ok(model)
    }

    /// The element type that most of the numbers have.
    pub(super) fn dtype(&self) -> DType {
        let elements = |dtype: DType| -> usize {
            self.weights
                .iter()
                .filter(|(_, weight)| weight.dtype() == dtype)
                .map(|(_, weight)| weight.len())
                .sum()
        };
        [DType::F32, DType::F16, DType::Bf16]
            .into_iter()
            .max_by_key(|dtype| elements(*dtype))
            .unwrap_or(DType::F32)
    }

    /// The text part of the new model's configuration; the head is a tensor of its own even where it was tied, as
    /// the additional rows would be tied with it.
    pub(super) fn config(&self) -> IdeficsConfig {
        let config = &self.config;
        IdeficsConfig {
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            hidden_act: config.hidden_act,
            max_position_embeddings: config.max_position_embeddings,
            initializer_range: config.initializer_range,
            rms_norm_eps: config.rms_norm_eps,
            rope_parameters: Some(RopeParameters {
                rope_theta: Some(config.rope_theta()),
                rope_type: Some("default".to_owned()),
            }),
            ..IdeficsConfig::default()
        }
    }

    /// The numbers of one tensor of the new model, or nothing for one that the text model does not have.
    pub(super) fn weight(&self, spec: &TensorSpec) -> Option<Result<Weight, InitError>> {
        let name = match spec.name.as_str() {
            HEAD if self.config.tie_word_embeddings => EMBEDDING,
            name if name.contains(".additional_") => return None,
            name => name,
        };
        Some(self.find(name).and_then(|weight| {
            let &[rows, width] = spec.shape.as_slice() else {
                return self.checked(name, weight, &spec.shape);
            };
            if name == EMBEDDING || name == HEAD {
                // The rows that tokens stand for.
                let weight = self.checked(name, weight, &[self.config.vocab_size, width])?;
                return Ok(weight.rows(0..rows));
            }
            let groups = self.config.groups();
            if groups > 1 && (name.ends_with(".k_proj.weight") || name.ends_with(".v_proj.weight")) {
                let weight = self.checked(name, weight, &[rows / groups, width])?;
                return Ok(repeat_heads(&weight, self.config.head_dim(), groups));
            }
            self.checked(name, weight, &spec.shape)
        }))
    }

    fn find(&self, name: &str) -> Result<&Weight, InitError> {
        let missing = || InitError::MissingTensor { path: self.directory.clone(), name: name.to_owned() };
        self.weights.get(name).ok_or_else(missing)
    }

    fn checked(&self, name: &str, weight: &Weight, expected: &[usize]) -> Result<Weight, InitError> {
        if weight.shape() == expected {
            return Ok(weight.clone());
        }
        let (name, got) = (name.to_owned(), weight.shape().to_vec());
        Err(InitError::WrongShape { path: self.directory.clone(), name, expected: expected.to_vec(), got })
    }

    /// All tensors are those of a LLaMA: a bias or a norm that would be lost is an error before anything is written.
    fn check_names(&self) -> Result<(), InitError> {
        let mut expected: Vec<String> = vec![EMBEDDING.to_owned(), "model.norm.weight".to_owned()];
        if !self.config.tie_word_embeddings {
            expected.push(HEAD.to_owned());
        }
        for layer in 0..self.config.num_hidden_layers {
            let parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
            let parts = parts.into_iter().chain(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]);
            let parts = parts.chain(["input_layernorm", "post_attention_layernorm"]);
            expected.extend(parts.map(|part| format!("model.layers.{layer}.{part}.weight")));
        }
        for name in &expected {
            self.find(name)?;
        }
        // Files of tied models may hold the head as well.
        let known = |name: &str| name == HEAD || expected.iter().any(|expected| expected == name);
        let unused: Vec<&str> =
            self.weights.iter().map(|(name, _)| name).filter(|name| !known(name)).collect();
        match unused.first() {
            None => Ok(()),
            Some(first) => Err(InitError::Unused {
                path: self.directory.clone(),
                count: unused.len(),
                first: (*first).to_owned(),
            }),
        }
    }
}

impl LlamaConfig {
    fn key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Query heads that share a key and value head.
    fn groups(&self) -> usize {
        self.num_attention_heads / self.key_value_heads()
    }

    fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    fn rope_theta(&self) -> f64 {
        self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta).unwrap_or(self.rope_theta)
    }

    fn check(&self, path: &Path) -> Result<(), InitError> {
        let path = || path.to_owned();
        if self.model_type != "llama" {
            let (expected, got) = ("`llama`", self.model_type.clone());
            return Err(InitError::ModelType { path: path(), expected, got });
        }
        let refuse = |field, got: &dyn std::fmt::Display, why| {
            Err(InitError::Unsupported { path: path(), field, got: got.to_string(), why })
        };
        let (heads, shared) = (self.num_attention_heads, self.key_value_heads());
        if heads == 0 || self.hidden_size == 0 || !self.hidden_size.is_multiple_of(heads) {
            return refuse("num_attention_heads", &heads, "heads that share the hidden size evenly");
        }
        if shared == 0 || !heads.is_multiple_of(shared) {
            return refuse("num_key_value_heads", &shared, "query heads that share them evenly");
        }
        if let Some(dim) = self.head_dim.filter(|dim| *dim != self.head_dim()) {
            return refuse("head_dim", &dim, "heads of hidden_size / num_attention_heads");
        }
        if self.attention_bias || self.mlp_bias {
            let field = if self.attention_bias { "attention_bias" } else { "mlp_bias" };
            return refuse(field, &true, "no biases in the text model");
        }
        if let Some(scaling) = self.rope_scaling.as_ref().filter(|scaling| !scaling.is_null()) {
            let kind = scaling.get("rope_type").or(scaling.get("type")).and_then(serde_json::Value::as_str);
            if kind != Some("default") {
                return refuse("rope_scaling", scaling, "the plain rotary embedding");
            }
        }
        let kind = self.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref());
        if let Some(kind) = kind.filter(|kind| *kind != "default") {
            return refuse("rope_parameters.rope_type", &kind, "the plain rotary embedding");
        }
        if let Some(quantization) = &self.quantization_config {
            return refuse(
                "quantization_config",
                quantization,
                "to be built from weights that are not quantized",
            );
        }
        Ok(())
    }
}

/// Each head's rows as often as query heads read them: `[KV·K, D] -> [H·K, D]` (transformers `repeat_kv`).
fn repeat_heads(weight: &Weight, head_dim: usize, groups: usize) -> Weight {
    let (rows, width) = (weight.shape()[0], weight.shape()[1]);
    let mut values = Vec::with_capacity(rows * groups * width);
    for head in 0..rows / head_dim {
        let head = weight.rows(head * head_dim..(head + 1) * head_dim).to_f32_vec();
        for _ in 0..groups {
            values.extend_from_slice(&head);
        }
    }
    Weight::from_f32(values, [rows * groups, width])
}
