//! The options of a generation: Hugging Face's names, defaults and meanings.
//!
//! Source: transformers `generation/configuration_utils.py`, `GenerationConfig`, and the length rules of
//! `GenerationMixin._prepare_generated_length`. Surprising: `top_k` is 50 whenever sampling is on, unless it is
//! set; `max_new_tokens` wins over `max_length`; without either an answer has 20 tokens.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::GenerateError;
use crate::{
    checkpoint::GenerationConfigFile,
    config::{IdeficsConfig, TokenIds},
};

/// Length of an answer when no length is set.
pub const DEFAULT_NEW_TOKENS: usize = 20;

// Bounds that keep one request from taking a server down; far above what is of use.
const MAX_TOKENS: usize = 1 << 20;
const MAX_BEAMS: usize = 64;
const MAX_RETURN_SEQUENCES: usize = 128;
const MAX_LOGPROBS: usize = 1000;
const MAX_STOP_STRINGS: usize = 64;
const MAX_STOP_STRING_BYTES: usize = 1024;
const MAX_TOKEN_LISTS: usize = 1 << 16;
const MAX_FACTOR: f64 = 1e4;

/// How a sequence is continued. The defaults are greedy search for 20 tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a field of generation_config.json")]
pub struct GenerationConfig {
    /// Longest sequence, prompt included. Does not count where `max_new_tokens` is set.
    pub max_length: Option<usize>,
    /// Longest answer.
    pub max_new_tokens: Option<usize>,
    /// No end token before the sequence, prompt included, has this length.
    pub min_length: usize,
    /// No end token before the answer has this length.
    pub min_new_tokens: Option<usize>,
    /// Stop after so many seconds; what is there by then is returned.
    pub max_time: Option<f64>,
    /// Stop after a text that contains one of these.
    #[serde(deserialize_with = "one_or_many_strings")]
    pub stop_strings: Vec<String>,
    /// Return and stream the text without the stop string and what follows it.
    pub trim_stop_strings: bool,

    /// Draw tokens instead of taking the best.
    pub do_sample: bool,
    /// Beams of a beam search; 1 is none.
    pub num_beams: usize,
    /// Answers to return.
    pub num_return_sequences: usize,
    /// When a beam search may end.
    pub early_stopping: EarlyStopping,
    /// Exponent of the length that divides the score of a finished beam; above 0 favours long ones.
    pub length_penalty: f64,
    /// Seed of the draws. The same seed gives the same answer in any batch. `None` takes a fresh one.
    pub seed: Option<u64>,
    /// Keep keys and values of what was read. Off, every step reads the whole sequence again.
    pub use_cache: bool,
    /// Tokens of a prompt that are read in one step.
    pub prefill_chunk: usize,

    /// Divides the scores when sampling.
    pub temperature: f64,
    /// Draw among so many best tokens; 0 is off.
    pub top_k: usize,
    /// Draw among the best tokens that together have this probability.
    pub top_p: f64,
    /// Draw among tokens with at least this share of the best token's probability.
    pub min_p: Option<f64>,
    /// Draw among the best tokens that together have this share of the entropy.
    pub top_h: Option<f64>,
    /// Draw among the tokens of most typical information that together have this probability.
    pub typical_p: f64,
    /// Draw among tokens of at least this probability; 0 is off.
    pub epsilon_cutoff: f64,
    /// The same with a threshold that falls with the entropy; 0 is off.
    pub eta_cutoff: f64,

    /// Above 1 makes tokens of the sequence, prompt included, less likely.
    pub repetition_penalty: f64,
    /// Above 1 makes tokens of the prompt more likely.
    pub encoder_repetition_penalty: f64,
    /// Taken off the score of each token as often as the answer has it. Not an option of transformers: `OpenAI`'s.
    pub frequency_penalty: f64,
    /// Taken off the score of each token that the answer has. Not an option of transformers: `OpenAI`'s.
    pub presence_penalty: f64,
    /// No n-gram of this size twice, prompt included; 0 is off.
    pub no_repeat_ngram_size: usize,
    /// No n-gram of this size that the prompt has; 0 is off.
    pub encoder_no_repeat_ngram_size: usize,
    /// Token sequences that are never completed.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Added to the score of the token that completes a sequence.
    pub sequence_bias: Vec<(Vec<u32>, f64)>,
    /// Tokens that are never chosen.
    pub suppress_tokens: Vec<u32>,
    /// Tokens that are not chosen first.
    pub begin_suppress_tokens: Vec<u32>,
    /// The token after a prompt of one token.
    pub forced_bos_token_id: Option<u32>,
    /// The token at the last position.
    #[serde(deserialize_with = "one_or_many_ids")]
    pub forced_eos_token_id: Vec<u32>,
    /// After so many new tokens the end tokens gain score, by a factor to the power of the excess.
    pub exponential_decay_length_penalty: Option<(usize, f64)>,
    /// Replace NaN and infinities among the scores.
    pub remove_invalid_values: bool,
    /// Turn the processed scores into log-probabilities before the choice.
    pub renormalize_logits: bool,

    /// Tokens that start a sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a sequence.
    #[serde(rename = "eos_token_id", deserialize_with = "one_or_many_ids")]
    pub eos_token_ids: Vec<u32>,
    /// Fills finished rows of a padded batch.
    pub pad_token_id: Option<u32>,
    /// `<image>` and `<fake_token_around_image>`: a text model that writes them only does harm, so they are never
    /// chosen.
    pub image_token_ids: Vec<u32>,
    /// Let the model write the tokens of `image_token_ids`.
    pub allow_image_tokens: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Report the log-probability of each chosen token and of so many best tokens. They are the model's own, before
    /// any processor or temperature.
    pub logprobs: Option<usize>,
}

/// When a beam search may end, once all beams have a finished sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// `false`: when no running beam, scored at its present length, beats the worst finished sequence.
    #[default]
    Heuristic,
    /// `true`: at once.
    Immediate,
    /// `"never"`: when no running beam can beat the worst finished sequence at any length.
    Never,
}

/// The lengths of one sequence, prompt included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Length of the prompt.
    pub prompt: usize,
    /// No end token before this length.
    pub min: usize,
    /// The sequence ends at this length.
    pub max: usize,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_length: None,
            max_new_tokens: None,
            min_length: 0,
            min_new_tokens: None,
            max_time: None,
            stop_strings: Vec::new(),
            trim_stop_strings: false,
            do_sample: false,
            num_beams: 1,
            num_return_sequences: 1,
            early_stopping: EarlyStopping::Heuristic,
            length_penalty: 1.0,
            seed: None,
            use_cache: true,
            prefill_chunk: 512,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            min_p: None,
            top_h: None,
            typical_p: 1.0,
            epsilon_cutoff: 0.0,
            eta_cutoff: 0.0,
            repetition_penalty: 1.0,
            encoder_repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            no_repeat_ngram_size: 0,
            encoder_no_repeat_ngram_size: 0,
            bad_words_ids: Vec::new(),
            sequence_bias: Vec::new(),
            suppress_tokens: Vec::new(),
            begin_suppress_tokens: Vec::new(),
            forced_bos_token_id: None,
            forced_eos_token_id: Vec::new(),
            exponential_decay_length_penalty: None,
            remove_invalid_values: false,
            renormalize_logits: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
            image_token_ids: Vec::new(),
            allow_image_tokens: false,
            skip_special_tokens: true,
            logprobs: None,
        }
    }
}

impl GenerationConfig {
    /// Reads a `generation_config.json`. Unknown keys are tolerated, and `null` means the default, as older
    /// versions of transformers write it.
    pub fn from_json(text: &str) -> Result<Self, GenerateError> {
        Self::default().with_json(serde_json::from_str(text)?)
    }

    /// The same options with those of a JSON object in their place; `null` changes nothing.
    pub fn with_json(&self, changes: serde_json::Value) -> Result<Self, GenerateError> {
        let mut value = serde_json::to_value(self)?;
        let serde_json::Value::Object(changes) = changes else {
            return Err(serde_json::Error::custom("expected a JSON object").into());
        };
        if let Some(fields) = value.as_object_mut() {
            fields.extend(changes.into_iter().filter(|(_, field)| !field.is_null()));
            fields.retain(|_, field| !field.is_null());
        }
        Ok(serde_json::from_value(value)?)
    }

    /// The defaults of a checkpoint: its `generation_config.json`, with the special tokens of its `config.json`
    /// where that leaves them open.
    pub fn from_checkpoint(
        model: &IdeficsConfig,
        file: &GenerationConfigFile,
    ) -> Result<Self, GenerateError> {
        // Both have Hugging Face's names.
        let mut config = Self::default().with_json(serde_json::to_value(file)?)?;
        config.bos_token_id = config.bos_token_id.or(model.bos_token_id);
        config.pad_token_id = config.pad_token_id.or(model.pad_token_id);
        if config.eos_token_ids.is_empty() {
            let eos = model.eos_token_id.as_ref().map(TokenIds::as_slice);
            config.eos_token_ids = eos.unwrap_or_default().to_vec();
        }
        Ok(config)
    }

    /// Refuses values out of range and options that contradict each other.
    pub fn validate(&self) -> Result<(), GenerateError> {
        self.validate_lengths()?;
        self.validate_sampling()?;
        self.validate_penalties()?;
        self.validate_tokens()?;
        self.validate_search()
    }

    /// Refuses token ids that the model does not have.
    pub fn validate_vocabulary(&self, vocab_size: usize) -> Result<(), GenerateError> {
        let check = |option, ids: &[u32]| match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&token_id) => Err(GenerateError::UnknownToken { option, token_id, vocab_size }),
            None => Ok(()),
        };
        for words in &self.bad_words_ids {
            check("bad_words_ids", words)?;
        }
        for (sequence, _) in &self.sequence_bias {
            check("sequence_bias", sequence)?;
        }
        check("suppress_tokens", &self.suppress_tokens)?;
        check("begin_suppress_tokens", &self.begin_suppress_tokens)?;
        check("forced_bos_token_id", self.forced_bos_token_id.as_slice())?;
        check("forced_eos_token_id", &self.forced_eos_token_id)?;
        check("eos_token_id", &self.eos_token_ids)?;
        check("image_token_ids", &self.image_token_ids)
    }

    /// The lengths that hold for a prompt of `prompt` tokens. An answer ends at the last position of the model,
    /// whatever was asked for.
    pub fn lengths(
        &self,
        request: usize,
        prompt: usize,
        max_positions: usize,
    ) -> Result<Lengths, GenerateError> {
        if prompt == 0 {
            return Err(GenerateError::EmptyPrompt { request });
        }
        if prompt >= max_positions {
            return Err(GenerateError::PromptTooLong { request, prompt_tokens: prompt, max_positions });
        }
        let max = match (self.max_new_tokens, self.max_length) {
            (Some(new), _) => prompt + new,
            (None, Some(max_length)) if prompt >= max_length => {
                return Err(GenerateError::NoRoom { request, prompt_tokens: prompt, max_length });
            }
            (None, Some(max_length)) => max_length,
            (None, None) => prompt + DEFAULT_NEW_TOKENS,
        };
        let min = self.min_new_tokens.map_or(self.min_length, |new| prompt + new);
        Ok(Lengths { prompt, min, max: max.min(max_positions) })
    }

    /// Options that were set but have no effect in the chosen mode, each with the reason. The reference only logs
    /// them; a caller can show them.
    pub fn unused_options(&self) -> Vec<String> {
        let default = Self::default();
        let mut unused = Vec::new();
        if !self.do_sample {
            let sampling = [
                ("temperature", self.temperature != default.temperature),
                ("top_k", self.top_k != default.top_k),
                ("top_p", self.top_p != default.top_p),
                ("min_p", self.min_p.is_some()),
                ("top_h", self.top_h.is_some()),
                ("typical_p", self.typical_p != default.typical_p),
                ("epsilon_cutoff", self.epsilon_cutoff != default.epsilon_cutoff),
                ("eta_cutoff", self.eta_cutoff != default.eta_cutoff),
            ];
            let set = sampling.iter().filter(|(_, set)| *set);
            unused.extend(set.map(|(name, _)| format!("`{name}` has no effect without `do_sample`")));
        }
        if self.num_beams == 1 {
            let beams = [
                ("early_stopping", self.early_stopping != default.early_stopping),
                ("length_penalty", self.length_penalty != default.length_penalty),
            ];
            let set = beams.iter().filter(|(_, set)| *set);
            unused.extend(set.map(|(name, _)| format!("`{name}` has no effect without `num_beams`")));
        }
        if self.max_new_tokens.is_some() && self.max_length.is_some() {
            unused.push("`max_length` has no effect beside `max_new_tokens`".to_owned());
        }
        if self.min_new_tokens.is_some() && self.min_length > 0 {
            unused.push("`min_length` has no effect beside `min_new_tokens`".to_owned());
        }
        unused
    }

    /// What fills the rows of a padded batch behind a finished sequence. Surprising: the reference's beam search
    /// takes the first end token where the padding token is 0 (`pad_token_id or eos_token_id[0]`).
    pub fn filler_token_id(&self) -> Option<u32> {
        let eos = self.eos_token_ids.first().copied();
        match self.pad_token_id {
            Some(0) if self.num_beams > 1 => eos.or(Some(0)),
            pad => pad.or(eos),
        }
    }

    fn validate_lengths(&self) -> Result<(), GenerateError> {
        within("max_length", self.max_length.unwrap_or(1), 1, MAX_TOKENS)?;
        within("max_new_tokens", self.max_new_tokens.unwrap_or(1), 1, MAX_TOKENS)?;
        within("min_length", self.min_length, 0, MAX_TOKENS)?;
        within("min_new_tokens", self.min_new_tokens.unwrap_or(0), 0, MAX_TOKENS)?;
        within("prefill_chunk", self.prefill_chunk, 1, MAX_TOKENS)?;
        if let (Some(min), Some(max)) = (self.min_new_tokens, self.max_new_tokens)
            && min > max
        {
            return invalid("min_new_tokens", format!("{min} is larger than `max_new_tokens`, {max}"));
        }
        if let (None, None, Some(max)) = (self.min_new_tokens, self.max_new_tokens, self.max_length)
            && self.min_length > max
        {
            return invalid("min_length", format!("{} is larger than `max_length`, {max}", self.min_length));
        }
        if let Some(seconds) = self.max_time {
            number("max_time", seconds, |x| x > 0.0 && x <= 1e9, "in (0, 1e9] seconds")?;
        }
        within("stop_strings", self.stop_strings.len(), 0, MAX_STOP_STRINGS)?;
        for text in &self.stop_strings {
            if text.is_empty() || text.len() > MAX_STOP_STRING_BYTES {
                let got = text.len();
                return invalid(
                    "stop_strings",
                    format!("a string has {got} bytes, 1 to {MAX_STOP_STRING_BYTES} are allowed"),
                );
            }
        }
        if self.trim_stop_strings && self.stop_strings.is_empty() {
            return invalid("trim_stop_strings", "there are no `stop_strings` to trim".to_owned());
        }
        Ok(())
    }

    fn validate_sampling(&self) -> Result<(), GenerateError> {
        let unit = |x: f64| (0.0..=1.0).contains(&x);
        number(
            "temperature",
            self.temperature,
            |x| x > 0.0 && x <= MAX_FACTOR,
            "in (0, 10000]; for the best token turn `do_sample` off",
        )?;
        within("top_k", self.top_k, 0, MAX_TOKENS)?;
        number("top_p", self.top_p, unit, "in [0, 1]")?;
        number("min_p", self.min_p.unwrap_or(0.0), unit, "in [0, 1]")?;
        number("top_h", self.top_h.unwrap_or(1.0), |x| x > 0.0 && x <= 1.0, "in (0, 1]")?;
        number("typical_p", self.typical_p, |x| x > 0.0 && x <= 1.0, "in (0, 1]")?;
        number("epsilon_cutoff", self.epsilon_cutoff, |x| (0.0..1.0).contains(&x), "in [0, 1)")?;
        number("eta_cutoff", self.eta_cutoff, |x| (0.0..1.0).contains(&x), "in [0, 1)")?;
        within("logprobs", self.logprobs.unwrap_or(0), 0, MAX_LOGPROBS)
    }

    fn validate_penalties(&self) -> Result<(), GenerateError> {
        let positive = |x: f64| x > 0.0 && x <= MAX_FACTOR;
        number("repetition_penalty", self.repetition_penalty, positive, "in (0, 10000]")?;
        number("encoder_repetition_penalty", self.encoder_repetition_penalty, positive, "in (0, 10000]")?;
        number("frequency_penalty", self.frequency_penalty, |x| x.abs() <= 100.0, "in [-100, 100]")?;
        number("presence_penalty", self.presence_penalty, |x| x.abs() <= 100.0, "in [-100, 100]")?;
        number("length_penalty", self.length_penalty, |x| x.abs() <= 100.0, "in [-100, 100]")?;
        within("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_TOKENS)?;
        within("encoder_no_repeat_ngram_size", self.encoder_no_repeat_ngram_size, 0, MAX_TOKENS)?;
        if let Some((start, factor)) = self.exponential_decay_length_penalty {
            within("exponential_decay_length_penalty", start, 0, MAX_TOKENS)?;
            number("exponential_decay_length_penalty", factor, positive, "a factor in (0, 10000]")?;
            if self.eos_token_ids.is_empty() {
                return invalid(
                    "exponential_decay_length_penalty",
                    "there is no end token to favour".to_owned(),
                );
            }
        }
        Ok(())
    }

    fn validate_tokens(&self) -> Result<(), GenerateError> {
        let lists = [
            ("bad_words_ids", self.bad_words_ids.len()),
            ("sequence_bias", self.sequence_bias.len()),
            ("suppress_tokens", self.suppress_tokens.len()),
            ("begin_suppress_tokens", self.begin_suppress_tokens.len()),
            ("forced_eos_token_id", self.forced_eos_token_id.len()),
            ("eos_token_id", self.eos_token_ids.len()),
            ("image_token_ids", self.image_token_ids.len()),
        ];
        for (option, length) in lists {
            within(option, length, 0, MAX_TOKEN_LISTS)?;
        }
        if self.bad_words_ids.iter().any(Vec::is_empty) {
            return invalid("bad_words_ids", "a token sequence is empty".to_owned());
        }
        for (sequence, bias) in &self.sequence_bias {
            if sequence.is_empty() {
                return invalid("sequence_bias", "a token sequence is empty".to_owned());
            }
            // An infinite ban is fine; an infinite favour has no meaning.
            let allowed = |x: f64| x < f64::INFINITY && !x.is_nan();
            if !allowed(*bias) {
                return invalid(
                    "sequence_bias",
                    format!("the bias {bias} of {sequence:?} is not a number below infinity"),
                );
            }
        }
        // Forcing a token that is also suppressed would leave no token at all.
        let forced: [(&str, &[u32]); 2] = [
            ("forced_bos_token_id", self.forced_bos_token_id.as_slice()),
            ("forced_eos_token_id", &self.forced_eos_token_id),
        ];
        for (option, ids) in forced {
            if !ids.is_empty() && ids.iter().all(|id| self.suppress_tokens.contains(id)) {
                return invalid(option, format!("every token of {ids:?} is also in `suppress_tokens`"));
            }
        }
        Ok(())
    }

    fn validate_search(&self) -> Result<(), GenerateError> {
        within("num_beams", self.num_beams, 1, MAX_BEAMS)?;
        within("num_return_sequences", self.num_return_sequences, 1, MAX_RETURN_SEQUENCES)?;
        let (returned, beams) = (self.num_return_sequences, self.num_beams);
        if beams > 1 && returned > beams {
            return invalid(
                "num_return_sequences",
                format!("{returned} is larger than `num_beams`, {beams}"),
            );
        }
        if beams == 1 && returned > 1 && !self.do_sample {
            return invalid(
                "num_return_sequences",
                format!(
                    "greedy search has one answer, got {returned}; turn `do_sample` on or raise `num_beams`"
                ),
            );
        }
        Ok(())
    }
}

/// Rows right-padded to the longest, as the reference returns a batch.
pub fn padded(rows: &[Vec<u32>], filler: u32) -> Vec<Vec<u32>> {
    let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let pad = |row: &Vec<u32>| row.iter().copied().chain(std::iter::repeat(filler)).take(longest).collect();
    rows.iter().map(pad).collect()
}

fn invalid<T>(option: &'static str, problem: String) -> Result<T, GenerateError> {
    Err(GenerateError::InvalidOption { option, problem })
}

fn within(option: &'static str, got: usize, min: usize, max: usize) -> Result<(), GenerateError> {
    if (min..=max).contains(&got) {
        return Ok(());
    }
    invalid(option, format!("expected {min} to {max}, got {got}"))
}

/// `allowed` must be false for NaN, which comparisons give for free.
fn number(
    option: &'static str,
    got: f64,
    allowed: impl Fn(f64) -> bool,
    range: &str,
) -> Result<(), GenerateError> {
    if allowed(got) {
        return Ok(());
    }
    invalid(option, format!("expected a number {range}, got {got}"))
}

fn one_or_many_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    Ok(TokenIds::deserialize(deserializer)?.as_slice().to_vec())
}

fn one_or_many_strings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Strings {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Strings::deserialize(deserializer)? {
        Strings::One(text) => vec![text],
        Strings::Many(texts) => texts,
    })
}

impl<'de> Deserialize<'de> for EarlyStopping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::Bool(false) => Ok(Self::Heuristic),
            serde_json::Value::Bool(true) => Ok(Self::Immediate),
            serde_json::Value::String(text) => text.parse().map_err(D::Error::custom),
            other => Err(D::Error::custom(format!("expected true, false or \"never\", got {other}"))),
        }
    }
}

impl Serialize for EarlyStopping {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Heuristic => serializer.serialize_bool(false),
            Self::Immediate => serializer.serialize_bool(true),
            Self::Never => serializer.serialize_str("never"),
        }
    }
}

impl std::str::FromStr for EarlyStopping {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "false" => Ok(Self::Heuristic),
            "true" => Ok(Self::Immediate),
            "never" => Ok(Self::Never),
            other => Err(format!("expected true, false or never, got {other:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The message of `validate` for the default configuration with some fields replaced.
    fn refusal(json: &str) -> String {
        let config = GenerationConfig::from_json(json).expect("the test's own JSON");
        config.validate().expect_err(json).to_string()
    }

    #[test]
    fn defaults_are_the_reference_s() {
        let config = GenerationConfig::from_json("{}").unwrap();
        assert_eq!(config, GenerationConfig::default());
        config.validate().unwrap();
        assert_eq!(
            config.lengths(0, 7, 2048).unwrap(),
            Lengths { prompt: 7, min: 0, max: 27 },
            "20 tokens more than the prompt"
        );
    }

    #[test]
    fn published_file_reads_with_unknown_keys_and_nulls() {
        let json = r#"{"_from_model_config": true, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "transformers_version": "4.32.0.dev0", "max_length": null, "top_k": null, "early_stopping": null}"#;
        let config = GenerationConfig::from_json(json).unwrap();
        assert_eq!(config.eos_token_ids, [2]);
        assert_eq!((config.bos_token_id, config.pad_token_id, config.top_k), (Some(1), Some(0), 50));
    }

    #[test]
    fn hugging_face_forms_are_read() {
        let json = r#"{"eos_token_id": [2, 32002], "early_stopping": "never", "stop_strings": "\nUser:",
            "sequence_bias": [[[10, 45], -2.0]], "exponential_decay_length_penalty": [5, 1.5], "bad_words_ids": [[7]]}"#;
        let config = GenerationConfig::from_json(json).unwrap();
        assert_eq!(config.eos_token_ids, [2, 32002]);
        assert_eq!(config.early_stopping, EarlyStopping::Never);
        assert_eq!(config.stop_strings, ["\nUser:"]);
        assert_eq!(config.sequence_bias, [(vec![10, 45], -2.0)]);
        assert_eq!(config.exponential_decay_length_penalty, Some((5, 1.5)));
        let again = GenerationConfig::from_json(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config, "what is written is read back");
    }

    #[test]
    fn a_checkpoint_s_proposals_hold_and_its_special_tokens_fill_the_gaps() {
        let file = |json: &str| serde_json::from_str::<GenerationConfigFile>(json).unwrap();
        let model = IdeficsConfig::default();
        let config = GenerationConfig::from_checkpoint(&model, &file("{}")).unwrap();
        assert_eq!((config.bos_token_id, config.pad_token_id), (Some(1), Some(0)));
        assert_eq!(config.eos_token_ids, [2]);
        let json = r#"{"eos_token_id": [2, 32002], "temperature": 0.7, "encoder_repetition_penalty": 1.5,
            "early_stopping": "never", "stop_strings": "x", "transformers_version": "5"}"#;
        let config = GenerationConfig::from_checkpoint(&model, &file(json)).unwrap();
        assert_eq!(config.eos_token_ids, [2, 32002]);
        assert_eq!((config.temperature, config.encoder_repetition_penalty), (0.7, 1.5));
        assert_eq!(
            (config.early_stopping, config.stop_strings),
            (EarlyStopping::Never, vec!["x".to_owned()])
        );
        assert!(GenerationConfig::default().with_json(serde_json::json!([1])).is_err());
    }

    #[test]
    fn lengths_follow_the_reference() {
        // (max_length, max_new_tokens, min_length, min_new_tokens, prompt, positions) -> (min, max)
        let rows = [
            (Some(100), None, 0, None, 7, 2048, (0, 100)),
            (Some(100), Some(3), 0, None, 7, 2048, (0, 10)),
            (None, Some(3), 50, Some(2), 7, 2048, (9, 10)),
            (None, None, 9, None, 7, 2048, (9, 27)),
            (None, None, 0, None, 2040, 2048, (0, 2048)),
            (None, Some(100), 0, None, 2040, 2048, (0, 2048)),
        ];
        for row in rows {
            let (max_length, max_new_tokens, min_length, min_new_tokens, prompt, positions, (min, max)) = row;
            let config = GenerationConfig {
                max_length,
                max_new_tokens,
                min_length,
                min_new_tokens,
                ..Default::default()
            };
            assert_eq!(
                config.lengths(0, prompt, positions).unwrap(),
                Lengths { prompt, min, max },
                "{row:?}"
            );
        }
    }

    #[test]
    fn long_prompts_are_refused_with_the_numbers() {
        let config = GenerationConfig { max_length: Some(100), ..Default::default() };
        let error = config.lengths(3, 2048, 2048).unwrap_err().to_string();
        assert!(error.contains("prompt 3 has 2048 tokens") && error.contains("2048 positions"), "{error}");
        let error = config.lengths(3, 100, 2048).unwrap_err().to_string();
        assert!(error.contains("has 100 tokens") && error.contains("is 100"), "{error}");
        assert!(config.lengths(3, 0, 2048).unwrap_err().to_string().contains("no tokens"));
    }

    #[test]
    fn every_number_has_bounds() {
        for json in [
            r#"{"max_new_tokens": 0}"#,
            r#"{"max_new_tokens": 99999999999}"#,
            r#"{"num_beams": 0}"#,
            r#"{"num_beams": 100000}"#,
            r#"{"do_sample": true, "num_return_sequences": 100000}"#,
            r#"{"num_return_sequences": 2}"#,
            r#"{"num_beams": 2, "num_return_sequences": 3}"#,
            r#"{"temperature": 0.0}"#,
            r#"{"temperature": -1.0}"#,
            r#"{"temperature": 1e300}"#,
            r#"{"top_k": 99999999999}"#,
            r#"{"top_p": 1.5}"#,
            r#"{"min_p": -0.1}"#,
            r#"{"top_h": 0.0}"#,
            r#"{"typical_p": 0.0}"#,
            r#"{"epsilon_cutoff": 1.0}"#,
            r#"{"eta_cutoff": -0.5}"#,
            r#"{"repetition_penalty": 0.0}"#,
            r#"{"length_penalty": 1e9}"#,
            r#"{"max_time": 0.0}"#,
            r#"{"prefill_chunk": 0}"#,
            r#"{"logprobs": 1000000}"#,
            r#"{"stop_strings": [""]}"#,
            r#"{"trim_stop_strings": true}"#,
            r#"{"bad_words_ids": [[]]}"#,
            r#"{"min_new_tokens": 5, "max_new_tokens": 4}"#,
            r#"{"min_length": 30, "max_length": 20}"#,
            r#"{"forced_eos_token_id": 2, "suppress_tokens": [1, 2]}"#,
            r#"{"exponential_decay_length_penalty": [1, 1.5]}"#,
        ] {
            let option = refusal(json);
            assert!(option.starts_with("generation option `"), "{json}: {option}");
        }
        let nan = GenerationConfig { temperature: f64::NAN, ..Default::default() };
        assert!(nan.validate().is_err(), "a NaN fits no range");
    }

    #[test]
    fn token_ids_are_checked_against_the_vocabulary() {
        let config = GenerationConfig { bad_words_ids: vec![vec![3, 40]], ..Default::default() };
        config.validate_vocabulary(41).unwrap();
        let error = config.validate_vocabulary(40).unwrap_err().to_string();
        assert!(error.contains("bad_words_ids") && error.contains("token 40"), "{error}");
    }

    #[test]
    fn unused_options_are_named() {
        let config = GenerationConfig { temperature: 0.5, length_penalty: 2.0, ..Default::default() };
        let unused = config.unused_options();
        assert_eq!(unused.len(), 2);
        assert!(unused[0].contains("temperature") && unused[1].contains("length_penalty"));
        assert!(GenerationConfig::default().unused_options().is_empty());
    }

    #[test]
    fn filler_of_padded_rows() {
        // (pad, beams) -> filler, with end tokens 5 and 6
        for (pad, num_beams, filler) in [(Some(0), 1, 0), (Some(0), 3, 5), (Some(9), 3, 9), (None, 1, 5)] {
            let config = GenerationConfig {
                pad_token_id: pad,
                num_beams,
                eos_token_ids: vec![5, 6],
                ..Default::default()
            };
            assert_eq!(config.filler_token_id(), Some(filler), "pad {pad:?}, {num_beams} beams");
        }
        assert_eq!(padded(&[vec![1], vec![2, 3]], 0), [vec![1, 0], vec![2, 3]]);
    }
}
