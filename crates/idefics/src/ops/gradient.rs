//! Where the gradients of weights go.
//!
//! Weights are not tensors of the tape: an operation carries the one it reads. An operation whose weight is
//! trained carries a [`Gradient`] beside it and adds to it when the tape runs backward. So the gradient of a
//! large weight exists once, and a frozen weight has none.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The gradient of one weight, `f32`, as many numbers as the weight has. Clones share them.
#[derive(Debug, Clone)]
pub struct Gradient(Arc<Mutex<Vec<f32>>>);

impl Gradient {
    /// A gradient of `n` zeros.
    pub fn new(n: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0.0; n])))
    }

    /// The numbers, for this thread alone until they are given back.
    pub fn lock(&self) -> MutexGuard<'_, Vec<f32>> {
        // A panic elsewhere leaves numbers behind, not a broken structure.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets all numbers to zero.
    pub fn zero(&self) {
        self.lock().fill(0.0);
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
}
