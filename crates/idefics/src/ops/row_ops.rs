//! Operations on rows: norms, activations, residuals, rotation, selection.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape};
use idefics_kernels::{backward, elementwise, norm, rope::RotaryTable};

use super::{Activation, Context, Gradient, Result, Tensor, contiguous, gradient_slice, tensor, with_slice};
use crate::checkpoint::Weight;

/// Changes a copy of its argument in place; the shape stays.
trait Unary: Send + Sync + 'static {
    const NAME: &'static str;
    fn apply(&self, values: &mut [f32]);
    /// The gradient of the argument `x` from that of the result.
    fn gradient(&self, x: &[f32], dy: &[f32]) -> Vec<f32>;
}

/// Changes a copy of its first argument in place, reading a second one of the same shape.
trait Binary: Send + Sync + 'static {
    const NAME: &'static str;
    fn apply(&self, values: &mut [f32], other: &[f32]);
    /// The gradients of both arguments from that of the result.
    fn gradients(&self, x: &[f32], other: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>);
}

struct UnaryOp<T>(T);
struct BinaryOp<T>(T);

impl<T: Unary> CustomOp1 for UnaryOp<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut values = contiguous(storage, layout)?.to_vec();
        self.0.apply(&mut values);
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dx = gradient_slice(dy, |dy| with_slice(x, |x, _| Ok(self.0.gradient(x, dy))))?;
        Ok(Some(tensor(dx, x.dims())?))
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

    fn bwd(
        &self,
        x: &Tensor,
        other: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dother) = gradient_slice(dy, |dy| {
            with_slice(x, |x, _| Ok(with_slice(other, |other, _| Ok(self.0.gradients(x, other, dy)))?))
        })?;
        Ok((Some(tensor(dx, x.dims())?), Some(tensor(dother, other.dims())?)))
    }
}

/// `x / √(mean(x²) + eps) · weight` over the last dimension.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Arc<[f32]>,
    eps: f32,
    gradient: Option<Gradient>,
}

/// `(x - mean) / √(variance + eps) · weight + bias` over the last dimension.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Arc<[f32]>,
    bias: Arc<[f32]>,
    eps: f32,
    gradient: Option<Gradient>,
    bias_gradient: Option<Gradient>,
}

/// What a branch is multiplied with before it joins the residual: `tanh(alpha)`, one number or one per channel.
#[derive(Debug, Clone)]
pub struct Gate {
    scale: Arc<[f32]>,
    gradient: Option<Gradient>,
}

impl RmsNorm {
    /// A norm over vectors as long as `weight`, and where its gradient goes if it is trained.
    pub fn new(weight: &Weight, eps: f64, gradient: Option<Gradient>) -> Self {
        Self { weight: weight.to_f32_vec().into(), eps: eps as f32, gradient }
    }

    /// Normalises each run of `weight.len()` elements: whole rows, or each head of a row.
    pub fn forward(&self, ctx: Context, x: &Tensor) -> Result<Tensor> {
        unary(x, Normed { ctx, norm: self.clone() })
    }
}

impl LayerNorm {
    /// A norm over vectors as long as `weight`, and where the gradients of weight and bias go if they are trained.
    pub fn new(
        weight: &Weight,
        bias: &Weight,
        eps: f64,
        gradient: Option<Gradient>,
        bias_gradient: Option<Gradient>,
    ) -> Self {
        let (weight, bias) = (weight.to_f32_vec().into(), bias.to_f32_vec().into());
        Self { weight, bias, eps: eps as f32, gradient, bias_gradient }
    }

    /// Normalises each run of `weight.len()` elements: whole rows, or each head of a row.
    pub fn forward(&self, ctx: Context, x: &Tensor) -> Result<Tensor> {
        unary(x, Normed { ctx, norm: self.clone() })
    }
}

impl Gate {
    /// The gate of `alpha`, one number or one per channel, and where the gradient of alpha goes if it is trained.
    pub fn new(alpha: &Weight, gradient: Option<Gradient>) -> Self {
        Self { scale: alpha.to_f32_vec().into_iter().map(f32::tanh).collect(), gradient }
    }
}

struct Normed<N> {
    ctx: Context,
    norm: N,
}

impl Unary for Normed<RmsNorm> {
    const NAME: &'static str = "rms_norm";

    fn apply(&self, values: &mut [f32]) {
        norm::rms_norm(self.ctx.isa, values, &self.norm.weight, self.norm.eps);
    }

    fn gradient(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let RmsNorm { weight, eps, gradient } = &self.norm;
        let mut dx = vec![0.0; x.len()];
        let mut dweight = gradient.as_ref().map(Gradient::lock);
        let dweight = dweight.as_mut().map(|sum| sum.as_mut_slice());
        backward::rms_norm(self.ctx.isa, x, weight, *eps, dy, &mut dx, dweight);
        dx
    }
}

impl Unary for Normed<LayerNorm> {
    const NAME: &'static str = "layer_norm";

    fn apply(&self, values: &mut [f32]) {
        let LayerNorm { weight, bias, eps, .. } = &self.norm;
        norm::layer_norm(self.ctx.isa, values, weight, bias, *eps);
    }

    fn gradient(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let LayerNorm { weight, eps, gradient, bias_gradient, .. } = &self.norm;
        let mut dx = vec![0.0; x.len()];
        let (mut dweight, mut dbias) =
            (gradient.as_ref().map(Gradient::lock), bias_gradient.as_ref().map(Gradient::lock));
        let dweight = dweight.as_mut().map(|sum| sum.as_mut_slice());
        let dbias = dbias.as_mut().map(|sum| sum.as_mut_slice());
        backward::layer_norm(self.ctx.isa, x, weight, *eps, dy, &mut dx, dweight, dbias);
        dx
    }
}

struct Activate(Context, Activation);

impl Unary for Activate {
    const NAME: &'static str = "activate";

    fn apply(&self, values: &mut [f32]) {
        elementwise::activate(self.0.isa, self.1, values);
    }

    fn gradient(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let mut dx = dy.to_vec();
        backward::activate(self.0.isa, self.1, x, &mut dx);
        dx
    }
}

impl Binary for Activate {
    const NAME: &'static str = "activate_gate";

    fn apply(&self, values: &mut [f32], up: &[f32]) {
        elementwise::activate_gate(self.0.isa, self.1, values, up);
    }

    fn gradients(&self, gate: &[f32], up: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        backward::activate_gate(self.0.isa, self.1, gate, up, dy)
    }
}

struct AddScaled(Context, Gate);

impl Binary for AddScaled {
    const NAME: &'static str = "add_scaled";

    fn apply(&self, values: &mut [f32], branch: &[f32]) {
        elementwise::add_scaled(self.0.isa, values, branch, &self.1.scale);
    }

    fn gradients(&self, _: &[f32], branch: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let Gate { scale, gradient } = &self.1;
        let Some(gradient) = gradient else {
            return (dy.to_vec(), backward::add_scaled(branch, scale, dy, None));
        };
        let mut dscale = vec![0.0; scale.len()];
        let dbranch = backward::add_scaled(branch, scale, dy, Some(&mut dscale));
        // The scale is tanh(alpha), whose slope is 1 - tanh².
        let slopes = dscale.iter().zip(scale.iter()).map(|(dscale, scale)| dscale * (1.0 - scale * scale));
        gradient.add_at(0, &slopes.collect::<Vec<_>>());
        (dy.to_vec(), dbranch)
    }
}

/// Not the tensor library's own, which would wake a second pool of threads beside ours.
struct Add;

impl Binary for Add {
    const NAME: &'static str = "add";

    fn apply(&self, values: &mut [f32], other: &[f32]) {
        elementwise::add(values, other);
    }

    fn gradients(&self, _: &[f32], _: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        (dy.to_vec(), dy.to_vec())
    }
}

struct Rotate {
    table: Arc<RotaryTable>,
    positions: Arc<[u32]>,
}

impl Unary for Rotate {
    const NAME: &'static str = "rotate";

    fn apply(&self, values: &mut [f32]) {
        self.table.rotate(values, &self.positions);
    }

    fn gradient(&self, _: &[f32], dy: &[f32]) -> Vec<f32> {
        let mut dx = dy.to_vec();
        self.table.rotate_back(&mut dx, &self.positions);
        dx
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

/// `residual + gate · branch`.
pub fn add_scaled(ctx: Context, residual: &Tensor, branch: &Tensor, gate: &Gate) -> Result<Tensor> {
    binary(residual, branch, AddScaled(ctx, gate.clone()))
}

/// `residual + scale · branch`.
pub(super) fn add_times(ctx: Context, residual: &Tensor, branch: &Tensor, scale: f32) -> Result<Tensor> {
    let gate = Gate { scale: Arc::new([scale]), gradient: None };
    binary(residual, branch, AddScaled(ctx, gate))
}

/// `residual + branch`.
pub fn add(residual: &Tensor, branch: &Tensor) -> Result<Tensor> {
    binary(residual, branch, Add)
}

/// Rotates every head of row `t` of `x` `[T, H·K]` by `positions[t]`.
pub fn rotate(x: &Tensor, table: &Arc<RotaryTable>, positions: &Arc<[u32]>) -> Result<Tensor> {
    unary(x, Rotate { table: Arc::clone(table), positions: Arc::clone(positions) })
}

/// Rows `indices` of `x`, in that order and each once: `[T, D] -> [indices.len(), D]`.
pub fn select_rows(x: &Tensor, indices: &Arc<[usize]>) -> Result<Tensor> {
    Ok(x.apply_op1(SelectRows(Arc::clone(indices)))?)
}

/// `x` with rows `indices`, each once, replaced by those of `rows`, in that order.
pub fn replace_rows(x: &Tensor, indices: &Arc<[usize]>, rows: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op2(rows, ReplaceRows(Arc::clone(indices)))?)
}

struct SelectRows(Arc<[usize]>);

struct ReplaceRows(Arc<[usize]>);

impl CustomOp1 for SelectRows {
    fn name(&self) -> &'static str {
        "select_rows"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let rows = gather(contiguous(storage, layout)?, width, &self.0)?;
        Ok((CpuStorage::F32(rows), (self.0.len(), width).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (count, width) = x.dims2()?;
        let mut dx = vec![0.0; count * width];
        gradient_slice(dy, |dy| Ok(scatter(dy, width, &self.0, &mut dx)?))?;
        Ok(Some(tensor(dx, x.dims())?))
    }
}

impl CustomOp2 for ReplaceRows {
    fn name(&self) -> &'static str {
        "replace_rows"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
        rows: &CpuStorage,
        rows_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        if rows_layout.dims() != [self.0.len(), width] {
            candle_core::bail!("{} rows of {width} expected, got {:?}", self.0.len(), rows_layout.dims());
        }
        let mut values = contiguous(storage, layout)?.to_vec();
        scatter(contiguous(rows, rows_layout)?, width, &self.0, &mut values)?;
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        rows: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, width) = x.dims2()?;
        let (dx, drows) = gradient_slice(dy, |dy| {
            let mut dx = dy.to_vec();
            scatter(&vec![0.0; self.0.len() * width], width, &self.0, &mut dx)?;
            Ok((dx, gather(dy, width, &self.0)?))
        })?;
        Ok((Some(tensor(dx, x.dims())?), Some(tensor(drows, rows.dims())?)))
    }
}

fn gather(values: &[f32], width: usize, indices: &[usize]) -> candle_core::Result<Vec<f32>> {
    let mut rows = Vec::with_capacity(indices.len() * width);
    for index in indices {
        let Some(row) = values.get(index * width..(index + 1) * width) else {
            candle_core::bail!("row {index} of {} asked for", values.len() / width);
        };
        rows.extend_from_slice(row);
    }
    Ok(rows)
}

fn scatter(rows: &[f32], width: usize, indices: &[usize], into: &mut [f32]) -> candle_core::Result<()> {
    let n = into.len() / width;
    for (index, row) in indices.iter().zip(rows.chunks_exact(width)) {
        let Some(target) = into.get_mut(index * width..(index + 1) * width) else {
            candle_core::bail!("row {index} of {n} asked for");
        };
        target.copy_from_slice(row);
    }
    Ok(())
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
