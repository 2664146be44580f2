//! Sixteen lanes with AVX-512, and the bf16 dot product where the processor has it.

#![allow(clippy::cast_ptr_alignment)] // Loads are the unaligned ones throughout.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, __mmask16, __mmask32, _mm256_loadu_si256, _mm256_maskz_loadu_epi16,
    _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_permutexvar_ps,
    _mm512_reduce_add_ps, _mm512_set1_ps, _mm512_setr_epi32, _mm512_setzero_ps, _mm512_shuffle_f32x4,
    _mm512_shuffle_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_unpackhi_pd,
    _mm512_unpacklo_pd,
};

use half::{bf16, f16};

use super::{SUMS, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

#[inline(always)]
fn head_mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

#[inline(always)]
unsafe fn widen_bf16(halves: __m256i) -> __m512 {
    // SAFETY: AVX-512F by the caller; a bf16 is the upper half of the f32 of the same value.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))) }
}

// SAFETY: intrinsics need AVX-512 F, BW and VL, which the trait's contract grants; pointers likewise.
unsafe impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_head(from: *const f32, n: usize) -> Self::V {
        // SAFETY: the trait's contract; masked lanes are not touched.
        unsafe { _mm512_maskz_loadu_ps(head_mask(n), from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { widen_bf16(_mm256_loadu_si256(from.cast::<__m256i>())) }
    }
    #[inline(always)]
    unsafe fn load_bf16_head(from: *const bf16, n: usize) -> Self::V {
        // SAFETY: the trait's contract; masked lanes are not touched.
        unsafe { widen_bf16(_mm256_maskz_loadu_epi16(head_mask(n), from.cast::<i16>())) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast::<__m256i>())) }
    }
    #[inline(always)]
    unsafe fn load_f16_head(from: *const f16, n: usize) -> Self::V {
        // SAFETY: the trait's contract; masked lanes are not touched.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(head_mask(n), from.cast::<i16>())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn store_head(to: *mut f32, value: Self::V, n: usize) {
        // SAFETY: the trait's contract; masked lanes are not touched.
        unsafe { _mm512_mask_storeu_ps(to, head_mask(n), value) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(value: Self::V) -> f32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_add_ps(value) }
    }
    /// By halves as [`sum`](Self::sum) does it, but two registers fold into one at a time: 15 additions for what would
    /// be 64.
    #[inline(always)]
    unsafe fn sum_all(v: [__m512; SUMS]) -> [f32; SUMS] {
        // SAFETY: the trait's contract; the array has room for a register.
        unsafe {
            // Lanes l and l + 8: of each pair, the eight sums of one and then those of the other.
            let mut halves = [_mm512_setzero_ps(); 8];
            for i in 0..8 {
                let (a, b) = (v[2 * i], v[2 * i + 1]);
                halves[i] =
                    _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            }
            // Lanes l and l + 4: a quarter for each of four.
            let mut quarters = [_mm512_setzero_ps(); 4];
            for i in 0..4 {
                let (a, b) = (halves[2 * i], halves[2 * i + 1]);
                quarters[i] =
                    _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            }
            // Lanes l and l + 2, within each quarter: two sums of one of four, two of the one that is four behind.
            let mut pairs = [_mm512_setzero_ps(); 2];
            for i in 0..2 {
                let (a, b) = (_mm512_castps_pd(quarters[2 * i]), _mm512_castps_pd(quarters[2 * i + 1]));
                pairs[i] = _mm512_add_ps(
                    _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
                );
            }
            let [a, b] = pairs;
            let sums = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
            // Quarter q holds the sums of q, q + 4, q + 8 and q + 12.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let mut out = [0.0; SUMS];
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(order, sums));
            out
        }
    }
}

/// 32 bf16 elements.
///
/// # Safety
/// AVX-512 F, and 32 elements can be read.
#[inline(always)]
pub(crate) unsafe fn load_pairs(from: *const bf16) -> __m512bh {
    // SAFETY: the contract above; both types are 512 bits without invalid patterns.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast::<__m512i>())) }
}

/// The first `n <= 32` of 32 bf16 elements, zeros behind.
///
/// # Safety
/// AVX-512 BW, and `n` elements can be read.
#[inline(always)]
pub(crate) unsafe fn load_pairs_head(from: *const bf16, n: usize) -> __m512bh {
    let mask = ((1u64 << n) - 1) as __mmask32;
    // SAFETY: the contract above; masked lanes are not touched.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_maskz_loadu_epi16(mask, from.cast::<i16>())) }
}

/// Adds the products of pairs to the 16 sums.
///
/// # Safety
/// AVX-512 BF16.
#[inline(always)]
pub(crate) unsafe fn dot_pairs(sums: __m512, a: __m512bh, b: __m512bh) -> __m512 {
    // SAFETY: the contract above.
    unsafe { _mm512_dpbf16_ps(sums, a, b) }
}

/// Writes 32 bf16 elements.
///
/// # Safety
/// AVX-512 F, and 32 elements can be written.
#[inline(always)]
pub(crate) unsafe fn store_pairs(to: *mut bf16, value: __m512bh) {
    // SAFETY: the contract above; both types are 512 bits without invalid patterns.
    unsafe { _mm512_storeu_si512(to.cast::<__m512i>(), std::mem::transmute::<__m512bh, __m512i>(value)) }
}
