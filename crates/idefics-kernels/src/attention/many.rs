//! Attention of many queries on AVX-512.
//!
//! A block of keys is transposed once for up to 56 queries, which are broadcast over it as in
//! `linear/broadcast`: each score is summed in the order of the tile of dot products, and weights and values in
//! the order of the narrow way, so a query has the same bits here and alone.

use std::arch::x86_64::_mm512_storeu_ps;

use super::{BLOCK, Heads, Running, Unit, Visible};
use crate::{
    linear::{
        broadcast::{
            LANES, Line, Single, Transposed, lane_stride, panel_lines,
            tile::{Cut, FEWEST_TILE_ROWS, Tile, Waiting},
            tile_lines, transpose, transpose_tile_rows,
        },
        job::Ahead,
        scratch,
    },
    parallel::SharedMut,
    simd::{Element, Simd, avx512::Avx512},
};

/// Queries from which on this is the way.
pub(super) const FEWEST: usize = FEWEST_TILE_ROWS;
/// Most queries of a unit: four tiles.
pub(super) const MOST: usize = 56;
/// Queries that share the values they read.
const QUERIES: usize = 8;

/// # Safety
/// The processor has AVX-512 F, BW, DQ and VL; no other thread writes this unit's output.
#[inline(always)]
pub(super) unsafe fn attend<E: Element>(
    unit: &Unit<'_>,
    heads: Heads,
    keys: &[E],
    values: &[E],
    out: SharedMut<f32>,
) {
    let dim = heads.head_dim;
    let queries = Cut::new(unit.count).tiles * tile_lines::<Single<f32>>(dim);
    let block = BLOCK / (2 * LANES) * panel_lines::<Single<E>>(dim);
    scratch::with(&scratch::ACTIVATIONS, queries, |queries| {
        scratch::with(&scratch::PANEL, block, |block| {
            // SAFETY: passed on.
            unsafe { attend_with(unit, heads, keys, values, out, queries, block) }
        });
    });
}

/// [`attend`] with buffers for the transposed queries and a block of transposed keys.
///
/// # Safety
/// As [`attend`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn attend_with<E: Element>(
    unit: &Unit<'_>,
    heads: Heads,
    keys: &[E],
    values: &[E],
    out: SharedMut<f32>,
    queries: &mut [Line],
    block: &mut [Line],
) {
    let (dim, width, count) = (heads.head_dim, heads.n_heads * heads.head_dim, unit.count);
    let column = unit.head * dim;
    let n_keys = keys.len() / width;
    let limit = |q: usize| match unit.job.visible {
        Visible::All => n_keys,
        Visible::Causal { past } => past + unit.first + q + 1,
    };
    let cut = Cut::new(count);
    let each = tile_lines::<Single<f32>>(dim);
    for (tile, lines) in queries.chunks_exact_mut(each).enumerate().take(cut.tiles) {
        let (first, rows) = cut.rows(tile);
        let x = &unit.job.queries[(unit.first + first) * width + column..][..(rows - 1) * width + dim];
        // SAFETY: the instruction set by the contract.
        unsafe { transpose_tile_rows::<Single<f32>>(x, (dim, width), rows, lines) };
    }

    let furthest = limit(count - 1);
    let mut running = vec![Running::new(); count];
    let mut sums = vec![0.0f32; count * dim]; // [Q, K], not yet divided by the total weight
    let mut scores = vec![[0.0f32; BLOCK]; count];
    // SAFETY: AVX-512 by the contract.
    let mut waiting = unsafe { Waiting::new() };
    for start in (0..furthest).step_by(BLOCK) {
        let n = BLOCK.min(furthest - start);
        // Queries before this one see none of these keys.
        let from = (0..count).find(|q| limit(*q) > start).unwrap_or(count);
        // SAFETY: keys and values of the block exist and hold `dim` elements from `column` on.
        unsafe {
            let keys = &keys[start * width + column..][..(n - 1) * width + dim];
            multiply(keys, (dim, width), cut, queries, block, &mut waiting, &mut scores);
            for q in from..count {
                let sums = &mut sums[q * dim..(q + 1) * dim];
                running[q].weigh::<true>(&mut scores[q], (limit(q) - start).min(n), heads.scale, sums);
            }
            let values = &values[start * width + column..][..(n - 1) * width + dim];
            add_values(&scores[from..], values, (dim, width), &mut sums[from * dim..]);
        }
    }
    for (q, (sums, running)) in sums.chunks_exact(dim).zip(&running).enumerate() {
        let row = (unit.out_row + q) * width + column;
        for (d, sum) in sums.iter().enumerate() {
            // SAFETY: inside the output by the assertion in `attention`, and this unit's own.
            unsafe { out.write(row + d, sum / running.total) };
        }
    }
}

/// Products of all queries with a block of keys, rows of `dim` elements `width` apart; those behind the last key
/// are rubbish.
///
/// # Safety
/// AVX-512 F, BW, DQ and VL; `queries` holds the tiles of `cut`, `block` has room for 64 transposed keys.
#[inline(always)]
unsafe fn multiply<E: Element>(
    keys: &[E],
    (dim, width): (usize, usize),
    cut: Cut,
    queries: &[Line],
    block: &mut [Line],
    waiting: &mut Waiting,
    scores: &mut [[f32; BLOCK]],
) {
    let steps = dim.div_ceil(LANES);
    let stride = lane_stride(steps, LANES);
    let each = tile_lines::<Single<f32>>(dim);
    let base = block.as_mut_ptr().cast::<u32>();
    for (group, keys) in keys.chunks(LANES * width).enumerate() {
        // The last row of a chunk may end with its own elements or go on with other heads'.
        let rows = keys.len().div_ceil(width);
        let keys = &keys[..(rows - 1) * width + dim];
        // SAFETY: a block has room for four groups.
        unsafe {
            let to = base.add(group * LANES * stride);
            transpose::<Single<E>, true>(keys, (dim, width), LANES, stride, to);
        }
    }
    let n = keys.len().div_ceil(width);
    for pair in 0..n.div_ceil(2 * LANES) {
        let w = [0, 1].map(|half| Transposed {
            units: base.wrapping_add((2 * pair + half) * LANES * stride).cast_const(),
            stride,
        });
        for tile in 0..cut.tiles {
            let (first, height) = cut.rows(tile);
            let units = queries[tile * each..].as_ptr().cast();
            let x = Transposed { units, stride: lane_stride(steps, height) };
            // SAFETY: queries and keys were transposed for `steps` steps; a half without keys holds old ones.
            unsafe {
                Tile { x, w, steps, ahead: Ahead::NOTHING }.run::<Single<E>>(height, waiting);
                for (row, products) in waiting.result()[..height].iter().enumerate() {
                    let to = scores[first + row][pair * 2 * LANES..][..2 * LANES].as_mut_ptr();
                    _mm512_storeu_ps(to, products[0]);
                    _mm512_storeu_ps(to.add(LANES), products[1]);
                }
            }
        }
    }
}

/// `sums[q] += Σₛ weights[q][s] · values[s]` over rows of `dim` elements `width` apart.
///
/// # Safety
/// AVX-512 F, BW, DQ and VL.
#[inline(always)]
unsafe fn add_values<E: Element>(
    weights: &[[f32; BLOCK]],
    values: &[E],
    (dim, width): (usize, usize),
    sums: &mut [f32],
) {
    let n = values.len().div_ceil(width);
    let count = weights.len();
    for first in (0..count).step_by(QUERIES) {
        // Past the last query it is repeated: each copy computes and writes the same.
        let index: [usize; QUERIES] = std::array::from_fn(|i| (first + i).min(count - 1));
        let weights: [*const f32; QUERIES] = std::array::from_fn(|i| weights[index[i]].as_ptr());
        let sums: [*mut f32; QUERIES] =
            std::array::from_fn(|i| sums[index[i] * dim..(index[i] + 1) * dim].as_mut_ptr());
        let mut at = 0;
        // SAFETY: columns stay below `dim`, rows below `n`.
        unsafe {
            while at + 3 * LANES <= dim {
                add_columns::<E, 3>(
                    weights,
                    values.as_ptr().add(at),
                    width,
                    n,
                    sums.map(|sums| sums.add(at)),
                );
                at += 3 * LANES;
            }
            while at + 2 * LANES <= dim {
                add_columns::<E, 2>(
                    weights,
                    values.as_ptr().add(at),
                    width,
                    n,
                    sums.map(|sums| sums.add(at)),
                );
                at += 2 * LANES;
            }
            while at < dim {
                let columns = LANES.min(dim - at);
                let sums = sums.map(|sums| sums.add(at));
                add_some_columns(weights, values.as_ptr().add(at), width, n, sums, columns);
                at += columns;
            }
        }
    }
}

/// [`add_values`] of eight queries in `16 · C` columns.
///
/// # Safety
/// AVX-512 F; `n` weights, `n` rows of values and the sums exist.
#[inline(always)]
unsafe fn add_columns<E: Element, const C: usize>(
    weights: [*const f32; QUERIES],
    values: *const E,
    width: usize,
    n: usize,
    sums: [*mut f32; QUERIES],
) {
    // SAFETY: the contract.
    unsafe {
        let mut totals = [[Avx512::splat(0.0); C]; QUERIES];
        for q in 0..QUERIES {
            for c in 0..C {
                totals[q][c] = Avx512::load(sums[q].add(c * LANES));
            }
        }
        for s in 0..n {
            let mut row = [Avx512::splat(0.0); C];
            for (c, row) in row.iter_mut().enumerate() {
                *row = E::load::<Avx512>(values.add(s * width + c * LANES));
            }
            for q in 0..QUERIES {
                let weight = Avx512::splat(weights[q].add(s).read());
                for c in 0..C {
                    totals[q][c] = Avx512::fma(weight, row[c], totals[q][c]);
                }
            }
        }
        for q in 0..QUERIES {
            for c in 0..C {
                Avx512::store(sums[q].add(c * LANES), totals[q][c]);
            }
        }
    }
}

/// [`add_columns`] in up to 16 columns.
///
/// # Safety
/// As [`add_columns`].
#[inline(always)]
unsafe fn add_some_columns<E: Element>(
    weights: [*const f32; QUERIES],
    values: *const E,
    width: usize,
    n: usize,
    sums: [*mut f32; QUERIES],
    columns: usize,
) {
    // SAFETY: the contract.
    unsafe {
        let mut totals = [Avx512::splat(0.0); QUERIES];
        for q in 0..QUERIES {
            totals[q] = Avx512::load_head(sums[q], columns);
        }
        for s in 0..n {
            let row = E::load_head::<Avx512>(values.add(s * width), columns);
            for q in 0..QUERIES {
                totals[q] = Avx512::fma(Avx512::splat(weights[q].add(s).read()), row, totals[q]);
            }
        }
        for q in 0..QUERIES {
            Avx512::store_head(sums[q], totals[q], columns);
        }
    }
}
