//! `out = x · Wᵀ + bias` over weights that stay where they are, in the layout of the checkpoint.
//!
//! `x` is `[M, K]`, `W` is `[N, K]`, `out` is `[M, N]`, all row-major. Both operands are read along `K`, so a
//! tile of dot products needs no packed copy of the weight (the idea of llamafile's tinyBLAS). Each output
//! element is one vector accumulator run along `K` and reduced at the end: the same bits for any `M`, any
//! tiling and any number of threads. Many rows of activations take another way to the same bits on AVX-512
//! (`broadcast.rs`).

#[cfg(target_arch = "x86_64")]
pub(crate) mod broadcast;
mod int8;
pub(crate) mod job;
#[cfg(target_arch = "x86_64")]
mod packed;
pub(crate) mod scratch;
pub(crate) mod tile;

#[cfg(test)]
mod tests;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::{
    Isa,
    isa::multiversion,
    nf4::Nf4,
    parallel::{SharedMut, filled, for_each_run, is_worth_sharing},
    q8::Q8,
};
use job::Job;

/// A borrowed row-major weight `[N, K]`.
#[derive(Debug, Clone, Copy)]
pub enum Matrix<'a> {
    /// 32-bit elements.
    F32(&'a [f32]),
    /// IEEE half precision elements.
    F16(&'a [f16]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
    /// 4 bits an element, a scale for every 64.
    Nf4(Nf4<'a>),
    /// 8 bits an element, a scale for every 64 of a row.
    Q8(Q8<'a>),
}

/// What the factors of a product are rounded to. Sums are always `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    /// Activations as they are, weights widened exactly.
    F32,
    /// Both factors rounded to bf16, to nearest even.
    Bf16,
    /// Packed weights of whole blocks and their activations in 8 bits, everything else as [`Bf16`](Self::Bf16).
    Int8,
}

impl Matrix<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::Nf4(weight) => weight.len(),
            Self::Q8(weight) => weight.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `out [M, N] = x [M, K] · weight [N, K]ᵀ + bias [N]`.
///
/// # Panics
/// If the lengths do not fit together: `k` must divide `x` and `weight`, `out` must be `M · N`.
pub fn linear(
    isa: Isa,
    compute: Compute,
    x: &[f32],
    weight: Matrix<'_>,
    k: usize,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let (m, n) = check(x, weight, k, bias);
    assert_eq!(out.len(), m * n, "an output of [{m}, {n}] was expected");
    multiply(isa, compute, x, weight, k, bias, SharedMut::new(out));
}

/// [`linear`] into a new vector.
///
/// # Panics
/// As [`linear`].
pub fn product(
    isa: Isa,
    compute: Compute,
    x: &[f32],
    weight: Matrix<'_>,
    k: usize,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let (m, n) = check(x, weight, k, bias);
    // SAFETY: every kernel writes its whole panel, and the panels cover the output.
    unsafe { filled(m * n, |out| multiply(isa, compute, x, weight, k, bias, out)) }
}

/// Rows of `x` and of `weight`, if the lengths fit together.
fn check(x: &[f32], weight: Matrix<'_>, k: usize, bias: Option<&[f32]>) -> (usize, usize) {
    assert!(
        k > 0 && x.len().is_multiple_of(k) && weight.len().is_multiple_of(k),
        "{k} does not divide {} and {}",
        x.len(),
        weight.len()
    );
    let (m, n) = (x.len() / k, weight.len() / k);
    assert!(bias.is_none_or(|bias| bias.len() == n), "a bias of [{n}] was expected");
    (m, n)
}

/// The product behind [`linear`], its lengths checked; `out` has room for it.
fn multiply(
    isa: Isa,
    compute: Compute,
    x: &[f32],
    weight: Matrix<'_>,
    k: usize,
    bias: Option<&[f32]>,
    out: SharedMut<f32>,
) {
    let (m, n) = (x.len() / k, weight.len() / k);
    if m == 0 || n == 0 {
        return;
    }
    let rows = rows_at_once(m, k);
    let bytes = if compute == Compute::Int8 { int8::Bytes::of(weight, k) } else { None };
    for (part, x) in x.chunks(rows * k).enumerate() {
        let (m, out) = (x.len() / k, out.behind(part * rows * n));
        let job = Job { isa, k, m, n, bias, out };
        if let Some(bytes) = bytes {
            job.int8(x, bytes);
            continue;
        }
        match (compute, weight) {
            (Compute::F32, Matrix::F32(weight)) => job.widened(x, weight),
            (Compute::F32, Matrix::F16(weight)) => job.widened(x, weight),
            (Compute::F32, Matrix::Bf16(weight)) => job.widened(x, weight),
            (_, Matrix::F32(weight)) => job.rounded(x, weight),
            (_, Matrix::F16(weight)) => job.rounded(x, weight),
            (_, Matrix::Bf16(weight)) => job.bf16(x, weight),
            (compute, Matrix::Nf4(weight)) => job.nf4(compute, x, weight),
            (compute, Matrix::Q8(weight)) => job.q8(compute, x, weight),
        }
    }
}

/// Rows of activations that go through all of the weight together. Each panel of the weight reads all of them, so
/// they should stay in a third-level cache: 8 MiB of bf16 here, in parts of one size. A part of 256 rows is enough
/// to hide that the weight is read again.
fn rows_at_once(m: usize, k: usize) -> usize {
    let most = ((4 << 20) / k).max(256);
    m.div_ceil(m.div_ceil(most))
}

/// [`product`] of the same `x` with several weights, each with its bias, at once: threads that are done with one go on
/// with the next, where they would wait for each other after each.
///
/// # Panics
/// As [`linear`].
pub fn products(
    isa: Isa,
    compute: Compute,
    x: &[f32],
    weights: &[(Matrix<'_>, Option<&[f32]>)],
    k: usize,
) -> Vec<Vec<f32>> {
    let flops: usize = weights.iter().map(|(weight, _)| 2 * x.len() * (weight.len() / k)).sum();
    if weights.len() < 2 || !is_worth_sharing(flops) {
        return weights.iter().map(|&(weight, bias)| product(isa, compute, x, weight, k, bias)).collect();
    }
    // Made by the caller: what one thread allocates and another frees stays with the first for long.
    let size = |&(weight, bias): &(Matrix<'_>, _)| {
        let (m, n) = check(x, weight, k, bias);
        m * n
    };
    let mut outs: Vec<Vec<f32>> = weights.iter().map(|weight| Vec::with_capacity(size(weight))).collect();
    let work: Vec<_> = weights.iter().zip(&mut outs).map(|(w, out)| (w, SharedMut::room(out))).collect();
    work.par_iter().with_max_len(1).for_each(|&(&(weight, bias), out)| {
        multiply(isa, compute, x, weight, k, bias, out);
    });
    for (out, weight) in outs.iter_mut().zip(weights) {
        // SAFETY: there is room for as many, and the kernels wrote them all, as in `product`.
        unsafe { out.set_len(size(weight)) };
    }
    outs
}

/// Activations rounded to bf16, to nearest even.
pub fn round_all(isa: Isa, values: &[f32]) -> Vec<bf16> {
    let mut out = vec![bf16::ZERO; values.len()];
    round_into(isa, values, &mut out);
    out
}

/// [`round_all`] into what is there.
///
/// # Panics
/// If the lengths differ.
pub fn round_into(isa: Isa, values: &[f32], out: &mut [bf16]) {
    assert_eq!(values.len(), out.len(), "one for each expected");
    for_each_run(out, 1 << 14, |first, out| round(isa, &values[first..first + out.len()], out));
}

multiversion! { fn round(values: &[f32], out: &mut [bf16]) = round_body }

#[inline(always)]
fn round_body<const FMA: bool>(values: &[f32], out: &mut [bf16]) {
    for (out, value) in out.iter_mut().zip(values) {
        let bits = value.to_bits();
        // Half a unit of the last kept place, less one where that place is even; NaN stays a quiet NaN.
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let kept = if bits & 0x7fff_ffff > 0x7f80_0000 { bits >> 16 | 0x40 } else { rounded };
        *out = bf16::from_bits(kept as u16);
    }
}
