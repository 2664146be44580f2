//! Products of many rows on AVX-512: activations broadcast over a transposed panel of weights.
//!
//! A tile of dot products (`linear/tile.rs`) loads ten registers for 25 products and ends each of them in a
//! sum across lanes. With many rows it pays to transpose first: a panel of weight rows into a buffer that stays in
//! the second-level cache, all activations once for the whole product. Then one register holds 16 columns of the
//! output, 14 rows of activations are broadcast over two of them, and 28 products need 16 loads that run straight
//! on. What is transposed is scratch; the weight stays the only copy.
//!
//! Surprising: the bits are those of the dot products. There, step `s` of the sum adds the elements
//! `16·s + l` (pairs of them in bf16) to lane `l`, and the lanes are summed at the end by halves: `l` and
//! `l + 8`, then `l` and `l + 4`, and so on. Here a lane is a product of its own: all steps of lane 0, then all of
//! lane 8, and what is done is added as that tree says. So whichever is faster may run.

pub(crate) mod lane;
pub(crate) mod tile;
pub(crate) mod transpose;

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_storeu_ps,
};

use rayon::prelude::*;

use super::{job::Ahead, scratch};
use crate::parallel::SharedMut;
pub(crate) use lane::{Lane, Pair, RoundedPair, RoundedSingle, Single};
use tile::{Cut, TILE_ROWS, Tile, Waiting};
pub(crate) use transpose::{Line, Transposed, lane_stride, transpose};

/// Weight rows that are transposed together: two registers of the output.
pub(super) const PANEL_ROWS: usize = 32;
/// Lanes of a register, each 32 bits: an `f32` or a pair of bf16.
pub(crate) const LANES: usize = 16;

/// All activations of a product, in tiles of up to 14 rows.
pub(super) struct Tiles<'a> {
    lines: &'a [Line],
    cut: Cut,
    /// Lines of a tile.
    each: usize,
    /// Registers along `K`.
    steps: usize,
}

/// Lines of a tile of activations of `k` elements.
pub(crate) fn tile_lines<L: Lane>(k: usize) -> usize {
    lane_stride(k.div_ceil(L::STEP), TILE_ROWS)
}

/// Lines of a transposed panel of weights of `k` elements.
pub(crate) fn panel_lines<L: Lane>(k: usize) -> usize {
    2 * lane_stride(k.div_ceil(L::STEP), LANES)
}

/// Lends the rows `x` of `k` elements in tiles, each filled by `transpose(rows, buffer)`, which calls
/// [`transpose_tile`] for the same `L`.
pub(super) fn with_tiles<L: Lane<Element: Sync>>(
    x: &[L::Element],
    k: usize,
    transpose: impl Fn(&[L::Element], &mut [Line]) + Sync + Send,
    work: impl FnOnce(Tiles<'_>),
) {
    let (cut, each) = (Cut::new(x.len() / k), tile_lines::<L>(k));
    scratch::with(&scratch::ACTIVATIONS, cut.tiles * each, |lines| {
        lines.par_chunks_exact_mut(each).enumerate().for_each(|(tile, out)| {
            let (first, rows) = cut.rows(tile);
            transpose(&x[first * k..(first + rows) * k], out);
        });
        work(Tiles { lines, cut, each, steps: k.div_ceil(L::STEP) });
    });
}

/// Transposes a tile's rows `x` of `k` elements into `out`.
///
/// # Safety
/// The instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn transpose_tile<L: Lane>(x: &[L::Element], k: usize, out: &mut [Line]) {
    // SAFETY: passed on.
    unsafe { transpose_tile_rows::<L>(x, (k, k), x.len() / k, out) }
}

/// The same of rows that start `apart` elements apart.
///
/// # Safety
/// As [`transpose_tile`].
#[inline(always)]
pub(crate) unsafe fn transpose_tile_rows<L: Lane>(
    x: &[L::Element],
    (k, apart): (usize, usize),
    rows: usize,
    out: &mut [Line],
) {
    assert!(rows <= TILE_ROWS && out.len() >= tile_lines::<L>(k), "a tile of rows and its buffer");
    let stride = lane_stride(k.div_ceil(L::STEP), rows);
    // SAFETY: the buffer has room for all lanes by the assertion.
    unsafe { transpose::<L, false>(x, (k, apart), rows, stride, out.as_mut_ptr().cast()) };
}

/// Up to 32 weight rows, to be multiplied with all activations.
pub(super) struct Panel<'a, L: Lane> {
    pub(super) x: &'a Tiles<'a>,
    /// `[rows, K]`.
    pub(super) w: &'a [L::Element],
    pub(super) k: usize,
    /// [`panel_lines`] for what is transposed.
    pub(super) buffer: &'a mut [Line],
    /// Asked for on the way.
    pub(super) ahead: Ahead,
    /// Added to each output column of this panel, if any: `[rows]`.
    pub(super) bias: Option<&'a [f32]>,
    /// The whole output `[M, N]`.
    pub(super) out: SharedMut<f32>,
    /// Width `N` of the output.
    pub(super) n: usize,
    /// Output column of the first weight row.
    pub(super) first: usize,
}

/// Computes a panel of the output.
///
/// # Safety
/// - The processor has AVX-512 F, BW, DQ and VL and the instruction set of `L`.
/// - The activations are of the same lanes, pairs or singles.
/// - No other thread touches columns `first..first + rows` of the output meanwhile.
#[inline(always)]
pub(super) unsafe fn panel<L: Lane>(p: &mut Panel<'_, L>) {
    let (rows, steps) = (p.w.len() / p.k, p.k.div_ceil(L::STEP));
    assert!(
        rows <= PANEL_ROWS && steps == p.x.steps && p.buffer.len() >= panel_lines::<L>(p.k),
        "a panel of up to 32 rows, as long as the activations, and its buffer"
    );
    let stride = lane_stride(steps, LANES);
    let base = p.buffer.as_mut_ptr().cast::<u32>();
    let (low, high) = p.w.split_at(p.w.len().min(LANES * p.k));
    // SAFETY: the buffer holds two transposed groups of 16 rows by the assertion.
    let w = unsafe {
        let second = base.add(LANES * stride);
        transpose::<L, true>(low, (p.k, p.k), LANES, stride, base);
        transpose::<L, true>(high, (p.k, p.k), LANES, stride, second);
        [Transposed { units: base, stride }, Transposed { units: second, stride }]
    };
    // SAFETY: AVX-512 by the contract.
    let mut waiting = unsafe { Waiting::new() };
    let cut = p.x.cut;
    let each = p.ahead.bytes.div_ceil(cut.tiles * LANES);
    for tile in 0..cut.tiles {
        let (row, height) = cut.rows(tile);
        let x = Transposed {
            units: p.x.lines[tile * p.x.each..].as_ptr().cast(),
            stride: lane_stride(steps, height),
        };
        let ahead = Ahead { from: p.ahead.from.wrapping_add(tile * LANES * each), bytes: each };
        // SAFETY: the buffers hold what the tile reads, by how they were filled; the tile's rows and columns lie
        // inside the output.
        unsafe {
            Tile { x, w, steps, ahead }.run::<L>(height, &mut waiting);
            store(p, row, &waiting.result()[..height], rows);
        }
    }
}

/// Writes the rows of a tile, up to 32 columns each, with the bias.
///
/// # Safety
/// AVX-512 F; the rows from `row` on and the panel's columns lie inside the output and are this thread's own.
#[inline(always)]
unsafe fn store<L: Lane>(p: &Panel<'_, L>, row: usize, tile: &[[__m512; 2]], columns: usize) {
    for half in 0..2 {
        let columns = columns.saturating_sub(half * LANES).min(LANES);
        if columns == 0 {
            continue;
        }
        let mask = ((1u32 << columns) - 1) as u16;
        // SAFETY: the mask keeps to the columns that exist, of the bias and of the output.
        unsafe {
            #[expect(clippy::manual_map, reason = "a closure that is not inlined compiles without AVX-512")]
            let bias = match p.bias {
                Some(bias) => Some(_mm512_maskz_loadu_ps(mask, bias[half * LANES..].as_ptr())),
                None => None,
            };
            for (i, sums) in tile.iter().enumerate() {
                let mut sum = sums[half];
                if let Some(bias) = bias {
                    sum = _mm512_add_ps(sum, bias);
                }
                let to = p.out.at((row + i) * p.n + p.first + half * LANES);
                if columns == LANES {
                    _mm512_storeu_ps(to, sum);
                } else {
                    _mm512_mask_storeu_ps(to, mask, sum);
                }
            }
        }
    }
}
