//! Model files: configuration, safetensors (single or sharded), the hub.

mod weight;

pub use weight::{DType, Weight};
