//! Training of IDEFICS models: all weights, some of them, or low-rank factors beside them.
//!
//! `data` turns files into sequences; `packing` puts them into batches; `trainer` asks the model for their loss
//! and gradients, and `optim` moves the weights in `parameters`. `state` writes all of it so that a run that was
//! stopped anywhere goes on as if nothing had happened.

pub mod config;
pub mod data;
pub mod error;
pub mod freeze;
pub mod interface;
pub mod optim;
pub mod packing;
pub mod parameters;
mod rng;
pub mod schedule;

pub use error::TrainError;
