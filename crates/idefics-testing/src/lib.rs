//! What several crates' tests need: fixtures, tolerances, hand-built checkpoints, the `LLaMA` tokenizer.
//!
//! Expected numbers come from the reference (`fixtures/`, written by `reference/`), never from this project.
//! Everything here is for tests: a helper that cannot do its work panics with the reason, and none skips
//! silently.

mod close;
mod fixtures;
mod golden;
mod llama_tokenizer;

pub use close::{Tolerance, assert_close, tolerance};
pub use fixtures::{Tensors, fixture, fixture_json};
pub use golden::{Golden, fnv1a_64, golden_fill, write_golden_checkpoint};
pub use llama_tokenizer::{TokenizerKind, idefics_tokenizer_dir, llama_tokenizer_dir};
