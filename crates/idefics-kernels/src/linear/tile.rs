//! The inner kernel: a tile of dot products held in registers.

use std::marker::PhantomData;

use half::bf16;

use crate::{
    parallel::SharedMut,
    simd::{Element, SUMS, Simd},
};

/// A dot product along `K`, a vector step at a time.
///
/// # Safety
/// Methods need the instruction set of the implementing type; pointers and rows must be readable for `STEP` (or
/// `n`) elements.
pub(crate) unsafe trait Dot {
    /// Element of the activations.
    type X: Copy + Sync;
    /// Where a weight row starts.
    type Row: Copy;
    /// A register of activations.
    type XV: Copy;
    /// A register of weights.
    type WV: Copy;
    /// A register of partial sums.
    type Sums: Copy;
    /// Elements of `K` in one step.
    const STEP: usize;
    /// Whether a register of weights takes so long to come by that it pays to begin a step early.
    const IS_SLOW_TO_LOAD: bool = false;

    unsafe fn zero() -> Self::Sums;
    unsafe fn load_x(from: *const Self::X) -> Self::XV;
    unsafe fn load_x_head(from: *const Self::X, n: usize) -> Self::XV;
    /// Elements `at..at + STEP` of a weight row.
    unsafe fn load_w(row: Self::Row, at: usize) -> Self::WV;
    /// Elements `at..at + n` of a weight row, zeros behind.
    unsafe fn load_w_head(row: Self::Row, at: usize, n: usize) -> Self::WV;
    /// Where element `at` of a weight row lies.
    fn address(row: Self::Row, at: usize) -> *const u8;
    unsafe fn step(sums: Self::Sums, x: Self::XV, w: Self::WV) -> Self::Sums;
    /// What each of the registers holds in all.
    unsafe fn sums(sums: [Self::Sums; SUMS]) -> [f32; SUMS];
}

/// Both factors widened to `f32`, products summed by fused multiply-add.
pub(crate) struct Widened<S, X, W>(PhantomData<(S, X, W)>);

// SAFETY: forwards to `Simd` and `Element` under the same contract.
unsafe impl<S: Simd, X: Element, W: Element> Dot for Widened<S, X, W> {
    type X = X;
    type Row = *const W;
    type XV = S::V;
    type WV = S::V;
    type Sums = S::V;
    const STEP: usize = S::LANES;

    #[inline(always)]
    unsafe fn zero() -> S::V {
        // SAFETY: same contract.
        unsafe { S::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn load_x(from: *const X) -> S::V {
        // SAFETY: same contract.
        unsafe { X::load::<S>(from) }
    }
    #[inline(always)]
    unsafe fn load_x_head(from: *const X, n: usize) -> S::V {
        // SAFETY: same contract.
        unsafe { X::load_head::<S>(from, n) }
    }
    #[inline(always)]
    unsafe fn load_w(row: *const W, at: usize) -> S::V {
        // SAFETY: same contract.
        unsafe { W::load::<S>(row.add(at)) }
    }
    #[inline(always)]
    unsafe fn load_w_head(row: *const W, at: usize, n: usize) -> S::V {
        // SAFETY: same contract.
        unsafe { W::load_head::<S>(row.add(at), n) }
    }
    #[inline(always)]
    fn address(row: *const W, at: usize) -> *const u8 {
        row.wrapping_add(at).cast()
    }
    #[inline(always)]
    unsafe fn step(sums: S::V, x: S::V, w: S::V) -> S::V {
        // SAFETY: same contract.
        unsafe { S::fma(x, w, sums) }
    }
    #[inline(always)]
    unsafe fn sums(sums: [S::V; SUMS]) -> [f32; SUMS] {
        // SAFETY: same contract.
        unsafe { S::sum_all(sums) }
    }
}

/// Pairs of bf16 products summed by `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Pairs;

#[cfg(target_arch = "x86_64")]
// SAFETY: forwards to the AVX-512 BF16 wrappers under the same contract.
unsafe impl Dot for Pairs {
    type X = bf16;
    type Row = *const bf16;
    type XV = std::arch::x86_64::__m512bh;
    type WV = std::arch::x86_64::__m512bh;
    type Sums = std::arch::x86_64::__m512;
    const STEP: usize = 32;

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        // SAFETY: same contract.
        unsafe { crate::simd::avx512::Avx512::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn load_x(from: *const bf16) -> Self::XV {
        // SAFETY: same contract.
        unsafe { crate::simd::avx512::load_pairs(from) }
    }
    #[inline(always)]
    unsafe fn load_x_head(from: *const bf16, n: usize) -> Self::XV {
        // SAFETY: same contract.
        unsafe { crate::simd::avx512::load_pairs_head(from, n) }
    }
    #[inline(always)]
    unsafe fn load_w(row: *const bf16, at: usize) -> Self::WV {
        // SAFETY: same contract.
        unsafe { crate::simd::avx512::load_pairs(row.add(at)) }
    }
    #[inline(always)]
    unsafe fn load_w_head(row: *const bf16, at: usize, n: usize) -> Self::WV {
        // SAFETY: same contract.
        unsafe { crate::simd::avx512::load_pairs_head(row.add(at), n) }
    }
    #[inline(always)]
    fn address(row: *const bf16, at: usize) -> *const u8 {
        row.wrapping_add(at).cast()
    }
    #[inline(always)]
    unsafe fn step(sums: Self::Sums, x: Self::XV, w: Self::WV) -> Self::Sums {
        // SAFETY: same contract.
        unsafe { crate::simd::avx512::dot_pairs(sums, x, w) }
    }
    #[inline(always)]
    unsafe fn sums(sums: [Self::Sums; SUMS]) -> [f32; SUMS] {
        // SAFETY: same contract.
        unsafe { crate::simd::avx512::Avx512::sum_all(sums) }
    }
}

/// Weight rows that a tile can start at.
pub(crate) trait WeightRows {
    /// Where one row starts.
    type Row: Copy;
    /// Number of rows.
    fn count(&self) -> usize;
    /// Row `index`, which is below `count`.
    fn row(&self, index: usize) -> Self::Row;
}

impl<R: WeightRows> WeightRows for &R {
    type Row = R::Row;

    #[inline(always)]
    fn count(&self) -> usize {
        (*self).count()
    }

    #[inline(always)]
    fn row(&self, index: usize) -> R::Row {
        (*self).row(index)
    }
}

/// Rows of `k` elements, one after the other.
pub(crate) struct DenseRows<'a, W> {
    /// `[rows, K]`.
    pub(crate) data: &'a [W],
    /// Elements of a row.
    pub(crate) k: usize,
}

impl<W> WeightRows for DenseRows<'_, W> {
    type Row = *const W;

    #[inline(always)]
    fn count(&self) -> usize {
        self.data.len() / self.k
    }

    #[inline(always)]
    fn row(&self, index: usize) -> *const W {
        self.data[index * self.k..(index + 1) * self.k].as_ptr()
    }
}

/// One thread's share: all rows of `x` against a run of weight rows.
pub(crate) struct Panel<'a, X, R> {
    /// Activations `[M, K]`.
    pub(crate) x: &'a [X],
    /// Weight rows of this panel.
    pub(crate) w: R,
    /// The inner dimension.
    pub(crate) k: usize,
    /// Added to each output column of this panel, if any: `[rows]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// The whole output `[M, N]`.
    pub(crate) out: SharedMut<f32>,
    /// Width `N` of the output.
    pub(crate) n: usize,
    /// Output column of the first weight row.
    pub(crate) first: usize,
}

/// Computes a panel in tiles of `MR` activation rows by `NR` weight rows; `MR` is at most 5.
///
/// # Safety
/// - The processor has the instruction set of `D`.
/// - Every row of the panel's weight can be loaded by `D` up to `k` elements.
/// - No other thread touches columns `first..first + rows` of the output meanwhile.
#[inline(always)]
pub(crate) unsafe fn panel<D: Dot, const MR: usize, const NR: usize>(
    p: &Panel<'_, D::X, impl WeightRows<Row = D::Row>>,
) {
    let m = p.x.len() / p.k;
    let mut row = 0;
    while row < m {
        let count = (m - row).min(MR);
        // SAFETY: passed on; `row + count <= m`.
        unsafe {
            match count {
                1 => strip::<D, 1, NR>(p, row, count),
                2 => strip::<D, 2, NR>(p, row, count),
                3 => strip::<D, 3, NR>(p, row, count),
                4 => strip::<D, 4, NR>(p, row, count),
                _ => strip::<D, 5, NR>(p, row, count),
            }
        }
        row += count;
    }
}

/// As [`panel`], for weights that take work to load: few rows of activations share each load among all of
/// them, and a wider strip pays even where some of its rows are empty.
///
/// # Safety
/// As [`panel`].
#[inline(always)]
pub(crate) unsafe fn packed_panel<D: Dot>(p: &Panel<'_, D::X, impl WeightRows<Row = D::Row>>) {
    let m = p.x.len() / p.k;
    let mut row = 0;
    while row < m {
        let count = (m - row).min(8);
        // SAFETY: passed on; `row + count <= m`.
        unsafe {
            match count {
                1 => strip::<D, 1, 4>(p, row, count),
                2 => strip::<D, 2, 4>(p, row, count),
                3 | 4 => strip::<D, 4, 4>(p, row, count),
                _ => strip::<D, 8, 2>(p, row, count),
            }
        }
        row += count;
    }
}

/// `count` rows of activations from `row` on, `MR` at most, against all weight rows of the panel.
///
/// # Safety
/// As [`panel`]; the rows of activations exist.
#[inline(always)]
unsafe fn strip<D: Dot, const MR: usize, const NR: usize>(
    p: &Panel<'_, D::X, impl WeightRows<Row = D::Row>>,
    row: usize,
    count: usize,
) {
    let rows = p.w.count();
    // Past the last row the tile repeats it; the doubled results are dropped below.
    let x: [*const D::X; MR] = std::array::from_fn(|i| {
        let row = row + i.min(count - 1);
        p.x[row * p.k..(row + 1) * p.k].as_ptr()
    });
    // A tile takes rows that lie apart, so that from tile to tile each of its streams runs straight on through
    // memory: neighbouring rows would be short streams, which the processor's prefetching learns too late.
    let apart = rows.div_ceil(NR);
    for step in 0..apart {
        // Where the last stream is shorter the tile repeats a row; the doubled results are dropped below.
        let w: [D::Row; NR] = std::array::from_fn(|j| p.w.row((step + j * apart).min(rows - 1)));
        // SAFETY: each pointer starts a row of `k` elements. The first strip is the one that waits for memory; later
        // ones find the panel in cache.
        let tile = unsafe { tile::<D, MR, NR>(x, w, p.k, row == 0) };
        for (i, sums) in tile.iter().enumerate().take(count) {
            for (j, sum) in sums.iter().enumerate() {
                let col = step + j * apart;
                if col < rows {
                    let value = p.bias.map_or(*sum, |bias| sum + bias[col]);
                    // SAFETY: row and column lie inside the output; the columns are this thread's own.
                    unsafe { p.out.write((row + i) * p.n + p.first + col, value) };
                }
            }
        }
    }
}

/// How far ahead of a weight row's position memory is asked for: by measurement, at the published widths in every
/// format. Less comes too late, and more takes the caches from what is being read.
const AHEAD_BYTES: usize = 1536;

/// `MR × NR` dot products of length `k`. Where weights come `from_memory`, what lies ahead of each row's position is
/// asked for as it goes: rows are short streams, which the processor's own prefetching learns too late.
///
/// # Safety
/// The processor has the instruction set of `D`; each row can be read for `k` elements.
#[inline(always)]
pub(crate) unsafe fn tile<D: Dot, const MR: usize, const NR: usize>(
    x: [*const D::X; MR],
    w: [D::Row; NR],
    k: usize,
    from_memory: bool,
) -> [[f32; NR]; MR] {
    // SAFETY: all loads stay below `k`, by the loop conditions.
    unsafe {
        let mut sums = [[D::zero(); NR]; MR];
        let mut at = 0;
        let mut wv = [D::load_w_head(w[0], 0, 0); NR];
        if D::IS_SLOW_TO_LOAD && k >= D::STEP {
            for j in 0..NR {
                wv[j] = D::load_w(w[j], 0);
            }
        }
        while at + D::STEP <= k {
            // Not a closure: one that is not inlined would compile without the instruction set.
            if from_memory {
                for row in w {
                    prefetch(D::address(row, at).wrapping_add(AHEAD_BYTES));
                }
            }
            if !D::IS_SLOW_TO_LOAD {
                for j in 0..NR {
                    wv[j] = D::load_w(w[j], at);
                }
            }
            // The last step loads its own weights once more, to stay inside the row.
            let (current, next) = (wv, (at + D::STEP).min(k - D::STEP));
            for i in 0..MR.max(NR) {
                if D::IS_SLOW_TO_LOAD && i < NR {
                    wv[i] = D::load_w(w[i], next);
                }
                if i < MR {
                    let xv = D::load_x(x[i].add(at));
                    for j in 0..NR {
                        sums[i][j] = D::step(sums[i][j], xv, current[j]);
                    }
                }
            }
            at += D::STEP;
        }
        if at < k {
            for i in 0..MR {
                let xv = D::load_x_head(x[i].add(at), k - at);
                for j in 0..NR {
                    sums[i][j] = D::step(sums[i][j], xv, D::load_w_head(w[j], at, k - at));
                }
            }
        }
        let mut out = [[0.0; NR]; MR];
        for first in (0..MR * NR).step_by(SUMS) {
            let mut group = [D::zero(); SUMS];
            for (n, sum) in (first..MR * NR).zip(&mut group) {
                *sum = sums[n / NR][n % NR];
            }
            for (n, sum) in (first..MR * NR).zip(D::sums(group)) {
                out[n / NR][n % NR] = sum;
            }
        }
        out
    }
}

/// Asks for a line of memory without waiting for it; any address will do. It goes to the second-level cache: the
/// streams of a tile may share few sets of the first, and would drive each other out of it.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults; every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
