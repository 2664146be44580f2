//! A small matrix product inside one thread, for the five products of attention's backward pass.

use crate::math::fma;

/// A view of numbers by row and column.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

const ROWS: usize = 4;
const COLUMNS: usize = 32;

/// `out [m, n] += a [m, k] · b [k, n]`, rows of `b` and `out` contiguous, `b_stride` and `out_stride` apart.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the extents and strides of a product")]
pub(super) fn add_product<const FMA: bool>(
    (m, n, k): (usize, usize, usize),
    a: View<'_>,
    b: &[f32],
    b_stride: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    for i in (0..m).step_by(ROWS) {
        let rows = ROWS.min(m - i);
        for j in (0..n).step_by(COLUMNS) {
            let columns = COLUMNS.min(n - j);
            if rows == ROWS && columns == COLUMNS {
                let mut sums = [[0.0f32; COLUMNS]; ROWS];
                for p in 0..k {
                    let b: &[f32; COLUMNS] =
                        b[p * b_stride + j..][..COLUMNS].try_into().expect("a slice of that length");
                    for r in 0..ROWS {
                        let a = a.data[(i + r) * a.row_stride + p * a.column_stride];
                        for c in 0..COLUMNS {
                            sums[r][c] = fma::<FMA>(a, b[c], sums[r][c]);
                        }
                    }
                }
                for r in 0..ROWS {
                    for (out, sum) in out[(i + r) * out_stride + j..][..COLUMNS].iter_mut().zip(sums[r]) {
                        *out += sum;
                    }
                }
            } else {
                for r in i..i + rows {
                    let mut sums = [0.0f32; COLUMNS];
                    for p in 0..k {
                        let a = a.data[r * a.row_stride + p * a.column_stride];
                        for (sum, b) in sums.iter_mut().zip(&b[p * b_stride + j..][..columns]) {
                            *sum = fma::<FMA>(a, *b, *sum);
                        }
                    }
                    for (out, sum) in out[r * out_stride + j..][..columns].iter_mut().zip(sums) {
                        *out += sum;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_any_shape_agree_with_the_plain_sum() {
        for (m, n, k) in [(1, 1, 1), (4, 32, 3), (5, 33, 7), (9, 70, 16), (3, 31, 2)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i % 5) as f32 - 2.0).collect();
            for transposed in [false, true] {
                let view = if transposed {
                    View { data: &a, row_stride: 1, column_stride: m }
                } else {
                    View { data: &a, row_stride: k, column_stride: 1 }
                };
                let mut out = vec![0.5; m * n];
                add_product::<false>((m, n, k), view, &b, n, &mut out, n);
                for i in 0..m {
                    for j in 0..n {
                        let at = |i: usize, p: usize| if transposed { a[p * m + i] } else { a[i * k + p] };
                        let expected = 0.5 + (0..k).map(|p| at(i, p) * b[p * n + j]).sum::<f32>();
                        assert_eq!(out[i * n + j], expected, "{m} {n} {k} at {i} {j}");
                    }
                }
            }
        }
    }
}
