//! Double quantization: the scales of an NF4 weight as 8-bit codes, as bitsandbytes makes them on a CPU.
//!
//! The mean of all scales is taken off; groups of 256 differences share their largest magnitude; a difference
//! takes the nearest of 256 values of a "dynamic" map, dense around zero. Source: Dettmers, "8-bit Approximations
//! for Parallelism in Deep Learning" (2016), and bitsandbytes `functional.py` and `csrc/cpu_ops.cpp`.
//!
//! Surprising: two details decide the last bit. The codes come from a table over a grid of 65536 points in
//! [-1, 1], so a value is rounded to the grid before it is compared. And the mean is torch's, whose sum runs in
//! a cascade over eight lanes; torch splits sums of 32768 and more values among its threads, so there the last
//! bit of *its* mean depends on their number, and this is the one of a single thread.

use std::sync::LazyLock;

use crate::nf4::NESTED_BLOCK;

/// Scales of an NF4 weight, quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedScales {
    /// A code per scale.
    pub codes: Vec<u8>,
    /// Largest magnitude of each group of 256 differences from the mean.
    pub absmax: Vec<f32>,
    /// The mean of the scales.
    pub offset: f32,
}

/// The value of each 8-bit code, ascending.
pub fn dynamic_map() -> &'static [f32; 256] {
    &DYNAMIC_MAP
}

/// Quantizes the scales of a weight.
pub fn quantize(scales: &[f32]) -> NestedScales {
    let offset = mean(scales);
    let mut codes = Vec::with_capacity(scales.len());
    let mut absmax = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCK));
    for group in scales.chunks(NESTED_BLOCK) {
        let largest = group.iter().fold(0.0f32, |largest, scale| largest.max((scale - offset).abs()));
        absmax.push(largest);
        if largest == 0.0 {
            codes.resize(codes.len() + group.len(), 0);
            continue;
        }
        let inverse = 1.0 / largest;
        codes.extend(group.iter().map(|scale| code_of((scale - offset) * inverse)));
    }
    NestedScales { codes, absmax, offset }
}

/// The code of a number in [-1, 1].
fn code_of(value: f32) -> u8 {
    let point = (value.clamp(-1.0, 1.0) + 1.0) * 0.5 * GRID + 0.5;
    CODE_OF_POINT[point as usize]
}

/// The last point of the grid over [-1, 1].
const GRID: f32 = 65535.0;

/// The code nearest to each point of the grid, the lower one at a midpoint.
static CODE_OF_POINT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut code = 0;
    (0..=GRID as u32)
        .map(|point| {
            let value = -1.0 + 2.0 * point as f32 / GRID;
            while code < 255 && 0.5 * (DYNAMIC_MAP[code] + DYNAMIC_MAP[code + 1]) < value {
                code += 1;
            }
            code as u8
        })
        .collect()
});

/// Zero, one, and for each power of ten from 1e-6 to 1 the middles of 2, 4, … 64 equal steps between a tenth of
/// it and itself, of both signs.
static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut values = vec![0.0, 1.0];
    for exponent in 0..7 {
        let power = 10f64.powi(exponent - 6) as f32;
        let ends = linspace(0.1, 1.0, (1 << exponent) + 1);
        for pair in ends.windows(2) {
            let middle = power * f32::midpoint(pair[0], pair[1]);
            values.extend([middle, -middle]);
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("two values and twice 1 + 2 + … + 64 are 256")
});

/// `n` numbers from `start` to `end`, the second half counted from the end, as torch does it.
fn linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    let step = (end - start) / (n - 1) as f32;
    let at = |i: usize| {
        if i < n / 2 { step.mul_add(i as f32, start) } else { step.mul_add(-((n - 1 - i) as f32), end) }
    };
    (0..n).map(at).collect()
}

/// Lanes of the vectors that torch sums with.
const LANES: usize = 8;

/// torch's mean of contiguous `f32` numbers on one thread.
fn mean(values: &[f32]) -> f32 {
    let sum = if values.len() < LANES { row_sum::<1>(values) } else { row_sum::<LANES>(values) };
    sum / values.len() as f32
}

/// torch's sum (`SumKernel.cpp`, `cascade_sum`): vectors of `N` lanes are dealt to four columns, each summed in
/// a cascade; then what is left of the vectors, the columns, the left-over numbers, and the lanes.
fn row_sum<const N: usize>(values: &[f32]) -> f32 {
    const COLUMNS: usize = 4;
    let (vectors, tail) = values.as_chunks::<N>();
    let (rows, rest) = vectors.as_chunks::<COLUMNS>();
    let [mut total, others @ ..] = cascade::<N, COLUMNS>(rows);
    for vector in rest.iter().chain(&others) {
        add(&mut total, vector);
    }
    tail.iter().chain(&total).fold(0.0, |sum, value| sum + value)
}

/// Sums of each column. A level takes the sum of the one below after so many steps, so that few numbers are
/// added to a much larger one.
fn cascade<const N: usize, const COLUMNS: usize>(rows: &[[[f32; N]; COLUMNS]]) -> [[f32; N]; COLUMNS] {
    const LEVELS: usize = 4;
    let log2 = rows.len().next_power_of_two().trailing_zeros() as usize;
    let power = 4.max(log2 / LEVELS);
    let step = 1 << power;
    let mut levels = [[[0.0; N]; COLUMNS]; LEVELS];
    let add_all = |to: &mut [[f32; N]; COLUMNS], from: &[[f32; N]; COLUMNS]| {
        to.iter_mut().zip(from).for_each(|(to, from)| add(to, from));
    };
    let whole = rows.len() / step;
    for (index, run) in rows.chunks_exact(step).enumerate() {
        for row in run {
            add_all(&mut levels[0], row);
        }
        let done = (index + 1) * step;
        for level in 1..LEVELS {
            let below = std::mem::replace(&mut levels[level - 1], [[0.0; N]; COLUMNS]);
            add_all(&mut levels[level], &below);
            if done & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    for row in &rows[whole * step..] {
        add_all(&mut levels[0], row);
    }
    let [mut total, upper @ ..] = levels;
    for level in &upper {
        add_all(&mut total, level);
    }
    total
}

fn add<const N: usize>(to: &mut [f32; N], from: &[f32; N]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

#[cfg(test)]
mod tests {
    use super::*;

    // Equality with bitsandbytes is tested on fixtures, in the crate `idefics`.

    #[test]
    fn scales_come_back_within_half_the_widest_gap() {
        let scales: Vec<f32> = (0..1000).map(|i| 0.01 + ((i * 7919 % 1000) as f32) * 1e-4).collect();
        let nested = quantize(&scales);
        assert_eq!((nested.codes.len(), nested.absmax.len()), (1000, 4));
        let map = dynamic_map();
        let widest = map.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max);
        for (i, scale) in scales.iter().enumerate() {
            let absmax = nested.absmax[i / NESTED_BLOCK];
            let read = map[nested.codes[i] as usize] * absmax + nested.offset;
            assert!((read - scale).abs() <= (0.5 * widest + 2.0 / GRID) * absmax, "{i}: {read} {scale}");
        }
    }

    #[test]
    fn equal_scales_are_exact() {
        let nested = quantize(&[0.25; 300]);
        assert_eq!(nested, NestedScales { codes: vec![0; 300], absmax: vec![0.0; 2], offset: 0.25 });
    }

    #[test]
    fn the_mean_is_a_mean() {
        for n in [1, 2, 7, 8, 9, 31, 32, 33, 511, 2048, 2049, 100_000] {
            let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1000) as f32) / 1000.0).collect();
            let exact = values.iter().copied().map(f64::from).sum::<f64>() / n as f64;
            assert!((f64::from(mean(&values)) - exact).abs() < 1e-6, "{n}");
        }
    }
}
