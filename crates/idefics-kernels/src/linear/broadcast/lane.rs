//! What a lane of a register holds: an `f32`, or a pair of bf16.

use std::{
    arch::x86_64::{
        __m512, __m512bh, __m512i, _CMP_UNORD_Q, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512,
        _mm512_castsi256_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16,
        _mm512_fmadd_ps, _mm512_inserti64x4, _mm512_mask_blend_epi32, _mm512_or_si512, _mm512_set1_epi32,
        _mm512_slli_epi32, _mm512_srli_epi32,
    },
    marker::PhantomData,
};

use half::bf16;

use super::LANES;
use crate::simd::{
    Element, Simd,
    avx512::{Avx512, dot_pairs, load_pairs, load_pairs_head},
};

/// What a lane holds, where it comes from, and how lanes are multiplied.
///
/// # Safety
/// Methods need the instruction set of the implementing type; `n` elements can be read at the pointer.
pub(crate) unsafe trait Lane {
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
pub(crate) struct Single<E>(PhantomData<E>);

/// Pairs of bf16.
pub(crate) struct Pair;

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
        unsafe { as_bits(load_pairs(from)) }
    }
    #[inline(always)]
    unsafe fn load_head(from: *const bf16, n: usize) -> __m512i {
        // SAFETY: same contract.
        unsafe { as_bits(load_pairs_head(from, n)) }
    }
    #[inline(always)]
    unsafe fn step(sums: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: same contract.
        unsafe { dot_pairs(sums, as_pairs(x), as_pairs(w)) }
    }
}

#[inline(always)]
fn as_bits(pairs: __m512bh) -> __m512i {
    // SAFETY: 512 bits without invalid patterns.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(pairs) }
}

#[inline(always)]
fn as_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: 512 bits without invalid patterns.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
}

/// `f32` rounded to pairs of bf16, to nearest even.
pub(crate) struct RoundedPair;

/// `f32` rounded to bf16 and widened again.
pub(crate) struct RoundedSingle;

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

/// The bits of each lane rounded to bf16, in the lower half: `linear::round` in registers. The instruction for it
/// would make zeros of the smallest numbers.
///
/// # Safety
/// AVX-512 F.
#[inline(always)]
pub(crate) unsafe fn round(values: __m512) -> __m512i {
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
