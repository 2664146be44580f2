//! A step of AdamW (Loshchilov and Hutter, 2019) on numbers, their gradient and its two moments, as `f32` or in 8
//! bits; and the norm that a gradient is clipped by.
//!
//! In 8 bits a code stands for a share of the largest magnitude among 256 numbers (blocks as in 8-bit Optimizers,
//! Dettmers et al., 2022): the first moment for its square, the second for its fourth power, so that small numbers have
//! steps that are small. A moment moves by less than a step at a time, most of all the second one, and rounded to the
//! nearest it would stand still: it is rounded up or down by a draw, so that it is right in the mean. Draws follow from
//! the step and the place alone.
//!
//! Surprising: every tier gives the same bits, as nothing is fused.

use rayon::prelude::*;

use crate::{Isa, isa::multiversion};

/// Numbers whose moments in 8 bits share a scale.
pub const BLOCK: usize = 256;
/// Numbers that a thread takes at a time; whole blocks.
const PIECE: usize = 1 << 14;

/// What every number's step has in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// What decay leaves of a number: `1 - rate · weight_decay`.
    pub keep: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `rate / (1 - beta1ᵗ)`.
    pub size: f32,
    /// `√(1 - beta2ᵗ)`.
    pub second_root: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Multiplied into the gradient.
    pub gradient_scale: f32,
}

/// Moments in 8 bits.
#[derive(Debug)]
pub struct Coded<'a> {
    /// Codes of the running mean of the gradients.
    pub first: &'a mut [i8],
    /// Codes of the running mean of their squares.
    pub second: &'a mut [u8],
    /// The largest magnitudes of both in each [`BLOCK`].
    pub scales: &'a mut [[f32; 2]],
}

/// Moves `values` against their gradient, as `torch.optim.AdamW` does.
///
/// # Panics
/// If the lengths differ.
pub fn step(
    isa: Isa,
    step: &Step,
    values: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
) {
    let n = values.len();
    assert_eq!([gradient.len(), first.len(), second.len()], [n; 3], "{n} of each expected");
    let pieces = values.par_chunks_mut(PIECE).zip(gradient.par_chunks(PIECE));
    let moments = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
    pieces.zip(moments).for_each(|((values, gradient), (first, second))| {
        plain(isa, step, values, gradient, first, second);
    });
}

/// The same with moments in 8 bits, which are rounded by draws of `seed`: another one for each step.
///
/// # Panics
/// If the lengths differ, or scales do not fit.
pub fn step_coded(
    isa: Isa,
    step: &Step,
    seed: u64,
    values: &mut [f32],
    gradient: &[f32],
    moments: Coded<'_>,
) {
    let Coded { first, second, scales } = moments;
    let n = values.len();
    assert_eq!([gradient.len(), first.len(), second.len()], [n; 3], "{n} of each expected");
    assert_eq!(scales.len(), n.div_ceil(BLOCK), "a scale for each {BLOCK} expected");
    let pieces = values.par_chunks_mut(PIECE).zip(gradient.par_chunks(PIECE));
    let codes = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
    let codes = codes.zip(scales.par_chunks_mut(PIECE / BLOCK));
    pieces.zip(codes).enumerate().for_each(|(piece, ((values, gradient), ((first, second), scales)))| {
        let place = (piece * PIECE / BLOCK) as u64;
        coded(isa, step, (seed, place), values, gradient, Coded { first, second, scales });
    });
}

/// The sum of the squares, in the same order on any number of threads.
pub fn sum_of_squares(isa: Isa, values: &[f32]) -> f64 {
    let sum = |piece: &[f32]| {
        let mut sum = 0.0;
        squares(isa, piece, &mut sum);
        sum
    };
    let sums: Vec<f64> = values.par_chunks(PIECE).map(sum).collect();
    sums.into_iter().sum()
}

multiversion! {
    fn plain(step: &Step, values: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) = plain_body
}

#[inline(always)]
fn plain_body<const FMA: bool>(
    step: &Step,
    values: &mut [f32],
    gradient: &[f32],
    first: &mut [f32],
    second: &mut [f32],
) {
    for (((value, gradient), first), second) in values.iter_mut().zip(gradient).zip(first).zip(second) {
        let gradient = gradient * step.gradient_scale;
        *value *= step.keep;
        *first += (gradient - *first) * (1.0 - step.beta1);
        *second = *second * step.beta2 + gradient * gradient * (1.0 - step.beta2);
        *value -= step.size * *first / (second.sqrt() / step.second_root + step.eps);
    }
}

multiversion! {
    fn coded(step: &Step, draws: (u64, u64), values: &mut [f32], gradient: &[f32], codes: Coded<'_>) = coded_body
}

/// `draws` are the seed and the number of the first block.
#[inline(always)]
fn coded_body<const FMA: bool>(
    step: &Step,
    (seed, place): (u64, u64),
    values: &mut [f32],
    gradient: &[f32],
    Coded { first, second, scales }: Coded<'_>,
) {
    let blocks = values.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
    let codes = first.chunks_mut(BLOCK).zip(second.chunks_mut(BLOCK)).zip(scales);
    let (mut wide_first, mut wide_second) = ([0.0; BLOCK], [0.0; BLOCK]);
    for (block, ((values, gradient), ((first, second), scales))) in blocks.zip(codes).enumerate() {
        let wide_first = &mut wide_first[..values.len()];
        let wide_second = &mut wide_second[..values.len()];
        decode(first, second, *scales, wide_first, wide_second);
        plain_body::<FMA>(step, values, gradient, wide_first, wide_second);
        *scales = encode(wide_first, wide_second, block_seed(seed, place + block as u64), first, second);
    }
}

#[inline(always)]
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
#[inline(always)]
fn encode(first: &[f32], second: &[f32], seed: u32, codes: &mut [i8], squares: &mut [u8]) -> [f32; 2] {
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
#[inline(always)]
fn whole(value: f32, least: f32, most: f32) -> u8 {
    /// Added to a number below 2^22 it leaves the nearest whole one in the low bits: `floor` is a call.
    const ROUNDING: f32 = 12_582_912.0;
    ((value - 0.5).max(least).min(most) + ROUNDING).to_bits() as u8
}

/// The largest magnitude, by lanes that do not wait for each other.
#[inline(always)]
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

/// The seed of a block's draws.
#[inline(always)]
fn block_seed(seed: u64, block: u64) -> u32 {
    // The finaliser of splitmix64.
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ block;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as u32
}

/// A number in [0, 1) that follows from a seed and a place.
#[inline(always)]
fn draw(seed: u32, index: usize) -> f32 {
    // The finaliser of MurmurHash3, of 32 bits, which vectors can do.
    let mut hash = seed.wrapping_add((index as u32).wrapping_mul(0x9e37_79b9));
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    ((hash ^ (hash >> 16)) >> 8) as f32 / (1 << 24) as f32
}

multiversion! { fn squares(values: &[f32], sum: &mut f64) = squares_body }

#[inline(always)]
fn squares_body<const FMA: bool>(values: &[f32], sum: &mut f64) {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0.0f64; 16];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    *sum = lanes.into_iter().chain(rest.iter().map(|value| f64::from(*value) * f64::from(*value))).sum();
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Step = Step {
        keep: 0.99,
        beta1: 0.9,
        beta2: 0.999,
        size: 0.1,
        second_root: 0.031,
        eps: 1e-8,
        gradient_scale: 0.5,
    };

    fn wave(n: usize, pace: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * pace).sin()).collect()
    }

    /// Codes and scales of moments.
    fn encoded(first: &[f32], second: &[f32], seed: u64) -> (Vec<i8>, Vec<u8>, Vec<[f32; 2]>) {
        let n = first.len();
        let (mut codes, mut squares) = (vec![0; n], vec![0; n]);
        let blocks = codes.chunks_mut(BLOCK).zip(squares.chunks_mut(BLOCK)).enumerate();
        let scales = blocks.map(|(block, (codes, squares))| {
            let range = block * BLOCK..n.min((block + 1) * BLOCK);
            encode(&first[range.clone()], &second[range], block_seed(seed, block as u64), codes, squares)
        });
        let scales = scales.collect();
        (codes, squares, scales)
    }

    fn decoded((codes, squares, scales): &(Vec<i8>, Vec<u8>, Vec<[f32; 2]>)) -> (Vec<f32>, Vec<f32>) {
        let (mut first, mut second) = (vec![0.0; codes.len()], vec![0.0; codes.len()]);
        for (block, scales) in scales.iter().enumerate() {
            let range = block * BLOCK..codes.len().min((block + 1) * BLOCK);
            let (wide, wide_second) = (&mut first[range.clone()], &mut second[range.clone()]);
            decode(&codes[range.clone()], &squares[range], *scales, wide, wide_second);
        }
        (first, second)
    }

    #[test]
    fn codes_are_within_a_step_and_right_in_the_mean() {
        let n = 700; // two blocks and a part of one
        let first: Vec<f32> = wave(n, 0.7).iter().map(|wave| wave.powi(5) * 3e-3).collect();
        let second: Vec<f32> = wave(n, 0.7).iter().map(|wave| wave.powi(8) * 7e-6).collect();
        let mut sums = (vec![0.0f64; n], vec![0.0f64; n]);
        let steps = 400;
        for step in 0..steps {
            let (one, two) = decoded(&encoded(&first, &second, step));
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
        let mut second = vec![1.0; 2048];
        for step in 1..=1000 {
            // One of each block stays, as the scale does.
            let moved = second.iter().enumerate();
            let moved: Vec<f32> =
                moved.map(|(i, value)| if i % BLOCK == 0 { 1.0 } else { value * 0.999 }).collect();
            second = decoded(&encoded(&vec![0.0; 2048], &moved, step)).1;
        }
        let falling = second.iter().enumerate().filter(|(i, _)| i % BLOCK != 0);
        let mean = falling.map(|(_, value)| f64::from(*value)).sum::<f64>() / (2048 - 8) as f64;
        assert!((mean - 0.999f64.powi(1000)).abs() < 0.02, "{mean}");
    }

    #[test]
    fn every_tier_and_number_of_threads_gives_the_same_bits() {
        for n in [1, 15, 300, 40_000] {
            let gradient = wave(n, 0.37);
            let of = |isa, threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let (mut values, mut coded_values) = (wave(n, 0.11), wave(n, 0.11));
                let (mut first, mut second) = (vec![0.0; n], vec![0.0; n]);
                let (mut codes, mut squares) = (vec![0; n], vec![0; n]);
                let mut scales = vec![[0.0; 2]; n.div_ceil(BLOCK)];
                pool.install(|| {
                    for seed in 0..3 {
                        step(isa, &STEP, &mut values, &gradient, &mut first, &mut second);
                        let coded = Coded { first: &mut codes, second: &mut squares, scales: &mut scales };
                        step_coded(isa, &STEP, seed, &mut coded_values, &gradient, coded);
                    }
                    let sum = sum_of_squares(isa, &values);
                    (values, coded_values, (first, second), (codes, squares, scales), sum)
                })
            };
            let expected = of(Isa::PORTABLE, 1);
            for isa in Isa::available() {
                assert_eq!(of(isa, 3), expected, "{} {n}", isa.tier());
            }
            let plain: f64 = expected.0.iter().map(|&v| f64::from(v).powi(2)).sum();
            assert!((expected.4 - plain).abs() <= 1e-9 * plain);
            // Codes are a part in a hundred of what they stand for.
            for (value, coded) in expected.0.iter().zip(&expected.1) {
                assert!((value - coded).abs() < 0.05, "{value} {coded}");
            }
        }
    }
}
