//! Operations on rows: norms, activations, residuals, rotation, selection.

use std::sync::Arc;

use idefics_kernels::{
    backward, elementwise, norm,
    rope::RotaryTable,
    rows::{self, Run},
};

use super::{Activation, Context, Gradient, Result, Tensor, dims2, message, owned, record, tensor};
use crate::checkpoint::Weight;

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
        let y = tensor(norm::rms_norm(ctx.isa, &x.elements()?, &self.weight, self.eps), x.dims())?;
        let (norm, kept) = (self.clone(), x.without_tape());
        Ok(record(&[x], y, self.gradient.is_some(), move |dy, slopes| {
            let mut dweight = norm.gradient.as_ref().map(Gradient::lock);
            let dweight = dweight.as_mut().map(|sum| sum.as_mut_slice());
            let x = kept.elements()?;
            slopes.add(0, backward::rms_norm(ctx.isa, &x, &norm.weight, norm.eps, &dy, dweight));
            Ok(())
        }))
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
        let y = norm::layer_norm(ctx.isa, &x.elements()?, &self.weight, &self.bias, self.eps);
        let (norm, kept) = (self.clone(), x.without_tape());
        let trains = self.gradient.is_some() || self.bias_gradient.is_some();
        Ok(record(&[x], tensor(y, x.dims())?, trains, move |dy, slopes| {
            let (mut dweight, mut dbias) =
                (norm.gradient.as_ref().map(Gradient::lock), norm.bias_gradient.as_ref().map(Gradient::lock));
            let dweight = dweight.as_mut().map(|sum| sum.as_mut_slice());
            let dbias = dbias.as_mut().map(|sum| sum.as_mut_slice());
            let x = kept.elements()?;
            slopes.add(0, backward::layer_norm(ctx.isa, &x, &norm.weight, norm.eps, &dy, dweight, dbias));
            Ok(())
        }))
    }
}

impl Gate {
    /// The gate of `alpha`, one number or one per channel, and where the gradient of alpha goes if it is trained.
    pub fn new(alpha: &Weight, gradient: Option<Gradient>) -> Self {
        Self { scale: alpha.to_f32_vec().into_iter().map(f32::tanh).collect(), gradient }
    }
}

/// `activation(x)`, element by element.
pub fn activate(ctx: Context, activation: Activation, x: &Tensor) -> Result<Tensor> {
    let y = tensor(elementwise::activate(ctx.isa, activation, &x.elements()?), x.dims())?;
    let kept = x.without_tape();
    Ok(record(&[x], y, false, move |dy, slopes| {
        let mut dx = owned(dy);
        backward::activate(ctx.isa, activation, &kept.elements()?, &mut dx);
        slopes.add(0, dx);
        Ok(())
    }))
}

/// `activation(gate) · up`, element by element.
pub(super) fn activate_gate(
    ctx: Context,
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
) -> Result<Tensor> {
    expect_alike("activate_gate", gate, up)?;
    let y = elementwise::activate_gate(ctx.isa, activation, &gate.elements()?, &up.elements()?);
    let kept = (gate.without_tape(), up.without_tape());
    Ok(record(&[gate, up], tensor(y, gate.dims())?, false, move |dy, slopes| {
        let mut dgate = owned(dy);
        let (gate, up) = (kept.0.elements()?, kept.1.elements()?);
        let dup = backward::activate_gate(ctx.isa, activation, &gate, &up, &mut dgate);
        slopes.add(0, dgate);
        slopes.add(1, dup);
        Ok(())
    }))
}

/// `residual + gate · branch`.
pub fn add_scaled(ctx: Context, residual: &Tensor, branch: &Tensor, gate: &Gate) -> Result<Tensor> {
    expect_alike("add_scaled", residual, branch)?;
    let y = elementwise::add_scaled(ctx.isa, &residual.elements()?, &branch.elements()?, &gate.scale);
    let (kept, Gate { scale, gradient }) = (branch.without_tape(), gate.clone());
    let trains = gradient.is_some();
    Ok(record(&[residual, branch], tensor(y, residual.dims())?, trains, move |dy, slopes| {
        let mut dscale = gradient.as_ref().map(|_| vec![0.0; scale.len()]);
        let branch = kept.elements()?;
        slopes.add(1, backward::add_scaled(ctx.isa, &branch, &scale, &dy, dscale.as_deref_mut()));
        slopes.add(0, dy);
        if let (Some(gradient), Some(dscale)) = (gradient, dscale) {
            // The scale is tanh(alpha), whose slope is 1 - tanh².
            let slopes =
                dscale.iter().zip(scale.iter()).map(|(dscale, scale)| dscale * (1.0 - scale * scale));
            gradient.add_at(0, &slopes.collect::<Vec<_>>());
        }
        Ok(())
    }))
}

/// `residual + scale · branch`.
pub(super) fn add_times(ctx: Context, residual: &Tensor, branch: &Tensor, scale: f32) -> Result<Tensor> {
    add_scaled(ctx, residual, branch, &Gate { scale: Arc::new([scale]), gradient: None })
}

/// `residual + branch`.
pub fn add(residual: &Tensor, branch: &Tensor) -> Result<Tensor> {
    expect_alike("add", residual, branch)?;
    let y = elementwise::sum(&residual.elements()?, &branch.elements()?);
    Ok(record(&[residual, branch], tensor(y, residual.dims())?, false, |dy, slopes| {
        slopes.add(0, Arc::clone(&dy));
        slopes.add(1, dy);
        Ok(())
    }))
}

/// Rotates every head of row `t` of `x` `[T, H·K]` by `positions[t]`.
pub fn rotate(x: &Tensor, table: &Arc<RotaryTable>, positions: &Arc<[u32]>) -> Result<Tensor> {
    let y = tensor(table.rotate(&x.elements()?, positions), x.dims())?;
    let (table, positions) = (Arc::clone(table), Arc::clone(positions));
    Ok(record(&[x], y, false, move |dy, slopes| {
        let mut dx = owned(dy);
        table.rotate_back(&mut dx, &positions);
        slopes.add(0, dx);
        Ok(())
    }))
}

/// The rows of `runs` one behind the other: `parts` `[·, D]` to `[Σ count, D]`.
pub fn arrange_rows(parts: &[&Tensor], runs: &Arc<[Run]>) -> Result<Tensor> {
    let width = dims2(parts.first().ok_or_else(|| message("rows of no tensor asked for".to_owned()))?)?.1;
    for (index, part) in parts.iter().enumerate() {
        let (count, own) = dims2(part)?;
        let reach = runs.iter().filter(|run| run.part == index).map(|run| run.first + run.count).max();
        if own != width || reach > Some(count) {
            return Err(message(format!("rows below {reach:?} of {width} expected, got {:?}", part.dims())));
        }
    }
    let elements = parts.iter().map(|part| part.elements()).collect::<Result<Vec<_>>>()?;
    let slices: Vec<&[f32]> = elements.iter().map(|part| &**part).collect();
    let y = rows::arranged(&slices, width, runs);
    let y = tensor(y, &[runs.iter().map(|run| run.count).sum(), width])?;
    let (runs, extents) =
        (Arc::clone(runs), parts.iter().map(|part| dims2(part)).collect::<Result<Vec<_>>>()?);
    Ok(record(parts, y, false, move |dy, slopes| {
        for (part, (count, width)) in extents.into_iter().enumerate() {
            if slopes.wants(part) {
                let mut dx = rows::zeros(count * width);
                rows::add_arranged(&dy, width, &runs, part, &mut dx);
                slopes.add(part, dx);
            }
        }
        Ok(())
    }))
}

/// Rows `indices` of `x`, in that order: `[T, D] -> [indices.len(), D]`.
pub fn select_rows(x: &Tensor, indices: &[usize]) -> Result<Tensor> {
    let mut runs: Vec<Run> = Vec::new();
    for &index in indices {
        match runs.last_mut() {
            Some(run) if run.first + run.count == index => run.count += 1,
            _ => runs.push(Run { part: 0, first: index, count: 1 }),
        }
    }
    arrange_rows(&[x], &runs.into())
}

/// `x` with rows `indices`, each once, replaced by those of `rows`, in that order.
pub fn replace_rows(x: &Tensor, indices: &Arc<[usize]>, rows: &Tensor) -> Result<Tensor> {
    let (count, width) = dims2(x)?;
    if rows.dims() != [indices.len(), width] {
        return Err(message(format!("{} rows of {width} expected, got {:?}", indices.len(), rows.dims())));
    }
    if let Some(index) = indices.iter().find(|index| **index >= count) {
        return Err(message(format!("row {index} of {count} asked for")));
    }
    let y = rows::replaced(&x.elements()?, width, indices, &rows.elements()?);
    let indices = Arc::clone(indices);
    Ok(record(&[x, rows], tensor(y, x.dims())?, false, move |dy, slopes| {
        let runs: Vec<Run> = indices.iter().map(|index| Run { part: 0, first: *index, count: 1 }).collect();
        slopes.add(1, rows::arranged(&[&dy], width, &runs));
        let mut dx = owned(dy);
        for index in &*indices {
            dx[index * width..(index + 1) * width].fill(0.0);
        }
        slopes.add(0, dx);
        Ok(())
    }))
}

/// Rows `first..first + count` of `x`, which is on no tape, sharing its elements.
pub fn rows(x: &Tensor, first: usize, count: usize) -> Result<Tensor> {
    drop(x.plain_elements()?);
    Ok(Tensor { values: x.values.narrow(0, first, count)?, place: None })
}

/// The rows of all parts, one after the other.
pub fn concat_rows(parts: &[&Tensor]) -> Result<Tensor> {
    let run = |(part, x): (usize, &&Tensor)| Ok(Run { part, first: 0, count: dims2(x)?.0 });
    arrange_rows(parts, &parts.iter().enumerate().map(run).collect::<Result<Arc<[Run]>>>()?)
}

/// The rows of `left` lengthened by those of `right`; both are on no tape.
pub fn concat_columns(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    drop((left.plain_elements()?, right.plain_elements()?));
    Ok(Tensor { values: candle_core::Tensor::cat(&[&left.values, &right.values], 1)?, place: None })
}

pub(super) fn expect_alike(what: &str, x: &Tensor, y: &Tensor) -> Result<()> {
    if x.dims() == y.dims() {
        return Ok(());
    }
    Err(message(format!("{what}: {:?} against {:?}", x.dims(), y.dims())))
}
