//! Products whose sums run over rows on AVX-512: `out [R, C] = A · B` with `B` `[S, C]` and `A` either `[S, R]`
//! (the gradient of a weight, summed over tokens) or `[R, S]` (the gradient of an input, summed over outputs).
//!
//! The forward product reads both factors along the sum and has to transpose them for that. Here `B` already lies as
//! registers want it: 32 columns of one row, or of a pair of rows in bf16, meet up to 14 broadcast elements of `A`.
//! Both factors are packed once, a block of the sum at a time, in the order in which they are read.
//!
//! Surprising: nothing but the length of the sum decides the order of its terms, as everywhere; but it is another
//! order than that of the forward product.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_ps, _mm512_castps_si512, _mm512_load_si512, _mm512_mask_storeu_epi32,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_or_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_store_si512,
};

use crate::{
    linear::{
        broadcast::{
            LANES, Line,
            lane::{Lane, RoundedPair, RoundedSingle, Single, round},
            tile::Cut,
            transpose::transpose_registers,
        },
        scratch,
    },
    parallel::{SharedMut, for_each},
};

/// Columns of a panel: two registers.
const PANEL: usize = 2 * LANES;
/// Steps of the sum for which a tile of `A` stays in the first-level cache.
const STEPS: usize = 256;
/// Panels of `B` and tiles of `A` that a thread takes together: the panels stay in the second-level cache.
const PANELS: usize = 4;
const TILES: usize = 8;
/// Units of 32 bits of a packed block of either factor.
const BLOCK: usize = 2 << 20;
/// Steps that a thread packs at a time.
const PACKED_STEPS: usize = 32;

/// What one step of a sum takes from both factors.
///
/// # Safety
/// Methods need AVX-512 F, BW, DQ and VL, and the instructions that [`Lane`] says.
pub(super) unsafe trait Step {
    /// How elements along a row of `A` are read where it lies as `[R, S]`.
    type Along: Lane<Element = f32>;
    /// Rows of `B` in a step.
    const ROWS: usize;
    /// 16 lanes from a row, or from two.
    unsafe fn join(rows: [__m512; 2]) -> __m512i;
    /// [`pack_left`], compiled for these instructions.
    unsafe fn pack_left(left: Left<'_>, extents: Extents, block: Block, part: usize, out: SharedMut<u32>);
    /// [`pack_right`], likewise.
    unsafe fn pack_right(rows: [&[f32]; 2], step: usize, steps: usize, out: SharedMut<u32>);
    /// [`multiply`], likewise.
    unsafe fn multiply(work: &Work<'_>);
}

/// The three entry points of a [`Step`], compiled for its instructions.
macro_rules! entries {
    ($step:ty, $features:literal) => {
        unsafe fn pack_left(
            left: Left<'_>,
            extents: Extents,
            block: Block,
            part: usize,
            out: SharedMut<u32>,
        ) {
            #[target_feature(enable = $features)]
            unsafe fn inner(l: Left<'_>, extents: Extents, block: Block, part: usize, out: SharedMut<u32>) {
                // SAFETY: passed on.
                unsafe { pack_left::<$step>(l, extents, block, part, out) }
            }
            // SAFETY: passed on.
            unsafe { inner(left, extents, block, part, out) }
        }
        unsafe fn pack_right(rows: [&[f32]; 2], step: usize, steps: usize, out: SharedMut<u32>) {
            #[target_feature(enable = $features)]
            unsafe fn inner(rows: [&[f32]; 2], step: usize, steps: usize, out: SharedMut<u32>) {
                // SAFETY: passed on.
                unsafe { pack_right::<$step>(rows, step, steps, out) }
            }
            // SAFETY: passed on.
            unsafe { inner(rows, step, steps, out) }
        }
        unsafe fn multiply(work: &Work<'_>) {
            #[target_feature(enable = $features)]
            unsafe fn inner(work: &Work<'_>) {
                // SAFETY: passed on.
                unsafe { multiply::<$step>(work) }
            }
            // SAFETY: passed on.
            unsafe { inner(work) }
        }
    };
}

/// `f32`.
pub(super) struct Plain;
/// Both factors rounded to bf16 and widened again.
pub(super) struct Rounded;
/// Both factors in pairs of bf16.
pub(super) struct Pairs;

// SAFETY: AVX-512 F by the contract.
unsafe impl Step for Plain {
    entries!(Plain, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
    type Along = Single<f32>;
    const ROWS: usize = 1;
    #[inline(always)]
    unsafe fn join([row, _]: [__m512; 2]) -> __m512i {
        // SAFETY: the contract.
        unsafe { _mm512_castps_si512(row) }
    }
}

// SAFETY: as above.
unsafe impl Step for Rounded {
    entries!(Rounded, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
    type Along = RoundedSingle;
    const ROWS: usize = 1;
    #[inline(always)]
    unsafe fn join([row, _]: [__m512; 2]) -> __m512i {
        // SAFETY: the contract.
        unsafe { _mm512_slli_epi32::<16>(round(row)) }
    }
}

// SAFETY: as above.
unsafe impl Step for Pairs {
    entries!(Pairs, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c");
    type Along = RoundedPair;
    const ROWS: usize = 2;
    #[inline(always)]
    unsafe fn join([first, second]: [__m512; 2]) -> __m512i {
        // SAFETY: the contract.
        unsafe { _mm512_or_si512(round(first), _mm512_slli_epi32::<16>(round(second))) }
    }
}

/// The factor that is broadcast.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// `[S, R]`.
    BySum(&'a [f32]),
    /// `[R, S]`.
    ByRow(&'a [f32]),
}

/// What becomes of the output's old numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Old {
    /// The product is added to them.
    Kept,
    /// They are not read.
    Ignored,
}

/// Extents of a product.
#[derive(Clone, Copy)]
pub(super) struct Extents {
    /// Rows of the output, `R`.
    pub(super) rows: usize,
    /// Its columns, `C`.
    pub(super) columns: usize,
    /// Terms of each sum, `S`.
    pub(super) terms: usize,
}

/// Rows of `B`.
pub(super) trait Rows: Sync {
    /// Lends one or two neighbouring rows, `C` elements each; without a second one it is empty.
    fn with_rows(&self, first: usize, count: usize, work: impl FnOnce([&[f32]; 2]));
}

/// A run of steps of the sum.
#[derive(Clone, Copy)]
pub(super) struct Block {
    first: usize,
    steps: usize,
}

/// Some panels and tiles of one block.
pub(super) struct Work<'a> {
    left: &'a [Line],
    right: &'a [Line],
    steps: usize,
    panels: std::ops::Range<usize>,
    tiles: std::ops::Range<usize>,
    extents: Extents,
    old: Old,
    out: SharedMut<f32>,
}

/// Computes `out [R, C]` from `left` and the rows of `right`.
///
/// # Safety
/// The instruction set of `T`; `out` has room for the output, which no other thread touches.
pub(super) unsafe fn product<T: Step>(
    left: Left<'_>,
    right: &impl Rows,
    extents: Extents,
    mut old: Old,
    out: SharedMut<f32>,
) {
    let Extents { rows, columns, terms } = extents;
    let given = match left {
        Left::BySum(left) | Left::ByRow(left) => left.len(),
    };
    assert_eq!(given, rows * terms, "a factor of [{rows}, {terms}] expected");
    assert!(rows > 0 && columns > 0 && terms > 0, "a product of something expected");
    let (cut, panels, steps) = (Cut::new(rows), columns.div_ceil(PANEL), terms.div_ceil(T::ROWS));
    let most = (BLOCK / rows.max(panels * PANEL)).next_multiple_of(STEPS).min(steps);
    // Blocks of nearly one size, so that the last one is worth its while.
    let blocks = steps.div_ceil(most);
    let each = steps.div_ceil(blocks).next_multiple_of(PACKED_STEPS).min(steps);
    let lines = |units: usize| units.div_ceil(LANES);
    scratch::with(&scratch::ACTIVATIONS, lines(rows * each), |a| {
        scratch::with(&scratch::RIGHT, lines(panels * PANEL * each), |b| {
            for first in (0..steps).step_by(each) {
                let block = Block { first, steps: each.min(steps - first) };
                // SAFETY: passed on.
                unsafe { pack::<T>(left, right, extents, block, (a, b)) };
                let (column_groups, row_groups) = (panels.div_ceil(PANELS), cut.tiles.div_ceil(TILES));
                let flops = 2 * rows * columns * block.steps * T::ROWS;
                let (left, right) = (&*a, &*b);
                for_each(column_groups * row_groups, flops, |group| {
                    let (panel, tile) = (group / row_groups * PANELS, group % row_groups * TILES);
                    let work = Work {
                        left,
                        right,
                        steps: block.steps,
                        panels: panel..panels.min(panel + PANELS),
                        tiles: tile..cut.tiles.min(tile + TILES),
                        extents,
                        old,
                        out,
                    };
                    // SAFETY: passed on; groups share no output.
                    unsafe { T::multiply(&work) };
                });
                old = Old::Kept;
            }
        });
    });
}

/// Packs a block of both factors.
///
/// # Safety
/// The instruction set of `T`.
unsafe fn pack<T: Step>(
    left: Left<'_>,
    right: &impl Rows,
    extents: Extents,
    block: Block,
    (a, b): (&mut [Line], &mut [Line]),
) {
    // Packing an element costs about as much as a few products.
    const COST: usize = 8;
    let Extents { rows, columns, terms } = extents;
    let (a, b) = (SharedMut::new(a).cast::<u32>(), SharedMut::new(b).cast::<u32>());
    let parts = block.steps.div_ceil(PACKED_STEPS);
    for_each(parts, COST * block.steps * T::ROWS * columns, |part| {
        let first = part * PACKED_STEPS;
        for step in first..block.steps.min(first + PACKED_STEPS) {
            let row = (block.first + step) * T::ROWS;
            right.with_rows(row, T::ROWS.min(terms - row), |rows| {
                assert!(rows[0].len() == columns && (rows[1].is_empty() || rows[1].len() == columns));
                // SAFETY: passed on; steps share no output, and the block has room for all of them.
                unsafe { T::pack_right(rows, step, block.steps, b) };
            });
        }
    });
    let cut = Cut::new(rows);
    let parts = if matches!(left, Left::BySum(_)) { parts } else { cut.tiles };
    for_each(parts, COST * block.steps * T::ROWS * rows, |part| {
        // SAFETY: as above; parts share no output.
        unsafe { T::pack_left(left, extents, block, part, a) };
    });
}

/// Writes one step of all panels of a block of `steps`: rows of `B` that a step joins, the second empty if there is
/// none.
///
/// # Safety
/// The instruction set of `T`; `out` is a line's start and has room for all panels; the step is this thread's own.
#[inline(always)]
unsafe fn pack_right<T: Step>(rows: [&[f32]; 2], step: usize, steps: usize, out: SharedMut<u32>) {
    let columns = rows[0].len();
    for first in (0..columns).step_by(LANES) {
        let mask = head(columns - first);
        let (panel, half) = (first / PANEL, first % PANEL);
        // SAFETY: loads stay inside the rows by the mask, stores inside the panel.
        unsafe {
            let a = _mm512_maskz_loadu_ps(mask, rows[0].as_ptr().add(first));
            let b = if rows[1].is_empty() {
                _mm512_setzero_ps()
            } else {
                _mm512_maskz_loadu_ps(mask, rows[1][first..].as_ptr())
            };
            _mm512_store_si512(out.at((panel * steps + step) * PANEL + half).cast(), T::join([a, b]));
        }
    }
}

/// Packs part `part` of `A`: a run of steps of all tiles where it lies by sum, all steps of a tile where it lies by
/// row. The tiles of the block follow one another, each `[step][row]`.
///
/// # Safety
/// The instruction set of `T`; `out` has room for all tiles; the part is this thread's own.
#[inline(always)]
unsafe fn pack_left<T: Step>(
    left: Left<'_>,
    extents: Extents,
    block: Block,
    part: usize,
    out: SharedMut<u32>,
) {
    let Extents { rows, terms, .. } = extents;
    let cut = Cut::new(rows);
    match left {
        Left::BySum(left) => {
            let steps = part * PACKED_STEPS..block.steps.min((part + 1) * PACKED_STEPS);
            for tile in 0..cut.tiles {
                let (first, height) = cut.rows(tile);
                let mask = head(height);
                for step in steps.clone() {
                    let row = (block.first + step) * T::ROWS;
                    // SAFETY: rows of `left` by the bounds, their columns by the mask; the step's place in the tile.
                    unsafe {
                        let from = left[row * rows + first..].as_ptr();
                        let a = _mm512_maskz_loadu_ps(mask, from);
                        let b = if T::ROWS == 2 && row + 1 < terms {
                            _mm512_maskz_loadu_ps(mask, from.add(rows))
                        } else {
                            _mm512_setzero_ps()
                        };
                        let to = out.at(first * block.steps + step * height);
                        _mm512_mask_storeu_epi32(to.cast(), mask, T::join([a, b]));
                    }
                }
            }
        }
        Left::ByRow(left) => {
            let (first, height) = cut.rows(part);
            let mask = head(height);
            for step in (0..block.steps).step_by(LANES) {
                let term = (block.first + step) * T::ROWS;
                let count = (terms - term).min(T::Along::STEP);
                // SAFETY: AVX-512 F.
                let mut registers = [unsafe { _mm512_setzero_si512() }; LANES];
                for (row, register) in registers.iter_mut().enumerate().take(height) {
                    let from = left[(first + row) * terms + term..][..count].as_ptr();
                    // SAFETY: `count` elements are there.
                    *register = unsafe {
                        if count == T::Along::STEP {
                            T::Along::load(from)
                        } else {
                            T::Along::load_head(from, count)
                        }
                    };
                }
                // SAFETY: AVX-512 F; the steps' places in the tile.
                unsafe {
                    let by_step = transpose_registers(registers);
                    for (i, units) in by_step.iter().enumerate().take(block.steps - step) {
                        let to = out.at(first * block.steps + (step + i) * height);
                        _mm512_mask_storeu_epi32(to.cast(), mask, *units);
                    }
                }
            }
        }
    }
}

/// The first `n` lanes.
fn head(n: usize) -> u16 {
    if n >= LANES { u16::MAX } else { (1 << n) - 1 }
}

/// Multiplies some panels and tiles.
///
/// # Safety
/// The instruction set of `T`; no other thread touches the same outputs meanwhile.
#[inline(always)]
unsafe fn multiply<T: Step>(work: &Work<'_>) {
    let cut = Cut::new(work.extents.rows);
    for step in (0..work.steps).step_by(STEPS) {
        let steps = STEPS.min(work.steps - step);
        let old = if step == 0 { work.old } else { Old::Kept };
        for tile in work.tiles.clone() {
            let (first, height) = cut.rows(tile);
            for panel in work.panels.clone() {
                let column = panel * PANEL;
                // SAFETY: both blocks hold these steps by how they were packed; rows and columns lie inside.
                unsafe {
                    let place = Place {
                        a: work.left.as_ptr().cast::<u32>().add(first * work.steps + step * height),
                        b: work.right.as_ptr().cast::<u32>().add((panel * work.steps + step) * PANEL),
                        steps,
                        out: work.out.at(first * work.extents.columns + column),
                        stride: work.extents.columns,
                        columns: PANEL.min(work.extents.columns - column),
                        old,
                    };
                    place.run::<T>(height);
                }
            }
        }
    }
}

/// One tile against one panel.
#[derive(Clone, Copy)]
struct Place {
    a: *const u32,
    b: *const u32,
    steps: usize,
    out: *mut f32,
    stride: usize,
    columns: usize,
    old: Old,
}

impl Place {
    /// # Safety
    /// The instruction set of `T`; the pointers are good for `height` rows, 1 to 14.
    #[inline(always)]
    unsafe fn run<T: Step>(self, height: usize) {
        macro_rules! by_height {
            ($($h:literal)*) => {
                match height {
                    // SAFETY: passed on.
                    $($h => unsafe { self.rows::<T, $h>() },)*
                    other => unreachable!("{other} rows in a tile"),
                }
            };
        }
        by_height!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    }

    /// # Safety
    /// As [`run`](Self::run), for `H` rows.
    #[inline(always)]
    unsafe fn rows<T: Step, const H: usize>(self) {
        // SAFETY: the contract; masks keep to the columns that exist.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; H];
            let (mut a, mut b) = (self.a, self.b);
            for _ in 0..self.steps {
                let columns = [_mm512_load_si512(b.cast()), _mm512_load_si512(b.add(LANES).cast())];
                for i in 0..H {
                    let x = _mm512_set1_epi32(a.add(i).read() as i32);
                    sums[i][0] = <T::Along as Lane>::step(sums[i][0], x, columns[0]);
                    sums[i][1] = <T::Along as Lane>::step(sums[i][1], x, columns[1]);
                }
                a = a.add(H);
                b = b.add(PANEL);
            }
            let masks = [head(self.columns), head(self.columns.saturating_sub(LANES))];
            for i in 0..H {
                for half in 0..2 {
                    let to = self.out.wrapping_add(i * self.stride + half * LANES);
                    let mut sum = sums[i][half];
                    if self.old == Old::Kept {
                        sum = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[half], to), sum);
                    }
                    _mm512_mask_storeu_ps(to, masks[half], sum);
                }
            }
        }
    }
}
