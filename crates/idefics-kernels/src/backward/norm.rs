//! Gradients of RMSNorm and LayerNorm.

use rayon::prelude::*;

use super::columns::{add_in_order, rows_at_a_time};
use crate::{Isa, isa::multiversion, math::sum_by};

/// Gradient of `y = x · r · weight` with `r = 1 / √(mean(x²) + eps)`: returns `dx`, adds to `dweight`.
///
/// # Panics
/// If `x` and `dy` differ in length or `weight` does not divide them.
pub fn rms_norm(
    isa: Isa,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dweight: Option<&mut [f32]>,
) -> Vec<f32> {
    by_rows(x, weight, dy, dweight, None, |x, dy, dx, sums| {
        rms_norm_row(isa, x, weight, eps, dy, dx, &mut sums.weight);
    })
}

/// Gradient of `y = (x - mean) · r · weight + bias` with `r = 1 / √(variance + eps)`: returns `dx`, adds to
/// `dweight` and `dbias`.
///
/// # Panics
/// If `x` and `dy` differ in length or `weight` does not divide them.
pub fn layer_norm(
    isa: Isa,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) -> Vec<f32> {
    by_rows(x, weight, dy, dweight, dbias, |x, dy, dx, sums| {
        layer_norm_row(isa, x, weight, eps, dy, dx, &mut sums.weight);
        for (sum, dy) in sums.bias.iter_mut().zip(dy) {
            *sum += dy;
        }
    })
}

/// Gradients of the shared vectors over a run of rows.
struct Sums {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

fn by_rows(
    x: &[f32],
    weight: &[f32],
    dy: &[f32],
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
    row: impl Fn(&[f32], &[f32], &mut [f32], &mut Sums) + Sync,
) -> Vec<f32> {
    let width = weight.len();
    assert!(width > 0 && x.len().is_multiple_of(width), "rows of {width} expected in {}", x.len());
    assert_eq!(dy.len(), x.len(), "a gradient of the extents of x expected");
    let run = width * rows_at_a_time(width);
    let mut dx = Vec::with_capacity(x.len());
    let sums: Vec<Sums> = dx.spare_capacity_mut()[..x.len()]
        .par_chunks_mut(run)
        .zip(x.par_chunks(run).zip(dy.par_chunks(run)))
        .map(|(dx, (x, dy))| {
            let dx = dx.write_copy_of_slice(dy);
            let mut sums = Sums { weight: vec![0.0; width], bias: vec![0.0; width] };
            let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
            for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                row(x, dy, dx, &mut sums);
            }
            sums
        })
        .collect();
    // SAFETY: the runs cover all elements, and each was written.
    unsafe { dx.set_len(x.len()) };
    let (weights, biases): (Vec<_>, Vec<_>) = sums.into_iter().map(|sums| (sums.weight, sums.bias)).unzip();
    if let Some(dweight) = dweight {
        add_in_order(&weights, dweight);
    }
    if let Some(dbias) = dbias {
        add_in_order(&biases, dbias);
    }
    dx
}

multiversion! {
    fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], sums: &mut [f32]) =
        rms_norm_body
}
multiversion! {
    fn layer_norm_row(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], sums: &mut [f32]) =
        layer_norm_body
}

#[inline(always)]
fn rms_norm_body<const FMA: bool>(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    sums: &mut [f32],
) {
    let n = x.len() as f32;
    let scale = 1.0 / (sum_by(x, |v| v * v) / n + eps).sqrt();
    for ((dx, weight), dy) in dx.iter_mut().zip(weight).zip(dy) {
        *dx = weight * dy;
    }
    centre::<FMA>(x, 0.0, scale, false, dy, dx, sums);
}

#[inline(always)]
fn layer_norm_body<const FMA: bool>(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    sums: &mut [f32],
) {
    let n = x.len() as f32;
    let mean = sum_by(x, |v| v) / n;
    let scale = 1.0 / (sum_by(x, |v| (v - mean) * (v - mean)) / n + eps).sqrt();
    for ((dx, weight), dy) in dx.iter_mut().zip(weight).zip(dy) {
        *dx = weight * dy;
    }
    centre::<FMA>(x, mean, scale, true, dy, dx, sums);
}

/// With `x̂ = (x - mean) · scale` and `g` in `dx`: `dx = scale · (g - mean(g) - x̂ · mean(g · x̂))`, where the
/// first mean is there for LayerNorm alone; `sums += dy · x̂`.
#[inline(always)]
fn centre<const FMA: bool>(
    x: &[f32],
    mean: f32,
    scale: f32,
    is_centred: bool,
    dy: &[f32],
    dx: &mut [f32],
    sums: &mut [f32],
) {
    const LANES: usize = 16;
    let n = x.len() as f32;
    let mut along = [0.0f32; LANES];
    for (x, g) in x.chunks(LANES).zip(dx.chunks(LANES)) {
        for ((along, x), g) in along.iter_mut().zip(x).zip(g) {
            *along += g * ((x - mean) * scale);
        }
    }
    let along = along.iter().sum::<f32>() / n;
    let shift = if is_centred { sum_by(dx, |v| v) / n } else { 0.0 };
    for (((dx, x), dy), sum) in dx.iter_mut().zip(x).zip(dy).zip(sums) {
        let normed = (x - mean) * scale;
        *sum += dy * normed;
        *dx = scale * (*dx - shift - normed * along);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The derivative of `Σ dy · norm(x)` by central differences in f64.
    fn check(width: usize, is_layer: bool) {
        let rows = 3;
        let at = |i: usize, a: usize, m: usize| ((i * a) % m) as f64 / m as f64 - 0.4;
        let x: Vec<f64> = (0..rows * width).map(|i| 3.0 * at(i, 37, 101)).collect();
        let dy: Vec<f64> = (0..rows * width).map(|i| at(i, 53, 97)).collect();
        let weight: Vec<f64> = (0..width).map(|i| 0.5 + at(i, 29, 31)).collect();
        let eps = 1e-5;
        let loss = |x: &[f64], weight: &[f64]| -> f64 {
            let mut sum = 0.0;
            for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
                let n = width as f64;
                let mean = if is_layer { x.iter().sum::<f64>() / n } else { 0.0 };
                let square = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
                for i in 0..width {
                    sum += dy[i] * (x[i] - mean) / (square + eps).sqrt() * weight[i];
                }
            }
            sum
        };
        let slope = |values: &[f64], i: usize, of: &dyn Fn(&[f64]) -> f64| {
            let (mut up, mut down) = (values.to_vec(), values.to_vec());
            up[i] += 1e-5;
            down[i] -= 1e-5;
            (of(&up) - of(&down)) / 2e-5
        };
        let narrow = |values: &[f64]| values.iter().map(|v| *v as f32).collect::<Vec<_>>();
        let (x32, dy32, weight32) = (narrow(&x), narrow(&dy), narrow(&weight));
        for isa in Isa::available() {
            let (mut dw, mut db) = (vec![1.0f32; width], vec![0.0f32; width]);
            let dx = if is_layer {
                let dx = layer_norm(isa, &x32, &weight32, 1e-5, &dy32, Some(&mut dw), Some(&mut db));
                for (c, got) in db.iter().enumerate() {
                    let expected: f64 = dy.iter().skip(c).step_by(width).sum();
                    assert!((f64::from(*got) - expected).abs() < 1e-5, "bias {c}: {got} {expected}");
                }
                dx
            } else {
                rms_norm(isa, &x32, &weight32, 1e-5, &dy32, Some(&mut dw))
            };
            for (i, got) in dx.iter().enumerate() {
                let expected = slope(&x, i, &|x| loss(x, &weight));
                assert!((f64::from(*got) - expected).abs() < 2e-4, "x {width} {i}: {got} {expected}");
            }
            for (i, got) in dw.iter().enumerate() {
                let expected = 1.0 + slope(&weight, i, &|weight| loss(&x, weight));
                assert!((f64::from(*got) - expected).abs() < 1e-4, "weight {width} {i}: {got} {expected}");
            }
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        for width in [2, 5, 16, 40] {
            check(width, true);
            check(width, false);
        }
    }
}
