//! The dialect of text-generation-inference, for `InferenceClient` and the users of the first IDEFICS endpoints.
//!
//! Differences from that server, on purpose: an error in a stream has its `error_type`, pictures are never part of
//! a message, and what this server cannot do is refused rather than ignored.

mod generate;
mod info;
mod markdown;
mod tokenize;
pub(crate) mod types;

pub(crate) use generate::{__path_generate, __path_generate_stream, compat, generate, generate_stream};
pub(crate) use info::{__path_info, info};
pub(crate) use tokenize::{__path_tokenize, tokenize};
