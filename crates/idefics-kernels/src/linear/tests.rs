use half::{bf16, f16};

use super::{Compute, Matrix, linear, products};
use crate::{
    Isa, Tier,
    nf4::{self, Nf4, Scales},
    q8::{self, Q8},
};

/// Values in [-1, 1) from a small generator; the seed names the stream.
pub(super) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// The plain twin, in f64.
fn reference(x: &[f32], w: &[f32], bias: Option<&[f32]>, k: usize) -> Vec<f64> {
    x.chunks(k)
        .flat_map(|x| {
            w.chunks(k).enumerate().map(move |(j, w)| {
                let dot: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                dot + bias.map_or(0.0, |bias| f64::from(bias[j]))
            })
        })
        .collect()
}

fn run(isa: Isa, compute: Compute, x: &[f32], w: Matrix<'_>, k: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / k * (w.len() / k)];
    linear(isa, compute, x, w, k, bias, &mut out);
    out
}

fn bf16s(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|v| bf16::from_f32(*v)).collect()
}

/// Sizes around every tile and vector width, tails included.
const SIZES: [(usize, usize, usize); 17] = [
    (1, 1, 1),
    (1, 5, 16),
    (2, 3, 7),
    (3, 40, 31),
    (4, 41, 32),
    (5, 5, 33),
    (6, 43, 64),
    (11, 7, 100),
    (1, 81, 257),
    (8, 39, 15),
    (13, 121, 48),
    (7, 200, 512),
    // Enough rows to be broadcast: every height of a tile, and panels of one and two registers.
    (24, 16, 1),
    (29, 33, 96),
    (31, 7, 33),
    (39, 64, 47),
    (71, 49, 130),
];

#[test]
fn every_tier_and_format_agrees_with_the_plain_twin() {
    for isa in Isa::available() {
        for (m, n, k) in SIZES {
            let (x, w, bias) = (noise(m * k, 1), noise(n * k, 2), noise(n, 3));
            let (w16, wb) = (w.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>(), bf16s(&w));
            let wide16: Vec<f32> = w16.iter().map(|v| v.to_f32()).collect();
            let wideb: Vec<f32> = wb.iter().map(|v| v.to_f32()).collect();
            let xb: Vec<f32> = x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            let w16b: Vec<f32> = wide16.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            for (name, compute, matrix, x_as, w_as) in [
                ("f32 x f32", Compute::F32, Matrix::F32(&w), &x, &w),
                ("f32 x f16", Compute::F32, Matrix::F16(&w16), &x, &wide16),
                ("f32 x bf16", Compute::F32, Matrix::Bf16(&wb), &x, &wideb),
                ("bf16 x f32", Compute::Bf16, Matrix::F32(&w), &xb, &wideb),
                ("bf16 x f16", Compute::Bf16, Matrix::F16(&w16), &xb, &w16b),
                ("bf16 x bf16", Compute::Bf16, Matrix::Bf16(&wb), &xb, &wideb),
            ] {
                let got = run(isa, compute, &x, matrix, k, Some(&bias));
                let expected = reference(x_as, w_as, Some(&bias), k);
                // Rounding of a sum of k products below 1: the worst case grows with k, the usual with its root.
                let bound = 4.0 * f64::from(f32::EPSILON) * (k as f64).sqrt().max(4.0);
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let error = (f64::from(*got) - expected).abs();
                    assert!(
                        error <= bound,
                        "{} {name} {m}x{n}x{k} at {i}: {got} against {expected}",
                        isa.tier()
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_gives_the_same_bits_alone_and_in_any_batch() {
    // 53 rows are broadcast over transposed weights, 17 are tiles of dot products, as is one.
    for (m, n, k) in [(17, 123, 77), (53, 123, 77), (53, 35, 160), (24, 33, 15)] {
        let (x, w, bias) = (noise(m * k, 4), noise(n * k, 5), noise(n, 6));
        let (half, short) = (w.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>(), bf16s(&w));
        for isa in Isa::available() {
            for compute in [Compute::F32, Compute::Bf16] {
                for weight in [Matrix::F32(&w), Matrix::F16(&half), Matrix::Bf16(&short)] {
                    let together = run(isa, compute, &x, weight, k, Some(&bias));
                    for (i, row) in x.chunks(k).enumerate() {
                        let alone = run(isa, compute, row, weight, k, Some(&bias));
                        assert_eq!(
                            alone,
                            together[i * n..(i + 1) * n],
                            "{} {compute:?} {m} rows, row {i}",
                            isa.tier()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn tiny_numbers_and_signed_zeros_keep_their_bits_when_broadcast() {
    // Products that underflow, sums that cancel: where the two ways could round, flush or sign a zero apart.
    let (m, n, k) = (30, 40, 70);
    let tiny = |values: Vec<f32>| -> Vec<f32> {
        let of = |(i, v): (usize, f32)| match i % 5 {
            0 => v * 1e-38,
            1 => v * 1e-22,
            2 => -0.0,
            3 => v * 3e-41,
            _ => -v * 1e-19,
        };
        values.into_iter().enumerate().map(of).collect()
    };
    let (x, w) = (tiny(noise(m * k, 40)), tiny(noise(n * k, 41)));
    for isa in Isa::available() {
        for compute in [Compute::F32, Compute::Bf16] {
            let bits = |x: &[f32]| -> Vec<u32> {
                run(isa, compute, x, Matrix::F32(&w), k, None).iter().map(|v| v.to_bits()).collect()
            };
            let together = bits(&x);
            for (row, together) in x.chunks(k).zip(together.chunks(n)) {
                assert_eq!(bits(row), together, "{} {compute:?}", isa.tier());
            }
        }
    }
}

#[test]
fn rows_that_are_computed_in_parts_are_those_of_the_whole() {
    // More rows than go through the weight together at this width.
    let (m, n, k) = (600, 3, 16_400);
    assert!(super::rows_at_once(m, k) < m);
    let (x, w) = (noise(m * k, 42), noise(n * k, 43));
    let together = run(Isa::best(), Compute::Bf16, &x, Matrix::F32(&w), k, None);
    for row in [0, 299, 300, 599] {
        let alone = run(Isa::best(), Compute::Bf16, &x[row * k..(row + 1) * k], Matrix::F32(&w), k, None);
        assert_eq!(alone, together[row * n..(row + 1) * n], "row {row}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for (m, n, k) in [(9, 301, 256), (45, 301, 256)] {
        let (x, w) = (noise(m * k, 6), bf16s(&noise(n * k, 7)));
        let isa = Isa::best();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| run(isa, Compute::Bf16, &x, Matrix::Bf16(&w), k, None))
        };
        let one = on(1);
        assert_eq!(one, on(2));
        assert_eq!(one, on(7));
    }
}

#[test]
fn products_at_once_are_those_of_each_alone() {
    let (k, large, small) = (128, noise(700 * 128, 1), noise(33 * 128, 2));
    let bias = noise(33, 3);
    for isa in Isa::available() {
        // Too little to be shared out, one row, and many.
        for rows in [1, 3, 70] {
            let x = noise(rows * k, 4);
            for few in [33, 700] {
                let first = Matrix::F32(&large[..few * k]);
                let weights = [(first, None), (Matrix::F32(&small), Some(&bias[..])), (first, None)];
                for compute in [Compute::F32, Compute::Bf16] {
                    let expected =
                        weights.map(|(weight, bias)| run(isa, compute, &x, weight, k, bias)).to_vec();
                    assert_eq!(products(isa, compute, &x, &weights, k), expected, "{} {rows}", isa.tier());
                }
            }
        }
    }
}

#[test]
fn not_a_number_and_infinity_reach_only_their_own_rows_and_columns() {
    let (m, n, k) = (26, 45, 40);
    let (mut x, mut w) = (noise(m * k, 8), noise(n * k, 9));
    x[3 * k + 39] = f32::NAN;
    w[44 * k] = f32::INFINITY;
    for isa in Isa::available() {
        for compute in [Compute::F32, Compute::Bf16] {
            let out = run(isa, compute, &x, Matrix::F32(&w), k, None);
            for (i, value) in out.iter().enumerate() {
                let (row, col) = (i / n, i % n);
                assert_eq!(value.is_nan(), row == 3, "{} {compute:?} at {row},{col}: {value}", isa.tier());
                assert_eq!(
                    value.is_infinite(),
                    row != 3 && col == 44,
                    "{} at {row},{col}: {value}",
                    isa.tier()
                );
            }
        }
    }
}

#[test]
fn unaligned_rows_are_read_right() {
    let k = 37;
    let buffer = noise(3 * k + 1, 10);
    let x = &buffer[1..=k];
    for isa in Isa::available() {
        let got = run(isa, Compute::F32, x, Matrix::F32(&buffer[1..=2 * k]), k, None);
        for (got, expected) in got.iter().zip(reference(x, &buffer[1..=2 * k], None, k)) {
            assert!((f64::from(*got) - expected).abs() < 1e-5);
        }
    }
}

#[test]
fn the_bf16_tier_rounds_as_the_widened_one_does() {
    // Exact products of small integers: any summation order gives the same value, so any difference is a bug.
    let Some(isa) = Isa::of(Tier::Avx512Bf16) else { return };
    let k = 96;
    let x: Vec<f32> = (0..3 * k).map(|i| (i % 7) as f32 - 3.0).collect();
    let w: Vec<f32> = (0..11 * k).map(|i| (i % 5) as f32 - 2.0).collect();
    let wb = bf16s(&w);
    assert_eq!(
        run(isa, Compute::Bf16, &x, Matrix::Bf16(&wb), k, None),
        run(Isa::PORTABLE, Compute::F32, &x, Matrix::F32(&w), k, None)
    );
}

/// Packed weights of all kinds with their plain values.
struct PackedCase {
    nf4_codes: Vec<u8>,
    nf4_scales: Vec<f32>,
    nf4_values: Vec<f32>,
    q8_codes: Vec<i8>,
    q8_scales: Vec<f32>,
    q8_values: Vec<f32>,
}

impl PackedCase {
    fn nf4(&self) -> Matrix<'_> {
        let scales = Scales::Plain(&self.nf4_scales);
        Matrix::Nf4(Nf4 { codes: &self.nf4_codes, scales, map: &nf4::CODE_VALUES })
    }

    fn q8(&self) -> Matrix<'_> {
        Matrix::Q8(Q8 { codes: &self.q8_codes, scales: &self.q8_scales })
    }
}

fn packed_case(n: usize, k: usize) -> PackedCase {
    let w = noise(n * k, 20);
    let (nf4_codes, nf4_scales) = nf4::quantize(&w);
    let weight = Nf4 { codes: &nf4_codes, scales: Scales::Plain(&nf4_scales), map: &nf4::CODE_VALUES };
    let nf4_values = (0..n * k).map(|i| weight.get(i)).collect();
    let (q8_codes, q8_scales) = q8::quantize(&w, k);
    let weight = Q8 { codes: &q8_codes, scales: &q8_scales };
    let mut q8_values = vec![0.0; n * k];
    q8_values.chunks_mut(k).enumerate().for_each(|(row, out)| weight.read_row(row, out));
    PackedCase { nf4_codes, nf4_scales, nf4_values, q8_codes, q8_scales, q8_values }
}

#[test]
fn packed_weights_agree_with_their_values_on_every_tier_and_way() {
    // Rows around the switch from fused to unpacked; a width that is not whole blocks takes the plain way.
    for (m, n, k) in [
        (1, 43, 64),
        (3, 40, 128),
        (4, 7, 320),
        (5, 81, 192),
        (9, 50, 64),
        (2, 6, 100),
        (6, 42, 34),
        (27, 45, 192),
    ] {
        let x = noise(m * k, 21);
        let case = packed_case(n, k);
        let round = |v: &[f32]| v.iter().map(|v| bf16::from_f32(*v).to_f32()).collect::<Vec<_>>();
        for isa in Isa::available() {
            for (name, matrix, values) in
                [("nf4", case.nf4(), &case.nf4_values), ("q8", case.q8(), &case.q8_values)]
            {
                for (compute, x_as, w_as) in
                    [(Compute::F32, x.clone(), values.clone()), (Compute::Bf16, round(&x), round(values))]
                {
                    let got = run(isa, compute, &x, matrix, k, None);
                    for (i, (got, expected)) in got.iter().zip(reference(&x_as, &w_as, None, k)).enumerate() {
                        let error = (f64::from(*got) - expected).abs();
                        let tier = isa.tier();
                        assert!(
                            error < 1e-5,
                            "{tier} {name} {compute:?} {m}x{n}x{k} at {i}: {got} {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_of_a_packed_product_gives_the_same_bits_alone_and_in_any_batch() {
    let (m, n, k) = (41, 90, 192);
    let x = noise(m * k, 22);
    let case = packed_case(n, k);
    let scales = &case.nf4_scales;
    let nested_map: [f32; 256] = std::array::from_fn(|i| i as f32 / 100.0);
    let nested_codes: Vec<u8> = (0..scales.len()).map(|i| (i * 31 % 251) as u8).collect();
    let nested_absmax = vec![0.7; scales.len().div_ceil(nf4::NESTED_BLOCK)];
    let nested =
        Scales::Nested { codes: &nested_codes, map: &nested_map, absmax: &nested_absmax, offset: 0.1 };
    let nested = Matrix::Nf4(Nf4 { codes: &case.nf4_codes, scales: nested, map: &nf4::CODE_VALUES });
    for matrix in [case.nf4(), nested, case.q8()] {
        for isa in Isa::available() {
            for compute in [Compute::F32, Compute::Bf16] {
                let together = run(isa, compute, &x, matrix, k, None);
                for rows in [1, 2, 4, 5, 11, 17, 24] {
                    let alone = run(isa, compute, &x[..rows * k], matrix, k, None);
                    assert_eq!(alone, together[..rows * n], "{} {compute:?} {rows} rows", isa.tier());
                }
            }
        }
    }
}

#[test]
fn rounding_is_that_of_the_half_crate() {
    let mut values = noise(1000, 30);
    values.extend([
        0.0,
        -0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-42,
        1.003_906_2,
    ]);
    for isa in Isa::available() {
        let rounded = super::round_all(isa, &values);
        for (value, rounded) in values.iter().zip(&rounded) {
            assert_eq!(rounded.to_bits(), bf16::from_f32(*value).to_bits(), "{value}");
        }
        assert!(super::round_all(isa, &[f32::NAN])[0].is_nan());
    }
}
