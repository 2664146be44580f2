//! Rows copied, put in another order, and added back.

use std::ops::Range;

use half::bf16;

use crate::parallel::{SharedMut, filled, for_each, for_each_run, mapped};

/// Elements that a thread takes at a time.
const CHUNK: usize = 8192;
/// Columns that a thread takes at a time where rows are added to.
const COLUMNS: usize = 64;

/// Neighbouring rows of one of several matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which matrix.
    pub part: usize,
    /// Its first row.
    pub first: usize,
    /// Number of rows.
    pub count: usize,
}

/// A copy.
pub fn copied(values: &[f32]) -> Vec<f32> {
    mapped(values, CHUNK, |_, _| {})
}

/// The same numbers as `f32`.
pub fn widened(values: &[bf16]) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for_each_run(&mut out.spare_capacity_mut()[..values.len()], CHUNK, |first, run| {
        for (out, value) in run.iter_mut().zip(&values[first..]) {
            out.write(f32::from_bits(u32::from(value.to_bits()) << 16));
        }
    });
    // SAFETY: the runs cover all elements, and each was written.
    unsafe { out.set_len(values.len()) };
    out
}

/// `n` zeros.
pub fn zeros(n: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(n);
    for_each_run(&mut out.spare_capacity_mut()[..n], CHUNK, |_, run| {
        for value in run {
            value.write(0.0);
        }
    });
    // SAFETY: the runs cover all elements, and each was written.
    unsafe { out.set_len(n) };
    out
}

/// The rows of `runs` one behind the other, `width` elements each: `parts` to `[Σ count, width]`.
///
/// # Panics
/// If a run reaches behind its part.
pub fn arranged(parts: &[&[f32]], width: usize, runs: &[Run]) -> Vec<f32> {
    let pieces: Vec<(usize, &[f32])> = runs
        .iter()
        .scan(0, |at, run| {
            let piece = &parts[run.part][run.first * width..(run.first + run.count) * width];
            *at += piece.len();
            Some((*at - piece.len(), piece))
        })
        .collect();
    let n = pieces.last().map_or(0, |(at, piece)| at + piece.len());
    // SAFETY: the pieces lie end to end and each is written whole, by one thread.
    unsafe {
        filled(n, |out: SharedMut<f32>| {
            for_each(pieces.len(), n, |index| {
                let (at, piece) = pieces[index];
                std::ptr::copy_nonoverlapping(piece.as_ptr(), out.at(at), piece.len());
            });
        })
    }
}

/// The gradient of part `part` of [`arranged`]: `into[row] += Σ dy[place]` over the places a row went to.
///
/// # Panics
/// If a run reaches behind `into`, or all of them together behind `dy`.
pub fn add_arranged(dy: &[f32], width: usize, runs: &[Run], part: usize, into: &mut [f32]) {
    let mut at = 0;
    let pieces: Vec<(usize, usize, usize)> = runs
        .iter()
        .filter_map(|run| {
            at += run.count;
            (run.part == part).then_some((at - run.count, run.first, run.count))
        })
        .collect();
    let rows: usize = pieces.iter().map(|(.., count)| count).sum();
    assert!(at * width <= dy.len(), "{at} rows of {width} expected in {}", dy.len());
    assert!(
        pieces.iter().all(|(_, first, count)| (first + count) * width <= into.len()),
        "a run of rows reaches behind {}",
        into.len() / width
    );
    let out = SharedMut::new(into);
    for_each(width.div_ceil(COLUMNS), rows * width, |block| {
        let columns = block * COLUMNS..width.min((block + 1) * COLUMNS);
        for &(from, first, count) in &pieces {
            for row in 0..count {
                let values = &dy[(from + row) * width..][columns.clone()];
                // SAFETY: inside by the assertion; the columns are this thread's own.
                let sums = unsafe {
                    let start = out.at((first + row) * width + columns.start);
                    std::slice::from_raw_parts_mut(start, values.len())
                };
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += value;
                }
            }
        }
    });
}

/// A copy of `x` with the rows `indices`, each once, replaced by those of `rows`, in that order.
///
/// # Panics
/// If there is no such row.
pub fn replaced(x: &[f32], width: usize, indices: &[usize], rows: &[f32]) -> Vec<f32> {
    assert_eq!(rows.len(), indices.len() * width, "a row of {width} for every index expected");
    let mut out = copied(x);
    for (index, row) in indices.iter().zip(rows.chunks_exact(width)) {
        out[index * width..(index + 1) * width].copy_from_slice(row);
    }
    out
}

/// Matrices of one number of rows side by side: `parts` `[M, width]` to `[M, Σ width]`.
///
/// # Panics
/// If their numbers of rows differ.
pub fn beside(parts: &[(&[f32], usize)]) -> Vec<f32> {
    let total: usize = parts.iter().map(|(_, width)| width).sum();
    let rows = parts.first().map_or(0, |(part, width)| part.len() / width.max(&1));
    assert!(parts.iter().all(|(part, width)| part.len() == rows * width), "parts of {rows} rows expected");
    // SAFETY: the parts of a row follow one another and cover it; each row is one thread's own.
    unsafe {
        filled(rows * total, |out: SharedMut<f32>| {
            for_each(rows, rows * total, |row| {
                let mut at = row * total;
                for (part, width) in parts {
                    let from = part[row * width..(row + 1) * width].as_ptr();
                    std::ptr::copy_nonoverlapping(from, out.at(at), *width);
                    at += width;
                }
            });
        })
    }
}

/// Some columns of a matrix of rows of `width`.
///
/// # Panics
/// If there are no such columns.
pub fn columns(x: &[f32], width: usize, columns: Range<usize>) -> Vec<f32> {
    let (rows, count) = (x.len() / width, columns.len());
    assert!(columns.end <= width && x.len() == rows * width, "columns {columns:?} of {width}");
    // SAFETY: each row is written whole, by one thread.
    unsafe {
        filled(rows * count, |out: SharedMut<f32>| {
            for_each(rows, rows * count, |row| {
                let from = x[row * width..][columns.clone()].as_ptr();
                std::ptr::copy_nonoverlapping(from, out.at(row * count), count);
            });
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_arranged_and_added_back() {
        for width in [1, 3, 100] {
            let a: Vec<f32> = (0..4 * width).map(|i| i as f32).collect();
            let b: Vec<f32> = (0..2 * width).map(|i| 1000.0 + i as f32).collect();
            let run = |part, first, count| Run { part, first, count };
            let runs = [run(0, 1, 2), run(1, 0, 2), run(0, 1, 1), run(1, 1, 1)];
            let out = arranged(&[&a, &b], width, &runs);
            let expected = [&a[width..3 * width], &b[..], &a[width..2 * width], &b[width..]].concat();
            assert_eq!(out, expected);
            let mut into = vec![1.0; a.len()];
            add_arranged(&out, width, &runs, 0, &mut into);
            for (i, got) in into.iter().enumerate() {
                let times = [0.0, 2.0, 1.0, 0.0][i / width]; // row 1 went to two places
                assert_eq!(*got, 1.0 + times * a[i]);
            }
        }
    }

    #[test]
    fn matrices_stand_side_by_side_and_are_taken_apart() {
        let (a, b): (Vec<f32>, Vec<f32>) = ((0..600).map(|i| i as f32).collect(), vec![-1.0; 200]);
        let both = beside(&[(&a, 3), (&b, 1)]);
        assert_eq!(both[..8], [0.0, 1.0, 2.0, -1.0, 3.0, 4.0, 5.0, -1.0]);
        assert_eq!(columns(&both, 4, 0..3), a);
        assert_eq!(columns(&both, 4, 3..4), b);
    }

    #[test]
    fn many_rows_are_copied_zeroed_and_replaced() {
        let x: Vec<f32> = (0..200_000).map(|i| i as f32).collect();
        assert_eq!(copied(&x), x);
        assert_eq!(zeros(x.len()), vec![0.0; x.len()]);
        let out = replaced(&x, 2, &[70_000, 3], &[-1.0, -2.0, -3.0, -4.0]);
        assert_eq!((out[140_000], out[140_001], out[6], out[7]), (-1.0, -2.0, -3.0, -4.0));
        assert_eq!((out[5], out[8], out[139_999], out[140_002]), (x[5], x[8], x[139_999], x[140_002]));
    }
}
