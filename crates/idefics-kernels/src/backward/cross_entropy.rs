//! Cross-entropy over a vocabulary, and its gradient in the place of the logits.

use rayon::prelude::*;

use crate::{
    Isa,
    isa::multiversion,
    math::{exp, sum_by},
};

/// What one row of logits cost.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RowLoss {
    /// `log Σ eˡ - l[target]`.
    pub cross_entropy: f32,
    /// `log Σ eˡ`, whose square the z-loss weighs.
    pub log_sum: f32,
    /// Whether the target has the largest logit.
    pub is_correct: bool,
}

/// For each row of `logits` `[n, V]` the loss of its target; the logits become their gradient,
/// `scale · (softmax · (1 + 2 · z_loss · log_sum) - onehot)`.
///
/// # Panics
/// If the lengths do not fit together or a target is outside the vocabulary.
pub fn cross_entropy(isa: Isa, logits: &mut [f32], targets: &[u32], z_loss: f32, scale: f32) -> Vec<RowLoss> {
    if targets.is_empty() {
        return Vec::new();
    }
    let width = logits.len() / targets.len();
    assert_eq!(logits.len(), width * targets.len(), "a row of logits for every target expected");
    logits
        .par_chunks_mut(width)
        .zip(targets)
        .map(|(logits, target)| {
            let target = *target as usize;
            let at_target = logits[target];
            let largest = logits.iter().fold(f32::NEG_INFINITY, |a, b| if a > *b { a } else { *b });
            exp_row(isa, logits, largest);
            let total = sum_by(logits, |v| v);
            let log_sum = total.ln() + largest;
            let factor = scale * (1.0 + 2.0 * z_loss * log_sum) / total;
            for value in logits.iter_mut() {
                *value *= factor;
            }
            logits[target] -= scale;
            RowLoss { cross_entropy: log_sum - at_target, log_sum, is_correct: at_target >= largest }
        })
        .collect()
}

multiversion! { fn exp_row(values: &mut [f32], largest: f32) = exp_body }

#[inline(always)]
fn exp_body<const FMA: bool>(values: &mut [f32], largest: f32) {
    for value in values {
        *value = exp::<FMA>(*value - largest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_and_gradients_agree_with_their_formulas() {
        let width = 37;
        let input: Vec<f32> = (0..3 * width).map(|i| ((i * 29 % 83) as f32 - 41.0) / 9.0).collect();
        let targets = [0, 36, 5];
        let (z_loss, scale) = (0.25, 0.5);
        for isa in Isa::available() {
            let mut gradient = input.clone();
            let losses = cross_entropy(isa, &mut gradient, &targets, z_loss, scale);
            for (row, loss) in losses.iter().enumerate() {
                let logits: Vec<f64> = input[row * width..][..width].iter().map(|v| f64::from(*v)).collect();
                let total: f64 = logits.iter().map(|v| v.exp()).sum();
                let (log_sum, target) = (total.ln(), targets[row] as usize);
                assert!((f64::from(loss.log_sum) - log_sum).abs() < 1e-5);
                assert!((f64::from(loss.cross_entropy) - (log_sum - logits[target])).abs() < 1e-5);
                let largest = logits.iter().copied().fold(f64::MIN, f64::max);
                assert_eq!(loss.is_correct, logits[target] == largest);
                for (c, got) in gradient[row * width..][..width].iter().enumerate() {
                    let softmax = logits[c].exp() / total;
                    let onehot = if c == target { 1.0 } else { 0.0 };
                    let expected = 0.5 * (softmax * (1.0 + 2.0 * 0.25 * log_sum) - onehot);
                    assert!((f64::from(*got) - expected).abs() < 1e-6, "{row} {c}: {got} {expected}");
                }
            }
        }
    }

    #[test]
    fn far_logits_stay_finite() {
        let mut logits = [1e4, -1e4, 0.0];
        let losses = cross_entropy(Isa::best(), &mut logits, &[1], 0.0, 1.0);
        assert_eq!(losses[0].cross_entropy, 2e4);
        assert_eq!(logits, [1.0, -1.0, 0.0]);
    }
}
