//! CPU arithmetic of IDEFICS on plain slices.
//!
//! Nothing here knows a layer's name, a file or a tensor library. Every routine takes an [`Isa`], which is the
//! proof that the processor has the instructions, and gives the same bits for any number of threads and for
//! any number of rows in the call: each output element is summed in an order that depends on the inner
//! dimension alone.

#![allow(unsafe_code)]
// The one home of SIMD; every block states what makes it sound.
// Vector helpers must compile inside the `#[target_feature]` function that calls them, or each call spills
// its registers.
#![allow(clippy::inline_always)]
// Kernels walk several arrays by one index.
#![allow(clippy::needless_range_loop)]

pub mod adamw;
pub mod allocator;
pub mod attention;
pub mod backward;
pub mod elementwise;
mod isa;
pub mod linear;
mod math;
pub mod nested;
pub mod nf4;
pub mod norm;
mod parallel;
pub mod probe;
pub mod q8;
pub mod rope;
pub mod rows;
mod simd;

pub use isa::{Isa, Tier};
pub use linear::{Compute, Matrix};
pub use parallel::in_pool;
