//! Gradients of `y = x · Wᵀ + b`: `dx = dy · W`, `dW = dyᵀ · x`.
//!
//! Both are the forward product again, which reads its factors along the inner dimension, on transposed copies:
//! `dx` of a run of columns of `W` at a time, `dW` of `dy` and `x`. The copies pass through the cache; the
//! packed weight never exists unpacked as a whole.

use half::{bf16, f16};

use crate::{
    Compute, Isa, Matrix,
    linear::{linear, round_all},
    nf4,
    parallel::for_each_run,
};

/// Elements of a transposed run of columns.
const RUN: usize = 2 << 20;
/// Rows that are transposed together.
const BLOCK: usize = 16;

/// `dx [M, K] = dy [M, N] · weight [N, K]`.
///
/// # Panics
/// If the lengths do not fit together: `k` must divide `dx` and `weight`.
pub fn linear_input(isa: Isa, compute: Compute, dy: &[f32], weight: Matrix<'_>, k: usize, dx: &mut [f32]) {
    let (m, n) = (dx.len() / k, weight.len() / k);
    assert_eq!((dx.len(), weight.len(), dy.len()), (m * k, n * k, m * n), "dy of [{m}, {n}] expected");
    if m == 0 || n == 0 {
        return dx.fill(0.0);
    }
    // Packed weights are read by whole blocks.
    let columns = (RUN / n).next_multiple_of(nf4::BLOCK).min(k);
    let mut out = Vec::new();
    for first in (0..k).step_by(columns) {
        let count = columns.min(k - first);
        let target = if count == k {
            &mut *dx
        } else {
            out.resize(m * count, 0.0);
            &mut out[..]
        };
        match (compute, weight) {
            (Compute::Bf16, Matrix::Bf16(weight)) => {
                let panel = transposed(n, k, first, count, |row, out| {
                    out.copy_from_slice(&weight[row * k + first..][..count]);
                });
                linear(isa, compute, dy, Matrix::Bf16(&panel), n, None, target);
            }
            (Compute::Bf16, weight) => {
                let panel = transposed(n, k, first, count, |row, out: &mut [bf16]| {
                    let mut wide = vec![0.0; count];
                    read(weight, k, row, first, &mut wide);
                    for (out, value) in out.iter_mut().zip(wide) {
                        *out = bf16::from_f32(value);
                    }
                });
                linear(isa, compute, dy, Matrix::Bf16(&panel), n, None, target);
            }
            (Compute::F32, weight) => {
                let panel = transposed(n, k, first, count, |row, out: &mut [f32]| {
                    read(weight, k, row, first, out);
                });
                linear(isa, compute, dy, Matrix::F32(&panel), n, None, target);
            }
        }
        if count < k {
            for (dx, out) in dx.chunks_exact_mut(k).zip(out.chunks_exact(count)) {
                dx[first..first + count].copy_from_slice(out);
            }
        }
    }
}

/// `dw [N, K] += dy [M, N]ᵀ · x [M, K]`.
///
/// # Panics
/// If the lengths do not fit together.
pub fn linear_weight(isa: Isa, compute: Compute, dy: &[f32], x: &[f32], k: usize, dw: &mut [f32]) {
    let (m, n) = (x.len() / k, dw.len() / k);
    assert_eq!((x.len(), dw.len(), dy.len()), (m * k, n * k, m * n), "dy of [{m}, {n}] expected");
    if m == 0 || n == 0 {
        return;
    }
    let dy = transpose(dy, m, n); // [N, M]
    let x = transpose(x, m, k); // [K, M]
    let rounded = match compute {
        Compute::F32 => Vec::new(),
        Compute::Bf16 => round_all(isa, &x),
    };
    let x = if compute == Compute::Bf16 { Matrix::Bf16(&rounded) } else { Matrix::F32(&x) };
    let rows = (RUN / 2 / k).max(1);
    let mut sums = vec![0.0; rows.min(n) * k];
    for (dw, dy) in dw.chunks_mut(rows * k).zip(dy.chunks(rows * m)) {
        let sums = &mut sums[..dw.len()];
        linear(isa, compute, dy, x, m, None, sums);
        for_each_run(dw, 1 << 14, |first, dw| {
            for (dw, sum) in dw.iter_mut().zip(&sums[first..]) {
                *dw += sum;
            }
        });
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transpose<T: Copy + Default + Send + Sync>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut out = vec![T::default(); rows * columns];
    for_each_run(&mut out, BLOCK * rows, |at, out| {
        let first = at / rows;
        for row in (0..rows).step_by(BLOCK) {
            let count = BLOCK.min(rows - row);
            for (column, out) in out.chunks_exact_mut(rows).enumerate() {
                for (i, out) in out[row..row + count].iter_mut().enumerate() {
                    *out = values[(row + i) * columns + first + column];
                }
            }
        }
    });
    out
}

/// Columns `first..first + count` of a weight `[n, k]` as rows, `[count, n]`; `read(row, out)` gives those
/// columns of a row.
fn transposed<T: Copy + Default + Send + Sync>(
    n: usize,
    k: usize,
    first: usize,
    count: usize,
    read: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    debug_assert!(first + count <= k);
    let mut rows = vec![T::default(); n * count];
    for_each_run(&mut rows, count * BLOCK, |at, rows| {
        for (i, row) in rows.chunks_exact_mut(count).enumerate() {
            read(at / count + i, row);
        }
    });
    transpose(&rows, n, count)
}

/// Elements `first..first + out.len()` of row `row`, widened.
fn read(weight: Matrix<'_>, k: usize, row: usize, first: usize, out: &mut [f32]) {
    let at = row * k + first;
    match weight {
        Matrix::F32(weight) => out.copy_from_slice(&weight[at..at + out.len()]),
        Matrix::F16(weight) => widen(&weight[at..at + out.len()], out, f16::to_f32),
        Matrix::Bf16(weight) => widen(&weight[at..at + out.len()], out, bf16::to_f32),
        Matrix::Nf4(weight) => weight.read(at, out),
        Matrix::Q8(weight) => {
            let mut whole = vec![0.0; k];
            weight.read_row(row, &mut whole);
            out.copy_from_slice(&whole[first..first + out.len()]);
        }
    }
}

fn widen<T: Copy>(values: &[T], out: &mut [f32], to_f32: impl Fn(T) -> f32) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = to_f32(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(747_796_405) | 1;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / 8_388_608.0 - 1.0
            })
            .collect()
    }

    #[test]
    fn both_gradients_agree_with_the_plain_sums_on_every_tier() {
        for isa in Isa::available() {
            for (m, n, k) in [(1, 1, 1), (3, 5, 7), (17, 33, 65), (40, 64, 128)] {
                let (dy, w, x) = (noise(m * n, 1), noise(n * k, 2), noise(m * k, 3));
                for (compute, bound) in [(Compute::F32, 1e-5), (Compute::Bf16, 0.05)] {
                    let (mut dx, mut dw) = (vec![f32::NAN; m * k], vec![1.0; n * k]);
                    linear_input(isa, compute, &dy, Matrix::F32(&w), k, &mut dx);
                    linear_weight(isa, compute, &dy, &x, k, &mut dw);
                    let close = |got: f32, expected: f32, inner: usize| {
                        assert!(
                            (got - expected).abs() < bound * (inner as f32).sqrt(),
                            "{} {compute:?} {m} {n} {k}: {got} {expected}",
                            isa.tier()
                        );
                    };
                    for (at, got) in dx.iter().enumerate() {
                        let (t, c) = (at / k, at % k);
                        close(*got, (0..n).map(|r| dy[t * n + r] * w[r * k + c]).sum(), n);
                    }
                    for (at, got) in dw.iter().enumerate() {
                        let (r, c) = (at / k, at % k);
                        close(*got, 1.0 + (0..m).map(|t| dy[t * n + r] * x[t * k + c]).sum::<f32>(), m);
                    }
                }
            }
        }
    }

    #[test]
    fn a_wide_weight_is_taken_in_runs_of_columns() {
        let (m, n, k) = (2, 20_000, 200); // a run holds 128 columns
        let (dy, w) = (noise(m * n, 4), noise(n * k, 5));
        let mut dx = vec![f32::NAN; m * k];
        linear_input(Isa::best(), Compute::F32, &dy, Matrix::F32(&w), k, &mut dx);
        for (at, got) in dx.iter().enumerate() {
            let (t, c) = (at / k, at % k);
            let expected: f64 = (0..n).map(|r| f64::from(dy[t * n + r]) * f64::from(w[r * k + c])).sum();
            assert!((f64::from(*got) - expected).abs() < 1e-2, "{at}: {got} {expected}");
        }
    }

    #[test]
    fn packed_weights_give_the_gradient_of_their_widened_twin() {
        let (m, n, k) = (5, 64, 192);
        let (dy, w) = (noise(m * n, 6), noise(n * k, 7));
        let (codes, scales) = nf4::quantize(&w);
        let packed = nf4::Nf4 { codes: &codes, scales: nf4::Scales::Plain(&scales), map: &nf4::CODE_VALUES };
        let mut wide = vec![0.0; n * k];
        packed.read(0, &mut wide);
        let (q8, q8_scales) = crate::q8::quantize(&w, k);
        let q8 = crate::q8::Q8 { codes: &q8, scales: &q8_scales };
        let mut q8_wide = vec![0.0; n * k];
        q8_wide.chunks_exact_mut(k).enumerate().for_each(|(row, out)| q8.read_row(row, out));
        for isa in Isa::available() {
            for compute in [Compute::F32, Compute::Bf16] {
                for (packed, wide) in [(Matrix::Nf4(packed), &wide), (Matrix::Q8(q8), &q8_wide)] {
                    let (mut got, mut expected) = (vec![0.0; m * k], vec![0.0; m * k]);
                    linear_input(isa, compute, &dy, packed, k, &mut got);
                    linear_input(isa, compute, &dy, Matrix::F32(wide), k, &mut expected);
                    assert_eq!(got, expected, "{} {compute:?}", isa.tier());
                }
            }
        }
    }
}
