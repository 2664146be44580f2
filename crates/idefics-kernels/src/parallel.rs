//! Splitting work over the one pool of threads.

use rayon::prelude::*;

/// Runs `work` on a thread of the pool. From any other one each piece that is shared out would wait for a thread of the
/// pool to take it up, and wake the caller at its end: a twentieth of a training step, more of a small model's.
pub fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

/// A pointer that several threads may write through, each to its own elements.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: the pointer is only a number; whoever writes through it promises disjoint elements.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The room that a vector has, which need not hold anything yet.
    pub(crate) fn room(vector: &mut Vec<T>) -> Self {
        Self(vector.as_mut_ptr())
    }

    /// The same memory as elements of another type.
    pub(crate) fn cast<U>(self) -> SharedMut<U> {
        SharedMut(self.0.cast())
    }

    /// The same from element `index` on.
    pub(crate) fn behind(self, index: usize) -> Self {
        Self(self.0.wrapping_add(index))
    }

    /// Where element `index` lies.
    ///
    /// # Safety
    /// `index` lies inside the slice this was made of.
    pub(crate) unsafe fn at(self, index: usize) -> *mut T {
        // SAFETY: in bounds by the contract above.
        unsafe { self.0.add(index) }
    }

    /// Writes one element.
    ///
    /// # Safety
    /// - `index` lies inside the slice this was made of, and that slice is still borrowed.
    /// - No other thread reads or writes the element meanwhile.
    pub(crate) unsafe fn write(self, index: usize, value: T) {
        // SAFETY: in bounds and unshared by the contract above.
        unsafe { self.0.add(index).write(value) }
    }
}

/// Whether work of that size is worth waking other threads for.
pub(crate) fn is_worth_sharing(flops: usize) -> bool {
    // Waking a thread takes some 5 µs, in which one core does about 100 kFLOP of dot products.
    flops >= 200_000
}

/// Runs `work` on `0..n_items`, in parallel when `flops` is worth waking other threads for.
pub(crate) fn for_each(n_items: usize, flops: usize, work: impl Fn(usize) + Sync + Send) {
    if !is_worth_sharing(flops) || n_items < 2 {
        (0..n_items).for_each(work);
    } else {
        (0..n_items).into_par_iter().for_each(work);
    }
}

/// Runs `work(row_index, row)` on every row of `data`, `width` elements each.
pub(crate) fn for_each_row<T: Send>(
    data: &mut [T],
    width: usize,
    work: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    // Groups of rows, so that a thread gets a few thousand elements at a time.
    let rows = (8192 / width).max(1);
    for_each_run(data, width * rows, |first, run| {
        run.chunks_exact_mut(width).enumerate().for_each(|(index, row)| work(first / width + index, row));
    });
}

/// Runs `work(first_index, run)` on runs of `length` elements of `data`, the last one shorter.
pub(crate) fn for_each_run<T: Send>(
    data: &mut [T],
    length: usize,
    work: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    const WORTH_SHARING: usize = 64 * 1024;
    if data.len() < WORTH_SHARING {
        data.chunks_mut(length).enumerate().for_each(|(index, run)| work(index * length, run));
    } else {
        data.par_chunks_mut(length).enumerate().for_each(|(index, run)| work(index * length, run));
    }
}

/// A copy of `values`, each run of `length` elements (the last one shorter) changed by `change(first_index, run)`
/// while it is in the first-level cache.
pub(crate) fn mapped<T: Copy + Send + Sync>(
    values: &[T],
    length: usize,
    change: impl Fn(usize, &mut [T]) + Sync + Send,
) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len());
    for_each_run(&mut out.spare_capacity_mut()[..values.len()], length, |first, run| {
        change(first, run.write_copy_of_slice(&values[first..first + run.len()]));
    });
    // SAFETY: the runs cover all elements, and each was written.
    unsafe { out.set_len(values.len()) };
    out
}

/// A copy of `data`, each row of `width` elements changed by `change(first_index, row)`.
pub(crate) fn mapped_rows<T: Copy + Send + Sync>(
    data: &[T],
    width: usize,
    change: impl Fn(usize, &mut [T]) + Sync + Send,
) -> Vec<T> {
    mapped(data, width * (8192 / width).max(1), |first, run| {
        run.chunks_exact_mut(width).enumerate().for_each(|(index, row)| change(first + index * width, row));
    })
}

/// `n` elements of which `fill` writes all, without zeros before.
///
/// # Safety
/// `fill` writes every element.
pub(crate) unsafe fn filled<T: Copy>(n: usize, fill: impl FnOnce(SharedMut<T>)) -> Vec<T> {
    let mut out: Vec<T> = Vec::with_capacity(n);
    fill(SharedMut(out.as_mut_ptr()));
    // SAFETY: written by the contract.
    unsafe { out.set_len(n) };
    out
}
