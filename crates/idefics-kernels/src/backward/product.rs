//! A small matrix product inside one thread, for the five products of attention's backward pass.

use crate::simd::Simd;

/// A view of numbers by row and column.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) data: &'a [f32],
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

/// Rows of a tile; with two vectors of columns its sums fill 12 registers.
pub(super) const ROWS: usize = 6;

/// `out [m, n] += a [m, k] · b [k, n]`, rows of `b` and `out` contiguous, `b_stride` and `out_stride` apart.
///
/// # Safety
/// The processor has the instruction set of `S`.
///
/// # Panics
/// If a view ends before its extents do.
#[inline(always)]
pub(super) unsafe fn add_product<S: Simd>(
    (m, n, k): (usize, usize, usize),
    a: View<'_>,
    b: &[f32],
    b_stride: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!((m - 1) * a.row_stride + (k - 1) * a.column_stride < a.data.len(), "a of [{m}, {k}] expected");
    assert!((k - 1) * b_stride + n <= b.len(), "b of [{k}, {n}] expected");
    assert!((m - 1) * out_stride + n <= out.len(), "out of [{m}, {n}] expected");
    let mut j = 0;
    while j < n {
        let columns = (n - j).min(2 * S::LANES);
        let mut i = 0;
        while i < m {
            let at = Tile {
                a: a.data[i * a.row_stride..].as_ptr(),
                strides: (a.row_stride, a.column_stride, b_stride, out_stride),
                b: b[j..].as_ptr(),
                out: out[i * out_stride + j..].as_mut_ptr(),
                k,
            };
            // SAFETY: the tile's rows and columns lie inside the extents asserted above.
            unsafe {
                match (m - i >= ROWS, columns == 2 * S::LANES) {
                    (true, true) => at.whole::<S, ROWS>(),
                    (true, false) => at.ragged::<S, ROWS>(columns),
                    // Loops, not closures: those would leave the instruction set behind.
                    (false, true) => {
                        for row in 0..m - i {
                            at.row(row).whole::<S, 1>();
                        }
                    }
                    (false, false) => {
                        for row in 0..m - i {
                            at.row(row).ragged::<S, 1>(columns);
                        }
                    }
                }
            }
            i += ROWS;
        }
        j += columns;
    }
}

/// Where one tile starts.
#[derive(Clone, Copy)]
struct Tile {
    a: *const f32,
    /// Of `a` by row and by column, of `b` and of the output by row.
    strides: (usize, usize, usize, usize),
    b: *const f32,
    out: *mut f32,
    k: usize,
}

impl Tile {
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    unsafe fn row(self, row: usize) -> Self {
        // SAFETY: the caller knows that the row is there.
        unsafe {
            Self { a: self.a.add(row * self.strides.0), out: self.out.add(row * self.strides.3), ..self }
        }
    }

    /// # Safety
    /// The processor has the instruction set of `S`; `R` rows and two vectors of columns are there.
    #[inline(always)]
    unsafe fn whole<S: Simd, const R: usize>(self) {
        let (a_row, a_column, b_row, out_row) = self.strides;
        // SAFETY: indices stay inside what the caller vouches for.
        unsafe {
            let mut sums = [[S::splat(0.0); 2]; R];
            for p in 0..self.k {
                let b = self.b.add(p * b_row);
                let (b0, b1) = (S::load(b), S::load(b.add(S::LANES)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = S::splat(*self.a.add(r * a_row + p * a_column));
                    sums[0] = S::fma(a, b0, sums[0]);
                    sums[1] = S::fma(a, b1, sums[1]);
                }
            }
            let one = S::splat(1.0);
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    let out = self.out.add(r * out_row + v * S::LANES);
                    S::store(out, S::fma(one, S::load(out), *sum));
                }
            }
        }
    }

    /// # Safety
    /// As [`whole`](Self::whole), with `columns` columns, fewer than two vectors.
    #[inline(always)]
    unsafe fn ragged<S: Simd, const R: usize>(self, columns: usize) {
        let (a_row, a_column, b_row, out_row) = self.strides;
        let mut first = 0;
        while first < columns {
            let count = (columns - first).min(S::LANES);
            // SAFETY: indices stay inside what the caller vouches for.
            unsafe {
                let mut sums = [S::splat(0.0); R];
                for p in 0..self.k {
                    let b = S::load_head(self.b.add(p * b_row + first), count);
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = S::fma(S::splat(*self.a.add(r * a_row + p * a_column)), b, *sum);
                    }
                }
                let one = S::splat(1.0);
                for (r, sum) in sums.iter().enumerate() {
                    let out = self.out.add(r * out_row + first);
                    S::store_head(out, S::fma(one, S::load_head(out, count), *sum), count);
                }
            }
            first += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::portable::Portable;

    #[test]
    fn products_of_any_shape_agree_with_the_plain_sum() {
        for (m, n, k) in [(1, 1, 1), (6, 32, 3), (5, 33, 7), (13, 70, 16), (3, 31, 2), (0, 1, 1)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..k * n).map(|i| (i % 5) as f32 - 2.0).collect();
            for transposed in [false, true] {
                let view = if transposed {
                    View { data: &a, row_stride: 1, column_stride: m }
                } else {
                    View { data: &a, row_stride: k, column_stride: 1 }
                };
                let mut out = vec![0.5; m * n];
                // SAFETY: every processor has the portable tier.
                unsafe { add_product::<Portable>((m, n, k), view, &b, n, &mut out, n) };
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
