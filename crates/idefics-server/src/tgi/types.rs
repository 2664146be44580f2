//! Requests and responses as JSON, by the names of text-generation-inference's `router/src/lib.rs`.

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};
use utoipa::ToSchema;

/// `POST /generate` and `/generate_stream`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct GenerateRequest {
    /// The prompt, with pictures as `![](ADDRESS)`.
    pub(crate) inputs: String,
    #[serde(default)]
    pub(crate) parameters: Option<Parameters>,
    /// For `POST /`: answer as it is written.
    #[serde(default)]
    pub(crate) stream: Option<bool>,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct Parameters {
    /// Longest answer in tokens; 100 if not said.
    #[schema(minimum = 1)]
    pub(crate) max_new_tokens: Option<f64>,
    /// Draw tokens instead of taking the best.
    pub(crate) do_sample: Option<bool>,
    /// Above 0.
    pub(crate) temperature: Option<f64>,
    #[schema(minimum = 1)]
    pub(crate) top_k: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) typical_p: Option<f64>,
    /// Above 0.
    pub(crate) repetition_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) frequency_penalty: Option<f64>,
    #[schema(value_type = Option<u64>)]
    pub(crate) seed: Option<Number>,
    /// Write so many answers and return the likeliest; needs sampling.
    #[schema(minimum = 1)]
    pub(crate) best_of: Option<f64>,
    /// Texts that end the answer and are its last part.
    #[serde(default, alias = "stop_sequences")]
    pub(crate) stop: Option<Vec<String>>,
    /// Only so many last tokens of the prompt count.
    #[schema(minimum = 1)]
    pub(crate) truncate: Option<f64>,
    /// Put the prompt in front of the answer.
    pub(crate) return_full_text: Option<bool>,
    pub(crate) details: Option<bool>,
    /// Report so many likely tokens beside each.
    #[schema(minimum = 0)]
    pub(crate) top_n_tokens: Option<f64>,
    /// Not supported.
    pub(crate) decoder_input_details: Option<bool>,
    /// Not supported.
    pub(crate) watermark: Option<bool>,
    /// `{"type": "json", "value": SCHEMA}` or `{"type": "regex", "value": PATTERN}`, which answers are held to.
    #[schema(value_type = Option<Object>)]
    pub(crate) grammar: Option<Value>,
    /// Not supported.
    pub(crate) adapter_id: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct GenerateResponse {
    pub(crate) generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) details: Option<Details>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Details {
    /// `length`, `eos_token` or `stop_sequence`.
    pub(crate) finish_reason: &'static str,
    pub(crate) generated_tokens: usize,
    pub(crate) seed: Option<u64>,
    /// Always empty: log-probabilities of prompts are not reported.
    pub(crate) prefill: Vec<Token>,
    pub(crate) tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) top_tokens: Option<Vec<Vec<Token>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) best_of_sequences: Option<Vec<BestOfSequence>>,
}

/// One of the answers that were not the best.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BestOfSequence {
    pub(crate) generated_text: String,
    pub(crate) finish_reason: &'static str,
    pub(crate) generated_tokens: usize,
    pub(crate) seed: Option<u64>,
    pub(crate) prefill: Vec<Token>,
    pub(crate) tokens: Vec<Token>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct Token {
    pub(crate) id: u32,
    pub(crate) text: String,
    pub(crate) logprob: f32,
    pub(crate) special: bool,
}

/// An event of a stream; the last one has the whole text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StreamResponse {
    pub(crate) index: usize,
    pub(crate) token: Token,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) top_tokens: Vec<Token>,
    pub(crate) generated_text: Option<String>,
    pub(crate) details: Option<StreamDetails>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StreamDetails {
    pub(crate) finish_reason: &'static str,
    pub(crate) generated_tokens: usize,
    pub(crate) seed: Option<u64>,
    pub(crate) input_length: usize,
}

/// `GET /info`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Info {
    pub(crate) model_id: String,
    pub(crate) model_sha: Option<String>,
    pub(crate) model_dtype: String,
    pub(crate) model_device_type: &'static str,
    pub(crate) model_pipeline_tag: &'static str,
    pub(crate) max_concurrent_requests: usize,
    pub(crate) max_best_of: usize,
    pub(crate) max_stop_sequences: usize,
    pub(crate) max_input_tokens: usize,
    pub(crate) max_total_tokens: usize,
    pub(crate) validation_workers: usize,
    pub(crate) max_client_batch_size: usize,
    pub(crate) router: &'static str,
    pub(crate) version: &'static str,
    pub(crate) sha: Option<String>,
    pub(crate) docker_label: Option<String>,
}

/// `POST /tokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    pub(crate) inputs: String,
}

/// A token of `/tokenize`.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct SimpleToken {
    pub(crate) id: u32,
    pub(crate) text: String,
    /// Where it starts in the prompt's string, in characters.
    pub(crate) start: usize,
    /// Where it ends.
    pub(crate) stop: usize,
}
