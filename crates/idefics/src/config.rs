//! `config.json`: the fields of the reference's `IdeficsConfig`, with its defaults.
//!
//! Field names are Hugging Face's. Unknown keys are tolerated, as the published files carry several that no
//! code reads. Source: transformers `models/idefics/configuration_idefics.py`.

mod memory;
mod validate;

pub use memory::{Memory, Workload};
pub use validate::ConfigError;

use serde::{Deserialize, Deserializer, Serialize};

use crate::checkpoint::DType;

/// The CLIP vision tower.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Width of the tower, `E` in shapes.
    #[serde(alias = "hidden_size")]
    pub embed_dim: usize,
    /// Side of the square input picture, in pixels.
    pub image_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Side of a square patch, in pixels.
    pub patch_size: usize,
    /// Number of transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads per layer.
    pub num_attention_heads: usize,
    /// Colour channels; always 3 in published checkpoints.
    pub num_channels: usize,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// Added to the variance in every LayerNorm of the tower.
    pub layer_norm_eps: f64,
    /// Dropout of attention weights; used in training only.
    pub attention_dropout: f64,
    /// Standard deviation of freshly initialised weights.
    pub initializer_range: f64,
    /// Multiplies the above.
    pub initializer_factor: f64,
}

/// The perceiver resampler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PerceiverConfig {
    /// Stands in the files, but decides nothing: [`IdeficsConfig::use_resampler`] does.
    pub use_resampler: bool,
    /// Latents per image, `L` in shapes.
    pub resampler_n_latents: usize,
    /// Number of attention + MLP blocks.
    pub resampler_depth: usize,
    /// Attention heads per block.
    pub resampler_n_heads: usize,
    /// Width of one head.
    pub resampler_head_dim: usize,
    /// LayerNorm on queries and keys of each head.
    pub qk_layer_norms_perceiver: bool,
}

/// The whole model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "the fields are the file's")]
pub struct IdeficsConfig {
    /// `idefics`, or nothing in a file written by hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_type: Option<String>,
    /// Element type of the stored weights as transformers 5 writes it; see [`IdeficsConfig::declared_dtype`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// The same as older versions write it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub torch_dtype: Option<String>,
    /// Rows of the base embedding and head, `V` in shapes.
    pub vocab_size: usize,
    /// Rows of the additional embedding and head, `A` in shapes.
    pub additional_vocab_size: usize,
    /// Text width, `D` in shapes.
    pub hidden_size: usize,
    /// Inner width of the text MLP, `F` in shapes.
    pub intermediate_size: usize,
    /// Number of LLaMA layers.
    pub num_hidden_layers: usize,
    /// Attention heads of the text model.
    pub num_attention_heads: usize,
    /// Dropout of attention weights and block outputs; used in training only.
    pub dropout: f64,
    /// Activation of the text MLP.
    pub hidden_act: Activation,
    /// Standard deviation of freshly initialised weights.
    pub initializer_range: f64,
    /// How the gates start: `zeros`, `ones`, `normal`, `gaussian` or `random`.
    pub alpha_initializer: String,
    /// Standard deviation of randomly initialised gates.
    pub alphas_initializer_range: f64,
    /// One gate for a block, or one for each of its channels.
    pub alpha_type: AlphaType,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether generation keeps keys and values; here it always does.
    pub use_cache: bool,
    /// Padding token; the reference fills finished rows with it.
    pub pad_token_id: Option<u32>,
    /// First token of every prompt.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    pub eos_token_id: Option<TokenIds>,
    /// Whether the heads are the embeddings.
    pub tie_word_embeddings: bool,
    /// A gated cross-attention block stands before every n-th layer.
    pub cross_layer_interval: usize,
    /// RMSNorm on queries and keys of the cross-attention.
    pub qk_layer_norms: bool,
    /// Training: freeze the text layers and the base embedding.
    pub freeze_text_layers: bool,
    /// Training: module types that stay trainable all the same.
    pub freeze_text_module_exceptions: Vec<String>,
    /// Training: freeze the base head.
    pub freeze_lm_head: bool,
    /// Training: freeze the vision tower.
    pub freeze_vision_layers: bool,
    /// Training: module types that stay trainable all the same.
    pub freeze_vision_module_exceptions: Vec<String>,
    /// Whether the perceiver resampler stands between the tower and the text model.
    pub use_resampler: bool,
    /// Longest sequence the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Rotary embedding parameters (transformers 5.17 and later).
    pub rope_parameters: Option<RopeParameters>,
    /// How the weights were quantized, if they were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization_config: Option<QuantizationConfig>,
    /// The vision tower.
    #[serde(deserialize_with = "null_is_default")]
    pub vision_config: VisionConfig,
    /// The perceiver resampler.
    #[serde(deserialize_with = "null_is_default")]
    pub perceiver_config: PerceiverConfig,
}

/// The part of `quantization_config` that says whose format the weights are in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QuantizationConfig {
    /// `bitsandbytes`, `gptq`, `awq`, …
    pub quant_method: Option<String>,
    /// bitsandbytes: 4-bit blocks.
    pub load_in_4bit: bool,
    /// bitsandbytes: 8-bit rows.
    pub load_in_8bit: bool,
    /// bitsandbytes: `nf4`, or `fp4`, which is also what nothing means.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bnb_4bit_quant_type: Option<String>,
}

/// `rope_parameters` of newer configurations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeParameters {
    /// Base of the geometric series of rotation speeds.
    pub rope_theta: Option<f64>,
    /// Only `default` is known for this model.
    pub rope_type: Option<String>,
}

/// One token id or several, as Hugging Face writes `eos_token_id`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// A single id.
    One(u32),
    /// A list of ids.
    Many(Vec<u32>),
}

/// Shape of the tanh gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AlphaType {
    /// One number for the block, stored as `[1]`.
    Float,
    /// One number for each channel, stored as `[1, 1, D]`.
    Vector,
}

/// Activation functions that IDEFICS configurations name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(x)`.
    #[serde(alias = "swish")]
    Silu,
    /// `x · Φ(x)` with the exact error function.
    Gelu,
    /// `x · sigmoid(1.702 x)`, the original CLIP's.
    QuickGelu,
    /// The tanh approximation of GELU.
    #[serde(alias = "gelu_new")]
    GeluPytorchTanh,
    /// `max(x, 0)`.
    Relu,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            embed_dim: 768,
            image_size: 224,
            intermediate_size: 5120,
            patch_size: 14,
            num_hidden_layers: 32,
            num_attention_heads: 16,
            num_channels: 3,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            initializer_factor: 1.0,
        }
    }
}

impl Default for PerceiverConfig {
    fn default() -> Self {
        Self {
            use_resampler: false,
            resampler_n_latents: 64,
            resampler_depth: 6,
            resampler_n_heads: 16,
            resampler_head_dim: 96,
            qk_layer_norms_perceiver: false,
        }
    }
}

impl Default for IdeficsConfig {
    fn default() -> Self {
        Self {
            model_type: None,
            dtype: None,
            torch_dtype: None,
            vocab_size: 32000,
            additional_vocab_size: 0,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            dropout: 0.0,
            hidden_act: Activation::Silu,
            initializer_range: 0.02,
            alpha_initializer: "zeros".to_owned(),
            alphas_initializer_range: 0.0,
            alpha_type: AlphaType::Float,
            rms_norm_eps: 1e-6,
            use_cache: true,
            pad_token_id: Some(0),
            bos_token_id: Some(1),
            eos_token_id: Some(TokenIds::One(2)),
            tie_word_embeddings: false,
            cross_layer_interval: 1,
            qk_layer_norms: false,
            freeze_text_layers: true,
            freeze_text_module_exceptions: Vec::new(),
            freeze_lm_head: false,
            freeze_vision_layers: true,
            freeze_vision_module_exceptions: Vec::new(),
            use_resampler: false,
            max_position_embeddings: 2048,
            rope_parameters: None,
            quantization_config: None,
            vision_config: VisionConfig::default(),
            perceiver_config: PerceiverConfig::default(),
        }
    }
}

/// Older files hold `null` where a nested configuration has its defaults.
fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(json: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(json)?.unwrap_or_default())
}

impl TokenIds {
    /// The ids, one or many.
    pub fn as_slice(&self) -> &[u32] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

impl VisionConfig {
    /// Patches of one picture of the configured size, class token included: `P` in shapes.
    pub fn num_positions(&self) -> usize {
        (self.image_size / self.patch_size).pow(2) + 1
    }
}

impl IdeficsConfig {
    /// Width of one text attention head, `K` in shapes.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Number of gated cross-attention blocks: one before layers 0, n, 2n, …
    pub fn num_cross_layers(&self) -> usize {
        self.num_hidden_layers.div_ceil(self.cross_layer_interval)
    }

    /// Width of the keys and values that the cross-attention reads: the vision tower's.
    pub fn image_dim(&self) -> usize {
        self.vision_config.embed_dim
    }

    /// Element type that the file says its weights have; `None` where it says nothing or something else.
    pub fn declared_dtype(&self) -> Option<DType> {
        let name = self.dtype.as_deref().or(self.torch_dtype.as_deref())?;
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" => Some(DType::F32),
            "float16" => Some(DType::F16),
            "bfloat16" => Some(DType::Bf16),
            _ => None,
        }
    }

    /// Base of the rotary embedding.
    pub fn rope_theta(&self) -> f64 {
        self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta).unwrap_or(10_000.0)
    }

    /// Vectors that the text model sees of each image of the configured size: `L` in shapes.
    pub fn image_seq_len(&self) -> usize {
        if self.use_resampler {
            self.perceiver_config.resampler_n_latents
        } else {
            self.vision_config.num_positions()
        }
    }
}
