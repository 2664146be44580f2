//! `generation_config.json`: what a checkpoint proposes for generation.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::TokenIds;

/// The fields of Hugging Face's `GenerationConfig` that say which tokens come next; all may be absent, in which
/// case the caller's or the library's defaults hold. Unknown keys are passed over.
///
/// Source: transformers `generation/configuration_utils.py`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the reference's, and its documentation explains them")]
pub struct GenerationConfigFile {
    pub max_length: Option<usize>,
    pub max_new_tokens: Option<usize>,
    pub min_length: Option<usize>,
    pub min_new_tokens: Option<usize>,
    pub early_stopping: Option<EarlyStopping>,
    pub max_time: Option<f64>,
    pub stop_strings: Option<StopStrings>,
    pub do_sample: Option<bool>,
    pub num_beams: Option<usize>,
    pub use_cache: Option<bool>,
    pub temperature: Option<f64>,
    pub top_k: Option<usize>,
    pub top_p: Option<f64>,
    pub min_p: Option<f64>,
    pub top_h: Option<f64>,
    pub typical_p: Option<f64>,
    pub epsilon_cutoff: Option<f64>,
    pub eta_cutoff: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub length_penalty: Option<f64>,
    pub no_repeat_ngram_size: Option<usize>,
    pub bad_words_ids: Option<Vec<Vec<u32>>>,
    pub sequence_bias: Option<Vec<(Vec<u32>, f64)>>,
    pub renormalize_logits: Option<bool>,
    pub forced_bos_token_id: Option<u32>,
    pub forced_eos_token_id: Option<TokenIds>,
    pub remove_invalid_values: Option<bool>,
    pub exponential_decay_length_penalty: Option<(usize, f64)>,
    pub suppress_tokens: Option<Vec<u32>>,
    pub begin_suppress_tokens: Option<Vec<u32>>,
    pub num_return_sequences: Option<usize>,
    pub pad_token_id: Option<u32>,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<TokenIds>,
    /// Whatever else the file holds, kept for a rewrite of the file.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// When beam search stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EarlyStopping {
    /// As soon as there are as many finished beams as asked for, or by a guess.
    Flag(bool),
    /// `never`: only when no better beam is possible.
    Word(String),
}

/// One stop string or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StopStrings {
    /// A single one.
    One(String),
    /// A list.
    Many(Vec<String>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_and_full_files_are_read() {
        let published = r#"{"_from_model_config": true, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "transformers_version": "4.32.0.dev0"}"#;
        let config: GenerationConfigFile = serde_json::from_str(published).unwrap();
        assert_eq!(config.eos_token_id, Some(TokenIds::One(2)));
        assert_eq!(config.max_length, None);
        assert_eq!(config.other["transformers_version"], "4.32.0.dev0");

        let full = r#"{"max_new_tokens": 30, "early_stopping": "never", "stop_strings": ["User:"], "temperature": 1,
            "bad_words_ids": [[32000], [32001]], "sequence_bias": [[[5, 6], -1.5]], "top_k": null,
            "exponential_decay_length_penalty": [10, 1.2], "eos_token_id": [2, 32002], "new_in_v6": {"a": []}}"#;
        let config: GenerationConfigFile = serde_json::from_str(full).unwrap();
        assert_eq!(config.early_stopping, Some(EarlyStopping::Word("never".to_owned())));
        assert_eq!(config.stop_strings, Some(StopStrings::Many(vec!["User:".to_owned()])));
        assert_eq!(config.temperature, Some(1.0));
        assert_eq!(config.top_k, None);
        assert_eq!(config.sequence_bias, Some(vec![(vec![5, 6], -1.5)]));
        assert_eq!(config.exponential_decay_length_penalty, Some((10, 1.2)));
        assert_eq!(config.eos_token_id.unwrap().as_slice(), [2, 32002]);
    }
}
