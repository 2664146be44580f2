use super::*;
use crate::{
    linear::{Compute, linear, tests::noise},
    nf4::{self, Scales},
    q8,
};

/// Sizes around every tile: rows of activations that are few and many, groups of weight rows that are short, blocks
/// that fill half a line of NF4's codes, more blocks than are unpacked at a time.
const SIZES: [(usize, usize, usize); 12] = [
    (1, 1, 64),
    (1, 16, 128),
    (2, 17, 192),
    (3, 32, 64),
    (4, 33, 576),
    (5, 50, 128),
    (6, 16, 1088),
    (7, 5, 320),
    (8, 31, 64),
    (13, 40, 512),
    (29, 64, 640),
    (70, 100, 192),
];

/// A weight in one of the packed formats.
enum Weight {
    Nf4(Vec<u8>, Vec<f32>),
    Q8(Vec<i8>, Vec<f32>),
}

impl Weight {
    fn both(values: &[f32], k: usize) -> [Self; 2] {
        let ((codes, scales), (bytes, steps)) = (nf4::quantize(values), q8::quantize(values, k));
        [Self::Nf4(codes, scales), Self::Q8(bytes, steps)]
    }

    fn matrix(&self) -> Matrix<'_> {
        match self {
            Self::Nf4(codes, scales) => {
                Matrix::Nf4(Nf4 { codes, scales: Scales::Plain(scales), map: &nf4::CODE_VALUES })
            }
            Self::Q8(codes, scales) => Matrix::Q8(Q8 { codes, scales }),
        }
    }

    fn widened(&self, n: usize, k: usize) -> Vec<f32> {
        let mut out = vec![0.0; n * k];
        match self.matrix() {
            Matrix::Nf4(weight) => weight.read(0, &mut out),
            Matrix::Q8(weight) => {
                out.chunks_mut(k).enumerate().for_each(|(row, out)| weight.read_row(row, out));
            }
            _ => unreachable!("both are packed"),
        }
        out
    }
}

fn run(isa: Isa, x: &[f32], weight: &Weight, k: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / k * (weight.matrix().len() / k)];
    linear(isa, Compute::Int8, x, weight.matrix(), k, bias, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_tier_gives_the_bits_of_the_portable_one() {
    for (m, n, k) in SIZES {
        let (x, bias) = (noise(m * k, 1), noise(n, 3));
        for weight in Weight::both(&noise(n * k, 2), k) {
            for bias in [None, Some(&*bias)] {
                let expected = run(Isa::PORTABLE, &x, &weight, k, bias);
                for isa in Isa::available() {
                    let got = run(isa, &x, &weight, k, bias);
                    assert_eq!(bits(&got), bits(&expected), "{} {m}x{n}x{k}", isa.tier());
                }
            }
        }
    }
}

#[test]
fn nested_scales_are_the_scales_that_they_stand_for() {
    let (m, n, k) = (7, 35, 192);
    let x = noise(m * k, 50);
    let (codes, _) = nf4::quantize(&noise(n * k, 51));
    let scale_codes: Vec<u8> = (0..n * k / BLOCK).map(|i| (i * 37 % 256) as u8).collect();
    let map: [f32; 256] = std::array::from_fn(|i| i as f32 / 255.0);
    let nested = Scales::Nested { codes: &scale_codes, map: &map, absmax: &[0.75], offset: 0.125 };
    let plain: Vec<f32> = (0..nested.len()).map(|i| nested.get(i)).collect();
    for isa in Isa::available() {
        let of = |scales| {
            let mut out = vec![f32::NAN; m * n];
            let weight = Matrix::Nf4(Nf4 { codes: &codes, scales, map: &nf4::CODE_VALUES });
            linear(isa, Compute::Int8, &x, weight, k, None, &mut out);
            bits(&out)
        };
        assert_eq!(of(nested), of(Scales::Plain(&plain)), "{}", isa.tier());
    }
}

#[test]
fn a_row_gives_the_same_bits_alone_and_in_any_batch() {
    let (m, n, k) = (23, 37, 704);
    let x = noise(m * k, 4);
    for weight in Weight::both(&noise(n * k, 5), k) {
        for isa in Isa::available() {
            let together = run(isa, &x, &weight, k, None);
            for rows in [1, 2, 3, 4, 5, 11] {
                let parts: Vec<f32> =
                    x.chunks(rows * k).flat_map(|x| run(isa, x, &weight, k, None)).collect();
                assert_eq!(bits(&parts), bits(&together), "{} in parts of {rows}", isa.tier());
            }
        }
    }
}

/// The error against exact products of the same packed weight is that of rounding each factor to a step of its block.
#[test]
fn the_error_stays_within_half_a_step_of_each_factor() {
    let (m, n, k) = (5, 33, 512);
    let x = noise(m * k, 6);
    let units = Levels::of(&nf4::CODE_VALUES);
    let farthest = |(value, code): (&f32, &i8)| (value - f32::from(*code) * units.unit).abs();
    let level_error = nf4::CODE_VALUES.iter().zip(&units.codes).map(farthest).fold(0.0, f32::max);
    assert!(level_error < 0.0045, "NF4's values are within half of their unit: {level_error}");
    for weight in Weight::both(&noise(n * k, 7), k) {
        let wide = weight.widened(n, k);
        let got = run(Isa::best(), &x, &weight, k, None);
        for (i, x) in x.chunks(k).enumerate() {
            for (j, w) in wide.chunks(k).enumerate() {
                let exact: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                let mut bound = 1e-4;
                for (x, w) in x.chunks(BLOCK).zip(w.chunks(BLOCK)) {
                    let largest = |values: &[f32]| values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                    let step_x = largest(x) / 254.0;
                    let step_w =
                        if matches!(weight, Weight::Nf4(..)) { level_error * largest(w) } else { 0.0 };
                    for (x, w) in x.iter().zip(w) {
                        bound += f64::from(step_x * w.abs() + step_w * (x.abs() + step_x));
                    }
                }
                let error = (f64::from(got[i * n + j]) - exact).abs();
                assert!(error <= bound, "{i},{j}: {error} > {bound}");
                // Errors of both signs: they must not add up as the bound does.
                assert!(error <= 0.2 * bound + 0.05, "{i},{j}: {error}, bound {bound}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_makes_its_row_nan_and_no_other() {
    let (m, n, k) = (6, 20, 128);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = noise(m * k, 8);
        x[2 * k + 70] = bad;
        for weight in Weight::both(&noise(n * k, 9), k) {
            for isa in Isa::available() {
                let out = run(isa, &x, &weight, k, None);
                for (row, out) in out.chunks(n).enumerate() {
                    assert!(out.iter().all(|value| value.is_nan() == (row == 2)), "{} {bad}", isa.tier());
                }
            }
        }
    }
}

#[test]
fn zeros_and_numbers_too_small_for_a_scale_give_zeros_and_the_largest_give_no_overflow() {
    let (n, k) = (20, 128);
    for weight in Weight::both(&noise(n * k, 10), k) {
        for isa in Isa::available() {
            for tiny in [0.0, 1e-42, -3e-38] {
                let out = run(isa, &vec![tiny; k], &weight, k, None);
                assert!(out.iter().all(|value| value.abs() < 1e-35), "{} {tiny}", isa.tier());
            }
            let out = run(isa, &vec![1e36; k], &weight, k, None);
            assert!(out.iter().all(|value| value.is_finite()), "{}", isa.tier());
        }
    }
}

#[test]
fn what_is_not_packed_in_whole_blocks_is_computed_in_bf16() {
    let (m, n, k) = (3, 9, 96);
    let (x, w) = (noise(m * k, 11), noise(n * k, 12));
    let (codes, scales) = nf4::quantize(&w);
    let nf4 = Matrix::Nf4(Nf4 { codes: &codes, scales: Scales::Plain(&scales), map: &nf4::CODE_VALUES });
    for isa in Isa::available() {
        for weight in [Matrix::F32(&w), nf4] {
            let [bytes, halves] = [Compute::Int8, Compute::Bf16].map(|compute| {
                let mut out = vec![f32::NAN; m * n];
                linear(isa, compute, &x, weight, k, None, &mut out);
                bits(&out)
            });
            assert_eq!(bytes, halves, "{}", isa.tier());
        }
    }
}
