//! The inner kernel: a tile of 14 rows by 32 columns held in registers.

#![allow(clippy::cast_ptr_alignment)] // Weights are lines, activations are read a unit at a time.

use std::arch::x86_64::{__m512, _mm512_add_ps, _mm512_load_si512, _mm512_set1_epi32, _mm512_setzero_ps};

use super::{LANES, lane::Lane, transpose::Transposed};
use crate::linear::{job::Ahead, tile::prefetch};

/// Most rows of a tile: 28 sums, two registers of weights and one of activations fill the 32.
pub(crate) const TILE_ROWS: usize = 14;
/// Fewest rows of a tile, when [`Cut`] cuts no fewer.
pub(crate) const FEWEST_TILE_ROWS: usize = 7;
/// Sums that wait in the tree of lanes, the result included.
const LEVELS: usize = 5;

/// How rows are cut: tiles of nearly one height, at most 14 and, where there are as many, at least 7.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    /// Number of tiles.
    pub(crate) tiles: usize,
    height: usize,
    higher: usize,
}

impl Cut {
    pub(crate) fn new(m: usize) -> Self {
        let tiles = m.div_ceil(TILE_ROWS);
        Self { tiles, height: m / tiles, higher: m % tiles }
    }

    /// First row and number of rows of a tile: the first `higher` ones have one more.
    pub(crate) fn rows(self, tile: usize) -> (usize, usize) {
        (tile * self.height + tile.min(self.higher), self.height + usize::from(tile < self.higher))
    }
}

/// Sums of finished lanes that wait for others, `[level][row][half]`; the last level is the result.
pub(crate) struct Waiting([[[__m512; 2]; TILE_ROWS]; LEVELS]);

impl Waiting {
    /// Nothing waits.
    ///
    /// # Safety
    /// AVX-512 F.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: the contract.
        Self([[[unsafe { _mm512_setzero_ps() }; 2]; TILE_ROWS]; LEVELS])
    }

    /// The finished rows of the tile that ran last, two registers each.
    #[inline(always)]
    pub(crate) fn result(&self) -> &[[__m512; 2]; TILE_ROWS] {
        &self.0[LEVELS - 1]
    }
}

/// Rows of activations against two registers of columns.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) x: Transposed,
    pub(crate) w: [Transposed; 2],
    /// Registers along `K`.
    pub(crate) steps: usize,
    /// What to ask for during the first lane; each further lane asks for as much behind it.
    pub(crate) ahead: Ahead,
}

impl Tile {
    /// Leaves the products of `height` rows, 7 to 14, in `waiting`.
    ///
    /// # Safety
    /// The instruction set of `L` and AVX-512 F; what is transposed holds `height` rows and 16 columns each, of
    /// `steps` steps, columns from a line's start.
    #[inline(always)]
    pub(crate) unsafe fn run<L: Lane>(&self, height: usize, waiting: &mut Waiting) {
        // SAFETY: passed on.
        unsafe {
            match height {
                7 => self.run_rows::<L, 7>(waiting),
                8 => self.run_rows::<L, 8>(waiting),
                9 => self.run_rows::<L, 9>(waiting),
                10 => self.run_rows::<L, 10>(waiting),
                11 => self.run_rows::<L, 11>(waiting),
                12 => self.run_rows::<L, 12>(waiting),
                13 => self.run_rows::<L, 13>(waiting),
                14 => self.run_rows::<L, 14>(waiting),
                other => unreachable!("{other} rows in a tile"),
            }
        }
    }

    /// # Safety
    /// As [`run`](Self::run), for `H` rows.
    #[inline(always)]
    unsafe fn run_rows<L: Lane, const H: usize>(&self, Waiting(waiting): &mut Waiting) {
        // SAFETY: all pointers stay inside what was transposed, by the loop bounds.
        unsafe {
            for leaf in 0..LANES {
                // By halves: the order of leaves of that tree is the reversal of their bits.
                let lane = (leaf as u8).reverse_bits() as usize >> 4;
                let mut x = self.x.units.add(lane * self.x.stride);
                let mut w = [0, 1].map(|half| self.w[half].units.add(lane * self.w[half].stride));
                let mut sums = [[_mm512_setzero_ps(); 2]; H];
                let ahead = self.ahead.from.wrapping_add(leaf * self.ahead.bytes);
                for at in (0..self.ahead.bytes).step_by(64) {
                    prefetch(ahead.wrapping_add(at));
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
                // As in a binary counter: each carry adds what waits there.
                let carries = leaf.trailing_ones() as usize;
                for level in &waiting[..carries] {
                    for i in 0..H {
                        for half in 0..2 {
                            sums[i][half] = _mm512_add_ps(level[i][half], sums[i][half]);
                        }
                    }
                }
                waiting[carries][..H].copy_from_slice(&sums);
            }
        }
    }
}
