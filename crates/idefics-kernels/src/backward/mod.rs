//! Gradients of the forward kernels.
//!
//! Each function takes what its forward twin read and the gradient of what it wrote. Gradients of inputs are
//! written, gradients of weights are added to what is there. As in the forward kernels the result has the same
//! bits for any number of threads: partial sums cover fixed runs of rows and are added in their order.

mod attention;
mod columns;
mod cross_entropy;
mod elementwise;
mod linear;
mod norm;
#[cfg(target_arch = "x86_64")]
mod outer;
mod product;

pub use attention::{Job, attention};
pub use columns::add_column_sums;
pub use cross_entropy::{RowLoss, cross_entropy};
pub use elementwise::{activate, activate_gate, add_scaled};
pub use linear::{add_linear_weight, linear_input, linear_weight};
pub use norm::{layer_norm, rms_norm};
