//! The next-token objective: head, cross-entropy and their gradients, a few positions at a time.

use idefics_kernels::{
    backward::cross_entropy,
    elementwise::add,
    rows::{beside, columns, zeros},
};

use super::{Context, Linear, Result, Tensor, dims2, message, rows, tensor};

/// Logits that are in memory at a time, but for [`FEWEST_POSITIONS`].
const LOGITS: usize = 2 << 20;
/// Positions whose logits are computed together, however large the vocabulary is.
const FEWEST_POSITIONS: usize = 256;

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
    let (n, width) = dims2(hidden)?;
    if n != targets.len() {
        return Err(message(format!("loss: {n} positions for {} targets", targets.len())));
    }
    let mut sum = LossSum::default();
    let mut gradient = Vec::with_capacity(if gradient_scale.is_some() { n * width } else { 0 });
    let outputs: usize = heads.iter().map(|head| head.out_features()).sum();
    let positions = (LOGITS / outputs.max(1)).max(FEWEST_POSITIONS);
    for (first, targets) in (0..n).step_by(positions).zip(targets.chunks(positions)) {
        let hidden = rows(hidden, first, targets.len())?;
        let mut logits = logits(ctx, &hidden, heads)?; // [n, V + A]
        let losses = cross_entropy(ctx.isa, &mut logits, targets, z_loss, gradient_scale.unwrap_or(0.0));
        for loss in losses {
            sum.cross_entropy += f64::from(loss.cross_entropy);
            sum.z += f64::from(loss.log_sum) * f64::from(loss.log_sum);
            sum.n_targets += 1;
            sum.n_correct += usize::from(loss.is_correct);
        }
        if gradient_scale.is_some() {
            gradient.extend(hidden_gradient(ctx, &hidden.plain_elements()?, heads, &logits));
        }
    }
    let gradient = gradient_scale.map(|_| tensor(gradient, &[n, width])).transpose()?;
    Ok((sum, gradient))
}

/// `[n, D]` to `[n, ΣV]`, a row of each head's logits behind the other's.
fn logits(ctx: Context, hidden: &Tensor, heads: &[&Linear]) -> Result<Vec<f32>> {
    let parts: Vec<Tensor> = heads.iter().map(|head| head.forward(ctx, hidden)).collect::<Result<_>>()?;
    let parts: Vec<_> = parts.iter().map(Tensor::plain_elements).collect::<Result<_>>()?;
    let parts: Vec<_> = heads.iter().zip(&parts).map(|(head, part)| (&**part, head.out_features())).collect();
    Ok(beside(&parts))
}

/// The gradient of hidden states `[n, D]` from that of their logits `[n, ΣV]`.
fn hidden_gradient(ctx: Context, hidden: &[f32], heads: &[&Linear], dy: &[f32]) -> Vec<f32> {
    let total: usize = heads.iter().map(|head| head.out_features()).sum();
    if let [only] = heads {
        return only.backward(ctx, hidden, dy);
    }
    let mut sum = zeros(hidden.len());
    let mut first = 0;
    for head in heads {
        let part = columns(dy, total, first..first + head.out_features());
        first += head.out_features();
        add(&mut sum, &head.backward(ctx, hidden, &part));
    }
    sum
}
