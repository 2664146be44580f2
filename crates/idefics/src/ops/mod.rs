//! The facade over the tensor library and the kernels: the only module that names either.
//!
//! Activations are `f32` tensors, `[T, D]` with the tokens of all sequences laid end to end. Weights are never
//! tensors: an operation carries the [`Weight`](crate::checkpoint::Weight) it reads, where the checkpoint is
//! mapped, and the [`Gradient`] it adds to when it is trained. The tape is our own: the tensor library's adds
//! gradients up in new memory, on one thread or on a pool of its own. An operation without a backward pass refuses
//! a tensor that is on a tape, so a gradient is never silently lost.

mod attention;
mod dropout;
mod gradient;
mod kept;
mod linear;
mod loss;
mod row_ops;
mod tape;

pub use attention::{GROWTH_ROWS, KeyValues, Span, attention_with_cache, attention_within};
pub use gradient::Gradient;
pub use idefics_kernels::backward::Job as AttentionGroup;
pub use idefics_kernels::{
    Compute, Isa,
    attention::{Heads, Visible},
    elementwise::Activation,
    in_pool,
    rope::RotaryTable,
    rows::Run,
};
pub use linear::{Embedding, Linear, LowRank};
pub use loss::{LossSum, next_token_loss};
pub use row_ops::{
    Gate, LayerNorm, RmsNorm, activate, add, add_scaled, arrange_rows, concat_columns, concat_rows,
    replace_rows, rotate, rows, select_rows,
};
pub use tape::{Input, Segment};

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Device, Storage};
use row_ops::{activate_gate, add_times, expect_alike};
use tape::{Place, owned, record};

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

/// Numbers with extents, `f32`. Clones share them. Inside a [`Segment`] that runs on a tape, it knows its place there.
#[derive(Debug, Clone)]
pub struct Tensor {
    values: candle_core::Tensor,
    place: Option<Place>,
}

/// The elements of a contiguous tensor, lent.
struct Elements<S> {
    storage: S,
    range: Range<usize>,
}

impl Tensor {
    /// The extents.
    pub fn dims(&self) -> &[usize] {
        self.values.dims()
    }

    /// The same numbers, on no tape.
    fn without_tape(&self) -> Self {
        Self { values: self.values.clone(), place: None }
    }

    /// The elements, for an operation that records its way back.
    fn elements(&self) -> Result<impl Deref<Target = [f32]>> {
        let (storage, layout) = self.values.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(message(format!("a contiguous tensor expected, got strides {:?}", layout.stride())));
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Elements { storage, range: start..end }),
            _ => Err(message("f32 on the CPU expected".to_owned())),
        }
    }

    /// The elements, for an operation that has no way back.
    fn plain_elements(&self) -> Result<impl Deref<Target = [f32]>> {
        if self.place.is_some() {
            return Err(message("an operation without a backward pass on a tape".to_owned()));
        }
        self.elements()
    }
}

impl<S: Deref<Target = Storage>> Deref for Elements<S> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("looked at when it was lent"),
        }
    }
}

fn message(text: String) -> TensorError {
    TensorError(candle_core::Error::Msg(text))
}

/// A tensor of `values` with extents `shape`.
pub fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor { values: candle_core::Tensor::from_vec(values, shape, &Device::Cpu)?, place: None })
}

/// A copy of the elements, row-major.
pub fn to_vec(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.plain_elements()?.to_vec())
}

/// The extents of a tensor of two dimensions, `[rows, width]`.
pub fn dims2(x: &Tensor) -> Result<(usize, usize)> {
    Ok(x.values.dims2()?)
}
