//! Rows to lanes: 16 by 16 transposes in registers.

#![allow(clippy::cast_ptr_alignment)] // The types are those of the intrinsics; aligned stores are promised.

use std::arch::x86_64::{
    __m512i, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_store_si512, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::{LANES, lane::Lane};

/// A line of cache, which is a register.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct Line([u32; LANES]);

/// Up to 16 rows transposed: `[lane][step][row]`, lanes `stride` units apart. What lies behind a lane's last
/// step is rubbish: stores of whole registers run over it.
#[derive(Clone, Copy)]
pub(crate) struct Transposed {
    pub(crate) units: *const u32,
    pub(crate) stride: usize,
}

/// Units between the lanes of `steps` steps of `rows` rows. One line more than they fill, so that stores of whole
/// registers stay inside and the 16 lanes do not meet in one set of the first-level cache.
pub(crate) fn lane_stride(steps: usize, rows: usize) -> usize {
    (steps * rows).next_multiple_of(LANES) + LANES
}

/// Transposes up to 16 rows of `k` elements that start `apart` elements apart. `width` rows are stored for each
/// step: 16, or with `ALIGNED` false any number.
///
/// # Safety
/// The instruction set of `L`; `out` has room for 16 lanes of `stride` units, and is a line's start if `ALIGNED`.
#[inline(always)]
pub(crate) unsafe fn transpose<L: Lane, const ALIGNED: bool>(
    rows: &[L::Element],
    (k, apart): (usize, usize),
    width: usize,
    stride: usize,
    out: *mut u32,
) {
    let count = if rows.is_empty() { 0 } else { (rows.len() - k) / apart + 1 };
    if count == 0 {
        return;
    }
    // Past the last row it is repeated: nobody looks at what comes of it.
    let from: [*const L::Element; LANES] =
        std::array::from_fn(|row| rows[row.min(count - 1) * apart..][..k].as_ptr());
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
pub(crate) unsafe fn transpose_registers(rows: [__m512i; LANES]) -> [__m512i; LANES] {
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
