//! RMSNorm and LayerNorm over rows, statistics in `f32`.

use crate::{
    Isa,
    isa::multiversion,
    math::{fma, sum_by},
    parallel,
};

/// `y = x / √(mean(x²) + eps) · weight`, row by row. `x` is `[…, weight.len()]`.
///
/// # Panics
/// If `weight` does not divide `x`.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    check(x, weight);
    parallel::mapped_rows(x, weight.len(), |_, row| rms_norm_row(isa, row, weight, eps))
}

/// `y = (x - mean) / √(variance + eps) · weight + bias`, row by row.
///
/// # Panics
/// If `weight` and `bias` differ in length or do not divide `x`.
pub fn layer_norm(isa: Isa, x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    check(x, weight);
    assert_eq!(weight.len(), bias.len(), "weight and bias must have one length");
    parallel::mapped_rows(x, weight.len(), |_, row| layer_norm_row(isa, row, weight, bias, eps))
}

fn check(x: &[f32], weight: &[f32]) {
    assert!(
        !weight.is_empty() && x.len().is_multiple_of(weight.len()),
        "rows of {} expected in {}",
        weight.len(),
        x.len()
    );
}

multiversion! { fn rms_norm_row(row: &mut [f32], weight: &[f32], eps: f32) = rms_norm_body }
multiversion! { fn layer_norm_row(row: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) = layer_norm_body }

#[inline(always)]
fn rms_norm_body<const FMA: bool>(row: &mut [f32], weight: &[f32], eps: f32) {
    let mean_square = sum_by(row, |v| v * v) / row.len() as f32;
    let scale = 1.0 / (mean_square + eps).sqrt();
    for (value, weight) in row.iter_mut().zip(weight) {
        *value = *value * scale * weight;
    }
}

#[inline(always)]
fn layer_norm_body<const FMA: bool>(row: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let mean = sum_by(row, |v| v) / row.len() as f32;
    let variance = sum_by(row, |v| (v - mean) * (v - mean)) / row.len() as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for ((value, weight), bias) in row.iter_mut().zip(weight).zip(bias) {
        *value = fma::<FMA>((*value - mean) * scale, *weight, *bias);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize, width: usize) -> Vec<f32> {
        (0..n * width).map(|i| ((i * 37 % 101) as f32 - 50.0) / 13.0).collect()
    }

    #[test]
    fn norms_agree_with_their_formulas_on_every_tier_and_width() {
        for isa in Isa::available() {
            for width in [1, 3, 16, 17, 80, 130] {
                let input = rows(4, width);
                let weight: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 / 100.0).collect();
                let bias: Vec<f32> = (0..width).map(|i| i as f32 / 50.0 - 1.0).collect();
                let rms = rms_norm(isa, &input, &weight, 1e-6);
                let layer = layer_norm(isa, &input, &weight, &bias, 1e-5);
                for (r, row) in input.chunks(width).enumerate() {
                    let row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
                    let n = width as f64;
                    let mean = row.iter().sum::<f64>() / n;
                    let square = row.iter().map(|v| v * v).sum::<f64>() / n;
                    let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
                    for c in 0..width {
                        let (w, b) = (f64::from(weight[c]), f64::from(bias[c]));
                        let rms_truth = row[c] / (square + 1e-6).sqrt() * w;
                        let layer_truth = (row[c] - mean) / (variance + 1e-5).sqrt() * w + b;
                        assert!(
                            (f64::from(rms[r * width + c]) - rms_truth).abs() < 2e-6,
                            "rms {width} {r} {c}"
                        );
                        assert!(
                            (f64::from(layer[r * width + c]) - layer_truth).abs() < 2e-6,
                            "layer {width} {r} {c}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_of_zeros_stays_finite() {
        let x = vec![0.0; 32];
        assert_eq!(rms_norm(Isa::best(), &x, &[1.0; 16], 1e-6), x);
        assert_eq!(layer_norm(Isa::best(), &x, &[1.0; 16], &[0.0; 16], 1e-5), x);
    }
}
