//! Sums over rows, which is how a gradient reaches a vector that every row shares.

use rayon::prelude::*;

/// Rows whose sums are kept apart: enough to be worth a thread's while.
pub(super) fn rows_at_a_time(width: usize) -> usize {
    (32 * 1024 / width.max(1)).max(1)
}

/// `into[c] += Σₜ rows[t][c]` for rows of `into.len()` elements.
///
/// # Panics
/// If `into` does not divide `rows`.
pub fn add_column_sums(rows: &[f32], into: &mut [f32]) {
    let width = into.len();
    assert!(width > 0 && rows.len().is_multiple_of(width), "rows of {width} expected in {}", rows.len());
    let partials: Vec<Vec<f32>> = rows
        .par_chunks(width * rows_at_a_time(width))
        .map(|rows| {
            let mut sums = vec![0.0; width];
            for row in rows.chunks_exact(width) {
                add(&mut sums, row);
            }
            sums
        })
        .collect();
    add_in_order(&partials, into);
}

/// Adds partial sums to `into`, first to last, so that the number of threads does not matter.
pub(super) fn add_in_order(partials: &[Vec<f32>], into: &mut [f32]) {
    for partial in partials {
        add(into, partial);
    }
}

fn add(into: &mut [f32], values: &[f32]) {
    for (into, value) in into.iter_mut().zip(values) {
        *into += value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_summed_and_added() {
        let rows: Vec<f32> = (0..3 * 50_000).map(|i| (i % 3) as f32 + 1.0).collect();
        let mut into = [1.0, 0.0, -1.0];
        add_column_sums(&rows, &mut into);
        assert_eq!(into, [50_001.0, 100_000.0, 149_999.0]);
    }
}
