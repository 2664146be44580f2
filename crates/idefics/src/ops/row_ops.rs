//! Operations on rows: norms, activations, residuals, rotation, selection.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape};
use idefics_kernels::{elementwise, norm, rope::RotaryTable};

use super::{Activation, Context, Result, Tensor, contiguous, tensor, with_slice};
use crate::checkpoint::Weight;

/// Changes a copy of its argument in place; the shape stays.
trait Unary: Send + Sync + 'static {
    const NAME: &'static str;
    fn apply(&self, values: &mut [f32], dims: &[usize]);
}

/// Changes a copy of its first argument in place, reading a second one of the same shape.
trait Binary: Send + Sync + 'static {
    const NAME: &'static str;
    fn apply(&self, values: &mut [f32], other: &[f32]);
}

struct UnaryOp<T>(T);
struct BinaryOp<T>(T);

impl<T: Unary> CustomOp1 for UnaryOp<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut values = contiguous(storage, layout)?.to_vec();
        self.0.apply(&mut values, layout.dims());
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }
}

impl<T: Binary> CustomOp2 for BinaryOp<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
        other: &CpuStorage,
        other_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        if layout.dims() != other_layout.dims() {
            candle_core::bail!("{}: {:?} against {:?}", T::NAME, layout.dims(), other_layout.dims());
        }
        let mut values = contiguous(storage, layout)?.to_vec();
        self.0.apply(&mut values, contiguous(other, other_layout)?);
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }
}

/// `x / √(mean(x²) + eps) · weight` over the last dimension.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Arc<[f32]>,
    eps: f32,
}

/// `(x - mean) / √(variance + eps) · weight + bias` over the last dimension.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Arc<[f32]>,
    bias: Arc<[f32]>,
    eps: f32,
}

impl RmsNorm {
    /// A norm over vectors as long as `weight`.
    pub fn new(weight: &Weight, eps: f64) -> Self {
        Self { weight: weight.to_f32_vec().into(), eps: eps as f32 }
    }

    /// Normalises each run of `weight.len()` elements: whole rows, or each head of a row.
    pub fn forward(&self, ctx: Context, x: &Tensor) -> Result<Tensor> {
        unary(x, Normed { ctx, norm: self.clone() })
    }
}

impl LayerNorm {
    /// A norm over vectors as long as `weight`.
    pub fn new(weight: &Weight, bias: &Weight, eps: f64) -> Self {
        Self { weight: weight.to_f32_vec().into(), bias: bias.to_f32_vec().into(), eps: eps as f32 }
    }

    /// Normalises each run of `weight.len()` elements: whole rows, or each head of a row.
    pub fn forward(&self, ctx: Context, x: &Tensor) -> Result<Tensor> {
        unary(x, Normed { ctx, norm: self.clone() })
    }
}

struct Normed<N> {
    ctx: Context,
    norm: N,
}

impl Unary for Normed<RmsNorm> {
    const NAME: &'static str = "rms_norm";
    fn apply(&self, values: &mut [f32], _: &[usize]) {
        norm::rms_norm(self.ctx.isa, values, &self.norm.weight, self.norm.eps);
    }
}

impl Unary for Normed<LayerNorm> {
    const NAME: &'static str = "layer_norm";
    fn apply(&self, values: &mut [f32], _: &[usize]) {
        let LayerNorm { weight, bias, eps } = &self.norm;
        norm::layer_norm(self.ctx.isa, values, weight, bias, *eps);
    }
}

struct Activate(Context, Activation);

impl Unary for Activate {
    const NAME: &'static str = "activate";
    fn apply(&self, values: &mut [f32], _: &[usize]) {
        elementwise::activate(self.0.isa, self.1, values);
    }
}

impl Binary for Activate {
    const NAME: &'static str = "activate_gate";
    fn apply(&self, values: &mut [f32], up: &[f32]) {
        elementwise::activate_gate(self.0.isa, self.1, values, up);
    }
}

struct AddScaled(Context, Arc<[f32]>);

impl Binary for AddScaled {
    const NAME: &'static str = "add_scaled";
    fn apply(&self, values: &mut [f32], branch: &[f32]) {
        elementwise::add_scaled(self.0.isa, values, branch, &self.1);
    }
}

struct Rotate {
    table: Arc<RotaryTable>,
    positions: Arc<[u32]>,
}

impl Unary for Rotate {
    const NAME: &'static str = "rotate";
    fn apply(&self, values: &mut [f32], _: &[usize]) {
        self.table.rotate(values, &self.positions);
    }
}

/// `activation(x)`, element by element.
pub fn activate(ctx: Context, activation: Activation, x: &Tensor) -> Result<Tensor> {
    unary(x, Activate(ctx, activation))
}

/// `activation(gate) · up`, element by element.
pub fn activate_gate(ctx: Context, activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    binary(gate, up, Activate(ctx, activation))
}

/// `residual + scale · branch`; `scale` has one element, or one per channel.
pub fn add_scaled(ctx: Context, residual: &Tensor, branch: &Tensor, scale: &Arc<[f32]>) -> Result<Tensor> {
    binary(residual, branch, AddScaled(ctx, Arc::clone(scale)))
}

/// `residual + branch`.
pub fn add(residual: &Tensor, branch: &Tensor) -> Result<Tensor> {
    Ok((residual + branch)?)
}

/// Rotates every head of row `t` of `x` `[T, H·K]` by `positions[t]`.
pub fn rotate(x: &Tensor, table: &Arc<RotaryTable>, positions: &Arc<[u32]>) -> Result<Tensor> {
    unary(x, Rotate { table: Arc::clone(table), positions: Arc::clone(positions) })
}

/// Rows `indices` of `x`, in that order: `[T, D] -> [indices.len(), D]`.
pub fn select_rows(x: &Tensor, indices: &[usize]) -> Result<Tensor> {
    with_slice(x, |values, dims| {
        let width = dims[1..].iter().product::<usize>();
        let mut rows = Vec::with_capacity(indices.len() * width);
        for index in indices {
            let Some(row) = values.get(index * width..(index + 1) * width) else {
                candle_core::bail!("row {index} of {dims:?} asked for");
            };
            rows.extend_from_slice(row);
        }
        Ok((rows, width))
    })
    .and_then(|(rows, width)| tensor(rows, &[indices.len(), width]))
}

/// `x` with rows `indices` replaced by those of `rows`, in that order.
pub fn replace_rows(x: &Tensor, indices: &[usize], rows: &Tensor) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let mut values = super::to_vec(x)?;
    with_slice(rows, |rows, row_dims| {
        let width = dims[1..].iter().product::<usize>();
        if row_dims != [indices.len(), width] {
            candle_core::bail!("{} rows of {width} expected, got {row_dims:?}", indices.len());
        }
        for (index, row) in indices.iter().zip(rows.chunks_exact(width)) {
            values[index * width..(index + 1) * width].copy_from_slice(row);
        }
        Ok(())
    })?;
    tensor(values, &dims)
}

/// Rows `first..first + count` of `x`, sharing its elements.
pub fn rows(x: &Tensor, first: usize, count: usize) -> Result<Tensor> {
    Ok(x.narrow(0, first, count)?)
}

/// The rows of all parts, one after the other.
pub fn concat_rows(parts: &[Tensor]) -> Result<Tensor> {
    Ok(Tensor::cat(parts, 0)?)
}

/// The rows of `left` lengthened by those of `right`.
pub fn concat_columns(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    Ok(Tensor::cat(&[left, right], 1)?)
}

fn unary(x: &Tensor, op: impl Unary) -> Result<Tensor> {
    Ok(x.apply_op1(UnaryOp(op))?)
}

fn binary(x: &Tensor, other: &Tensor, op: impl Binary) -> Result<Tensor> {
    Ok(x.apply_op2(other, BinaryOp(op))?)
}
