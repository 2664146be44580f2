//! Buffers that a thread keeps between products, so that they seldom allocate.

use std::{cell::RefCell, thread::LocalKey};

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::broadcast::Line;

thread_local! {
    /// A panel of unpacked weights.
    pub(crate) static WIDENED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// A panel of unpacked weights, rounded.
    pub(crate) static ROUNDED: RefCell<Vec<bf16>> = const { RefCell::new(Vec::new()) };
    /// A panel of codes in a byte each.
    pub(crate) static CODES: RefCell<Vec<i8>> = const { RefCell::new(Vec::new()) };
    /// A panel of transposed weights.
    #[cfg(target_arch = "x86_64")]
    pub(crate) static PANEL: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    /// The rows of a factor of a gradient's product, packed.
    #[cfg(target_arch = "x86_64")]
    pub(crate) static RIGHT: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    /// The activations of a product, transposed.
    #[cfg(target_arch = "x86_64")]
    pub(crate) static ACTIVATIONS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Lends `n` elements of this thread's buffer, their content left over from the last use.
pub(crate) fn with<T: Clone + Default, R>(
    buffer: &'static LocalKey<RefCell<Vec<T>>>,
    n: usize,
    work: impl FnOnce(&mut [T]) -> R,
) -> R {
    // Taken out meanwhile: a thread that waits for others may start another product, with a buffer of its own.
    let mut held = buffer.take();
    if held.len() < n {
        held.resize(n, T::default());
    }
    let result = work(&mut held[..n]);
    buffer.with_borrow_mut(|other| {
        if other.len() < held.len() {
            *other = held;
        }
    });
    result
}
