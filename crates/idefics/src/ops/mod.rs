//! The facade over the tensor library and the kernels: the only module that names either.
//!
//! Activations are `f32` tensors, `[T, D]` with the tokens of all sequences laid end to end. Weights are never
//! tensors: an operation carries the [`Weight`](crate::checkpoint::Weight) it reads, where the checkpoint is
//! mapped, and the [`Gradient`] it adds to when it is trained. Operations are candle `CustomOp`s, so a backward pass
//! that is missing is an error there and never a silently lost gradient.

mod attention;
mod dropout;
mod gradient;
mod linear;
mod loss;
mod row_ops;
mod tape;

pub use attention::{GROWTH_ROWS, KeyValues, Span, attention_with_cache, attention_within};
pub use candle_core::Tensor;
pub use gradient::Gradient;
pub use idefics_kernels::backward::Job as AttentionGroup;
pub use idefics_kernels::{
    Compute, Isa,
    attention::{Heads, Visible},
    elementwise::Activation,
    rope::RotaryTable,
};
pub use linear::{Embedding, Linear, LowRank};
pub use loss::{LossSum, next_token_loss};
pub use row_ops::{
    Gate, LayerNorm, RmsNorm, activate, activate_gate, add, add_scaled, concat_columns, concat_rows,
    replace_rows, rotate, rows, select_rows,
};
pub use tape::Segment;

use candle_core::{CpuStorage, Device, Layout};
use row_ops::add_times;

/// How operations are computed: with which instructions, and what products are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The instruction tier.
    pub isa: Isa,
    /// What the factors of matrix products are rounded to, and how keys and values are kept.
    pub compute: Compute,
}

/// An operation of the tensor library failed: shapes that do not fit, or a tensor of the wrong kind.
#[derive(Debug, thiserror::Error)]
#[error("tensor operation failed: {0}")]
pub struct TensorError(#[from] candle_core::Error);

impl From<TensorError> for candle_core::Error {
    fn from(TensorError(error): TensorError) -> Self {
        error
    }
}

/// Result of an operation.
pub type Result<T, E = TensorError> = std::result::Result<T, E>;

/// A tensor of `values` with extents `shape`.
pub fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A copy of the elements, row-major.
pub fn to_vec(x: &Tensor) -> Result<Vec<f32>> {
    with_slice(x, |values, _| Ok(values.to_vec()))
}

/// The extents of a tensor of two dimensions, `[rows, width]`.
pub fn dims2(x: &Tensor) -> Result<(usize, usize)> {
    Ok(x.dims2()?)
}

/// The same elements under other extents.
pub fn reshape(x: &Tensor, shape: &[usize]) -> Result<Tensor> {
    Ok(x.reshape(shape)?)
}

/// Lends the elements of a contiguous `f32` tensor with its extents.
fn with_slice<R>(x: &Tensor, work: impl FnOnce(&[f32], &[usize]) -> candle_core::Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        return Err(TensorError(candle_core::Error::Msg("a tensor on the CPU expected".to_owned())));
    };
    Ok(work(contiguous(storage, layout)?, layout.dims())?)
}

/// Lends the elements of a gradient, which the tape may hand over in any layout.
fn gradient_slice<R>(dy: &Tensor, work: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let dy = dy.contiguous()?;
    with_slice(&dy, |dy, _| Ok(work(dy)?))
}

/// The elements of a contiguous `f32` storage.
fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a contiguous tensor expected, got strides {:?}", layout.stride());
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}
