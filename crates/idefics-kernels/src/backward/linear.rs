//! Gradients of `y = x · Wᵀ + b`: `dx = dy · W`, `dW = dyᵀ · x`.
//!
//! On AVX-512 both are products of their own (`outer.rs`). Elsewhere they are the forward product again, which reads
//! its factors along the inner dimension, on transposed copies: `dx` of a run of columns of `W` at a time, `dW` of
//! `dy` and `x`. Either way the packed weight never exists unpacked as a whole.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::outer::{self, Extents, Left, Old};
use crate::{
    Compute, Isa, Matrix,
    linear::{linear, round_all},
    nf4,
    parallel::for_each_run,
    rows,
};
#[cfg(target_arch = "x86_64")]
use crate::{
    Tier,
    linear::scratch,
    parallel::{SharedMut, filled},
};

/// Elements of a transposed run of columns.
const RUN: usize = 2 << 20;
/// Rows that are transposed together.
const BLOCK: usize = 16;

/// `dx [M, K] = dy [M, N] · weight [N, K]`.
///
/// # Panics
/// If the lengths do not fit together: `k` must divide `weight`, and `N` `dy`.
pub fn linear_input(isa: Isa, compute: Compute, dy: &[f32], weight: Matrix<'_>, k: usize) -> Vec<f32> {
    let n = weight.len() / k;
    assert!(n > 0 && weight.len() == n * k, "{k} does not divide {}", weight.len());
    let m = dy.len() / n;
    assert_eq!(dy.len(), m * n, "dy of [{m}, {n}] expected");
    if m == 0 {
        return Vec::new();
    }
    #[cfg(target_arch = "x86_64")]
    if isa.tier() >= Tier::Avx512 {
        let extents = Extents { rows: m, columns: k, terms: n };
        let right = MatrixRows { matrix: weight, k };
        // SAFETY: the tier is proven by the `Isa`; the product writes all of its output.
        return unsafe {
            filled(m * k, |out| outer(isa, compute, Left::ByRow(dy), &right, extents, Old::Ignored, out))
        };
    }
    transposing_input(isa, compute, dy, weight, k)
}

/// [`linear_input`] through the forward product.
fn transposing_input(isa: Isa, compute: Compute, dy: &[f32], weight: Matrix<'_>, k: usize) -> Vec<f32> {
    let n = weight.len() / k;
    let m = dy.len() / n;
    let mut dx = rows::zeros(m * k);
    // Packed weights are read by whole blocks.
    let columns = (RUN / n).next_multiple_of(nf4::BLOCK).min(k);
    let mut out = Vec::new();
    for first in (0..k).step_by(columns) {
        let count = columns.min(k - first);
        let target = if count == k {
            &mut dx[..]
        } else {
            out.resize(m * count, 0.0);
            &mut out[..]
        };
        match (compute, weight) {
            (Compute::F32, weight) => {
                let panel = transposed(n, k, first, count, |row, out: &mut [f32]| {
                    read(weight, k, row, first, out);
                });
                linear(isa, compute, dy, Matrix::F32(&panel), n, None, target);
            }
            (_, Matrix::Bf16(weight)) => {
                let panel = transposed(n, k, first, count, |row, out| {
                    out.copy_from_slice(&weight[row * k + first..][..count]);
                });
                linear(isa, Compute::Bf16, dy, Matrix::Bf16(&panel), n, None, target);
            }
            (_, weight) => {
                let panel = transposed(n, k, first, count, |row, out: &mut [bf16]| {
                    let mut wide = vec![0.0; count];
                    read(weight, k, row, first, &mut wide);
                    for (out, value) in out.iter_mut().zip(wide) {
                        *out = bf16::from_f32(value);
                    }
                });
                linear(isa, Compute::Bf16, dy, Matrix::Bf16(&panel), n, None, target);
            }
        }
        if count < k {
            for (dx, out) in dx.chunks_exact_mut(k).zip(out.chunks_exact(count)) {
                dx[first..first + count].copy_from_slice(out);
            }
        }
    }
    dx
}

/// `dy [M, N]ᵀ · x [M, K]`, `[N, K]`. `x` may have been rounded to bf16 already where that is what is computed in.
///
/// # Panics
/// If the lengths do not fit together, or there are no rows: `N` is not known then.
pub fn linear_weight(isa: Isa, compute: Compute, dy: &[f32], x: Matrix<'_>, k: usize) -> Vec<f32> {
    let m = x.len() / k;
    assert!(m > 0, "rows expected");
    let n = dy.len() / m;
    assert_eq!((x.len(), dy.len()), (m * k, m * n), "dy of [{m}, {n}] expected");
    #[cfg(target_arch = "x86_64")]
    if isa.tier() >= Tier::Avx512 && n > 0 {
        // SAFETY: the tier is proven by the `Isa`; the product writes all of its output.
        return unsafe {
            filled(n * k, |out| sum_over_rows(isa, compute, dy, x, [n, k, m], Old::Ignored, out))
        };
    }
    let mut dw = rows::zeros(n * k);
    add_linear_weight(isa, compute, dy, x, k, &mut dw);
    dw
}

/// `dw [N, K] += dy [M, N]ᵀ · x [M, K]`, `x` as in [`linear_weight`].
///
/// # Panics
/// If the lengths do not fit together.
pub fn add_linear_weight(isa: Isa, compute: Compute, dy: &[f32], x: Matrix<'_>, k: usize, dw: &mut [f32]) {
    let (m, n) = (x.len() / k, dw.len() / k);
    assert_eq!((x.len(), dw.len(), dy.len()), (m * k, n * k, m * n), "dy of [{m}, {n}] expected");
    if m == 0 || n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa.tier() >= Tier::Avx512 {
        let out = SharedMut::new(dw);
        // SAFETY: the tier is proven by the `Isa`; the output is borrowed here alone.
        return unsafe { sum_over_rows(isa, compute, dy, x, [n, k, m], Old::Kept, out) };
    }
    transposing_weight(isa, compute, dy, x, k, dw);
}

/// [`add_linear_weight`] by a product of its own; `extents` are `N`, `K` and `M`.
///
/// # Safety
/// As [`outer`].
#[cfg(target_arch = "x86_64")]
unsafe fn sum_over_rows(
    isa: Isa,
    compute: Compute,
    dy: &[f32],
    x: Matrix<'_>,
    [rows, columns, terms]: [usize; 3],
    old: Old,
    out: SharedMut<f32>,
) {
    let right = MatrixRows { matrix: x, k: columns };
    // SAFETY: passed on.
    unsafe { outer(isa, compute, Left::BySum(dy), &right, Extents { rows, columns, terms }, old, out) }
}

/// [`add_linear_weight`] through the forward product.
fn transposing_weight(isa: Isa, compute: Compute, dy: &[f32], x: Matrix<'_>, k: usize, dw: &mut [f32]) {
    let (m, n) = (x.len() / k, dw.len() / k);
    let dy = transpose(dy, m, n); // [N, M]
    let wide;
    let x = match x {
        Matrix::F32(x) => x,
        other => {
            wide = widened(other, k);
            &wide
        }
    };
    let x = transpose(x, m, k); // [K, M]
    let rounded = match compute {
        Compute::F32 => Vec::new(),
        Compute::Bf16 | Compute::Int8 => round_all(isa, &x),
    };
    let x = if compute == Compute::F32 { Matrix::F32(&x) } else { Matrix::Bf16(&rounded) };
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

/// A product whose sums run over rows, by the instructions of a tier.
///
/// # Safety
/// The processor has AVX-512; `out` has room for the output, which no other thread touches.
#[cfg(target_arch = "x86_64")]
unsafe fn outer(
    isa: Isa,
    compute: Compute,
    left: Left<'_>,
    right: &impl outer::Rows,
    extents: Extents,
    old: Old,
    out: SharedMut<f32>,
) {
    // SAFETY: passed on; an `Isa` of the last tier proves its instructions.
    unsafe {
        match (compute, isa.tier()) {
            (Compute::F32, _) => outer::product::<outer::Plain>(left, right, extents, old, out),
            (_, Tier::Avx512Bf16) => {
                outer::product::<outer::Pairs>(left, right, extents, old, out);
            }
            _ => outer::product::<outer::Rounded>(left, right, extents, old, out),
        }
    }
}

/// Rows of numbers.
#[cfg(target_arch = "x86_64")]
struct SliceRows<'a> {
    data: &'a [f32],
    width: usize,
}

#[cfg(target_arch = "x86_64")]
impl outer::Rows for SliceRows<'_> {
    fn with_rows(&self, first: usize, count: usize, work: impl FnOnce([&[f32]; 2])) {
        let rows = &self.data[first * self.width..(first + count) * self.width];
        let (one, other) = rows.split_at(self.width);
        work([one, other]);
    }
}

/// Rows of `k` numbers, widened.
#[cfg(target_arch = "x86_64")]
struct MatrixRows<'a> {
    matrix: Matrix<'a>,
    k: usize,
}

#[cfg(target_arch = "x86_64")]
impl outer::Rows for MatrixRows<'_> {
    fn with_rows(&self, first: usize, count: usize, work: impl FnOnce([&[f32]; 2])) {
        if let Matrix::F32(data) = self.matrix {
            return SliceRows { data, width: self.k }.with_rows(first, count, work);
        }
        scratch::with(&scratch::WIDENED, count * self.k, |rows| {
            for (i, row) in rows.chunks_exact_mut(self.k).enumerate() {
                read(self.matrix, self.k, first + i, 0, row);
            }
            let (one, other) = rows.split_at(self.k);
            work([one, other]);
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

/// All rows.
fn widened(matrix: Matrix<'_>, k: usize) -> Vec<f32> {
    let mut wide = rows::zeros(matrix.len());
    for_each_run(&mut wide, k * BLOCK, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(k).enumerate() {
            read(matrix, k, first / k + i, 0, row);
        }
    });
    wide
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
            for (m, n, k) in [(1, 1, 1), (3, 5, 7), (17, 33, 65), (40, 64, 128), (700, 31, 20), (9, 650, 300)]
            {
                let (dy, w, x) = (noise(m * n, 1), noise(n * k, 2), noise(m * k, 3));
                for (compute, bound) in [(Compute::F32, 1e-5), (Compute::Bf16, 0.05)] {
                    let dx = linear_input(isa, compute, &dy, Matrix::F32(&w), k);
                    let mut dw = vec![1.0; n * k];
                    add_linear_weight(isa, compute, &dy, Matrix::F32(&x), k, &mut dw);
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
    fn products_of_their_own_agree_with_the_transposing_ones() {
        for isa in Isa::available() {
            for (m, n, k) in [(1, 2, 3), (15, 29, 33), (130, 70, 100), (1100, 90, 130)] {
                let (dy, w, x) = (noise(m * n, 1), noise(n * k, 2), noise(m * k, 3));
                for compute in [Compute::F32, Compute::Bf16] {
                    let (mut dw, mut expected_dw) = (vec![0.5; n * k], vec![0.5; n * k]);
                    let x = Matrix::F32(&x);
                    add_linear_weight(isa, compute, &dy, x, k, &mut dw);
                    transposing_weight(isa, compute, &dy, x, k, &mut expected_dw);
                    let dx = linear_input(isa, compute, &dy, Matrix::F32(&w), k);
                    let expected_dx = transposing_input(isa, compute, &dy, Matrix::F32(&w), k);
                    for (what, got, expected) in [("dw", &dw, &expected_dw), ("dx", &dx, &expected_dx)] {
                        for (got, expected) in got.iter().zip(expected) {
                            // The factors are rounded alike; the sums are not made in one order.
                            assert!(
                                (got - expected).abs() < 2e-4,
                                "{what} {} {compute:?} {m} {n} {k}: {got} {expected}",
                                isa.tier()
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_have_the_same_bits_on_any_number_of_threads_and_a_row_alone_those_in_a_batch() {
        let (m, n, k) = (200, 96, 70);
        let (dy, w, x) = (noise(m * n, 1), noise(n * k, 2), noise(m * k, 3));
        for isa in Isa::available() {
            for compute in [Compute::F32, Compute::Bf16] {
                let on = |threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| {
                        let dw = linear_weight(isa, compute, &dy, Matrix::F32(&x), k);
                        (linear_input(isa, compute, &dy, Matrix::F32(&w), k), dw)
                    })
                };
                let (dx, dw) = on(1);
                assert_eq!((&dx, &dw), (&on(3).0, &on(3).1));
                let alone = linear_input(isa, compute, &dy[5 * n..6 * n], Matrix::F32(&w), k);
                assert_eq!(dx[5 * k..6 * k], alone);
            }
        }
    }

    #[test]
    fn rows_rounded_before_give_the_bits_of_rows_rounded_on_the_way() {
        for isa in Isa::available() {
            for (m, n, k) in [(1, 2, 3), (33, 29, 40), (1100, 90, 130)] {
                let (dy, x) = (noise(m * n, 1), noise(m * k, 3));
                let rounded = round_all(isa, &x);
                let new = |x| linear_weight(isa, Compute::Bf16, &dy, x, k);
                assert_eq!(new(Matrix::F32(&x)), new(Matrix::Bf16(&rounded)), "{}", isa.tier());
                let added = |x| {
                    let mut dw = vec![0.0; n * k];
                    add_linear_weight(isa, Compute::Bf16, &dy, x, k, &mut dw);
                    dw
                };
                assert_eq!(new(Matrix::F32(&x)), added(Matrix::Bf16(&rounded)), "{}", isa.tier());
            }
        }
    }

    #[test]
    fn a_wide_weight_is_taken_in_runs_of_columns() {
        let (m, n, k) = (2, 20_000, 200); // a run holds 128 columns
        let (dy, w) = (noise(m * n, 4), noise(n * k, 5));
        let dx = transposing_input(Isa::best(), Compute::F32, &dy, Matrix::F32(&w), k);
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
                    let got = linear_input(isa, compute, &dy, packed, k);
                    let expected = linear_input(isa, compute, &dy, Matrix::F32(wide), k);
                    assert_eq!(got, expected, "{} {compute:?}", isa.tier());
                }
            }
        }
    }
}
