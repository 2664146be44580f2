//! Rotary position embedding, the half-split form of LLaMA.
//!
//! `x·cos + rotate_half(x)·sin` with `rotate_half([a, b]) = [-b, a]` on the two halves of a head, not on
//! interleaved pairs. Reference: `IdeficsEmbedding` and `apply_rotary_pos_emb` in `modeling_idefics.py`.

use crate::parallel;

/// Cosines and sines of every position up to a limit.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    /// `[positions, K/2]`, cosine and sine side by side.
    cos_sin: Vec<(f32, f32)>,
    half: usize,
}

impl RotaryTable {
    /// Tables for positions `0..n_positions` of heads of `head_dim` elements.
    pub fn new(head_dim: usize, theta: f64, n_positions: usize) -> Self {
        let half = head_dim / 2;
        // The angle is a product of f32 numbers in the reference; its cosine is then taken exactly.
        let inverse: Vec<f32> =
            (0..half).map(|i| (1.0 / theta.powf((2 * i) as f64 / head_dim as f64)) as f32).collect();
        let cos_sin = (0..n_positions)
            .flat_map(|position| inverse.iter().map(move |inverse| f64::from(position as f32 * inverse)))
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .collect();
        Self { cos_sin, half }
    }

    /// Number of positions in the table.
    pub fn n_positions(&self) -> usize {
        self.cos_sin.len() / self.half.max(1)
    }

    /// Every head of every row of `x` `[T, H·K]` rotated, row `t` by `positions[t]`.
    ///
    /// # Panics
    /// If a position lies outside the table or the rows do not divide `x`.
    #[must_use]
    pub fn rotate(&self, x: &[f32], positions: &[u32]) -> Vec<f32> {
        if positions.is_empty() {
            return Vec::new();
        }
        let width = row_width(x, positions);
        parallel::mapped_rows(x, width, |first, row| self.turn(row, positions[first / width], 1.0))
    }

    /// Undoes [`rotate`](Self::rotate) in place, which is what its gradient goes through.
    ///
    /// # Panics
    /// As there.
    pub fn rotate_back(&self, x: &mut [f32], positions: &[u32]) {
        if !positions.is_empty() {
            let width = row_width(x, positions);
            parallel::for_each_row(x, width, |row, values| self.turn(values, positions[row], -1.0));
        }
    }

    fn turn(&self, row: &mut [f32], position: u32, direction: f32) {
        let at = position as usize * self.half;
        let table = &self.cos_sin[at..at + self.half];
        for head in row.chunks_exact_mut(2 * self.half) {
            let (first, second) = head.split_at_mut(self.half);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(table) {
                let sin = sin * direction;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

fn row_width(x: &[f32], positions: &[u32]) -> usize {
    assert_eq!(x.len() % positions.len(), 0, "one position per row expected");
    x.len() / positions.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_rotate_by_position_times_speed() {
        let table = RotaryTable::new(4, 10_000.0, 8);
        assert_eq!(table.n_positions(), 8);
        let mut x = table.rotate(&[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0], &[0, 3]);
        assert_eq!(x[..4], [1.0, 2.0, 3.0, 4.0]);
        let (c0, s0) = (3f32.cos(), 3f32.sin());
        let (c1, s1) = (0.03f32.cos(), 0.03f32.sin());
        let expected = [c0 - 3.0 * s0, 2.0 * c1 - 4.0 * s1, 3.0 * c0 + s0, 4.0 * c1 + 2.0 * s1];
        for (got, expected) in x[4..].iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
        table.rotate_back(&mut x, &[0, 3]);
        for (got, expected) in x.iter().zip([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
    }
}
