//! Tiles over weights that are packed below 16 bits, for AVX-512.
//!
//! A register of weights is unpacked on its way into the products, so decoding reads each packed byte once. For
//! more rows of activations the same registers are stored as a panel first, and the dense tiles take it from
//! there: the same numbers in the same order, so the bits do not depend on the way.

#![allow(clippy::cast_ptr_alignment)] // Loads are the unaligned ones throughout.

use std::arch::x86_64::{
    __m128i, __m256i, __m512, __m512bh, __m512i, _mm_loadu_si128, _mm256_loadu_si256, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtepu8_epi32, _mm512_cvtne2ps_pbh, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_mul_ps, _mm512_permutexvar_epi16, _mm512_permutexvar_ps, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_srli_epi16, _mm512_srli_epi32,
};

use std::borrow::Cow;

use half::bf16;

use super::{
    job::Ahead,
    tile::{Dot, WeightRows},
};
use crate::{
    Isa,
    isa::multiversion,
    parallel::for_each_run,
    simd::{SUMS, Simd, avx512},
};

/// Elements unpacked at a time: one block of NF4 or Q8.
pub(crate) const STEP: usize = 64;

/// Rows of NF4 codes with their scales, `k` a multiple of 64.
pub(crate) struct Nf4Rows<'a> {
    /// `[rows, K / 2]`.
    pub(crate) codes: &'a [u8],
    /// `[rows, K / 64]`.
    pub(crate) scales: Cow<'a, [f32]>,
    pub(crate) map: &'a [f32; 16],
    pub(crate) k: usize,
}

/// Where an NF4 row starts.
#[derive(Clone, Copy)]
pub(crate) struct Nf4Row {
    codes: *const u8,
    scales: *const f32,
    map: *const f32,
}

impl WeightRows for Nf4Rows<'_> {
    type Row = Nf4Row;

    #[inline(always)]
    fn count(&self) -> usize {
        self.codes.len() * 2 / self.k
    }

    #[inline(always)]
    fn row(&self, index: usize) -> Nf4Row {
        let (bytes, blocks) = (self.k / 2, self.k / STEP);
        Nf4Row {
            codes: self.codes[index * bytes..(index + 1) * bytes].as_ptr(),
            scales: self.scales[index * blocks..(index + 1) * blocks].as_ptr(),
            map: self.map.as_ptr(),
        }
    }
}

/// Rows of Q8 codes with their scales, `k` a multiple of 64.
pub(crate) struct Q8Rows<'a> {
    /// `[rows, K]`.
    pub(crate) codes: &'a [i8],
    /// `[rows, K / 64]`.
    pub(crate) scales: &'a [f32],
    pub(crate) k: usize,
}

/// Where a Q8 row starts.
#[derive(Clone, Copy)]
pub(crate) struct Q8Row {
    codes: *const i8,
    scales: *const f32,
}

impl WeightRows for Q8Rows<'_> {
    type Row = Q8Row;

    #[inline(always)]
    fn count(&self) -> usize {
        self.codes.len() / self.k
    }

    #[inline(always)]
    fn row(&self, index: usize) -> Q8Row {
        let blocks = self.k / STEP;
        Q8Row {
            codes: self.codes[index * self.k..(index + 1) * self.k].as_ptr(),
            scales: self.scales[index * blocks..(index + 1) * blocks].as_ptr(),
        }
    }
}

/// A packed format that AVX-512 unpacks 64 elements at a time.
///
/// # Safety
/// Methods need AVX-512 F and BW (and BF16 for [`pairs`](Self::pairs)); `at` is a multiple of 64 inside the row.
pub(crate) unsafe trait Packed {
    type Row: Copy;

    /// Elements `at..at + 64` as `f32`, in the format's order.
    unsafe fn widened(row: Self::Row, at: usize) -> [__m512; 4];
    /// Elements `at..at + 64` as bf16, in the same order.
    unsafe fn pairs(row: Self::Row, at: usize) -> [__m512bh; 2];
    /// Where element `at` lies.
    fn address(row: Self::Row, at: usize) -> *const u8;
}

/// NF4. Its order within a block is the even elements, then the odd ones: nibbles come apart that way.
pub(crate) struct Nf4Format;

// SAFETY: reads one block of codes and one scale, which the contract of the trait grants.
unsafe impl Packed for Nf4Format {
    type Row = Nf4Row;

    #[inline(always)]
    unsafe fn widened(row: Nf4Row, at: usize) -> [__m512; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let values = scaled_map(row, at);
            let codes = row.codes.add(at / 2).cast::<__m128i>();
            let first = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes));
            let second = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.add(1)));
            // The permutation looks at the low four bits of an index alone: no mask is needed.
            [
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(first), values),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(second), values),
                _mm512_permutexvar_ps(first, values),
                _mm512_permutexvar_ps(second, values),
            ]
        }
    }

    #[inline(always)]
    unsafe fn pairs(row: Nf4Row, at: usize) -> [__m512bh; 2] {
        // SAFETY: the trait's contract; all types of one width share their bits.
        unsafe {
            // The block's 16 possible values, scaled and rounded once, are the table of the lookup.
            // It stands there twice, so that the fifth bit of an index does not matter.
            let values = scaled_map(row, at);
            let table = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(values, values));
            let codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(row.codes.add(at / 2).cast::<__m256i>()));
            let even = _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), table);
            let odd = _mm512_permutexvar_epi16(codes, table);
            [as_pairs(even), as_pairs(odd)]
        }
    }

    #[inline(always)]
    fn address(row: Nf4Row, at: usize) -> *const u8 {
        row.codes.wrapping_add(at / 2)
    }
}

#[inline(always)]
unsafe fn scaled_map(row: Nf4Row, at: usize) -> __m512 {
    // SAFETY: AVX-512 and a readable block by the caller; the map has 16 elements.
    unsafe { _mm512_mul_ps(_mm512_loadu_ps(row.map), _mm512_set1_ps(*row.scales.add(at / STEP))) }
}

#[inline(always)]
unsafe fn as_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: 512 bits without invalid patterns.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

/// Q8, in natural order.
pub(crate) struct Q8Format;

// SAFETY: reads one block of codes and one scale, which the contract of the trait grants.
unsafe impl Packed for Q8Format {
    type Row = Q8Row;

    #[inline(always)]
    unsafe fn widened(row: Q8Row, at: usize) -> [__m512; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let scale = _mm512_set1_ps(*row.scales.add(at / STEP));
            let codes = row.codes.add(at).cast::<__m128i>();
            // Not a closure: one that is not inlined would compile without AVX-512.
            let mut out = [_mm512_setzero_ps(); 4];
            for (i, out) in out.iter_mut().enumerate() {
                let codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes.add(i)));
                *out = _mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale);
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn pairs(row: Q8Row, at: usize) -> [__m512bh; 2] {
        // SAFETY: the trait's contract. The conversion puts its second argument first.
        unsafe {
            let [a, b, c, d] = Self::widened(row, at);
            [_mm512_cvtne2ps_pbh(b, a), _mm512_cvtne2ps_pbh(d, c)]
        }
    }

    #[inline(always)]
    fn address(row: Q8Row, at: usize) -> *const u8 {
        row.codes.wrapping_add(at).cast()
    }
}

/// Dot products in `f32` over a packed format.
pub(crate) struct PackedWidened<F>(std::marker::PhantomData<F>);

/// Dot products of bf16 pairs over a packed format.
pub(crate) struct PackedPairs<F>(std::marker::PhantomData<F>);

// SAFETY: forwards to `Packed` and AVX-512 loads under the same contract. Rows are whole blocks, so the head
// methods are never reached with a part of one; they load nothing.
unsafe impl<F: Packed> Dot for PackedWidened<F> {
    type X = f32;
    type Row = F::Row;
    type XV = [__m512; 4];
    type WV = [__m512; 4];
    type Sums = __m512;
    const STEP: usize = STEP;
    const IS_SLOW_TO_LOAD: bool = true;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: same contract.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load_x(from: *const f32) -> Self::XV {
        // SAFETY: same contract.
        unsafe {
            [
                _mm512_loadu_ps(from),
                _mm512_loadu_ps(from.add(16)),
                _mm512_loadu_ps(from.add(32)),
                _mm512_loadu_ps(from.add(48)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_x_head(_: *const f32, _: usize) -> Self::XV {
        // SAFETY: same contract.
        unsafe { [_mm512_setzero_ps(); 4] }
    }
    #[inline(always)]
    unsafe fn load_w(row: Self::Row, at: usize) -> Self::WV {
        // SAFETY: same contract.
        unsafe { F::widened(row, at) }
    }
    #[inline(always)]
    unsafe fn load_w_head(_: Self::Row, _: usize, _: usize) -> Self::WV {
        // SAFETY: same contract.
        unsafe { [_mm512_setzero_ps(); 4] }
    }
    #[inline(always)]
    fn address(row: Self::Row, at: usize) -> *const u8 {
        F::address(row, at)
    }
    #[inline(always)]
    unsafe fn step(mut sums: __m512, x: Self::XV, w: Self::WV) -> __m512 {
        for i in 0..4 {
            // SAFETY: same contract.
            sums = unsafe { _mm512_fmadd_ps(x[i], w[i], sums) };
        }
        sums
    }
    #[inline(always)]
    unsafe fn sums(sums: [__m512; SUMS]) -> [f32; SUMS] {
        // SAFETY: same contract.
        unsafe { avx512::Avx512::sum_all(sums) }
    }
}

// SAFETY: as above.
unsafe impl<F: Packed> Dot for PackedPairs<F> {
    type X = bf16;
    type Row = F::Row;
    type XV = [__m512bh; 2];
    type WV = [__m512bh; 2];
    type Sums = __m512;
    const STEP: usize = STEP;
    const IS_SLOW_TO_LOAD: bool = true;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: same contract.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load_x(from: *const bf16) -> Self::XV {
        // SAFETY: same contract.
        unsafe { [avx512::load_pairs(from), avx512::load_pairs(from.add(32))] }
    }
    #[inline(always)]
    unsafe fn load_x_head(from: *const bf16, _: usize) -> Self::XV {
        // SAFETY: nothing is read under an empty mask.
        unsafe { [avx512::load_pairs_head(from, 0); 2] }
    }
    #[inline(always)]
    unsafe fn load_w(row: Self::Row, at: usize) -> Self::WV {
        // SAFETY: same contract.
        unsafe { F::pairs(row, at) }
    }
    #[inline(always)]
    unsafe fn load_w_head(_: Self::Row, _: usize, _: usize) -> Self::WV {
        // SAFETY: zero bits are zeros.
        unsafe { [as_pairs(std::mem::zeroed()); 2] }
    }
    #[inline(always)]
    fn address(row: Self::Row, at: usize) -> *const u8 {
        F::address(row, at)
    }
    #[inline(always)]
    unsafe fn step(sums: __m512, x: Self::XV, w: Self::WV) -> __m512 {
        // SAFETY: same contract.
        unsafe { avx512::dot_pairs(avx512::dot_pairs(sums, x[0], w[0]), x[1], w[1]) }
    }
    #[inline(always)]
    unsafe fn sums(sums: [__m512; SUMS]) -> [f32; SUMS] {
        // SAFETY: same contract.
        unsafe { avx512::Avx512::sum_all(sums) }
    }
}

/// Unpacks whole rows to `f32`, in the format's order.
///
/// # Safety
/// AVX-512 F and BW; `out` holds all rows of `k` elements, `k` a multiple of 64.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(crate) unsafe fn unpack_widened<F: Packed>(
    rows: &impl WeightRows<Row = F::Row>,
    k: usize,
    out: &mut [f32],
) {
    for (index, out) in out.chunks_exact_mut(k).enumerate() {
        let row = rows.row(index);
        for (block, out) in out.chunks_exact_mut(STEP).enumerate() {
            // SAFETY: the block lies inside the row, and `out` has room for its 64 elements.
            unsafe {
                for (i, values) in F::widened(row, block * STEP).into_iter().enumerate() {
                    avx512::Avx512::store(out.as_mut_ptr().add(16 * i), values);
                }
            }
        }
    }
}

/// Unpacks whole rows to bf16, in the format's order.
///
/// # Safety
/// AVX-512 F, BW and BF16; `out` holds all rows of `k` elements, `k` a multiple of 64.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(crate) unsafe fn unpack_pairs<F: Packed>(
    rows: &impl WeightRows<Row = F::Row>,
    k: usize,
    out: &mut [bf16],
) {
    for (index, out) in out.chunks_exact_mut(k).enumerate() {
        let row = rows.row(index);
        for (block, out) in out.chunks_exact_mut(STEP).enumerate() {
            // SAFETY: the block lies inside the row, and `out` has room for its 64 elements.
            unsafe {
                for (i, values) in F::pairs(row, block * STEP).into_iter().enumerate() {
                    avx512::store_pairs(out.as_mut_ptr().add(32 * i), values);
                }
            }
        }
    }
}

/// The codes behind a panel, as many as its own.
pub(super) fn ahead<F: Packed>(rows: &impl WeightRows<Row = F::Row>, k: usize) -> Ahead {
    let start = F::address(rows.row(0), 0);
    let end = F::address(rows.row(0), rows.count() * k);
    Ahead { from: end, bytes: end.addr() - start.addr() }
}

/// Activations in the order of [`Nf4Format`]: of each 64, the even ones, then the odd ones.
pub(crate) fn evens_then_odds(isa: Isa, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for_each_run(&mut out, 256 * STEP, |first, out| reorder(isa, &x[first..first + out.len()], out));
    out
}

multiversion! { fn reorder(x: &[f32], out: &mut [f32]) = reorder_body }

#[inline(always)]
fn reorder_body<const FMA: bool>(x: &[f32], out: &mut [f32]) {
    for (out, x) in out.as_chunks_mut::<STEP>().0.iter_mut().zip(x.as_chunks::<STEP>().0) {
        for i in 0..STEP / 2 {
            out[i] = x[2 * i];
            out[STEP / 2 + i] = x[2 * i + 1];
        }
    }
}
