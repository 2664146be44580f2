//! Buffers that a thread keeps between panels, so that unpacking allocates nothing after warm-up.

use std::{cell::RefCell, thread::LocalKey};

use half::bf16;

thread_local! {
    /// A panel of unpacked weights.
    pub(super) static WIDENED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// A panel of unpacked weights, rounded.
    pub(super) static ROUNDED: RefCell<Vec<bf16>> = const { RefCell::new(Vec::new()) };
}

/// Lends `n` elements of this thread's buffer, their content left over from the last use.
pub(super) fn with<T: Clone + Default, R>(
    buffer: &'static LocalKey<RefCell<Vec<T>>>,
    n: usize,
    work: impl FnOnce(&mut [T]) -> R,
) -> R {
    buffer.with_borrow_mut(|buffer| {
        if buffer.len() < n {
            buffer.resize(n, T::default());
        }
        work(&mut buffer[..n])
    })
}
