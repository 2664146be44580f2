//! Requests and responses as JSON. Unknown fields are ignored; known ones that are not supported are refused where
//! they would matter.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};
use utoipa::ToSchema;

/// `POST /v1/chat/completions`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ChatRequest {
    /// The name of the model, or nothing.
    pub(crate) model: Option<String>,
    /// The dialogue so far. If the last message is the assistant's, it is continued.
    pub(crate) messages: Vec<Message>,
    /// Send the answer as it is written.
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    /// Longest answer in tokens.
    #[schema(minimum = 1)]
    pub(crate) max_tokens: Option<f64>,
    /// The newer name of `max_tokens`, which wins.
    #[schema(minimum = 1)]
    pub(crate) max_completion_tokens: Option<f64>,
    /// Report the log-probability of each token.
    pub(crate) logprobs: Option<bool>,
    /// Report so many likely tokens beside each.
    #[schema(minimum = 0, maximum = 20)]
    pub(crate) top_logprobs: Option<f64>,
    /// `{"type": "text"}`, `{"type": "json_object"}`, or `{"type": "json_schema", "json_schema": {"schema"}}`, which
    /// answers are held to.
    #[schema(value_type = Option<Object>)]
    pub(crate) response_format: Option<Value>,
    /// Must be empty: these models call no tools.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(crate) tools: Option<Value>,
    #[schema(value_type = Option<Vec<Object>>)]
    pub(crate) functions: Option<Value>,
    /// `["text"]` alone.
    pub(crate) modalities: Option<Vec<String>>,
}

/// A request with the options that all requests share, for the `OpenAPI` document.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only described")]
pub(crate) struct WithCommon<T> {
    #[schema(inline)]
    #[serde(flatten)]
    request: T,
    #[serde(flatten)]
    common: Common,
}

/// What chat and plain completions share.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct Common {
    /// 0 takes the best token at each step.
    #[schema(minimum = 0, maximum = 2)]
    pub(crate) temperature: Option<f64>,
    #[schema(minimum = 0, maximum = 1)]
    pub(crate) top_p: Option<f64>,
    /// Answers to give.
    #[schema(minimum = 1)]
    pub(crate) n: Option<f64>,
    /// Texts that end an answer and are not part of it.
    pub(crate) stop: Option<OneOrMany>,
    /// The same seed gives the same answer.
    #[schema(value_type = Option<i64>)]
    pub(crate) seed: Option<Number>,
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) frequency_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub(crate) presence_penalty: Option<f64>,
    /// Token ids to numbers from -100 to 100.
    pub(crate) logit_bias: Option<BTreeMap<String, f64>>,
    /// Not `OpenAI`'s: draw among so many best tokens; 0 is off.
    #[schema(minimum = 0)]
    pub(crate) top_k: Option<f64>,
    /// Not `OpenAI`'s: draw among tokens of at least this share of the best one's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub(crate) min_p: Option<f64>,
    /// Not `OpenAI`'s: above 1 makes tokens of prompt and answer less likely.
    pub(crate) repetition_penalty: Option<f64>,
    /// Not `OpenAI`'s: no end before the answer has so many tokens.
    #[schema(minimum = 0)]
    pub(crate) min_tokens: Option<f64>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// Send the usage in a chunk of its own, the last.
    pub(crate) include_usage: Option<bool>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Message {
    /// `system`, `developer`, `user` or `assistant`.
    pub(crate) role: String,
    pub(crate) content: Option<Content>,
    #[schema(value_type = Option<Vec<Object>>)]
    pub(crate) tool_calls: Option<Value>,
}

/// A text, or texts and pictures in the order they are read.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of parts")]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Part {
    /// `text` or `image_url`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) text: Option<String>,
    pub(crate) image_url: Option<ImageUrl>,
}

/// A `data:` URI, or an address where the server allows it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an object with `url`")]
pub(crate) enum ImageUrl {
    Plain(String),
    Object { url: String },
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Answer to a chat request.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatResponse {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: &'static str,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: Usage,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: AnswerMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerMessage {
    pub(crate) role: &'static str,
    pub(crate) content: String,
    pub(crate) refusal: Option<String>,
}

/// A piece of a streamed chat answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'static str,
    pub(crate) choices: Vec<ChunkChoice>,
    pub(crate) usage: Option<Usage>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChunkChoice {
    pub(crate) index: usize,
    pub(crate) delta: Delta,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatTokenLogprob>,
    pub(crate) refusal: Option<String>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct ChatTokenLogprob {
    #[serde(flatten)]
    pub(crate) token: TokenWithLogprob,
    pub(crate) top_logprobs: Vec<TokenWithLogprob>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub(crate) struct TokenWithLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    /// The token's bytes, where it may be part of a character.
    pub(crate) bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    pub(crate) prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct PromptTokensDetails {
    /// Tokens that an earlier request had read already.
    pub(crate) cached_tokens: usize,
    /// Tokens that stand for pictures.
    pub(crate) image_tokens: usize,
}

/// `POST /v1/completions`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionRequest {
    pub(crate) model: Option<String>,
    #[schema(value_type = Object)]
    pub(crate) prompt: PromptForm,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    /// Longest answer in tokens; 16 if not said.
    #[schema(minimum = 1)]
    pub(crate) max_tokens: Option<f64>,
    /// Report log-probabilities, and so many likely tokens beside each.
    #[schema(minimum = 0, maximum = 20)]
    pub(crate) logprobs: Option<f64>,
    /// Put the prompt in front of the answer.
    pub(crate) echo: Option<bool>,
    /// Write so many answers and return the `n` likeliest.
    #[schema(minimum = 1)]
    pub(crate) best_of: Option<f64>,
    #[schema(value_type = Option<String>)]
    pub(crate) suffix: Option<Value>,
    /// As for chat.
    #[schema(value_type = Option<Object>)]
    pub(crate) response_format: Option<Value>,
}

/// One prompt or several, in words or token ids, or words with pictures.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, token ids, an object with `prompt_string`, or a list of one kind"
)]
pub(crate) enum PromptForm {
    Text(String),
    WithImages(PromptWithImages),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ManyIds(Vec<Vec<u32>>),
    ManyWithImages(Vec<PromptWithImages>),
}

/// The form of llama.cpp: each `<__media__>` in the words stands for the next picture.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct PromptWithImages {
    pub(crate) prompt_string: String,
    /// Pictures in base64, or `data:` URIs.
    pub(crate) multimodal_data: Vec<String>,
}

/// Answer to a completion request, and each piece of a streamed one.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionResponse<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'static str,
    pub(crate) choices: Vec<CompletionChoice>,
    pub(crate) usage: Option<Usage>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<CompletionLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    pub(crate) tokens: Vec<String>,
    pub(crate) token_logprobs: Vec<f32>,
    pub(crate) top_logprobs: Vec<BTreeMap<String, f32>>,
    pub(crate) text_offset: Vec<usize>,
}

/// `GET /v1/models`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<ModelObject>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelObject {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) owned_by: &'static str,
    /// Not `OpenAI`'s.
    pub(crate) meta: ModelMeta,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelMeta {
    /// `instruct` or `base`.
    pub(crate) form: &'static str,
    pub(crate) context_length: usize,
    pub(crate) vocab_size: usize,
    pub(crate) dtype: String,
    pub(crate) input_modalities: [&'static str; 2],
    pub(crate) max_images: usize,
}
