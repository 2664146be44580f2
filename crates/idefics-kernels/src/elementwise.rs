//! Activations and residuals, element by element.

use crate::{
    Isa,
    isa::multiversion,
    math::{erf, exp, fma, sigmoid},
    parallel,
};

/// The activation functions that IDEFICS configurations name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)`, with the exact error function.
    Gelu,
    /// `x · sigmoid(1.702 x)`.
    QuickGelu,
    /// `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Elements that a thread takes at a time.
const CHUNK: usize = 8192;

/// The function behind `activation`, in place.
pub(crate) fn function(activation: Activation) -> fn(Isa, &mut [f32]) {
    match activation {
        Activation::Silu => silu,
        Activation::Gelu => gelu,
        Activation::QuickGelu => quick_gelu,
        Activation::GeluTanh => gelu_tanh,
        Activation::Relu => relu,
    }
}

/// `activation(x)`.
pub fn activate(isa: Isa, activation: Activation, x: &[f32]) -> Vec<f32> {
    let apply = function(activation);
    parallel::mapped(x, CHUNK, |_, chunk| apply(isa, chunk))
}

/// `activation(gate) · up`, the gated half of a LLaMA MLP.
///
/// # Panics
/// If the lengths differ.
pub fn activate_gate(isa: Isa, activation: Activation, gate: &[f32], up: &[f32]) -> Vec<f32> {
    assert_eq!(gate.len(), up.len(), "gate and up must have one length");
    let apply = function(activation);
    parallel::mapped(gate, CHUNK, |first, chunk| {
        apply(isa, chunk);
        multiply(isa, chunk, &up[first..first + chunk.len()]);
    })
}

/// `x + y`. One rounding each, so all tiers give the same bits and none is asked for.
///
/// # Panics
/// If the lengths differ.
pub fn sum(x: &[f32], y: &[f32]) -> Vec<f32> {
    assert_eq!(x.len(), y.len(), "both terms must have one length");
    parallel::mapped(x, CHUNK, |first, chunk| {
        for (value, other) in chunk.iter_mut().zip(&y[first..]) {
            *value += other;
        }
    })
}

/// `values ← values + other`. One rounding each, so all tiers give the same bits and none is asked for.
///
/// # Panics
/// If the lengths differ.
pub fn add(values: &mut [f32], other: &[f32]) {
    assert_eq!(values.len(), other.len(), "both terms must have one length");
    parallel::for_each_run(values, CHUNK, |first, chunk| {
        for (value, other) in chunk.iter_mut().zip(&other[first..]) {
            *value += other;
        }
    });
}

/// `residual + scale · branch`; `scale` has one element, or one per channel and repeats.
///
/// # Panics
/// If `branch` and `residual` differ in length, or `scale` does not divide them.
pub fn add_scaled(isa: Isa, residual: &[f32], branch: &[f32], scale: &[f32]) -> Vec<f32> {
    assert_eq!(residual.len(), branch.len(), "residual and branch must have one length");
    assert!(
        !scale.is_empty() && residual.len().is_multiple_of(scale.len()),
        "the scale must divide the rows"
    );
    if let [scale] = scale {
        parallel::mapped(residual, CHUNK, |first, chunk| {
            axpy(isa, chunk, &branch[first..first + chunk.len()], *scale);
        })
    } else {
        parallel::mapped_rows(residual, scale.len(), |first, row| {
            axpy_by_channel(isa, row, &branch[first..first + row.len()], scale);
        })
    }
}

multiversion! { fn silu(values: &mut [f32]) = silu_body }
multiversion! { fn gelu(values: &mut [f32]) = gelu_body }
multiversion! { fn quick_gelu(values: &mut [f32]) = quick_gelu_body }
multiversion! { fn gelu_tanh(values: &mut [f32]) = gelu_tanh_body }
multiversion! { fn relu(values: &mut [f32]) = relu_body }
multiversion! { fn multiply(values: &mut [f32], by: &[f32]) = multiply_body }
multiversion! { fn axpy(residual: &mut [f32], branch: &[f32], scale: f32) = axpy_body }
multiversion! {
    fn axpy_by_channel(residual: &mut [f32], branch: &[f32], scale: &[f32]) = axpy_by_channel_body
}

#[inline(always)]
fn silu_body<const FMA: bool>(values: &mut [f32]) {
    for value in values {
        *value *= sigmoid::<FMA>(*value);
    }
}

#[inline(always)]
fn gelu_body<const FMA: bool>(values: &mut [f32]) {
    for value in values {
        *value *= 0.5 * (1.0 + erf::<FMA>(*value * std::f32::consts::FRAC_1_SQRT_2));
    }
}

#[inline(always)]
fn quick_gelu_body<const FMA: bool>(values: &mut [f32]) {
    for value in values {
        *value *= sigmoid::<FMA>(1.702 * *value);
    }
}

#[inline(always)]
fn gelu_tanh_body<const FMA: bool>(values: &mut [f32]) {
    for value in values {
        let x = *value;
        let inner = 0.797_884_6 * fma::<FMA>(0.044_715 * x * x, x, x);
        // tanh(y) = 1 - 2 / (1 + e^(2y)), which saturates cleanly on both sides.
        let tanh = 1.0 - 2.0 / (1.0 + exp::<FMA>(2.0 * inner));
        *value = 0.5 * x * (1.0 + tanh);
    }
}

#[inline(always)]
fn relu_body<const FMA: bool>(values: &mut [f32]) {
    for value in values {
        // Written so that NaN stays NaN, as in the reference.
        *value = if *value < 0.0 { 0.0 } else { *value };
    }
}

#[inline(always)]
fn multiply_body<const FMA: bool>(values: &mut [f32], by: &[f32]) {
    for (value, by) in values.iter_mut().zip(by) {
        *value *= by;
    }
}

#[inline(always)]
fn axpy_body<const FMA: bool>(residual: &mut [f32], branch: &[f32], scale: f32) {
    for (residual, branch) in residual.iter_mut().zip(branch) {
        *residual = fma::<FMA>(scale, *branch, *residual);
    }
}

#[inline(always)]
fn axpy_by_channel_body<const FMA: bool>(residual: &mut [f32], branch: &[f32], scale: &[f32]) {
    for ((residual, branch), scale) in residual.iter_mut().zip(branch).zip(scale) {
        *residual = fma::<FMA>(*scale, *branch, *residual);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tanh GELU and quick GELU as their formulas, in f64.
    fn plain(activation: Activation, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match activation {
            Activation::Silu => x * sigmoid(x),
            Activation::QuickGelu => x * sigmoid(1.702 * x),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::Gelu => unreachable!("no error function in std; checked by table"),
        }
    }

    #[test]
    fn activations_agree_with_their_formulas_on_every_tier() {
        let inputs: Vec<f32> = (-1200..1200).map(|i| i as f32 / 100.0).collect();
        for isa in Isa::available() {
            for activation in
                [Activation::Silu, Activation::QuickGelu, Activation::GeluTanh, Activation::Relu]
            {
                let values = activate(isa, activation, &inputs);
                for (x, got) in inputs.iter().zip(&values) {
                    let expected = plain(activation, f64::from(*x));
                    let bound = 4e-7 * f64::from(x.abs()).max(1.0);
                    assert!(
                        (f64::from(*got) - expected).abs() < bound,
                        "{activation:?}({x}) = {got}, not {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn gelu_at_points_of_the_reference() {
        // torch.nn.functional.gelu in float64.
        for isa in Isa::available() {
            let values = activate(isa, Activation::Gelu, &[-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 6.0]);
            let expected = [
                -0.004_049_694,
                -0.158_655_25,
                -0.154_268_77,
                0.0,
                0.345_731_23,
                0.841_344_8,
                1.954_499_7,
                6.0,
            ];
            for (got, expected) in values.iter().zip(expected) {
                assert!((got - expected).abs() < 4e-7, "{got} {expected}");
            }
        }
    }

    #[test]
    fn far_values_saturate_and_nan_stays() {
        for isa in Isa::available() {
            for activation in [
                Activation::Silu,
                Activation::Gelu,
                Activation::QuickGelu,
                Activation::GeluTanh,
                Activation::Relu,
            ] {
                let values = activate(isa, activation, &[-1e4, 1e4, f32::NAN]);
                assert_eq!(values[..2], [0.0, 1e4], "{activation:?}");
                assert!(values[2].is_nan(), "{activation:?}");
            }
        }
    }

    #[test]
    fn residuals_take_one_scale_or_one_per_channel() {
        for isa in Isa::available() {
            let branch = [1.0, 2.0, 3.0, 4.0];
            let one = add_scaled(isa, &[10.0; 4], &branch, &[0.5]);
            assert_eq!(one, [10.5, 11.0, 11.5, 12.0]);
            let channels = add_scaled(isa, &[10.0; 4], &branch, &[1.0, -1.0]);
            assert_eq!(channels, [11.0, 8.0, 13.0, 6.0]);
        }
    }

    #[test]
    fn a_gate_is_activated_then_multiplied() {
        let up: Vec<f32> = (0..200_000).map(|i| i as f32).collect();
        let gate = vec![1.0; up.len()];
        assert_eq!(activate_gate(Isa::best(), Activation::Relu, &gate, &up), up);
        let mut sums = gate.clone();
        add(&mut sums, &up);
        assert_eq!(sums, sum(&gate, &up));
        assert_eq!(sums[77_777], 77_778.0);
    }
}
