//! Training of IDEFICS-1: new models from two unimodal ones, and adapters.

pub mod adapter;
pub mod init;
pub mod random;
