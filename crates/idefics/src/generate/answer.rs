//! What comes out of a generation: events on the way, the answers in the end.

use std::time::Duration;

use super::{FinishReason, TokenLogprob};

/// Something that happened: a token, or the end of an answer. A beam search has events only at its end, one for
/// each answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Index of the prompt.
    pub request: usize,
    /// Index among the answers to the prompt.
    pub sequence: usize,
    /// The new token.
    pub token_id: Option<u32>,
    /// Its log-probability, where it was asked for.
    pub logprob: Option<TokenLogprob>,
    /// Text that is certain by now; the texts of an answer joined are the answer.
    pub text: String,
    /// Set in the last event of an answer.
    pub finish_reason: Option<FinishReason>,
}

/// The answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// As many as `num_return_sequences`; best first in a beam search, which gives fewer where the options rule
    /// out so much that there are fewer.
    pub sequences: Vec<Completion>,
    /// What was counted.
    pub usage: Usage,
    /// How long it took.
    pub timings: Timings,
    /// The seed of the draws, where there were any.
    pub seed: Option<u64>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Generated tokens, the end token included.
    pub token_ids: Vec<u32>,
    /// The text behind the prompt, where there is a decoder.
    pub text: Option<String>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Log-probabilities of the tokens, where they were asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// The score of a beam: summed log-probability divided by a power of the length.
    pub score: Option<f32>,
}

/// Counts of one prompt and its answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that an earlier request had read already.
    pub cached_tokens: usize,
    /// Pictures of the prompt.
    pub images: usize,
    /// Those of them that were read for an earlier request, or stood in the prompt before.
    pub cached_images: usize,
    /// Tokens of all answers.
    pub generated_tokens: usize,
}

/// Wall time of one prompt. In a batch the time of shared steps counts for each prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From the request to its start.
    pub queued: Duration,
    /// From the start to the first token, pictures included.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}
