//! IDEFICS over HTTP: the dialects of `OpenAI` and of text-generation-inference, metrics, and a web chat.
//!
//! [`Server::bind`] listens at once and says 503 until [`Server::run`] has got a model. A request goes through
//! these stations: connection (`listen`: time limits, number) → observation (`observe`: request id, log line,
//! metrics) → rules (`gate`: host, API key, readiness, places) → a dialect (`openai`, `tgi`: JSON to prompt and
//! options) → `service` (pictures decoded off the async threads, request handed to the engine) → events back
//! through the dialect. Dropping anything on the way cancels what lies behind it.
//!
//! This crate sees no tensor: it knows the engine as a [`Backend`].

mod auth;
mod backend;
mod body;
mod error;
mod gate;
mod grammar;
mod health;
mod ids;
mod listen;
pub mod logging;
mod media;
mod metrics;
mod observe;
mod openai;
mod openapi;
mod options;
mod pages;
mod router;
mod sampling;
#[cfg(target_os = "linux")]
mod sandbox;
mod service;
mod state;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tgi;
mod together;
mod trace;

pub use auth::{ApiKeys, KeyError};
pub use backend::Backend;
pub use listen::{ServeError, Server};
pub use options::{Limits, Sandbox, ServerOptions};
pub use router::WrongOrigin;
pub use service::{Loaded, ModelCard};
pub use trace::Traces;
