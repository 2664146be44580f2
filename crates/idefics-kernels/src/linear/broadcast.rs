//! Products of many rows on AVX-512: activations broadcast over a transposed panel of weights.
//!
//! A tile of dot products ([`tile`](super::tile)) loads ten registers for 25 products and ends each of them in a
//! sum across lanes. With many rows it pays to transpose first: a panel of weight rows into a buffer that stays in
//! the second-level cache, all activations once for the whole product. Then one register holds 16 columns of the
//! output, 14 rows of activations are broadcast over two of them, and 28 products need 16 loads that run straight
//! on. What is transposed is scratch; the weight stays the only copy.
//!
//! Surprising: the bits are those of the dot products. There, step `s` of the sum adds the elements
//! `16·s + l` (pairs of them in bf16) to lane `l`, and the lanes are summed at the end by halves: `l` and
//! `l + 8`, then `l` and `l + 4`, and so on. Here a lane is a product of its own: all steps of lane 0, then all of
//! lane 8, and what is done is added as that tree says. So whichever is faster may run.

#![allow(clippy::cast_ptr_alignment)] // Loads are the unaligned ones throughout.

use std::arch::x86_64::{
    __m512, __m512i, _CMP_UNORD_Q, _MM_HINT_T1, _mm_prefetch, _mm512_add_epi32, _mm512_add_ps,
    _mm512_and_si512, _mm512_castps_si512, _mm512_castsi256_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cvtepi32_epi16, _mm512_fmadd_ps, _mm512_inserti64x4, _mm512_load_si512, _mm512_mask_blend_epi32,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_or_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_store_si512,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::marker::PhantomData;

use half::bf16;
use rayon::prelude::*;

use super::{job::Ahead, scratch};
use crate::{
    parallel::SharedMut,
    simd::{
        Element, Simd,
        avx512::{Avx512, dot_pairs, load_pairs, load_pairs_head},
    },
};

/// Rows of activations from which transposing pays.
pub(super) const FEWEST_ROWS: usize = 24;
/// Weight rows that are transposed together: two registers of the output.
pub(super) const PANEL_ROWS: usize = 32;
/// Most rows of activations in a tile: 28 sums, two registers of weights and one of activations fill the 32.
const TILE_ROWS: usize = 14;
/// Lanes of a register, each 32 bits: an `f32` or a pair of bf16.
const LANES: usize = 16;
/// Sums that wait in the tree of lanes, the result included.
const LEVELS: usize = 5;

/// A line of cache, which is a register.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct Line([u32; LANES]);

/// What a lane holds, where it comes from, and how lanes are multiplied.
///
/// # Safety
/// Methods need the instruction set of the implementing type; `n` elements can be read at the pointer.
pub(super) unsafe trait Lane {
    /// Element of the rows.
    type Element: Copy;
    /// Elements in one register.
    const STEP: usize;

    /// [`STEP`](Self::STEP) elements.
    unsafe fn load(from: *const Self::Element) -> __m512i;
    /// The first `n` elements, zeros behind.
    unsafe fn load_head(from: *const Self::Element, n: usize) -> __m512i;
    /// `sums + x · w` in every lane, with the instruction that the dot products use.
    unsafe fn step(sums: __m512, x: __m512i, w: __m512i) -> __m512;
}

/// Elements widened to `f32`.
pub(super) struct Single<E>(PhantomData<E>);

/// Pairs of bf16.
pub(super) struct Pair;

// SAFETY: forwards to `Element` and AVX-512 F under the same contract.
unsafe impl<E: Element> Lane for Single<E> {
    type Element = E;
    const STEP: usize = LANES;

    #[inline(always)]
    unsafe fn load(from: *const E) -> __m512i {
        // SAFETY: same contract.
        unsafe { _mm512_castps_si512(E::load::<Avx512>(from)) }
    }
    #[inline(always)]
    unsafe fn load_head(from: *const E, n: usize) -> __m512i {
        // SAFETY: same contract.
        unsafe { _mm512_castps_si512(E::load_head::<Avx512>(from, n)) }
    }
    #[inline(always)]
    unsafe fn step(sums: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: same contract.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sums) }
    }
}

// SAFETY: forwards to the AVX-512 BF16 wrappers under the same contract; all types of 512 bits share their bits.
unsafe impl Lane for Pair {
    type Element = bf16;
    const STEP: usize = 2 * LANES;

    #[inline(always)]
    unsafe fn load(from: *const bf16) -> __m512i {
        // SAFETY: same contract.
        unsafe { std::mem::transmute(load_pairs(from)) }
    }
    #[inline(always)]
    unsafe fn load_head(from: *const bf16, n: usize) -> __m512i {
        // SAFETY: same contract.
        unsafe { std::mem::transmute(load_pairs_head(from, n)) }
    }
    #[inline(always)]
    unsafe fn step(sums: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: same contract.
        unsafe { dot_pairs(sums, std::mem::transmute(x), std::mem::transmute(w)) }
    }
}

/// `f32` rounded to pairs of bf16, to nearest even.
pub(super) struct RoundedPair;

/// `f32` rounded to bf16 and widened again.
pub(super) struct RoundedSingle;

// SAFETY: forwards to AVX-512 loads under the same contract.
unsafe impl Lane for RoundedPair {
    type Element = f32;
    const STEP: usize = Pair::STEP;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512i {
        // SAFETY: same contract.
        unsafe { pack(round(Avx512::load(from)), round(Avx512::load(from.add(LANES)))) }
    }
    #[inline(always)]
    unsafe fn load_head(from: *const f32, n: usize) -> __m512i {
        // SAFETY: same contract; nothing is read under an empty mask.
        unsafe {
            let behind = from.wrapping_add(LANES);
            let low = Avx512::load_head(from, n.min(LANES));
            pack(round(low), round(Avx512::load_head(behind, n.saturating_sub(LANES))))
        }
    }
    #[inline(always)]
    unsafe fn step(sums: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: same contract.
        unsafe { Pair::step(sums, x, w) }
    }
}

// SAFETY: as above.
unsafe impl Lane for RoundedSingle {
    type Element = f32;
    const STEP: usize = LANES;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512i {
        // SAFETY: same contract.
        unsafe { _mm512_slli_epi32::<16>(round(Avx512::load(from))) }
    }
    #[inline(always)]
    unsafe fn load_head(from: *const f32, n: usize) -> __m512i {
        // SAFETY: same contract.
        unsafe { _mm512_slli_epi32::<16>(round(Avx512::load_head(from, n))) }
    }
    #[inline(always)]
    unsafe fn step(sums: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: same contract.
        unsafe { Single::<f32>::step(sums, x, w) }
    }
}

/// The bits of each lane rounded to bf16, in the lower half: [`super::round`] in registers. The instruction for it
/// would make zeros of the smallest numbers.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn round(values: __m512) -> __m512i {
    // SAFETY: the contract.
    unsafe {
        let bits = _mm512_castps_si512(values);
        let even = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let half = _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
        let quiet = _mm512_or_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(0x40));
        _mm512_mask_blend_epi32(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values), rounded, quiet)
    }
}

/// The lower halves of all lanes, those of `low` first.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn pack(low: __m512i, high: __m512i) -> __m512i {
    // SAFETY: the contract.
    unsafe {
        let (low, high) = (_mm512_cvtepi32_epi16(low), _mm512_cvtepi32_epi16(high));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
}

/// Up to 16 rows transposed: `[lane][step][row]`, lanes `stride` units apart. What lies behind a lane's last
/// step is rubbish: stores of whole registers run over it.
#[derive(Clone, Copy)]
struct Transposed {
    units: *const u32,
    stride: usize,
}

/// Units between the lanes of `steps` steps of `rows` rows. One line more than they fill, so that stores of whole
/// registers stay inside and the 16 lanes do not meet in one set of the first-level cache.
fn lane_stride(steps: usize, rows: usize) -> usize {
    (steps * rows).next_multiple_of(LANES) + LANES
}

/// All activations of a product, in tiles of up to 14 rows.
pub(super) struct Tiles<'a> {
    lines: &'a [Line],
    cut: Cut,
    /// Lines of a tile.
    each: usize,
    /// Registers along `K`.
    steps: usize,
}

/// How `m` rows are cut: tiles of nearly one height, at least 7 for `m >= FEWEST_ROWS`.
#[derive(Clone, Copy)]
struct Cut {
    tiles: usize,
    height: usize,
    higher: usize,
}

impl Cut {
    fn new(m: usize) -> Self {
        let tiles = m.div_ceil(TILE_ROWS);
        Self { tiles, height: m / tiles, higher: m % tiles }
    }

    /// First row and number of rows of a tile: the first `higher` ones have one more.
    fn rows(self, tile: usize) -> (usize, usize) {
        (tile * self.height + tile.min(self.higher), self.height + usize::from(tile < self.higher))
    }
}

/// Lines of a tile of activations of `k` elements.
fn tile_lines<L: Lane>(k: usize) -> usize {
    lane_stride(k.div_ceil(L::STEP), TILE_ROWS)
}

/// Lines of a transposed panel of weights of `k` elements.
pub(super) fn panel_lines<L: Lane>(k: usize) -> usize {
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
pub(super) unsafe fn transpose_tile<L: Lane>(x: &[L::Element], k: usize, out: &mut [Line]) {
    let (rows, steps) = (x.len() / k, k.div_ceil(L::STEP));
    assert!(rows <= TILE_ROWS && out.len() >= tile_lines::<L>(k), "a tile of rows and its buffer");
    // SAFETY: rows exist, and the buffer has room for all lanes by the assertion.
    unsafe { transpose::<L, false>(x, k, rows, lane_stride(steps, rows), out.as_mut_ptr().cast()) };
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
        transpose::<L, true>(low, p.k, LANES, stride, base);
        transpose::<L, true>(high, p.k, LANES, stride, second);
        [Transposed { units: base, stride }, Transposed { units: second, stride }]
    };
    // SAFETY: AVX-512 by the contract.
    let mut waiting: Waiting = [unsafe { _mm512_setzero_ps() }; _];
    let cut = p.x.cut;
    let each = p.ahead.bytes.div_ceil(cut.tiles * LANES);
    for tile in 0..cut.tiles {
        let (row, height) = cut.rows(tile);
        let job = Tile {
            x: Transposed {
                units: p.x.lines[tile * p.x.each..].as_ptr().cast(),
                stride: lane_stride(steps, height),
            },
            w,
            steps,
            ahead: Ahead { from: p.ahead.from.wrapping_add(tile * LANES * each), bytes: each },
            row,
            columns: rows,
        };
        // SAFETY: passed on; the tile's rows and columns lie inside the output.
        unsafe {
            match height {
                7 => job.run::<L, 7>(p, &mut waiting),
                8 => job.run::<L, 8>(p, &mut waiting),
                9 => job.run::<L, 9>(p, &mut waiting),
                10 => job.run::<L, 10>(p, &mut waiting),
                11 => job.run::<L, 11>(p, &mut waiting),
                12 => job.run::<L, 12>(p, &mut waiting),
                13 => job.run::<L, 13>(p, &mut waiting),
                14 => job.run::<L, 14>(p, &mut waiting),
                other => unreachable!("{other} rows in a tile"),
            }
        }
    }
}

/// Sums of finished lanes that wait for others, `[level][row][half]`.
type Waiting = [__m512; LEVELS * TILE_ROWS * 2];

/// A tile of the output: up to 14 rows by 32 columns.
struct Tile {
    x: Transposed,
    w: [Transposed; 2],
    steps: usize,
    /// What to ask for during the first lane; each further lane asks for as much behind it.
    ahead: Ahead,
    /// First row of the output.
    row: usize,
    /// Columns that exist.
    columns: usize,
}

impl Tile {
    /// # Safety
    /// As [`panel`]; the tile has `H` rows.
    #[inline(always)]
    unsafe fn run<L: Lane, const H: usize>(&self, p: &Panel<'_, L>, waiting: &mut Waiting) {
        // SAFETY: all pointers stay inside what was transposed, by the loop bounds.
        unsafe {
            let waiting = waiting.as_mut_ptr();
            for leaf in 0..LANES {
                // By halves: the order of leaves of that tree is the reversal of their bits.
                let lane = (leaf as u8).reverse_bits() as usize >> 4;
                let mut x = self.x.units.add(lane * self.x.stride);
                let mut w = [0, 1].map(|half| self.w[half].units.add(lane * self.w[half].stride));
                let mut sums = [[_mm512_setzero_ps(); 2]; H];
                let ahead = self.ahead.from.wrapping_add(leaf * self.ahead.bytes);
                for at in (0..self.ahead.bytes).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(at).cast());
                }
                for _ in 0..self.steps {
                    let columns = [_mm512_load_si512(w[0].cast()), _mm512_load_si512(w[1].cast())];
                    for i in 0..H {
                        let x = _mm512_set1_epi32(x.add(i).read() as i32);
                        sums[i][0] = L::step(sums[i][0], x, columns[0]);
                        sums[i][1] = L::step(sums[i][1], x, columns[1]);
                    }
                    x = x.add(H);
                    w = [w[0].add(LANES), w[1].add(LANES)];
                }
                let mut level = 0;
                while leaf >> level & 1 == 1 {
                    for i in 0..H {
                        for half in 0..2 {
                            let earlier = waiting.add((level * TILE_ROWS + i) * 2 + half).read();
                            sums[i][half] = _mm512_add_ps(earlier, sums[i][half]);
                        }
                    }
                    level += 1;
                }
                for i in 0..H {
                    for half in 0..2 {
                        waiting.add((level * TILE_ROWS + i) * 2 + half).write(sums[i][half]);
                    }
                }
            }
            for half in 0..2 {
                let columns = self.columns.saturating_sub(half * LANES).min(LANES);
                if columns == 0 {
                    continue;
                }
                let mask = ((1u32 << columns) - 1) as u16;
                // Not a closure: one that is not inlined would compile without AVX-512.
                let bias = match p.bias {
                    Some(bias) => Some(_mm512_maskz_loadu_ps(mask, bias[half * LANES..].as_ptr())),
                    None => None,
                };
                for i in 0..H {
                    let mut sum = waiting.add(((LEVELS - 1) * TILE_ROWS + i) * 2 + half).read();
                    if let Some(bias) = bias {
                        sum = _mm512_add_ps(sum, bias);
                    }
                    let to = p.out.at((self.row + i) * p.n + p.first + half * LANES);
                    if columns == LANES {
                        _mm512_storeu_ps(to, sum);
                    } else {
                        _mm512_mask_storeu_ps(to, mask, sum);
                    }
                }
            }
        }
    }
}

/// Transposes up to 16 rows of `k` elements. `width` rows are stored for each step: 16,
/// or with `ALIGNED` false any number.
///
/// # Safety
/// The instruction set of `L`; `out` has room for 16 lanes of `stride` units, and is a line's start if `ALIGNED`.
#[inline(always)]
unsafe fn transpose<L: Lane, const ALIGNED: bool>(
    rows: &[L::Element],
    k: usize,
    width: usize,
    stride: usize,
    out: *mut u32,
) {
    let count = rows.len() / k;
    if count == 0 {
        return;
    }
    // Past the last row it is repeated: nobody looks at what comes of it.
    let from: [*const L::Element; LANES] =
        std::array::from_fn(|row| rows[row.min(count - 1) * k..][..k].as_ptr());
    let whole = k - k % L::STEP;
    let mut to = out;
    // SAFETY: loads stay below `k`; stores stay below `stride` in each lane, as the last step's run over by less
    // than the line that `lane_stride` adds.
    unsafe {
        for at in (0..whole).step_by(L::STEP) {
            let mut registers = [_mm512_setzero_si512(); LANES];
            for (register, from) in registers.iter_mut().zip(from) {
                *register = L::load(from.add(at));
            }
            scatter::<ALIGNED>(registers, stride, to);
            to = to.add(width);
        }
        if whole < k {
            let mut registers = [_mm512_setzero_si512(); LANES];
            for (register, from) in registers.iter_mut().zip(from) {
                *register = L::load_head(from.add(whole), k - whole);
            }
            scatter::<ALIGNED>(registers, stride, to);
        }
    }
}

/// Transposes and stores 16 registers, lanes `stride` units apart.
///
/// # Safety
/// As [`transpose`], for one step.
#[inline(always)]
unsafe fn scatter<const ALIGNED: bool>(registers: [__m512i; LANES], stride: usize, to: *mut u32) {
    // SAFETY: the contract.
    unsafe {
        for (lane, units) in transpose_registers(registers).into_iter().enumerate() {
            let to = to.add(lane * stride);
            if ALIGNED {
                _mm512_store_si512(to.cast(), units);
            } else {
                _mm512_storeu_si512(to.cast(), units);
            }
        }
    }
}

/// A 16 by 16 transpose of 32-bit lanes.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn transpose_registers(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    // SAFETY: AVX-512 F by the contract.
    unsafe {
        // Of each group of four rows: column c of every quarter, c = 0..4.
        let mut quarters = [_mm512_setzero_si512(); LANES];
        for group in (0..LANES).step_by(4) {
            let [a, b, c, d] = [rows[group], rows[group + 1], rows[group + 2], rows[group + 3]];
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            quarters[group] = _mm512_unpacklo_epi64(ab_low, cd_low);
            quarters[group + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
            quarters[group + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
            quarters[group + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
        }
        let mut out = [_mm512_setzero_si512(); LANES];
        for c in 0..4 {
            let [a, b, d, e] = [quarters[c], quarters[4 + c], quarters[8 + c], quarters[12 + c]];
            let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
            let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(d, e), _mm512_shuffle_i32x4::<0xdd>(d, e));
            out[c] = _mm512_shuffle_i32x4::<0x88>(even, even2);
            out[c + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
            out[c + 8] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
            out[c + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
        }
        out
    }
}
