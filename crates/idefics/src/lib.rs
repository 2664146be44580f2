//! IDEFICS-1 in Rust: prompts of interleaved images and text in, text out.
//!
//! The data flows one way: [`processor`] turns [`Segment`]s into token ids, pixels and one image index per
//! token; [`model`] reads pictures once and tokens step by step; [`generate`] decides which token comes next.
//! [`checkpoint`] is the only module that opens model files, [`ops`] the only one that touches the tensor library.

pub mod adapter;
pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod dialogue;
mod files;
pub mod generate;
pub mod model;
pub mod ops;
mod pretrained;
pub mod processor;
pub mod quantize;

pub use files::{MemoryFiles, ModelFiles};
pub use pretrained::{ComputeType, Idefics, LoadError, LoadOptions};
pub use processor::{Processor, Prompt, Segment, SequenceInputs};
