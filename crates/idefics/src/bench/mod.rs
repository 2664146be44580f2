//! How fast this machine runs a model, as figures and as shares of what the machine gave in the same run.
//!
//! Machines are shared and clocks move, so everything is repeated in turns and medians are reported: each round
//! first asks the machine what it gives now, then takes every measurement once.

mod measure;
mod quality;
mod random_weights;

pub use measure::{Answer, Decode, Machine, Perceiver, Plan, Prefill, Product, Report, Vision, run};
pub use quality::{Distributions, Quality, TEXT, distributions};
pub use random_weights::{Format, RandomWeights, shape};
