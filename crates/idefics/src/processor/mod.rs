//! Prompts in, model inputs out: token ids, pixels, and for each token the image it sees.

pub mod decode;
pub mod error;
pub mod fetch;
pub mod image_processor;
pub mod resize;
mod types;

pub use types::{ImageHash, ImageSource, PixelValues, Prompt, Segment, SequenceInputs};
