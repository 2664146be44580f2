//! What must hold of a configuration before anything is computed from it.
//!
//! The file may be hostile, so every count has a limit: past this check, products of two or three fields fit in
//! a `u64`, no division is by zero, and the list of expected tensors has a sane length.

use super::{IdeficsConfig, PerceiverConfig, VisionConfig};

/// Widest layer that is believed: sixteen times the MLP of the 80B model.
const MAX_WIDTH: usize = 1 << 19;
/// Most layers that are believed.
const MAX_LAYERS: usize = 1 << 12;
/// Largest vocabulary that is believed.
const MAX_VOCAB: usize = 1 << 24;
/// Longest side of a picture that is believed.
const MAX_IMAGE_SIZE: usize = 1 << 14;
/// Most parameters that are believed, of all tensors together: a hundred times the 80B model.
pub(super) const MAX_PARAMETERS: u128 = 1 << 43;

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not JSON, or a field of the wrong type.
    #[error("not a usable configuration")]
    Json(#[from] serde_json::Error),
    /// JSON, but a list.
    #[error("expected a JSON object, got a list")]
    NotAnObject,
    /// Some other model.
    #[error("`model_type` is `{found}`, expected `idefics`: only IDEFICS-1 models can be loaded")]
    ModelType {
        /// What the file says.
        found: String,
    },
    /// A count that makes no sense.
    #[error("`{field}` is {value}, expected {min} to {max}")]
    OutOfRange {
        /// Path of the field.
        field: &'static str,
        /// What the file says.
        value: usize,
        /// Least accepted value.
        min: usize,
        /// Greatest accepted value.
        max: usize,
    },
    /// A number that is not finite or not positive.
    #[error("`{field}` is {value}, expected {expected}")]
    BadNumber {
        /// Path of the field.
        field: &'static str,
        /// What the file says.
        value: f64,
        /// What it should be.
        expected: &'static str,
    },
    /// One count does not divide another.
    #[error("`{field}` is {value}, which is not a multiple of {by}: {of}")]
    NotAMultiple {
        /// Path of the field.
        field: &'static str,
        /// What the file says.
        value: usize,
        /// What should divide it.
        by: usize,
        /// Where the divisor comes from.
        of: &'static str,
    },
    /// A word that no code knows.
    #[error("`{field}` is `{value}`, expected one of {known:?}")]
    UnknownWord {
        /// Path of the field.
        field: &'static str,
        /// What the file says.
        value: String,
        /// The words that are known.
        known: &'static [&'static str],
    },
    /// A token id beyond the embedding.
    #[error("`{field}` names token {id}, but there are {tokens} (`vocab_size` + `additional_vocab_size`)")]
    TokenId {
        /// Path of the field.
        field: &'static str,
        /// The id.
        id: u32,
        /// Size of both vocabularies together.
        tokens: usize,
    },
    /// All fields are fine alone, yet the whole is absurd.
    #[error(
        "the configuration describes {parameters} parameters, more than the {MAX_PARAMETERS} that are believed"
    )]
    TooManyParameters {
        /// Parameters of all tensors.
        parameters: u128,
    },
}

impl IdeficsConfig {
    /// Reads and validates the text of a `config.json`.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_str(text)?;
        // Serde also takes a list for a structure.
        if !text.trim_start().starts_with('{') {
            return Err(ConfigError::NotAnObject);
        }
        config.validate()?;
        Ok(config)
    }

    /// Checks every field against its limits and against the others.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(found) = self.model_type.as_ref().filter(|name| *name != "idefics") {
            return Err(ConfigError::ModelType { found: found.clone() });
        }
        within("vocab_size", self.vocab_size, 1, MAX_VOCAB)?;
        within("additional_vocab_size", self.additional_vocab_size, 0, MAX_VOCAB)?;
        within("hidden_size", self.hidden_size, 1, MAX_WIDTH)?;
        within("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)?;
        within("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)?;
        within("num_attention_heads", self.num_attention_heads, 1, self.hidden_size)?;
        within("cross_layer_interval", self.cross_layer_interval, 1, MAX_LAYERS)?;
        within("max_position_embeddings", self.max_position_embeddings, 1, 1 << 24)?;
        multiple("hidden_size", self.hidden_size, self.num_attention_heads, "`num_attention_heads`")?;
        // The rotary embedding turns the two halves of a head against each other.
        multiple("hidden_size / num_attention_heads", self.head_dim(), 2, "rotary embedding turns pairs")?;

        positive("rms_norm_eps", self.rms_norm_eps)?;
        not_negative("initializer_range", self.initializer_range)?;
        not_negative("alphas_initializer_range", self.alphas_initializer_range)?;
        dropout("dropout", self.dropout)?;
        positive("rope_parameters.rope_theta", self.rope_theta())?;
        one_of(
            "alpha_initializer",
            &self.alpha_initializer,
            &["zeros", "ones", "normal", "gaussian", "random"],
        )?;
        let rope_type = self.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref());
        one_of("rope_parameters.rope_type", rope_type.unwrap_or("default"), &["default"])?;
        self.check_token_ids()?;

        self.vision_config.validate()?;
        if self.use_resampler {
            self.perceiver_config.validate()?;
        }
        let parameters = self.num_parameters();
        if parameters > MAX_PARAMETERS {
            return Err(ConfigError::TooManyParameters { parameters });
        }
        Ok(())
    }

    /// Parameters of all tensors together, unused ones included.
    pub fn num_parameters(&self) -> u128 {
        crate::checkpoint::expected_tensors(self)
            .iter()
            .map(|(_, shape)| shape.iter().map(|&extent| extent as u128).product::<u128>())
            .sum()
    }

    fn check_token_ids(&self) -> Result<(), ConfigError> {
        let tokens = self.vocab_size + self.additional_vocab_size;
        let eos = self.eos_token_id.as_ref().map_or(&[][..], super::TokenIds::as_slice);
        let fields = [
            ("pad_token_id", self.pad_token_id.as_slice()),
            ("bos_token_id", self.bos_token_id.as_slice()),
            ("eos_token_id", eos),
        ];
        for (field, ids) in fields {
            if let Some(&id) = ids.iter().find(|&&id| id as usize >= tokens) {
                return Err(ConfigError::TokenId { field, id, tokens });
            }
        }
        Ok(())
    }
}

impl VisionConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        within("vision_config.embed_dim", self.embed_dim, 1, MAX_WIDTH)?;
        within("vision_config.intermediate_size", self.intermediate_size, 1, MAX_WIDTH)?;
        within("vision_config.num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)?;
        within("vision_config.num_attention_heads", self.num_attention_heads, 1, self.embed_dim)?;
        within("vision_config.image_size", self.image_size, 1, MAX_IMAGE_SIZE)?;
        within("vision_config.patch_size", self.patch_size, 1, self.image_size)?;
        // The processor makes RGB.
        within("vision_config.num_channels", self.num_channels, 3, 3)?;
        multiple(
            "vision_config.embed_dim",
            self.embed_dim,
            self.num_attention_heads,
            "`vision_config.num_attention_heads`",
        )?;
        multiple("vision_config.image_size", self.image_size, self.patch_size, "`vision_config.patch_size`")?;
        positive("vision_config.layer_norm_eps", self.layer_norm_eps)?;
        dropout("vision_config.attention_dropout", self.attention_dropout)?;
        not_negative("vision_config.initializer_range", self.initializer_range)?;
        not_negative("vision_config.initializer_factor", self.initializer_factor)
    }
}

impl PerceiverConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        within("perceiver_config.resampler_n_latents", self.resampler_n_latents, 1, 1 << 16)?;
        within("perceiver_config.resampler_depth", self.resampler_depth, 1, MAX_LAYERS)?;
        within("perceiver_config.resampler_n_heads", self.resampler_n_heads, 1, 1 << 12)?;
        within("perceiver_config.resampler_head_dim", self.resampler_head_dim, 1, 1 << 12)
    }
}

fn within(field: &'static str, value: usize, min: usize, max: usize) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange { field, value, min, max })
    }
}

fn multiple(field: &'static str, value: usize, by: usize, of: &'static str) -> Result<(), ConfigError> {
    if value.is_multiple_of(by) { Ok(()) } else { Err(ConfigError::NotAMultiple { field, value, by, of }) }
}

fn positive(field: &'static str, value: f64) -> Result<(), ConfigError> {
    // Also as the f32 that the arithmetic uses: 1e-60 is zero there, and 1e60 infinite.
    let narrow = value as f32;
    if narrow.is_finite() && narrow > 0.0 { Ok(()) } else { Err(bad_number(field, value, "a positive f32")) }
}

fn not_negative(field: &'static str, value: f64) -> Result<(), ConfigError> {
    if value == 0.0 { Ok(()) } else { positive(field, value) }
}

fn dropout(field: &'static str, value: f64) -> Result<(), ConfigError> {
    if (0.0..1.0).contains(&value) {
        Ok(())
    } else {
        Err(bad_number(field, value, "0 or more and less than 1"))
    }
}

fn bad_number(field: &'static str, value: f64, expected: &'static str) -> ConfigError {
    ConfigError::BadNumber { field, value, expected }
}

fn one_of(field: &'static str, value: &str, known: &'static [&'static str]) -> Result<(), ConfigError> {
    if known.contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::UnknownWord { field, value: value.to_owned(), known })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::DType,
        config::{Activation, TokenIds},
    };

    /// What the 9B instruct checkpoint's file says, with the keys that no code reads.
    const INSTRUCT: &str = r#"{
        "additional_vocab_size": 3, "alpha_initializer": "zeros", "alpha_type": "float",
        "alphas_initializer_range": 0.0, "architectures": ["IdeficsForVisionText2Text"], "bos_token_id": 1,
        "cross_layer_activation_function": "swiglu", "cross_layer_interval": 4, "dropout": 0.0, "eos_token_id": 2,
        "ffn_dim": 10, "freeze_lm_head": false, "freeze_text_layers": false, "freeze_vision_layers": false,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_new_tokens": 100, "max_position_embeddings": 2048, "max_sequence_length": 2048, "model_type": "idefics",
        "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "qk_layer_norms": true,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
        "use_resampler": true, "vocab_size": 32000, "word_embed_proj_dim": 4096,
        "perceiver_config": {"model_type": "idefics", "qk_layer_norms_perceiver": true, "resampler_depth": 6,
            "resampler_head_dim": 96, "resampler_n_heads": 16, "resampler_n_latents": 64, "use_resampler": true},
        "vision_config": {"embed_dim": 1280, "hidden_act": "gelu", "image_size": 224, "intermediate_size": 5120,
            "model_type": "idefics", "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14,
            "vision_model_name": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
    }"#;

    #[test]
    fn a_published_file_is_read() {
        let config = IdeficsConfig::from_json(INSTRUCT).unwrap();
        assert_eq!(config.additional_vocab_size, 3);
        assert_eq!(config.num_cross_layers(), 8);
        assert_eq!(config.head_dim(), 128);
        assert_eq!(config.image_seq_len(), 64);
        assert_eq!(config.vision_config.num_positions(), 257);
        assert_eq!(config.vision_config.hidden_act, Activation::Gelu);
        assert_eq!(config.vision_config.layer_norm_eps, 1e-5);
        assert_eq!(config.declared_dtype(), Some(DType::Bf16));
        assert_eq!(config.num_parameters(), 8_929_687_824);
        let again = IdeficsConfig::from_json(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn numbers_are_the_nearest_ones() {
        let config = IdeficsConfig::from_json(r#"{"rms_norm_eps": 1e-34}"#).unwrap();
        assert_eq!(config.rms_norm_eps, 1e-34);
        let again = IdeficsConfig::from_json(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn an_empty_file_is_the_library_default() {
        assert_eq!(IdeficsConfig::from_json("{}").unwrap(), IdeficsConfig::default());
        let nulls = r#"{"vision_config": null, "perceiver_config": null, "rope_parameters": null}"#;
        assert_eq!(IdeficsConfig::from_json(nulls).unwrap(), IdeficsConfig::default());
    }

    #[test]
    fn variants_of_spelling() {
        let json = r#"{"vision_config": {"hidden_size": 32, "num_attention_heads": 4}, "eos_token_id": [2, 31999],
            "dtype": "torch.float16", "torch_dtype": "float32", "hidden_act": "swish",
            "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}"#;
        let config = IdeficsConfig::from_json(json).unwrap();
        assert_eq!(config.vision_config.embed_dim, 32);
        assert_eq!(config.eos_token_id, Some(TokenIds::Many(vec![2, 31999])));
        assert_eq!(config.declared_dtype(), Some(DType::F16));
        assert_eq!(config.hidden_act, Activation::Silu);
        assert_eq!(config.rope_theta(), 5000.0);
    }

    #[test]
    fn hostile_files_are_named_errors() {
        let rows = [
            ("", "EOF while parsing"),
            ("[]", "expected a JSON object, got a list"),
            ("{\"hidden_size\": -1}", "expected usize at line 1"),
            ("{\"hidden_size\": 4096.5}", "expected usize at line 1"),
            ("{\"hidden_size\": 99999999999999999999}", "expected usize at line 1"),
            ("{\"alpha_type\": \"tensor\"}", "unknown variant `tensor`, expected `float` or `vector`"),
            ("{\"hidden_act\": \"mish\"}", "unknown variant `mish`"),
            ("{\"model_type\": \"idefics2\"}", "`model_type` is `idefics2`, expected `idefics`"),
            ("{\"num_hidden_layers\": 0}", "`num_hidden_layers` is 0, expected 1 to 4096"),
            ("{\"num_hidden_layers\": 4000000000}", "`num_hidden_layers` is 4000000000, expected 1 to 4096"),
            ("{\"num_attention_heads\": 0}", "`num_attention_heads` is 0"),
            ("{\"num_attention_heads\": 3}", "`hidden_size` is 4096, which is not a multiple of 3"),
            (
                "{\"num_attention_heads\": 4096}",
                "`hidden_size / num_attention_heads` is 1, which is not a multiple of 2",
            ),
            ("{\"cross_layer_interval\": 0}", "`cross_layer_interval` is 0"),
            ("{\"vocab_size\": 0}", "`vocab_size` is 0"),
            (
                "{\"additional_vocab_size\": 18446744073709551615}",
                "`additional_vocab_size` is 18446744073709551615",
            ),
            ("{\"rms_norm_eps\": 0}", "`rms_norm_eps` is 0, expected a positive f32"),
            ("{\"rms_norm_eps\": 1e-60}", "`rms_norm_eps` is 0.000"),
            ("{\"rms_norm_eps\": 1e300}", "expected a positive f32"),
            ("{\"dropout\": 1.0}", "`dropout` is 1, expected 0 or more and less than 1"),
            (
                "{\"alpha_initializer\": \"twos\"}",
                "`alpha_initializer` is `twos`, expected one of [\"zeros\", ",
            ),
            ("{\"rope_parameters\": {\"rope_type\": \"yarn\"}}", "`rope_parameters.rope_type` is `yarn`"),
            ("{\"rope_parameters\": {\"rope_theta\": -1}}", "`rope_parameters.rope_theta` is -1"),
            ("{\"eos_token_id\": [2, 32000]}", "`eos_token_id` names token 32000, but there are 32000"),
            ("{\"pad_token_id\": 40000}", "`pad_token_id` names token 40000"),
            ("{\"vision_config\": {\"patch_size\": 0}}", "`vision_config.patch_size` is 0"),
            (
                "{\"vision_config\": {\"patch_size\": 225}}",
                "`vision_config.patch_size` is 225, expected 1 to 224",
            ),
            (
                "{\"vision_config\": {\"patch_size\": 15}}",
                "`vision_config.image_size` is 224, which is not a multiple of 15",
            ),
            (
                "{\"vision_config\": {\"num_channels\": 1}}",
                "`vision_config.num_channels` is 1, expected 3 to 3",
            ),
            (
                "{\"vision_config\": {\"num_attention_heads\": 5}}",
                "`vision_config.embed_dim` is 768, which is not",
            ),
            (
                "{\"use_resampler\": true, \"perceiver_config\": {\"resampler_depth\": 0}}",
                "`perceiver_config.resampler_depth` is 0",
            ),
            (
                "{\"hidden_size\": 524288, \"intermediate_size\": 524288, \"num_hidden_layers\": 4096, \"vocab_size\": 16777216}",
                "parameters, more than the 8796093022208 that are believed",
            ),
        ];
        for (json, expected) in rows {
            let error = IdeficsConfig::from_json(json).expect_err(json);
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let message = format!("{error}: {source}");
            assert!(message.contains(expected), "{json}\n  gave     {message}\n  expected {expected}");
        }
    }
}
