//! Where the gradients of weights go.
//!
//! Weights are not tensors of the tape: an operation carries the one it reads. An operation whose weight is
//! trained carries a [`Gradient`] beside it and adds to it when the tape runs backward. So the gradient of a
//! large weight exists once, and a frozen weight has none.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use idefics_kernels::{Matrix, backward, rows};

use super::Context;

/// The gradient of one weight, `f32`, as many numbers as the weight has. Clones share them.
///
/// While all of them are zero they take no memory: gradients come on the way back, as what the forward pass kept
/// goes, and both need not fit at once.
#[derive(Debug, Clone)]
pub struct Gradient(Arc<Sum>);

#[derive(Debug)]
struct Sum {
    len: usize,
    /// Empty while all numbers are zero.
    numbers: Mutex<Vec<f32>>,
}

impl Gradient {
    /// A gradient of `n` zeros.
    pub fn new(n: usize) -> Self {
        Self(Arc::new(Sum { len: n, numbers: Mutex::new(Vec::new()) }))
    }

    /// The numbers, for this thread alone until they are given back.
    pub fn lock(&self) -> MutexGuard<'_, Vec<f32>> {
        let mut numbers = self.stored();
        if numbers.is_empty() {
            *numbers = rows::zeros(self.0.len);
        }
        numbers
    }

    /// Sets all numbers to zero, and gives their memory back.
    pub fn zero(&self) {
        *self.stored() = Vec::new();
    }

    /// Adds `values` to the numbers from `first` on.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn add_at(&self, first: usize, values: &[f32]) {
        for (sum, value) in self.lock()[first..first + values.len()].iter_mut().zip(values) {
            *sum += value;
        }
    }

    /// Adds `dyᵀ · x` of `dy` `[T, N]` and `x` `[T, k]`: what a product's rows say of its weight.
    pub(super) fn add_outer(&self, ctx: Context, dy: &[f32], x: Matrix<'_>, k: usize) {
        let mut numbers = self.stored();
        if numbers.is_empty() && !x.is_empty() {
            *numbers = backward::linear_weight(ctx.isa, ctx.compute, dy, x, k);
        } else {
            backward::add_linear_weight(ctx.isa, ctx.compute, dy, x, k, &mut numbers);
        }
    }

    fn stored(&self) -> MutexGuard<'_, Vec<f32>> {
        // A panic elsewhere leaves numbers behind, not a broken structure.
        self.0.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
