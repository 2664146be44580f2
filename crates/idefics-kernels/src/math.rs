//! Scalar functions without branches, so that loops over them vectorise.

#![allow(clippy::approx_constant)] // A fitted coefficient that comes near 2/√π is not meant to be it.

/// `a · b + c`, fused where that is one instruction.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `Σ cᵢ xⁱ`, lowest power first.
#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    coefficients.iter().rev().fold(0.0, |sum, c| fma::<FMA>(sum, x, *c))
}

/// `eˣ` within 2 units in the last place; 0 below -87.3 and infinity above 88.37, where the true value leaves
/// the normal numbers or soon will.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4; // few bits, so that n · LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves the rounded integer in the low bits
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_LOW, fma::<FMA>(n, -LN2_HIGH, x));
    // Taylor's series on |r| <= ln 2 / 2: the first term left out is below 6e-9.
    let p = polynomial::<FMA, 8>(
        r,
        [1.0, 1.0, 0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0],
    );
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    let value = p * scale;
    let value = if x < -87.3 { 0.0 } else { value };
    if x > 88.37 { f32::INFINITY } else { value }
}

/// The error function, absolute error below 2e-7.
///
/// Polynomials fitted by weighted least squares on Chebyshev nodes: `x · P(x²)` up to 1, `1 - e^(-x²) · Q(t)`
/// with `t = 1 / (1 + x/2)` above.
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    let size = x.abs();
    let square = x * x;
    let near = x * polynomial::<FMA, 7>(
        square,
        [
            1.128_379_1,
            -0.376_126_26,
            0.112_836,
            -0.026_854_444,
            0.005_189_535,
            -0.000_802_083_8,
            7.889_109e-5,
        ],
    );
    let t = 1.0 / fma::<FMA>(size, 0.5, 1.0);
    let q = polynomial::<FMA, 7>(
        t,
        [
            0.002_073_738,
            0.257_078_26,
            0.408_170_43,
            -0.090_665_94,
            0.670_559_05,
            -0.254_095_44,
            0.006_654_933_6,
        ],
    );
    let far = (1.0 - exp::<FMA>(-square) * q).copysign(x);
    let value = if size < 1.0 { near } else { far };
    // The fit of Q ends at 4.2; beyond 4 the function is 1 to the last bit.
    if size > 4.0 { 1.0f32.copysign(x) } else { value }
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Sum with sixteen running sums, so that it vectorises and its order is fixed.
#[inline(always)]
pub(crate) fn sum_by(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += term(*value);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += term(*value);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -87_000..88_300 {
            let x = i as f32 / 1000.0;
            let truth = f64::from(x).exp();
            for got in [exp::<true>(x), exp::<false>(x)] {
                let error = (f64::from(got) - truth).abs() / truth;
                assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) = {got}, expected {truth}");
            }
        }
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-1e30), 0.0);
        assert_eq!(exp::<true>(f32::INFINITY), f32::INFINITY);
        assert!(exp::<true>(f32::NAN).is_nan() && exp::<false>(f32::NAN).is_nan());
    }

    #[test]
    fn erf_at_tabulated_points() {
        // Abramowitz and Stegun, table 7.1.
        for (x, truth) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916_0),
            (0.5, 0.520_499_877_8),
            (0.99, 0.838_508_069_6),
            (1.0, 0.842_700_792_9),
            (1.5, 0.966_105_146_5),
            (2.0, 0.995_322_265_0),
            (3.0, 0.999_977_909_5),
            (5.0, 1.0),
        ] {
            for got in [erf::<true>(x), erf::<false>(x), -erf::<true>(-x)] {
                assert!((f64::from(got) - truth).abs() < 2e-7, "erf({x}) = {got}, expected {truth}");
            }
        }
        assert!(erf::<true>(f32::NAN).is_nan());
        assert_eq!((erf::<true>(f32::INFINITY), erf::<true>(f32::NEG_INFINITY)), (1.0, -1.0));
    }

    #[test]
    fn sums_of_every_length() {
        for n in 0..70 {
            let values: Vec<f32> = (1..=n).map(|v| v as f32).collect();
            assert_eq!(sum_by(&values, |v| v), (n * (n + 1) / 2) as f32);
        }
    }
}
