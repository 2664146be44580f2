//! The products in 8 bits by `vpdpbusd`: four products of bytes added to each of 16 sums.
//!
//! A lane of a register is a row of the weight, so that activations are broadcast, sums need no folding, and an output
//! is written as it stands. What has to be transposed for that are the packed codes, 64 bytes of each of 16 rows at a
//! time, before they are unpacked: half the work with 4 bits. The instruction wants one factor without a sign, which
//! are the weight's codes with 128 added.

#![allow(clippy::cast_ptr_alignment)] // Loads are the unaligned ones throughout.

use std::arch::x86_64::{
    __m128i, __m512, __m512i, __mmask16, _mm_loadu_si128, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_broadcast_i32x4, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi32, _mm512_maskz_loadu_ps,
    _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_srli_epi16, _mm512_storeu_si512, _mm512_xor_si512,
};

use super::{Activations, BLOCK, Block, Bytes};
use crate::linear::{broadcast::transpose::transpose_registers, job::Job, scratch, tile::prefetch};

/// Rows of the weight in the lanes of a register.
const LANES: usize = 16;
/// Registers of weights beside each other in a tile.
const WIDTH: usize = 2;
/// Rows of the weight in a panel.
const ROWS: usize = LANES * WIDTH;
/// Rows of activations in a tile.
const HEIGHT: usize = 6;
/// Rows of activations up to which weights go from their unpacking straight into the products.
const FEW: usize = 8;
/// Bytes of codes of a row that are transposed together.
const LINE: usize = 64;
/// Bytes behind a line that are asked for when it is read.
const AHEAD: usize = 16 * LINE;
/// Broadcasts of four activations in a block.
const STEPS: usize = BLOCK / 4;
/// Blocks of the weight that are unpacked before they are multiplied: with [`WIDTH`] registers they fill half of a
/// first-level cache.
const CHUNK: usize = 8;

/// How codes are packed.
///
/// # Safety
/// `step` needs AVX-512 F and BW.
unsafe trait Format: Copy + Sync {
    /// Blocks in a line of codes.
    const BLOCKS: usize;

    /// Bytes of the `i`th four elements that a register of codes holds for each row, 128 added.
    unsafe fn step(self, codes: __m512i, i: usize) -> __m512i;
}

/// NF4: 128 elements a line, two groups of four in each four bytes.
#[derive(Clone, Copy)]
struct Nibbles {
    /// The value of each code, 128 added, four times.
    table: __m512i,
}

/// Q8: 64 elements a line.
#[derive(Clone, Copy)]
struct Whole;

// SAFETY: arithmetic on registers, under the trait's contract.
unsafe impl Format for Nibbles {
    const BLOCKS: usize = 2;

    #[inline(always)]
    unsafe fn step(self, codes: __m512i, i: usize) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe {
            let codes = if i == 0 { _mm512_srli_epi16::<4>(codes) } else { codes };
            _mm512_shuffle_epi8(self.table, _mm512_and_si512(codes, _mm512_set1_epi8(15)))
        }
    }
}

// SAFETY: as above.
unsafe impl Format for Whole {
    const BLOCKS: usize = 1;

    #[inline(always)]
    unsafe fn step(self, codes: __m512i, _: usize) -> __m512i {
        // SAFETY: the trait's contract. Adding 128 to a byte turns its highest bit.
        unsafe { _mm512_xor_si512(codes, _mm512_set1_epi8(i8::MIN)) }
    }
}

/// All panels of the product, in parallel.
pub(super) fn product(job: &Job<'_>, x: &Activations, weight: Bytes<'_>) {
    let blocks = job.k / BLOCK;
    job.for_each_run(ROWS, |first, rows| {
        let (by_row, unit) = weight.scales(first, rows, job.k);
        scratch::with(&scratch::WIDENED, blocks * ROWS, |scales| {
            // [K / 64, ROWS], so that a register holds the scales of all its rows. Those past the last are not used.
            for (row, by_row) in by_row.chunks_exact(blocks).enumerate() {
                for (scales, scale) in scales.as_chunks_mut::<ROWS>().0.iter_mut().zip(by_row) {
                    scales[row] = scale * unit;
                }
                // Those of the panel that comes next, which nothing else asks for before they are needed.
                let next = by_row.as_ptr().wrapping_add(ROWS * blocks).cast::<u8>();
                (0..size_of_val(by_row)).step_by(LINE).for_each(|at| prefetch(next.wrapping_add(at)));
            }
            // SAFETY: the caller's `Isa` proves the tier; the codes are those of the panel's rows; panels do not overlap.
            unsafe {
                match weight {
                    Bytes::Nf4(weight, levels) => {
                        let codes = weight.codes[first * job.k / 2..(first + rows) * job.k / 2].as_ptr();
                        nibbles(&Panel { job, x, codes, row: job.k / 2, first, rows, scales }, &levels.codes);
                    }
                    Bytes::Q8(weight) => {
                        let codes = weight.codes[first * job.k..(first + rows) * job.k].as_ptr().cast();
                        whole(&Panel { job, x, codes, row: job.k, first, rows, scales });
                    }
                }
            }
        });
    });
}

/// A run of at most [`ROWS`] rows of the weight.
struct Panel<'a> {
    job: &'a Job<'a>,
    x: &'a Activations,
    /// Where its codes start.
    codes: *const u8,
    /// Bytes of codes of a row.
    row: usize,
    /// Its first row.
    first: usize,
    rows: usize,
    /// `[K / 64, ROWS]`.
    scales: &'a [f32],
}

/// # Safety
/// As [`panel`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn nibbles(p: &Panel<'_>, levels: &[i8; 16]) {
    let table = levels.map(|level| (i16::from(level) + 128) as u8);
    // SAFETY: the table has 16 bytes; the rest is passed on.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast::<__m128i>()));
        panel(p, Nibbles { table });
    }
}

/// # Safety
/// As [`panel`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn whole(p: &Panel<'_>) {
    // SAFETY: passed on.
    unsafe { panel(p, Whole) }
}

/// # Safety
/// - The processor has AVX-512 F, BW and VNNI.
/// - `rows` rows of codes can be read in the panel.
/// - No other thread touches its columns of the output meanwhile.
#[inline(always)]
unsafe fn panel<F: Format>(p: &Panel<'_>, format: F) {
    // Not in a closure: one that is not inlined would compile without the instruction set.
    // SAFETY: passed on.
    unsafe {
        match p.job.m {
            1 => few::<F, 1>(p, format),
            2 => few::<F, 2>(p, format),
            3 => few::<F, 3>(p, format),
            4 => few::<F, 4>(p, format),
            5 => few::<F, 5>(p, format),
            6 => few::<F, 6>(p, format),
            7 => few::<F, 7>(p, format),
            FEW => few::<F, FEW>(p, format),
            _ => many(p, format),
        }
    }
}

/// `M` rows of activations, which are all.
///
/// # Safety
/// As [`panel`].
#[inline(always)]
unsafe fn few<F: Format, const M: usize>(p: &Panel<'_>, format: F) {
    let blocks = p.job.k / BLOCK;
    for group in 0..p.rows.div_ceil(LANES) {
        // SAFETY: AVX-512 by the contract; lines and blocks lie inside the rows.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); M];
            for line in 0..blocks.div_ceil(F::BLOCKS) {
                let codes = transposed_line::<F>(p, group, line);
                let block = line * F::BLOCKS;
                few_of_block::<F, M, 0>(p, format, &codes, block, group, &mut sums);
                if F::BLOCKS == 2 && block + 1 < blocks {
                    few_of_block::<F, M, 1>(p, format, &codes, block + 1, group, &mut sums);
                }
            }
            for (m, sums) in sums.into_iter().enumerate() {
                store(p, m, group, sums, true);
            }
        }
    }
}

/// One block of all rows of activations, which is the `HALF`th in the line of codes.
///
/// # Safety
/// As [`panel`]; the block lies inside the rows.
#[inline(always)]
unsafe fn few_of_block<F: Format, const M: usize, const HALF: usize>(
    p: &Panel<'_>,
    format: F,
    codes: &[__m512i; LANES],
    block: usize,
    group: usize,
    sums: &mut [__m512; M],
) {
    let blocks = p.job.k / BLOCK;
    // SAFETY: AVX-512 by the contract; the activations of the block exist.
    unsafe {
        let scale = _mm512_loadu_ps(p.scales[block * ROWS + group * LANES..][..LANES].as_ptr());
        // A second sum where there are so few that each would wait for itself.
        let sums_each = if M < 4 { 2 } else { 1 };
        let mut whole = [[_mm512_setzero_si512(); 2]; M];
        for m in 0..M {
            whole[m][0] = _mm512_set1_epi32(p.x.blocks[m * blocks + block].excess);
        }
        for i in 0..LANES / F::BLOCKS {
            for half in 0..F::BLOCKS {
                let step = i * F::BLOCKS + half;
                let w = format.step(codes[HALF * (LANES / F::BLOCKS) + i], half);
                for m in 0..M {
                    let x = four(p.x.codes.as_ptr().add(m * p.job.k + block * BLOCK + 4 * step));
                    let sum = &mut whole[m][step % sums_each];
                    *sum = _mm512_dpbusd_epi32(*sum, w, x);
                }
            }
        }
        for m in 0..M {
            let whole = _mm512_add_epi32(whole[m][0], whole[m][1]);
            sums[m] = add_block(sums[m], whole, scale, p.x.blocks[m * blocks + block]);
        }
    }
}

/// Any number of rows of activations: some blocks of the weight are unpacked at a time and meet all of them. What has
/// been summed waits in the output.
///
/// # Safety
/// As [`panel`].
#[inline(always)]
unsafe fn many<F: Format>(p: &Panel<'_>, format: F) {
    let (m, blocks) = (p.job.m, p.job.k / BLOCK);
    let mut chunk = [[[[0u8; LINE]; WIDTH]; STEPS]; CHUNK];
    for first in (0..blocks).step_by(CHUNK) {
        let count = CHUNK.min(blocks - first);
        // SAFETY: AVX-512 by the contract; lines lie inside the rows, and rows of activations below `m`.
        unsafe {
            for group in 0..WIDTH {
                for line in 0..count.div_ceil(F::BLOCKS) {
                    let codes = transposed_line::<F>(p, group, first / F::BLOCKS + line);
                    for half in 0..F::BLOCKS {
                        for step in 0..STEPS {
                            let w = format.step(codes[(half * STEPS + step) / F::BLOCKS], step % F::BLOCKS);
                            let to = chunk[line * F::BLOCKS + half][step][group].as_mut_ptr();
                            _mm512_storeu_si512(to.cast::<__m512i>(), w);
                        }
                    }
                }
            }
            let chunk = Chunk { codes: &chunk[..count], scales: &p.scales[first * ROWS..], first };
            let mut row = 0;
            // Tiles of nearly one height: the last one would else be a row or two.
            let height = m.div_ceil(m.div_ceil(HEIGHT));
            while row < m {
                match height.min(m - row) {
                    1 => tile::<1>(p, &chunk, row),
                    2 => tile::<2>(p, &chunk, row),
                    3 => tile::<3>(p, &chunk, row),
                    4 => tile::<4>(p, &chunk, row),
                    5 => tile::<5>(p, &chunk, row),
                    _ => tile::<HEIGHT>(p, &chunk, row),
                }
                row += height;
            }
        }
    }
}

/// Blocks of the weight as they are multiplied.
struct Chunk<'a> {
    codes: &'a [[[[u8; LINE]; WIDTH]; STEPS]],
    /// From its first block on: `[blocks, ROWS]`.
    scales: &'a [f32],
    /// The first block.
    first: usize,
}

/// `M` rows of activations from `row` on against a chunk.
///
/// # Safety
/// As [`panel`]; the rows exist.
#[inline(always)]
unsafe fn tile<const M: usize>(p: &Panel<'_>, chunk: &Chunk<'_>, row: usize) {
    let (k, blocks) = (p.job.k, p.job.k / BLOCK);
    let mut x = [std::ptr::null(); M];
    let mut x_blocks = [&p.x.blocks[..0]; M];
    for m in 0..M {
        x[m] = p.x.codes[(row + m) * k + chunk.first * BLOCK..].as_ptr();
        x_blocks[m] = &p.x.blocks[(row + m) * blocks + chunk.first..][..chunk.codes.len()];
    }
    // SAFETY: AVX-512 by the contract; the blocks lie inside the rows.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); WIDTH]; M];
        if chunk.first > 0 {
            for m in 0..M {
                for group in 0..WIDTH {
                    sums[m][group] = load(p, row + m, group);
                }
            }
        }
        for (block, codes) in chunk.codes.iter().enumerate() {
            let mut whole = [[_mm512_setzero_si512(); WIDTH]; M];
            for m in 0..M {
                whole[m] = [_mm512_set1_epi32(x_blocks[m][block].excess); WIDTH];
            }
            for (step, codes) in codes.iter().enumerate() {
                let mut w = [_mm512_setzero_si512(); WIDTH];
                for group in 0..WIDTH {
                    w[group] = _mm512_loadu_si512(codes[group].as_ptr().cast::<__m512i>());
                }
                for m in 0..M {
                    let x = four(x[m].add(block * BLOCK + 4 * step));
                    for group in 0..WIDTH {
                        whole[m][group] = _mm512_dpbusd_epi32(whole[m][group], w[group], x);
                    }
                }
            }
            let mut scale = [_mm512_setzero_ps(); WIDTH];
            for group in 0..WIDTH {
                scale[group] = _mm512_loadu_ps(chunk.scales[block * ROWS + group * LANES..].as_ptr());
            }
            for m in 0..M {
                for group in 0..WIDTH {
                    sums[m][group] =
                        add_block(sums[m][group], whole[m][group], scale[group], x_blocks[m][block]);
                }
            }
        }
        let is_last = chunk.first + chunk.codes.len() == blocks;
        for m in 0..M {
            for group in 0..WIDTH {
                store(p, row + m, group, sums[m][group], is_last);
            }
        }
    }
}

/// What a block adds: its whole sum times what one of it is worth.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
unsafe fn add_block(sums: __m512, whole: __m512i, scale: __m512, x: Block) -> __m512 {
    // SAFETY: the contract above.
    unsafe { _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scale, _mm512_set1_ps(x.scale)), sums) }
}

/// Four activations in every lane.
///
/// # Safety
/// AVX-512 F, and four bytes can be read.
#[inline(always)]
unsafe fn four(x: *const i8) -> __m512i {
    // SAFETY: the contract above.
    unsafe { _mm512_set1_epi32(x.cast::<i32>().read_unaligned()) }
}

/// Line `line` of the codes of a group of rows: register `i` holds bytes `4 i..4 i + 4` of each of them. Past the last
/// row it is repeated, past the end of a row there are zeros.
///
/// # Safety
/// As [`panel`]; the line begins inside the row.
#[inline(always)]
unsafe fn transposed_line<F: Format>(p: &Panel<'_>, group: usize, line: usize) -> [__m512i; LANES] {
    let left = (p.row - line * LINE).min(LINE);
    let mask = (u32::MAX >> (32 - left / 4)) as __mmask16;
    // What will be read next is asked for, into the second-level cache: in the first one, lines of rows that lie a power
    // of two apart drive each other out. Past the end of a row it is the row of the group that comes next.
    let ahead = AHEAD + if line * LINE + AHEAD < p.row { 0 } else { (LANES - 1) * p.row };
    // SAFETY: AVX-512 by the contract; masked bytes are not touched.
    unsafe {
        let mut codes = [_mm512_setzero_si512(); LANES];
        for (lane, codes) in codes.iter_mut().enumerate() {
            let from = p.codes.add((group * LANES + lane).min(p.rows - 1) * p.row + line * LINE);
            prefetch(from.wrapping_add(ahead));
            *codes = _mm512_maskz_loadu_epi32(mask, from.cast());
        }
        transpose_registers(codes)
    }
}

/// Columns of the output that belong to `group` of the panel.
#[inline(always)]
fn columns(p: &Panel<'_>, group: usize) -> __mmask16 {
    let count = p.rows.saturating_sub(group * LANES).min(LANES);
    ((1u32 << count) - 1) as __mmask16
}

/// Sums that wait in the output.
///
/// # Safety
/// As [`panel`]; the row exists.
#[inline(always)]
unsafe fn load(p: &Panel<'_>, row: usize, group: usize) -> __m512 {
    let at = row * p.job.n + p.first + group * LANES;
    // SAFETY: AVX-512 by the contract; masked columns, which may lie outside, are not touched.
    unsafe { _mm512_maskz_loadu_ps(columns(p, group), p.job.out.behind(at).at(0)) }
}

/// Writes sums, with the bias once they are whole.
///
/// # Safety
/// As [`panel`]; the row exists.
#[inline(always)]
unsafe fn store(p: &Panel<'_>, row: usize, group: usize, mut sums: __m512, is_whole: bool) {
    let (at, mask) = (p.first + group * LANES, columns(p, group));
    // SAFETY: AVX-512 by the contract; masked columns, which may lie outside, are not touched.
    unsafe {
        if let (true, Some(bias)) = (is_whole, p.job.bias) {
            sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, bias.as_ptr().wrapping_add(at)));
        }
        _mm512_mask_storeu_ps(p.job.out.behind(row * p.job.n + at).at(0), mask, sums);
    }
}
