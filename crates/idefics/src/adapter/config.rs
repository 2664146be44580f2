//! `adapter_config.json` as PEFT writes it (`peft/tuners/lora/config.py`).
//!
//! Fields that change what an adapter computes are either here or refused; those about how it was trained are kept
//! out of the way.

use std::path::Path;

use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::AdapterError;
use crate::checkpoint::write::read_object;

/// The file's name.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// What LoRA does, and to which layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank where no pattern says otherwise.
    pub r: usize,
    /// Numerator of the scale where no pattern says otherwise.
    pub lora_alpha: f64,
    /// Share of the inputs that the factors do not see in training.
    #[serde(default)]
    pub lora_dropout: f64,
    /// The linear layers. Only training looks at it: in a finished adapter the tensors say which they are.
    #[serde(default)]
    pub target_modules: Option<Targets>,
    /// Layers that are left out all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Targets>,
    /// Ranks by pattern, in the file's order; the first that matches holds.
    #[serde(default)]
    pub rank_pattern: Map<String, Value>,
    /// Numerators by pattern.
    #[serde(default)]
    pub alpha_pattern: Map<String, Value>,
    /// Divide by the root of the rank instead of the rank (Kalajdzievski, 2023).
    #[serde(default)]
    pub use_rslora: bool,
    /// Modules that are trained whole, by the end of their names.
    #[serde(default)]
    pub modules_to_save: Option<Vec<String>>,
}

/// Which modules are meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// A regular expression for the whole name.
    Pattern(String),
    /// Names, or what names end with behind a dot.
    Names(Vec<String>),
}

/// Fields that ask for another computation unless they are empty, with what is supported.
const REFUSED: [&str; 13] = [
    "fan_in_fan_out",
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
];

impl LoraConfig {
    /// Reads and checks the file of an adapter's directory.
    pub(super) fn open(directory: &Path) -> Result<Self, AdapterError> {
        let path = directory.join(CONFIG_FILE);
        let object = read_object(&directory.into(), CONFIG_FILE)?;
        let refuse = |field: &str, got: &Value, expected| {
            let (field, got) = (field.to_owned(), got.to_string());
            Err(AdapterError::Setting { path: path.clone(), field, got, expected })
        };
        match object.get("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            other => return refuse("peft_type", other.unwrap_or(&Value::Null), "\"LORA\""),
        }
        for field in REFUSED {
            if let Some(value) = object.get(field).filter(|value| !is_empty(value)) {
                return refuse(field, value, "nothing: it is not supported");
            }
        }
        let config: Self = serde_json::from_value(Value::Object(object))
            .map_err(|source| AdapterError::Json { path: path.clone(), source })?;
        if config.r == 0 {
            return refuse("r", &Value::from(0), "1 or more");
        }
        for (field, patterns) in
            [("rank_pattern", &config.rank_pattern), ("alpha_pattern", &config.alpha_pattern)]
        {
            for (pattern, value) in patterns {
                suffix_regex(field, pattern)?;
                if !value.as_f64().is_some_and(|value| value.is_finite() && value > 0.0) {
                    return refuse(&format!("{field}.{pattern}"), value, "a positive number");
                }
            }
        }
        Ok(config)
    }

    /// The rank of a module that training gives factors to.
    pub fn rank(&self, module: &str) -> Result<usize, AdapterError> {
        let named = find_pattern("rank_pattern", &self.rank_pattern, module)?;
        Ok(named.and_then(Value::as_u64).map_or(self.r, |rank| rank as usize))
    }

    /// The factor on what a module of that rank adds.
    pub fn scale(&self, module: &str, rank: usize) -> Result<f32, AdapterError> {
        let named = find_pattern("alpha_pattern", &self.alpha_pattern, module)?;
        let alpha = named.and_then(Value::as_f64).unwrap_or(self.lora_alpha);
        let rank = rank as f64;
        Ok((alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32)
    }

    /// Whether training gives factors to a module.
    pub fn targets(&self, module: &str) -> Result<bool, AdapterError> {
        if let Some(excluded) = &self.exclude_modules
            && excluded.matches("exclude_modules", module)?
        {
            return Ok(false);
        }
        self.target_modules.as_ref().map_or(Ok(false), |targets| targets.matches("target_modules", module))
    }
}

impl Targets {
    /// As PEFT's `_maybe_include_all_linear_layers` and `check_target_module_exists`; every module that is asked
    /// about is a linear layer other than the heads, which is what `all-linear` means.
    fn matches(&self, field: &'static str, module: &str) -> Result<bool, AdapterError> {
        match self {
            Self::Pattern(pattern) if pattern == "all-linear" => Ok(true),
            Self::Pattern(pattern) => {
                let regex = regex(field, pattern, &format!("^(?:{pattern})$"))?;
                is_match(field, pattern, &regex, module)
            }
            Self::Names(names) => Ok(names.iter().any(|name| {
                module == name || module.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'))
            })),
        }
    }
}

/// The value of the first pattern that fits the end of a module's name (PEFT's `get_pattern_key`).
fn find_pattern<'a>(
    field: &'static str,
    patterns: &'a Map<String, Value>,
    module: &str,
) -> Result<Option<&'a Value>, AdapterError> {
    for (pattern, value) in patterns {
        if is_match(field, pattern, &suffix_regex(field, pattern)?, module)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn suffix_regex(field: &'static str, pattern: &str) -> Result<Regex, AdapterError> {
    regex(field, pattern, &format!(r"^(?:.*\.)?(?:{pattern})$"))
}

fn regex(field: &'static str, pattern: &str, whole: &str) -> Result<Regex, AdapterError> {
    Regex::new(whole).map_err(|error| bad_pattern(field, pattern, &error))
}

fn is_match(field: &'static str, pattern: &str, regex: &Regex, module: &str) -> Result<bool, AdapterError> {
    // It fails when a hostile expression would take too long.
    regex.is_match(module).map_err(|error| bad_pattern(field, pattern, &error))
}

fn bad_pattern(field: &'static str, pattern: &str, error: &fancy_regex::Error) -> AdapterError {
    AdapterError::Pattern { field, pattern: pattern.to_owned(), problem: error.to_string() }
}

/// What Python calls false.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: Value) -> LoraConfig {
        serde_json::from_value(json).unwrap()
    }

    /// What PEFT 0.21's `check_target_module_exists` gives for the same names.
    #[test]
    fn targets_match_as_in_peft() {
        let layer = "model.layers.3.self_attn.q_proj";
        for (targets, module, expected) in [
            (serde_json::json!(["q_proj"]), layer, true),
            (serde_json::json!(["proj"]), layer, false),
            (serde_json::json!(["self_attn.q_proj"]), layer, true),
            (serde_json::json!([layer]), layer, true),
            (serde_json::json!("q_proj"), layer, false),
            (serde_json::json!(r".*\.q_proj"), layer, true),
            (serde_json::json!(r"(?!.*vision).*q_proj"), layer, true),
            (
                serde_json::json!(r"(?!.*vision).*q_proj"),
                "model.vision_model.encoder.layers.0.self_attn.q_proj",
                false,
            ),
            (serde_json::json!("a|b"), "ab", false),
            (serde_json::json!("all-linear"), layer, true),
        ] {
            let config = config(serde_json::json!({"r": 1, "lora_alpha": 1, "target_modules": targets}));
            assert_eq!(config.targets(module).unwrap(), expected, "{targets} on {module}");
        }
        let both = serde_json::json!({"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "exclude_modules": r".*\.3\..*"});
        assert!(!config(both).targets(layer).unwrap());
    }

    #[test]
    fn ranks_and_scales_follow_the_first_pattern() {
        let config = config(serde_json::json!({
            "r": 16, "lora_alpha": 8, "use_rslora": true,
            "rank_pattern": {"k_proj": 4, r"layers\.\d+\.self_attn\.v_proj": 2},
            "alpha_pattern": {"v_proj": 3.0},
        }));
        for (module, rank, scale) in [
            ("model.layers.0.self_attn.q_proj", 16, 2.0),
            ("model.layers.0.self_attn.k_proj", 4, 4.0),
            ("model.layers.0.self_attn.v_proj", 2, (3.0 / 2f64.sqrt()) as f32),
            ("model.layers.0.self_attn.ok_proj", 16, 2.0),
        ] {
            assert_eq!(config.rank(module).unwrap(), rank, "{module}");
            assert_eq!(config.scale(module, rank).unwrap(), scale, "{module}");
        }
    }
}
