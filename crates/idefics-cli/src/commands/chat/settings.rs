//! How answers are written, changed while the conversation goes on: the options of [`GenerationConfig`] by their
//! Hugging Face names.

use anyhow::bail;
use idefics::generate::GenerationConfig;
use serde_json::{Map, Value};

/// Always shown; others only where they were changed.
const MAIN: [&str; 7] =
    ["do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "repetition_penalty", "seed"];
/// Any of them means that tokens are drawn, as with the flags.
const SHAPES: [&str; 8] =
    ["temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"];

pub(super) struct Settings {
    pub(super) config: GenerationConfig,
    initial: GenerationConfig,
}

impl Settings {
    pub(super) fn new(config: GenerationConfig) -> Self {
        Self { initial: config.clone(), config }
    }

    /// Changes one option; nothing changes if the value is refused.
    pub(super) fn set(&mut self, name: &str, value: &str) -> anyhow::Result<()> {
        let name = if name == "max_tokens" { "max_new_tokens" } else { name };
        let known = fields(&self.config)?;
        if !known.contains_key(name) {
            bail!("`{name}` is no option of generation");
        }
        // A text need not be written as JSON.
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        let mut changes = Map::new();
        if name == "temperature" && value.as_f64() == Some(0.0) {
            // What servers mean by it: the best token.
            changes.insert("do_sample".to_owned(), Value::Bool(false));
        } else {
            if SHAPES.contains(&name) {
                changes.insert("do_sample".to_owned(), Value::Bool(true));
            }
            changes.insert(name.to_owned(), value);
        }
        self.replace(self.config.with_json(Value::Object(changes))?)
    }

    /// Back to the value of the start; all of them without a name.
    pub(super) fn reset(&mut self, name: Option<&str>) -> anyhow::Result<()> {
        let Some(name) = name else {
            self.config = self.initial.clone();
            return Ok(());
        };
        let initial = fields(&self.initial)?;
        let Some(value) = initial.get(name) else { bail!("`{name}` is no option of generation") };
        // `null` in a file changes nothing, so an option that was not set is put back by itself.
        let mut all = fields(&self.config)?;
        all.insert(name.to_owned(), value.clone());
        all.retain(|_, value| !value.is_null());
        self.replace(GenerationConfig::default().with_json(Value::Object(all))?)
    }

    fn replace(&mut self, config: GenerationConfig) -> anyhow::Result<()> {
        config.validate()?;
        if config.num_return_sequences != 1 {
            bail!("generation option `num_return_sequences`: a chat has one answer to a message");
        }
        self.config = config;
        Ok(())
    }

    /// A line for each option of interest.
    pub(super) fn shown(&self) -> anyhow::Result<String> {
        let (now, then) = (fields(&self.config)?, fields(&GenerationConfig::default())?);
        let is_shown = |name: &str, value: &Value| MAIN.contains(&name) || then.get(name) != Some(value);
        let hidden = ["image_token_ids", "bos_token_id", "eos_token_id", "pad_token_id", "max_length"];
        let others = now.iter().filter(|(name, _)| !MAIN.contains(&name.as_str()));
        let main = MAIN.iter().filter_map(|&name| now.get_key_value(name));
        let lines: Vec<String> = main
            .chain(others)
            .filter(|(name, value)| is_shown(name, value) && !hidden.contains(&name.as_str()))
            .map(|(name, value)| match value {
                Value::Null => format!("  {name}: not set"),
                value => format!("  {name}: {value}"),
            })
            .collect();
        Ok(lines.join("\n"))
    }
}

fn fields(config: &GenerationConfig) -> anyhow::Result<Map<String, Value>> {
    match serde_json::to_value(config)? {
        Value::Object(fields) => Ok(fields),
        other => bail!("options of generation are an object, got {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_set_checked_and_put_back() {
        let start = GenerationConfig { max_new_tokens: Some(512), ..Default::default() };
        let mut settings = Settings::new(start.clone());
        settings.set("temperature", "0.7").unwrap();
        assert!(settings.config.do_sample, "a temperature means a draw");
        assert_eq!(settings.config.temperature, 0.7);
        settings.set("max_tokens", "30").unwrap();
        settings.set("stop_strings", "a \"b\"").unwrap();
        settings.set("seed", "7").unwrap();
        assert_eq!(settings.config.max_new_tokens, Some(30));
        assert_eq!(settings.config.stop_strings, ["a \"b\""]);
        assert!(settings.shown().unwrap().contains("temperature: 0.7"));
        settings.set("temperature", "0").unwrap();
        assert!(!settings.config.do_sample, "a temperature of 0 means the best token");
        let before = settings.config.clone();
        for (name, value) in [
            ("temperature", "-1"),
            ("temprature", "1"),
            ("top_p", "2"),
            ("num_beams", "many"),
            ("num_return_sequences", "2"),
        ] {
            assert!(settings.set(name, value).is_err(), "{name} {value}");
            assert_eq!(settings.config, before, "{name} {value}");
        }
        settings.reset(Some("seed")).unwrap();
        assert_eq!((settings.config.seed, settings.config.max_new_tokens), (None, Some(30)));
        assert!(settings.reset(Some("sed")).is_err());
        settings.reset(None).unwrap();
        assert_eq!(settings.config, start);
    }
}
