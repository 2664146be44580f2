//! Gradients of activations and of the gated residual.

use rayon::prelude::*;

use super::columns::{add_in_order, rows_at_a_time};
use crate::{
    Isa,
    elementwise::{Activation, function as forward},
    isa::multiversion,
    math::{erf, exp, fma, sigmoid},
    parallel,
};

/// Elements that a thread takes at a time.
const CHUNK: usize = 8192;

/// `dy ← dy · activation'(x)`.
///
/// # Panics
/// If the lengths differ.
pub fn activate(isa: Isa, activation: Activation, x: &[f32], dy: &mut [f32]) {
    assert_eq!(x.len(), dy.len(), "x and its gradient must have one length");
    let apply = function(activation);
    parallel::for_each_run(dy, CHUNK, |first, dy| apply(isa, &x[first..first + dy.len()], dy));
}

/// What multiplies a gradient with the slope at `x`.
fn function(activation: Activation) -> fn(Isa, &[f32], &mut [f32]) {
    match activation {
        Activation::Silu => silu,
        Activation::Gelu => gelu,
        Activation::QuickGelu => quick_gelu,
        Activation::GeluTanh => gelu_tanh,
        Activation::Relu => relu,
    }
}

/// Gradients of `activation(gate) · up`: `dy` becomes that of `gate`, that of `up` is returned.
///
/// # Panics
/// If the lengths differ.
pub fn activate_gate(isa: Isa, activation: Activation, gate: &[f32], up: &[f32], dy: &mut [f32]) -> Vec<f32> {
    assert_eq!((gate.len(), up.len()), (dy.len(), dy.len()), "gate, up and their gradient differ in length");
    let (forward, slope) = (forward(activation), function(activation));
    let dup = parallel::mapped(gate, CHUNK, |first, chunk| {
        forward(isa, chunk);
        multiply(isa, chunk, &dy[first..]);
    });
    parallel::for_each_run(dy, CHUNK, |first, dy| {
        multiply(isa, dy, &up[first..]);
        slope(isa, &gate[first..first + dy.len()], dy);
    });
    dup
}

/// Gradient of `residual + scale · branch` by `branch`, returned, and by `scale`, added to `dscale`. `scale` has
/// one element, or one per channel and repeats.
///
/// # Panics
/// If lengths do not fit together.
pub fn add_scaled(
    isa: Isa,
    branch: &[f32],
    scale: &[f32],
    dy: &[f32],
    dscale: Option<&mut [f32]>,
) -> Vec<f32> {
    let width = scale.len();
    assert!(width > 0 && dy.len().is_multiple_of(width), "the scale must divide the rows");
    assert_eq!(branch.len(), dy.len(), "branch and its gradient differ in length");
    if let Some(dscale) = dscale {
        let run = width * rows_at_a_time(width);
        let partials: Vec<Vec<f32>> = dy
            .par_chunks(run)
            .zip(branch.par_chunks(run))
            .map(|(dy, branch)| {
                let mut sums = vec![0.0; width];
                if let [sum] = &mut sums[..] {
                    dot(isa, dy, branch, sum);
                } else {
                    for (dy, branch) in dy.chunks_exact(width).zip(branch.chunks_exact(width)) {
                        add_products(isa, dy, branch, &mut sums);
                    }
                }
                sums
            })
            .collect();
        add_in_order(&partials, dscale);
    }
    if let [scale] = scale {
        return parallel::mapped(dy, CHUNK, |_, run| scale_all(isa, run, *scale));
    }
    parallel::mapped_rows(dy, width, |_, row| multiply(isa, row, scale))
}

multiversion! { fn dot(a: &[f32], b: &[f32], sum: &mut f32) = dot_body }
multiversion! { fn add_products(a: &[f32], b: &[f32], sums: &mut [f32]) = add_products_body }
multiversion! { fn scale_all(values: &mut [f32], by: f32) = scale_all_body }

#[inline(always)]
fn dot_body<const FMA: bool>(a: &[f32], b: &[f32], sum: &mut f32) {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = fma::<FMA>(*a, *b, *sum);
        }
    }
    *sum += sums.iter().sum::<f32>();
}

#[inline(always)]
fn add_products_body<const FMA: bool>(a: &[f32], b: &[f32], sums: &mut [f32]) {
    for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
        *sum = fma::<FMA>(*a, *b, *sum);
    }
}

#[inline(always)]
fn scale_all_body<const FMA: bool>(values: &mut [f32], by: f32) {
    for value in values {
        *value *= by;
    }
}

multiversion! { fn silu(x: &[f32], dy: &mut [f32]) = silu_body }
multiversion! { fn gelu(x: &[f32], dy: &mut [f32]) = gelu_body }
multiversion! { fn quick_gelu(x: &[f32], dy: &mut [f32]) = quick_gelu_body }
multiversion! { fn gelu_tanh(x: &[f32], dy: &mut [f32]) = gelu_tanh_body }
multiversion! { fn relu(x: &[f32], dy: &mut [f32]) = relu_body }
multiversion! { fn multiply(values: &mut [f32], by: &[f32]) = multiply_body }

#[inline(always)]
fn multiply_body<const FMA: bool>(values: &mut [f32], by: &[f32]) {
    for (value, by) in values.iter_mut().zip(by) {
        *value *= by;
    }
}

#[inline(always)]
fn silu_body<const FMA: bool>(x: &[f32], dy: &mut [f32]) {
    for (dy, x) in dy.iter_mut().zip(x) {
        let s = sigmoid::<FMA>(*x);
        *dy *= s * (1.0 + x * (1.0 - s));
    }
}

#[inline(always)]
fn quick_gelu_body<const FMA: bool>(x: &[f32], dy: &mut [f32]) {
    for (dy, x) in dy.iter_mut().zip(x) {
        let s = sigmoid::<FMA>(1.702 * x);
        *dy *= s * (1.0 + 1.702 * x * (1.0 - s));
    }
}

#[inline(always)]
fn gelu_body<const FMA: bool>(x: &[f32], dy: &mut [f32]) {
    const DENSITY_AT_ZERO: f32 = 0.398_942_3; // 1 / √(2π)
    for (dy, x) in dy.iter_mut().zip(x) {
        let below = 0.5 * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
        let density = DENSITY_AT_ZERO * exp::<FMA>(-0.5 * x * x);
        *dy *= fma::<FMA>(*x, density, below);
    }
}

#[inline(always)]
fn gelu_tanh_body<const FMA: bool>(x: &[f32], dy: &mut [f32]) {
    const ROOT: f32 = 0.797_884_6; // √(2/π)
    const CUBE: f32 = 0.044_715;
    for (dy, x) in dy.iter_mut().zip(x) {
        let inner = ROOT * fma::<FMA>(CUBE * x * x, *x, *x);
        let tanh = 1.0 - 2.0 / (1.0 + exp::<FMA>(2.0 * inner));
        let slope = ROOT * fma::<FMA>(3.0 * CUBE * x, *x, 1.0);
        *dy *= 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope;
    }
}

#[inline(always)]
fn relu_body<const FMA: bool>(x: &[f32], dy: &mut [f32]) {
    for (dy, x) in dy.iter_mut().zip(x) {
        *dy = if *x > 0.0 { *dy } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Activation; 5] =
        [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::GeluTanh, Activation::Relu];

    #[test]
    fn slopes_agree_with_differences_of_the_forward_pass() {
        // The forward pass has its own test against formulas; the step is wide because it computes in f32.
        const STEP: f32 = 0.015_625;
        let x: Vec<f32> = (-80..80).map(|i| i as f32 / 16.0 + 0.03125).collect();
        for isa in Isa::available() {
            for activation in ALL {
                let (mut up, mut down): (Vec<f32>, Vec<f32>) =
                    (x.iter().map(|x| x + STEP).collect(), x.iter().map(|x| x - STEP).collect());
                forward(activation)(isa, &mut up);
                forward(activation)(isa, &mut down);
                let mut slopes = vec![2.0; x.len()];
                activate(isa, activation, &x, &mut slopes);
                for ((up, down), (x, slope)) in up.iter().zip(&down).zip(x.iter().zip(&slopes)) {
                    let expected = (up - down) / STEP;
                    assert!((slope - expected).abs() < 5e-4, "{activation:?} at {x}: {slope} {expected}");
                }
            }
        }
    }

    #[test]
    fn a_gate_gives_both_factors_their_gradient() {
        let (gate, up, mut dy) = ([0.5, -1.0, 2.0], [2.0, 3.0, -1.0], [1.0, 0.5, -2.0]);
        let dup = activate_gate(Isa::PORTABLE, Activation::Relu, &gate, &up, &mut dy);
        assert_eq!((dy, dup), ([2.0, 0.0, 2.0], vec![0.5, 0.0, -4.0]));
    }

    #[test]
    fn a_scale_of_one_element_or_of_a_channel_gets_its_sum() {
        let (branch, dy) = ([1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 0.5, 2.0]);
        for isa in Isa::available() {
            let mut one = [10.0];
            assert_eq!(add_scaled(isa, &branch, &[2.0], &dy, Some(&mut one)), [2.0, -2.0, 1.0, 4.0]);
            assert_eq!(one, [10.0 + 1.0 - 2.0 + 1.5 + 8.0]);
            let mut two = [0.0, 0.0];
            assert_eq!(add_scaled(isa, &branch, &[1.0, 3.0], &dy, Some(&mut two)), [1.0, -3.0, 0.5, 6.0]);
            assert_eq!(two, [2.5, 6.0]);
        }
    }
}
