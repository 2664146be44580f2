//! Eight lanes in plain Rust: the fallback, and the twin that the others are tested against.

use half::{bf16, f16};

use super::{Element, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
unsafe fn gather<E: Element>(from: *const E, n: usize) -> [f32; 8] {
    let mut lanes = [0.0; 8];
    for (i, lane) in lanes.iter_mut().enumerate().take(n) {
        // SAFETY: `i < n`, and the caller lets `n` elements be read.
        *lane = unsafe { from.add(i).read_unaligned() }.widen();
    }
    lanes
}

// SAFETY: plain Rust, no instruction set is needed; pointers are used within the trait's contract.
unsafe impl Simd for Portable {
    type V = [f32; 8];
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        [value; 8]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { gather(from, 8) }
    }
    #[inline(always)]
    unsafe fn load_head(from: *const f32, n: usize) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { gather(from, n) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { gather(from, 8) }
    }
    #[inline(always)]
    unsafe fn load_bf16_head(from: *const bf16, n: usize) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { gather(from, n) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { gather(from, 8) }
    }
    #[inline(always)]
    unsafe fn load_f16_head(from: *const f16, n: usize) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { gather(from, n) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { Self::store_head(to, value, 8) }
    }
    #[inline(always)]
    unsafe fn store_head(to: *mut f32, value: Self::V, n: usize) {
        for (i, lane) in value.iter().enumerate().take(n) {
            // SAFETY: `i < n`, and the caller lets `n` elements be written.
            unsafe { to.add(i).write_unaligned(*lane) };
        }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
}
