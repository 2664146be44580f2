//! Vectors of `f32`, thin per instruction set, so that kernels are written once.
//!
//! Methods are `unsafe` because they need the instruction set of their type and trust pointers. They are
//! `#[inline(always)]` so that they compile inside the `#[target_feature]` function that calls them.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod portable;

use half::{bf16, f16};

/// A vector register of `f32`.
///
/// # Safety
/// Every method requires that the processor has the instruction set of the implementing type. `load` and
/// `load_head` also require that `LANES` (or `n`) elements can be read at the pointer, `store` and
/// `store_head` that they can be written. `n` is at most `LANES`.
pub(crate) unsafe trait Simd: Copy {
    /// The register.
    type V: Copy;
    /// Elements in it.
    const LANES: usize;

    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// The first `n` elements, zeros behind.
    unsafe fn load_head(from: *const f32, n: usize) -> Self::V;
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn load_bf16_head(from: *const bf16, n: usize) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    unsafe fn load_f16_head(from: *const f16, n: usize) -> Self::V;
    unsafe fn store(to: *mut f32, value: Self::V);
    unsafe fn store_head(to: *mut f32, value: Self::V, n: usize);
    /// `a · b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Sum of all lanes, in a fixed order.
    unsafe fn sum(value: Self::V) -> f32;
    /// The same of many registers, each with the bits that it has alone.
    #[inline(always)]
    unsafe fn sum_all(values: [Self::V; SUMS]) -> [f32; SUMS] {
        let mut out = [0.0; SUMS];
        // Not `map`: a closure that is not inlined would compile without the instruction set.
        for (out, value) in out.iter_mut().zip(values) {
            // SAFETY: same contract.
            *out = unsafe { Self::sum(value) };
        }
        out
    }
}

/// Registers that [`Simd::sum_all`] takes.
pub(crate) const SUMS: usize = 16;

/// An element type that a vector register can be filled from.
///
/// # Safety
/// As for [`Simd::load`] and [`Simd::load_head`].
pub(crate) unsafe trait Element: Copy + Send + Sync {
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
    unsafe fn load_head<S: Simd>(from: *const Self, n: usize) -> S::V;
    fn widen(self) -> f32;
}

macro_rules! element {
    ($type:ty, $load:ident, $load_head:ident, $widen:expr) => {
        // SAFETY: forwards to `Simd` under the same contract.
        unsafe impl Element for $type {
            #[inline(always)]
            unsafe fn load<S: Simd>(from: *const Self) -> S::V {
                // SAFETY: same contract.
                unsafe { S::$load(from) }
            }
            #[inline(always)]
            unsafe fn load_head<S: Simd>(from: *const Self, n: usize) -> S::V {
                // SAFETY: same contract.
                unsafe { S::$load_head(from, n) }
            }
            #[inline(always)]
            fn widen(self) -> f32 {
                $widen(self)
            }
        }
    };
}
element!(f32, load, load_head, |value: f32| value);
element!(bf16, load_bf16, load_bf16_head, bf16::to_f32);
element!(f16, load_f16, load_f16_head, f16::to_f32);
