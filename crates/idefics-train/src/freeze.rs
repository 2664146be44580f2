//! Which weights are trained: the reference's freeze flags with their exceptions, and patterns on top.
//!
//! Source: transformers `modeling_idefics.py`, `freeze_model` and `freeze_relevant_params`; m4's
//! `patterns_to_unfreeze`. Surprising: the text's norms are `RMSNorm`s, which the exception `LayerNorm` does not
//! mean; gated blocks, perceiver and additional vocabulary are frozen by no flag; the tower's last norm is stored
//! but never used, so it is never trained.

use idefics::config::IdeficsConfig;
use serde::{Deserialize, Serialize};

/// A set of flags to begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Everything is trained.
    #[default]
    Full,
    /// Gated blocks, perceiver and additional vocabulary: how IDEFICS was made of two models.
    FrozenBackbones,
    /// As the model's `config.json` says.
    Configured,
    /// No weight of the model itself.
    Nothing,
}

/// The reference's module types that can be exceptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModuleType {
    /// Norms of the tower.
    LayerNorm,
    /// Linear layers.
    Linear,
    /// Tables.
    Embedding,
}

/// A list of parts that must all be in a name.
pub type Pattern = Vec<String>;

/// What is trained. What is not given follows from the preset, whichever it is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trainable {
    /// Where to begin; everything is trained if nothing is said, or nothing where there is LoRA.
    pub preset: Option<Preset>,
    /// Whether the text layers, their last norm and the base embedding are frozen.
    pub freeze_text_layers: Option<bool>,
    /// Module types in the text layers that stay trainable all the same.
    pub freeze_text_module_exceptions: Option<Vec<ModuleType>>,
    /// Whether the vision tower is frozen.
    pub freeze_vision_layers: Option<bool>,
    /// Module types in the tower that stay trainable all the same.
    pub freeze_vision_module_exceptions: Option<Vec<ModuleType>>,
    /// Whether the base head is frozen.
    pub freeze_lm_head: Option<bool>,
    /// Names that are trained whatever the flags say.
    pub unfreeze: Vec<Pattern>,
    /// Names that are frozen whatever all of the above says.
    pub freeze: Vec<Pattern>,
    /// Weights that learn faster or slower than `optimizer.learning_rate` says; the first entry that fits counts.
    pub rates: Vec<Rate>,
}

/// How fast some of the weights learn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Parts that must all be in a weight's name.
    pub parts: Pattern,
    /// Multiplied into the learning rate.
    pub factor: f64,
}

/// A module type that the reference does not know.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("config.json, {field}: expected `LayerNorm`, `Linear` or `Embedding`, got `{got}`")]
pub struct UnknownModuleType {
    field: &'static str,
    got: String,
}

/// The flags when everything is decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    text: Option<Vec<ModuleType>>,
    vision: Option<Vec<ModuleType>>,
    is_head_frozen: bool,
    /// What no flag names: gated blocks, perceiver, additional vocabulary.
    is_rest_frozen: bool,
    unfreeze: Vec<Pattern>,
    freeze: Vec<Pattern>,
}

impl Rate {
    /// Whether it is for the weight of that name.
    pub fn fits(&self, name: &str) -> bool {
        fits(&self.parts, name)
    }
}

impl Trainable {
    /// What the learning rate is multiplied with for the weight of that name.
    pub fn rate_factor(&self, name: &str) -> f64 {
        self.rates.iter().find(|rate| rate.fits(name)).map_or(1.0, |rate| rate.factor)
    }

    /// The first pattern of `freeze` and `unfreeze` that fits none of the names, and where it stands.
    pub fn unused_pattern(&self, names: &[&str]) -> Option<(&'static str, &Pattern)> {
        let freeze = self.freeze.iter().map(|parts| ("trainable.freeze", parts));
        let unfreeze = self.unfreeze.iter().map(|parts| ("trainable.unfreeze", parts));
        freeze.chain(unfreeze).find(|(_, parts)| !names.iter().any(|name| fits(parts, name)))
    }

    /// The rules for a model of that configuration, and a preset where none was chosen.
    pub fn rules(&self, config: &IdeficsConfig, default: Preset) -> Result<Rules, UnknownModuleType> {
        let preset = self.preset.unwrap_or(default);
        let (text, vision, head) = match preset {
            Preset::Full => (false, false, false),
            Preset::FrozenBackbones | Preset::Nothing => (true, true, true),
            Preset::Configured => {
                (config.freeze_text_layers, config.freeze_vision_layers, config.freeze_lm_head)
            }
        };
        let exceptions = |given: &Option<Vec<ModuleType>>, field, configured: &[String]| match given {
            Some(given) => Ok(given.clone()),
            None if preset == Preset::Configured => module_types(field, configured),
            None => Ok(Vec::new()),
        };
        let text_exceptions = exceptions(
            &self.freeze_text_module_exceptions,
            "freeze_text_module_exceptions",
            &config.freeze_text_module_exceptions,
        )?;
        let vision_exceptions = exceptions(
            &self.freeze_vision_module_exceptions,
            "freeze_vision_module_exceptions",
            &config.freeze_vision_module_exceptions,
        )?;
        Ok(Rules {
            text: self.freeze_text_layers.unwrap_or(text).then_some(text_exceptions),
            vision: self.freeze_vision_layers.unwrap_or(vision).then_some(vision_exceptions),
            is_head_frozen: self.freeze_lm_head.unwrap_or(head),
            is_rest_frozen: preset == Preset::Nothing,
            unfreeze: self.unfreeze.clone(),
            freeze: self.freeze.clone(),
        })
    }
}

fn fits(parts: &Pattern, name: &str) -> bool {
    parts.iter().all(|part| name.contains(part.as_str()))
}

impl Rules {
    /// Whether the weight of that name is trained.
    pub fn is_trained(&self, name: &str) -> bool {
        let matches = |patterns: &[Pattern]| patterns.iter().any(|parts| fits(parts, name));
        !is_unused(name) && !matches(&self.freeze) && (matches(&self.unfreeze) || self.by_flags(name))
    }

    fn by_flags(&self, name: &str) -> bool {
        let is_exception =
            |exceptions: &[ModuleType]| module_type(name).is_some_and(|kind| exceptions.contains(&kind));
        if name.starts_with("model.layers.") || name.starts_with("model.norm.") {
            self.text.as_ref().is_none_or(|exceptions| is_exception(exceptions))
        } else if name == "model.embed_tokens.weight" {
            self.text.is_none()
        } else if name.starts_with("model.vision_model.") {
            self.vision.as_ref().is_none_or(|exceptions| is_exception(exceptions))
        } else if name == "lm_head.weight" {
            !self.is_head_frozen
        } else {
            !self.is_rest_frozen
        }
    }
}

/// Stored, but no output depends on it: torch gives such a weight no gradient, and so no decay.
fn is_unused(name: &str) -> bool {
    name.starts_with("model.vision_model.post_layernorm.")
}

/// The reference's type of the module that a weight belongs to, if it can be an exception.
fn module_type(name: &str) -> Option<ModuleType> {
    let module = name.rsplit('.').nth(1)?;
    if matches!(module, "layer_norm1" | "layer_norm2" | "pre_layrnorm") {
        Some(ModuleType::LayerNorm)
    } else if module.ends_with("_proj") || matches!(module, "fc1" | "fc2") {
        Some(ModuleType::Linear)
    } else {
        (module == "position_embedding").then_some(ModuleType::Embedding)
    }
}

fn module_types(field: &'static str, names: &[String]) -> Result<Vec<ModuleType>, UnknownModuleType> {
    let parse = |name: &String| match name.as_str() {
        "LayerNorm" => Ok(ModuleType::LayerNorm),
        "Linear" => Ok(ModuleType::Linear),
        "Embedding" => Ok(ModuleType::Embedding),
        _ => Err(UnknownModuleType { field, got: name.clone() }),
    };
    names.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 16] = [
        "model.embed_tokens.weight",
        "model.embed_tokens.additional_embedding.weight",
        "model.vision_model.embeddings.class_embedding",
        "model.vision_model.embeddings.patch_embedding.weight",
        "model.vision_model.embeddings.position_embedding.weight",
        "model.vision_model.encoder.layers.0.layer_norm1.bias",
        "model.vision_model.encoder.layers.0.mlp.fc1.bias",
        "model.vision_model.post_layernorm.weight",
        "model.perceiver_resampler.latents",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.gated_cross_attn_layers.0.alpha_dense",
        "model.gated_cross_attn_layers.0.cross_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "lm_head.additional_fc.weight",
    ];

    /// `expected` has a `t` for each trained name, in their order, and a `.` for each frozen one.
    fn check(trainable: &Trainable, config: &IdeficsConfig, expected: &str) {
        let rules = trainable.rules(config, Preset::Full).unwrap();
        let got: String = NAMES.iter().map(|name| if rules.is_trained(name) { 't' } else { '.' }).collect();
        assert_eq!(got, expected, "{trainable:?}");
    }

    #[test]
    fn presets_and_flags() {
        let config = IdeficsConfig::default();
        let preset = |preset| Trainable { preset: Some(preset), ..Trainable::default() };
        check(&preset(Preset::Full), &config, "ttttttt.tttttttt");
        check(&preset(Preset::FrozenBackbones), &config, ".t......t..tt..t");
        check(&preset(Preset::Nothing), &config, "................");
        check(&preset(Preset::Configured), &config, ".t......t..tt.tt");
        let frozen_text = Trainable { freeze_text_layers: Some(true), ..Trainable::default() };
        check(&frozen_text, &config, ".tttttt.t..tt.tt");
        // A flag that is set counts where nothing else is trained, too.
        let layers = Trainable { freeze_text_layers: Some(false), ..preset(Preset::Nothing) };
        check(&layers, &config, "t........tt..t..");
        let head = Trainable { freeze_lm_head: Some(false), ..preset(Preset::Nothing) };
        check(&head, &config, "..............t.");
        let norms = Trainable {
            freeze_vision_module_exceptions: Some(vec![ModuleType::LayerNorm]),
            ..preset(Preset::Nothing)
        };
        check(&norms, &config, ".....t..........");
        let linear = Trainable {
            freeze_text_module_exceptions: Some(vec![ModuleType::Linear, ModuleType::LayerNorm]),
            ..frozen_text
        };
        check(&linear, &config, ".tttttt.tt.tt.tt");
    }

    #[test]
    fn exceptions_are_module_types_of_the_reference() {
        let config = IdeficsConfig {
            freeze_vision_module_exceptions: vec!["LayerNorm".to_owned(), "Embedding".to_owned()],
            ..IdeficsConfig::default()
        };
        let configured = Trainable { preset: Some(Preset::Configured), ..Trainable::default() };
        check(&configured, &config, ".t..tt..t..tt.tt");
        let config = IdeficsConfig {
            freeze_text_module_exceptions: vec!["RMSNorm".to_owned()],
            ..IdeficsConfig::default()
        };
        let error = configured.rules(&config, Preset::Full).unwrap_err().to_string();
        assert!(error.contains("freeze_text_module_exceptions") && error.contains("RMSNorm"), "{error}");
    }

    #[test]
    fn patterns_have_the_last_word() {
        let pattern = |parts: &[&str]| parts.iter().map(|&part| part.to_owned()).collect();
        let trainable = Trainable {
            preset: Some(Preset::Nothing),
            unfreeze: vec![pattern(&["model.layers", "q_proj"]), pattern(&["alpha_"])],
            ..Trainable::default()
        };
        check(&trainable, &IdeficsConfig::default(), ".........t.t....");
        let trainable = Trainable { freeze: vec![pattern(&["embed"])], ..Trainable::default() };
        check(&trainable, &IdeficsConfig::default(), ".....tt.tttttttt");
        assert_eq!(trainable.unused_pattern(&NAMES), None);
        let misspelt = pattern(&["model.layers", "qproj"]);
        let trainable = Trainable { unfreeze: vec![misspelt.clone()], ..trainable };
        assert_eq!(trainable.unused_pattern(&NAMES), Some(("trainable.unfreeze", &misspelt)));
    }
}
