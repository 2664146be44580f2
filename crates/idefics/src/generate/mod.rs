//! From logits to text: processors, sampling, beams, stopping, streaming.
//!
//! [`generate`] answers a list of prompts, [`Generation`] is the same as an iterator of [`Event`]s, [`Engine`]
//! answers whatever comes while it runs, and [`score`](score()) rates given texts. All of them know a model only
//! as a [`StepModel`].

mod admission;
mod answer;
mod batch;
mod beam;
mod config;
mod engine;
mod error;
mod facade;
mod generation;
mod group;
mod image_cache;
mod lane;
mod logits_processor;
mod memory;
mod prefix_cache;
mod request;
mod sampler;
mod scheduler;
mod score;
mod sequence;
mod stats;
mod step;
mod stopping;
mod stream;
#[cfg(test)]
mod stub;
mod warper;

pub use answer::{Completion, Event, Generated, Timings, Usage};
pub use config::{DEFAULT_NEW_TOKENS, EarlyStopping, GenerationConfig, Lengths, padded};
pub use engine::{
    AnswerError, Drain, Engine, EngineEvent, EngineOptions, Listener, Rejected, SharedProcessor, Submission,
    Ticket,
};
pub use error::GenerateError;
pub use generation::{Generation, answer_each, generate, generate_requests};
pub use logits_processor::{CustomProcessor, LogitsProcessors};
pub use memory::{Memory, available_bytes};
pub use request::Request;
pub(crate) use sampler::LogNormalizer;
pub use sampler::{SequenceRng, TokenLogprob, argmax, log_softmax};
pub use scheduler::Scheduler;
pub use score::{ScoreOptions, ScoreRequest, Scored, score, score_continuations};
pub use stats::Stats;
pub use step::{LogitsOf, Row, StepModel};
pub use stopping::FinishReason;
pub use stream::Decode;
