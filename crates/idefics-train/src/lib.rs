//! Training of IDEFICS-1: new models from two unimodal ones.

pub mod init;
pub mod random;
