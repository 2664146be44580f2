//! From logits to text: processors, sampling, beams, stopping, streaming.
//!
//! [`generate`] answers a batch of prompts, [`Generation`] is the same as an iterator of [`Event`]s, and
//! [`score`](score()) rates given texts. All of them know a model only as a [`StepModel`].

mod beam;
mod config;
mod engine;
mod error;
mod facade;
mod group;
mod lane;
mod logits_processor;
mod sampler;
mod scheduler;
mod score;
mod sequence;
mod step;
mod stopping;
mod stream;
#[cfg(test)]
mod stub;
mod warper;

pub use config::{DEFAULT_NEW_TOKENS, EarlyStopping, GenerationConfig, Lengths, padded};
pub use engine::{
    Completion, Event, Generated, Generation, Request, Timings, Usage, generate, generate_requests,
};
pub use error::GenerateError;
pub use logits_processor::{CustomProcessor, LogitsProcessors};
pub use sampler::{SequenceRng, TokenLogprob, argmax, log_softmax};
pub use scheduler::Scheduler;
pub use score::{ScoreOptions, ScoreRequest, Scored, score, score_continuations};
pub use step::{LogitsOf, Row, StepModel};
pub use stopping::FinishReason;
pub use stream::Decode;
