//! Products of packed weights in 8 bits.
//!
//! Both factors are whole numbers of a byte. Activations are rounded, with a scale for every 64 of a row; codes of Q8
//! are what they are; the 16 values of NF4 become the nearest multiples of one unit. The products of a block are summed
//! exactly, so their order is free, and the blocks in `f32` in their own order: the same bits on every tier and in any
//! batch. llama.cpp multiplies its packed formats in this way.

#[cfg(target_arch = "x86_64")]
mod vnni;

#[cfg(test)]
mod tests;

use std::{borrow::Cow, sync::LazyLock};

use rayon::prelude::*;

use super::{Matrix, job::Job, scratch};
#[cfg(target_arch = "x86_64")]
use crate::Tier;
use crate::{
    Isa,
    isa::multiversion,
    nf4::{CODE_VALUES, Nf4},
    q8::Q8,
};

/// Elements of a row that share a scale, in weights and activations alike.
const BLOCK: usize = 64;

/// Elements whose codes a packed format keeps in other than their natural order: NF4 has those of even index in the
/// high nibbles of four bytes, those of odd index in the low ones.
const PAIRED: usize = 8;

/// A weight of bytes: `code · scale`.
#[derive(Clone, Copy)]
pub(super) enum Bytes<'a> {
    /// NF4 and its values in units.
    Nf4(Nf4<'a>, Levels),
    /// Q8 as it is.
    Q8(Q8<'a>),
}

/// The values of NF4 as multiples of a unit.
#[derive(Clone, Copy)]
pub(super) struct Levels {
    codes: [i8; 16],
    unit: f32,
}

/// Activations in bytes.
struct Activations {
    /// `[M, K]`.
    codes: Vec<i8>,
    /// `[M, K / 64]`.
    blocks: Vec<Block>,
}

/// What the 64 codes of a block have in common.
#[derive(Clone, Copy)]
struct Block {
    /// An activation is `code · scale`; NaN where one of them was not finite.
    scale: f32,
    /// What the products of this block have too much where 128 was added to each code of the weight.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    excess: i32,
}

impl Levels {
    /// [`best`](Self::best) of `map`, of which there is but one in practice.
    fn of(map: &[f32; 16]) -> Self {
        static USUAL: LazyLock<Levels> = LazyLock::new(|| Levels::best(&CODE_VALUES));
        if *map == CODE_VALUES { *USUAL } else { Self::best(map) }
    }

    /// In the unit that meets `map` best: its inverse is tried from 64 to 127.
    fn best(map: &[f32; 16]) -> Self {
        let error = |steps: f32| -> f32 {
            map.iter().map(|value| (value - (value * steps).round_ties_even() / steps).powi(2)).sum()
        };
        let steps = (64..=127u8).map(f32::from).min_by(|a, b| error(*a).total_cmp(&error(*b)));
        let steps = steps.expect("a range that is not empty");
        Self { codes: map.map(|value| (value * steps).round_ties_even() as i8), unit: 1.0 / steps }
    }
}

impl<'a> Bytes<'a> {
    /// `weight`, if it is packed in whole blocks of rows of `k`.
    pub(super) fn of(weight: Matrix<'a>, k: usize) -> Option<Self> {
        match weight {
            _ if !k.is_multiple_of(BLOCK) => None,
            Matrix::Nf4(weight) => Some(Self::Nf4(weight, Levels::of(weight.map))),
            Matrix::Q8(weight) => Some(Self::Q8(weight)),
            Matrix::F32(_) | Matrix::F16(_) | Matrix::Bf16(_) => None,
        }
    }

    /// The codes of the rows from `first` on, in natural order.
    fn read(&self, first: usize, k: usize, out: &mut [i8]) {
        match self {
            Self::Nf4(weight, levels) => {
                let codes = &weight.codes[first * k / 2..];
                for (pair, byte) in out.chunks_exact_mut(2).zip(codes) {
                    pair[0] = levels.codes[usize::from(byte >> 4)];
                    pair[1] = levels.codes[usize::from(byte & 15)];
                }
            }
            Self::Q8(weight) => out.copy_from_slice(&weight.codes[first * k..first * k + out.len()]),
        }
    }

    /// The scales of `rows` rows from `first` on, `[rows, K / 64]`, and by how much each has to be multiplied to be what
    /// a code of its block is worth.
    fn scales(&self, first: usize, rows: usize, k: usize) -> (Cow<'_, [f32]>, f32) {
        let (first, count) = (first * (k / BLOCK), rows * (k / BLOCK));
        match self {
            Self::Nf4(weight, levels) => (weight.scales.range(first, count), levels.unit),
            Self::Q8(weight) => (Cow::Borrowed(&weight.scales[first..first + count]), 1.0),
        }
    }
}

impl Activations {
    /// Rows `[M, K]` rounded. `is_paired` puts the even ones of each eight before the odd ones.
    fn round(isa: Isa, x: &[f32], k: usize, is_paired: bool) -> Self {
        let mut codes = vec![0i8; x.len()];
        let mut blocks = vec![Block { scale: 0.0, excess: 0 }; x.len() / BLOCK];
        // Fewer elements are not worth another thread.
        let rows = ((64 << 10) / k).max(1);
        let parts = codes.par_chunks_mut(k).zip(blocks.par_chunks_mut(k / BLOCK)).zip(x.par_chunks(k));
        parts.with_min_len(rows).for_each(|((codes, blocks), x)| round(isa, x, is_paired, codes, blocks));
        Self { codes, blocks }
    }
}

multiversion! { fn round(x: &[f32], is_paired: bool, codes: &mut [i8], blocks: &mut [Block]) = round_body }

#[inline(always)]
fn round_body<const FMA: bool>(x: &[f32], is_paired: bool, codes: &mut [i8], blocks: &mut [Block]) {
    /// Added to a number below 2^22 it leaves the nearest whole one, ties to even, in the low bits.
    const ROUNDING: f32 = 12_582_912.0;
    let (x, codes) = (x.as_chunks::<BLOCK>().0, codes.as_chunks_mut::<BLOCK>().0);
    for ((x, codes), block) in x.iter().zip(codes).zip(blocks) {
        let (mut largest, mut poison) = (0.0f32, 0.0f32);
        for value in x {
            largest = largest.max(value.abs());
            // Zero, or NaN of a value that is not finite.
            poison += value * 0.0;
        }
        // So small a block that the inverse of its scale overflows is nothing.
        let inverse = if largest > 127.0 / f32::MAX { 127.0 / largest } else { 0.0 };
        let mut sum = 0i32;
        let mut rounded = [0i8; BLOCK];
        for (code, value) in rounded.iter_mut().zip(x) {
            *code = (value * inverse + ROUNDING).to_bits() as i8;
            sum += i32::from(*code);
        }
        *block =
            Block { scale: if inverse > 0.0 { largest / 127.0 } else { 0.0 } + poison, excess: -128 * sum };
        if is_paired {
            let eights = codes.as_chunks_mut::<PAIRED>().0.iter_mut();
            for (out, code) in eights.zip(rounded.as_chunks::<PAIRED>().0) {
                *out = [code[0], code[2], code[4], code[6], code[1], code[3], code[5], code[7]];
            }
        } else {
            *codes = rounded;
        }
    }
}

impl Job<'_> {
    /// The product in 8 bits.
    pub(super) fn int8(&self, x: &[f32], weight: Bytes<'_>) {
        #[cfg(target_arch = "x86_64")]
        if self.isa.tier() == Tier::Avx512Bf16 {
            let is_paired = matches!(weight, Bytes::Nf4(..));
            return vnni::product(self, &Activations::round(self.isa, x, self.k, is_paired), weight);
        }
        let x = Activations::round(self.isa, x, self.k, false);
        self.for_each_panel(|first, rows| {
            scratch::with(&scratch::CODES, rows * self.k, |codes| {
                weight.read(first, self.k, codes);
                let scales = weight.scales(first, rows, self.k);
                multiply(self.isa, &x, codes, scales, self, first);
            });
        });
    }
}

multiversion! {
    /// The plain way: a panel of codes `[rows, K]` and scales `[rows, K / 64]` against all activations.
    fn multiply(x: &Activations, codes: &[i8], scales: (Cow<'_, [f32]>, f32), job: &Job<'_>, first: usize) = multiply_body
}

#[inline(always)]
fn multiply_body<const FMA: bool>(
    x: &Activations,
    codes: &[i8],
    (scales, unit): (Cow<'_, [f32]>, f32),
    job: &Job<'_>,
    first: usize,
) {
    let blocks = job.k / BLOCK;
    let rows = codes.chunks_exact(job.k).zip(scales.chunks_exact(blocks));
    for (column, (codes, scales)) in (first..).zip(rows) {
        let activations = x.codes.chunks_exact(job.k).zip(x.blocks.chunks_exact(blocks));
        for (row, (x, x_blocks)) in activations.enumerate() {
            let mut sum = 0.0f32;
            let pairs = x.as_chunks::<BLOCK>().0.iter().zip(codes.as_chunks::<BLOCK>().0);
            for ((x, codes), (block, scale)) in pairs.zip(x_blocks.iter().zip(scales)) {
                let dot: i32 = x.iter().zip(codes).map(|(x, code)| i32::from(*x) * i32::from(*code)).sum();
                sum = (dot as f32).mul_add(scale * unit * block.scale, sum);
            }
            let value = job.bias.map_or(sum, |bias| sum + bias[column]);
            // SAFETY: row and column lie inside the output; the columns of a panel are this thread's own.
            unsafe { job.out.write(row * job.n + column, value) };
        }
    }
}
