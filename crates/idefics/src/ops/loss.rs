//! The next-token objective: head, cross-entropy and their gradients, a few positions at a time.

use candle_core::Result as CandleResult;
use idefics_kernels::backward::cross_entropy;

use super::{Context, Linear, Result, Tensor, tensor, with_slice};

/// Positions whose logits are in memory at a time.
const POSITIONS: usize = 256;

/// Losses summed over targets.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSum {
    /// `Σ -log p(target)`, in nats.
    pub cross_entropy: f64,
    /// `Σ (log Σ eˡ)²`, what the z-loss weighs.
    pub z: f64,
    /// Number of targets.
    pub n_targets: usize,
    /// Targets that had the largest logit.
    pub n_correct: usize,
}

impl LossSum {
    /// Cross-entropy by target, in nats; 0 where nothing counted.
    pub fn mean(&self) -> f64 {
        if self.n_targets == 0 { 0.0 } else { self.cross_entropy / self.n_targets as f64 }
    }

    /// Adds another sum.
    pub fn add(&mut self, other: &Self) {
        self.cross_entropy += other.cross_entropy;
        self.z += other.z;
        self.n_targets += other.n_targets;
        self.n_correct += other.n_correct;
    }
}

/// The loss of `targets` from the hidden states `[n, D]` of the positions that predict them, through heads whose
/// logits stand one behind the other. With `gradient_scale` also the gradient of the hidden states of
/// `gradient_scale · (cross_entropy + z_loss · z)`, and those of the heads are added where they go.
pub fn next_token_loss(
    ctx: Context,
    hidden: &Tensor,
    targets: &[u32],
    heads: &[&Linear],
    z_loss: f32,
    gradient_scale: Option<f32>,
) -> Result<(LossSum, Option<Tensor>)> {
    let (n, width) = super::dims2(hidden)?;
    with_slice(hidden, |hidden, _| {
        if n != targets.len() {
            candle_core::bail!("loss: {n} positions for {} targets", targets.len());
        }
        let mut sum = LossSum::default();
        let mut gradient = Vec::with_capacity(if gradient_scale.is_some() { hidden.len() } else { 0 });
        for (hidden, targets) in hidden.chunks(POSITIONS * width).zip(targets.chunks(POSITIONS)) {
            let mut logits = logits(ctx, hidden, width, heads)?; // [n, V + A]
            let losses = cross_entropy(ctx.isa, &mut logits, targets, z_loss, gradient_scale.unwrap_or(0.0));
            for loss in losses {
                sum.cross_entropy += f64::from(loss.cross_entropy);
                sum.z += f64::from(loss.log_sum) * f64::from(loss.log_sum);
                sum.n_targets += 1;
                sum.n_correct += usize::from(loss.is_correct);
            }
            if gradient_scale.is_some() {
                gradient.extend(hidden_gradient(ctx, hidden, width, heads, &logits));
            }
        }
        Ok((sum, gradient_scale.is_some().then_some(gradient)))
    })
    .and_then(|(sum, gradient)| {
        Ok((sum, gradient.map(|gradient| tensor(gradient, &[n, width])).transpose()?))
    })
}

/// `[n, D]` to `[n, ΣV]`, a row of each head's logits behind the other's.
fn logits(ctx: Context, hidden: &[f32], width: usize, heads: &[&Linear]) -> CandleResult<Vec<f32>> {
    let rows = hidden.len() / width;
    let x = tensor(hidden.to_vec(), &[rows, width])?;
    let parts: Vec<Tensor> = heads.iter().map(|head| head.forward(ctx, &x)).collect::<Result<_>>()?;
    if let [only] = parts.as_slice() {
        return Ok(super::to_vec(only)?);
    }
    Ok(super::to_vec(&Tensor::cat(&parts, 1)?)?)
}

/// The gradient of hidden states `[n, D]` from that of their logits `[n, ΣV]`.
fn hidden_gradient(ctx: Context, hidden: &[f32], width: usize, heads: &[&Linear], dy: &[f32]) -> Vec<f32> {
    let total: usize = heads.iter().map(|head| head.out_features()).sum();
    let mut sum = vec![0.0; hidden.len()];
    let mut first = 0;
    for head in heads {
        let columns = head.out_features();
        let part: Vec<f32> =
            dy.chunks_exact(total).flat_map(|row| &row[first..first + columns]).copied().collect();
        first += columns;
        debug_assert_eq!(hidden.len() % width, 0);
        for (sum, value) in sum.iter_mut().zip(head.backward(ctx, hidden, &part)) {
            *sum += value;
        }
    }
    sum
}
