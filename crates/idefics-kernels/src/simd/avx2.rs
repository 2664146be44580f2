//! Eight lanes with AVX2, FMA and F16C.

#![allow(clippy::cast_ptr_alignment)] // Loads are the unaligned ones throughout.

use std::arch::x86_64::{
    __m128i, __m256, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehdup_ps, _mm_movehl_ps,
    _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps,
    _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_slli_epi32,
    _mm256_storeu_ps,
};

use half::{bf16, f16};

use super::{Element, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// The first `n` elements through a buffer on the stack: tails are rare, and a masked load of 16-bit elements
/// does not exist here.
#[inline(always)]
unsafe fn head<E: Element>(from: *const E, n: usize) -> __m256 {
    let mut lanes = [0.0f32; 8];
    for (i, lane) in lanes.iter_mut().enumerate().take(n) {
        // SAFETY: `i < n`, and the caller lets `n` elements be read.
        *lane = unsafe { from.add(i).read_unaligned() }.widen();
    }
    // SAFETY: eight elements on the stack; AVX2 by the trait's contract.
    unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
}

// SAFETY: intrinsics need AVX2, FMA and F16C, which the trait's contract grants; pointers likewise.
unsafe impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_head(from: *const f32, n: usize) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { head(from, n) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        // SAFETY: the trait's contract; a bf16 is the upper half of the f32 of the same value.
        unsafe {
            let halves = _mm_loadu_si128(from.cast::<__m128i>());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_head(from: *const bf16, n: usize) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { head(from, n) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast::<__m128i>())) }
    }
    #[inline(always)]
    unsafe fn load_f16_head(from: *const f16, n: usize) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { head(from, n) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn store_head(to: *mut f32, value: Self::V, n: usize) {
        let mut lanes = [0.0f32; 8];
        // SAFETY: eight elements on the stack, then `n <= 8` elements to where the caller lets them be written.
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), value);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn sum(value: Self::V) -> f32 {
        // SAFETY: the trait's contract. Halves are added until one lane is left.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
}
