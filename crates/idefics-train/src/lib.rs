//! Training of IDEFICS models: all weights, some of them, or low-rank factors beside them.
//!
//! `data` turns files into sequences; `packing` puts them into batches; `trainer` asks the model for their loss
//! and gradients, and `optim` moves the weights in `parameters`. `state` writes all of it so that a run that was
//! stopped anywhere goes on as if nothing had happened. `init` builds the models to begin with, `adapter` makes and
//! writes low-rank factors.

pub mod adapter;
pub mod check;
pub mod config;
pub mod data;
pub mod error;
pub mod freeze;
pub mod init;
pub mod learner;
pub mod memory;
pub mod metrics;
pub mod moments;
pub mod optim;
pub mod packing;
pub mod parameters;
pub mod plot;
pub mod random;
mod rng;
pub mod schedule;
pub mod spikes;
pub mod state;
pub mod stream;
pub mod tensorboard;
pub mod trainer;

pub use error::TrainError;
