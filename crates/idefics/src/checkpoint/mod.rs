//! Model files: configuration, safetensors (single or sharded), the hub.

mod layout;
mod weight;

pub use layout::{Component, expected_tensors};
pub use weight::{DType, Weight};
