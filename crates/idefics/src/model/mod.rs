//! The forward pass: pictures through `vision` and `perceiver` once, tokens through `decoder` layers with a
//! `gated_cross_attention` block before every `cross_layer_interval`-th.
//!
//! Everything works on the tokens of all sequences laid end to end, `[T, D]`, with no padding. Dimension
//! letters are defined in `MODEL.md`. This module opens no file: weights come from a [`WeightSource`].

mod cache;
mod decoder;
mod embedding;
mod error;
mod forward;
mod gated_cross_attention;
mod kept_images;
mod loader;
mod mlp;
mod observe;
mod perceiver;
mod read_ahead;
mod sizes;
mod training;
mod vision;

pub use cache::{ImageStates, SequenceCache};
pub use error::ModelError;
pub use forward::{Model, OtherSizes};
pub use kept_images::KeptImages;
pub use loader::WeightSource;
pub use observe::{Observer, Stage, unobserved};
pub use training::{LossOptions, Tape, TrainingSequence};
