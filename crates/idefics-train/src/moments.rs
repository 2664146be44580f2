//! The two moments of AdamW, as `f32` or in 8 bits.
//!
//! In 8 bits a code stands for a share of the largest magnitude among 256 numbers (blocks as in 8-bit Optimizers,
//! Dettmers et al., 2022): the first moment for its square, the second for its fourth power, so that small numbers have
//! steps that are small. A moment moves by less than a step at a time, most of all the second one, and rounded to the
//! nearest it would stand still: it is rounded up or down by a draw, so that it is right in the mean. Draws follow from
//! the step and the place alone.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::rng::mix;

/// Numbers that a thread takes at a time; whole blocks.
pub(crate) const PIECE: usize = 1 << 14;
/// Numbers that share a scale.
const BLOCK: usize = 256;

/// What moments are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MomentFormat {
    /// `f32`: 8 bytes for each number that is trained.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// A byte each, and two scales for every 256: a quarter of that.
    #[serde(rename = "8bit")]
    EightBit,
}

/// First and second moment of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum Moments {
    /// As they are.
    F32 {
        /// Running mean of the gradients.
        first: Vec<f32>,
        /// Running mean of their squares.
        second: Vec<f32>,
    },
    /// In 8 bits.
    EightBit {
        /// Codes of the running mean of the gradients.
        first: Vec<i8>,
        /// Codes of the running mean of their squares.
        second: Vec<u8>,
        /// The largest magnitudes of both in each block.
        scales: Vec<[f32; 2]>,
    },
}

impl MomentFormat {
    /// Bytes of both moments of `len` numbers.
    pub fn num_bytes(self, len: u64) -> u64 {
        match self {
            Self::F32 => 8 * len,
            Self::EightBit => 2 * len + 8 * len.div_ceil(BLOCK as u64),
        }
    }

    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::EightBit => "8bit",
        }
    }
}

impl Moments {
    /// Moments of `len` numbers before the first step.
    pub fn new(len: usize, format: MomentFormat) -> Self {
        match format {
            MomentFormat::F32 => Self::F32 { first: vec![0.0; len], second: vec![0.0; len] },
            MomentFormat::EightBit => Self::EightBit {
                first: vec![0; len],
                second: vec![0; len],
                scales: vec![[0.0; 2]; len.div_ceil(BLOCK)],
            },
        }
    }

    /// What they are kept as.
    pub fn format(&self) -> MomentFormat {
        match self {
            Self::F32 { .. } => MomentFormat::F32,
            Self::EightBit { .. } => MomentFormat::EightBit,
        }
    }

    /// Number of numbers that have moments.
    pub fn len(&self) -> usize {
        match self {
            Self::F32 { first, .. } => first.len(),
            Self::EightBit { first, .. } => first.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Scales of `len` numbers in 8 bits.
    pub(crate) fn num_scales(len: usize) -> usize {
        len.div_ceil(BLOCK)
    }

    /// Calls `change(value, gradient, first moment, second moment)` for each number, in `step`.
    pub(crate) fn change(
        &mut self,
        step: u64,
        values: &mut [f32],
        gradient: &[f32],
        change: impl Fn(&mut f32, f32, &mut f32, &mut f32) + Sync,
    ) {
        let pieces = values.par_chunks_mut(PIECE).zip(gradient.par_chunks(PIECE));
        match self {
            Self::F32 { first, second } => {
                let moments = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
                pieces.zip(moments).for_each(|((values, gradient), (first, second))| {
                    each(values, gradient, first, second, &change);
                });
            }
            Self::EightBit { first, second, scales } => {
                let codes = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
                let codes = codes.zip(scales.par_chunks_mut(PIECE / BLOCK)).enumerate();
                pieces.zip(codes).for_each(|((values, gradient), (piece, ((first, second), scales)))| {
                    let blocks = values.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
                    let codes = first.chunks_mut(BLOCK).zip(second.chunks_mut(BLOCK)).zip(scales);
                    for (block, ((values, gradient), ((first, second), scales))) in
                        blocks.zip(codes).enumerate()
                    {
                        let (mut wide_first, mut wide_second) = ([0.0; BLOCK], [0.0; BLOCK]);
                        let (wide_first, wide_second) =
                            (&mut wide_first[..values.len()], &mut wide_second[..values.len()]);
                        decode(first, second, *scales, wide_first, wide_second);
                        each(values, gradient, wide_first, wide_second, &change);
                        let place = (piece * PIECE / BLOCK + block) as u64;
                        *scales = encode(wide_first, wide_second, mix(&[step, place]), first, second);
                    }
                });
            }
        }
    }
}

#[inline]
fn each(
    values: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    change: &impl Fn(&mut f32, f32, &mut f32, &mut f32),
) {
    for (((value, gradient), first), second) in values.iter_mut().zip(gradient).zip(first).zip(second) {
        change(value, *gradient, first, second);
    }
}

fn decode(first: &[i8], second: &[u8], scales: [f32; 2], wide_first: &mut [f32], wide_second: &mut [f32]) {
    // What a code of one stands for.
    let (unit, square_unit) = (scales[0] / 127.0 / 127.0, scales[1] / 255.0 / 255.0 / 255.0 / 255.0);
    for (wide, code) in wide_first.iter_mut().zip(first) {
        let root = f32::from(*code);
        *wide = root * root.abs() * unit;
    }
    for (wide, code) in wide_second.iter_mut().zip(second) {
        let square = f32::from(*code) * f32::from(*code);
        *wide = square * square * square_unit;
    }
}

/// Writes codes and returns their scales.
fn encode(first: &[f32], second: &[f32], seed: u64, codes: &mut [i8], squares: &mut [u8]) -> [f32; 2] {
    let scales = [largest(first), largest(second)];
    // Where all numbers are too small for an inverse, they are nothing.
    let [inverse, inverse_square] =
        scales.map(|scale| if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 });
    for (index, (code, value)) in codes.iter_mut().zip(first).enumerate() {
        let magnitude = whole((value.abs() * inverse).sqrt() * 127.0 + draw(seed, index), 0.0, 127.0) as i8;
        *code = if *value < 0.0 { -magnitude } else { magnitude };
    }
    for (index, (code, value)) in squares.iter_mut().zip(second).enumerate() {
        // What divides a step is never rounded to nothing.
        let least = if *value > 0.0 { 1.0 } else { 0.0 };
        *code = whole((value * inverse_square).sqrt().sqrt() * 255.0 + draw(!seed, index), least, 255.0);
    }
    scales
}

/// The whole part of a number that is not negative, held between two bounds.
#[inline]
fn whole(value: f32, least: f32, most: f32) -> u8 {
    /// Added to a number below 2^22 it leaves the nearest whole one in the low bits: `floor` is a call.
    const ROUNDING: f32 = 12_582_912.0;
    ((value - 0.5).max(least).min(most) + ROUNDING).to_bits() as u8
}

/// The largest magnitude, by lanes that do not wait for each other.
fn largest(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0.0f32; 16];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, value.abs());
        }
    }
    lanes.into_iter().chain(rest.iter().map(|value| value.abs())).fold(0.0, larger)
}

/// A number in [0, 1) that follows from a seed and a place.
#[inline]
fn draw(seed: u64, index: usize) -> f32 {
    // The finaliser of MurmurHash3, of 32 bits, which vectors can do.
    let mut hash = (seed as u32).wrapping_add((index as u32).wrapping_mul(0x9e37_79b9));
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    ((hash ^ (hash >> 16)) >> 8) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coded(first: &[f32], second: &[f32], step: u64) -> (Vec<f32>, Vec<f32>) {
        let mut moments = Moments::new(first.len(), MomentFormat::EightBit);
        let (mut values, zeros) = (vec![0.0; first.len()], vec![0.0; first.len()]);
        let (first, second) = (first.to_vec(), second.to_vec());
        // The value says which number it is.
        values.iter_mut().enumerate().for_each(|(i, value)| *value = i as f32);
        moments.change(step, &mut values, &zeros, |value, _, one, two| {
            (*one, *two) = (first[*value as usize], second[*value as usize]);
        });
        let found = std::sync::Mutex::new((vec![0.0; first.len()], vec![0.0; first.len()]));
        moments.change(step + 1, &mut values, &zeros, |value, _, one, two| {
            let mut found = found.lock().unwrap();
            (found.0[*value as usize], found.1[*value as usize]) = (*one, *two);
        });
        found.into_inner().unwrap()
    }

    #[test]
    fn codes_are_within_a_step_and_right_in_the_mean() {
        let n = 700; // two blocks and a part of one
        let wave = |i: usize| (i as f32 * 0.7).sin();
        let first: Vec<f32> = (0..n).map(|i| wave(i).powi(5) * 3e-3).collect();
        let second: Vec<f32> = (0..n).map(|i| wave(i).powi(8) * 7e-6).collect();
        let mut sums = (vec![0.0f64; n], vec![0.0f64; n]);
        let steps = 400;
        for step in 0..steps {
            let (one, two) = coded(&first, &second, step);
            for i in 0..n {
                // Between neighbouring shares of the root: twice, four times the root's own step at most.
                let share = (first[i].abs() / 3e-3).sqrt();
                assert!((one[i] - first[i]).abs() <= 3e-3 * (2.0 * share + 1.0 / 120.0) / 120.0, "{i}");
                let root = (second[i] / 7e-6).sqrt().sqrt() + 1.0 / 240.0;
                assert!((two[i] - second[i]).abs() <= 7e-6 * 4.0 * root.powi(3) / 240.0, "{i}");
                assert_eq!(two[i] > 0.0, second[i] > 0.0, "{i}");
                sums.0[i] += f64::from(one[i]);
                sums.1[i] += f64::from(two[i]);
            }
        }
        for i in 0..n {
            let means = (sums.0[i] / steps as f64, sums.1[i] / steps as f64);
            assert!((means.0 - f64::from(first[i])).abs() < 4e-6, "{i}: {} {}", means.0, first[i]);
            assert!((means.1 - f64::from(second[i])).abs() < 2.5e-8, "{i}: {} {}", means.1, second[i]);
        }
    }

    /// A second moment falls by a thousandth in a step of which a code is many: it has to fall all the same.
    #[test]
    fn a_moment_that_moves_by_less_than_a_step_moves() {
        let mut moments = Moments::new(2048, MomentFormat::EightBit);
        let (mut values, gradient) = (vec![0.0; 2048], vec![1.0; 2048]);
        moments.change(0, &mut values, &gradient, |_, gradient, _, second| *second = gradient);
        // One of each block stays, as the scale does.
        values.iter_mut().step_by(BLOCK).for_each(|value| *value = 1.0);
        for step in 1..=1000 {
            moments.change(step, &mut values, &gradient, |value, _, _, second| {
                *second = if *value == 1.0 { 1.0 } else { *second * 0.999 };
            });
        }
        let sum = std::sync::Mutex::new(0.0f64);
        moments.change(1001, &mut values, &gradient, |value, _, _, second| {
            if *value == 0.0 {
                *sum.lock().unwrap() += f64::from(*second);
            }
        });
        let mean = sum.into_inner().unwrap() / (2048 - 8) as f64;
        assert!((mean - 0.999f64.powi(1000)).abs() < 0.02, "{mean}");
    }

    #[test]
    fn nothing_depends_on_threads() {
        let values: Vec<f32> = (0..40_000).map(|i| (i as f32 * 0.37).sin()).collect();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut moments = Moments::new(values.len(), MomentFormat::EightBit);
            pool.install(|| {
                moments.change(3, &mut values.clone(), &values, |_, gradient, first, second| {
                    (*first, *second) = (gradient * 0.1, gradient * gradient);
                });
            });
            moments
        };
        assert_eq!(on(1), on(3));
    }
}
