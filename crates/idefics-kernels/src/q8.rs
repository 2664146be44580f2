//! Q8 weights: a signed byte an element, a scale for each run of 64 along a row.
//!
//! An element is `code · scale`. What a product uses is that number in `f32` arithmetic, and rounded to bf16 in
//! bf16 arithmetic. The step between bf16 and NF4: 8.5 bits an element, of the quality of bf16 within what
//! activations of that type can tell.

/// Elements that share a scale.
pub const BLOCK: usize = 64;

/// A borrowed Q8 weight of `[N, K]`; a row's last block may be shorter.
#[derive(Debug, Clone, Copy)]
pub struct Q8<'a> {
    /// `[N, K]`.
    pub codes: &'a [i8],
    /// `[N, ⌈K / 64⌉]`.
    pub scales: &'a [f32],
}

impl Q8<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// Row `index` of `out.len()` elements: the plain twin of every fast path.
    pub fn read_row(&self, index: usize, out: &mut [f32]) {
        let k = out.len();
        let (codes, scales) =
            (&self.codes[index * k..(index + 1) * k], &self.scales[index * k.div_ceil(BLOCK)..]);
        for ((out, codes), scale) in out.chunks_mut(BLOCK).zip(codes.chunks(BLOCK)).zip(scales) {
            for (out, code) in out.iter_mut().zip(codes) {
                *out = f32::from(*code) * scale;
            }
        }
    }
}

/// Quantizes rows of `k` elements; returns codes `[N, K]` and scales `[N, ⌈K / 64⌉]`. A block's largest
/// magnitude becomes ±127.
pub fn quantize(values: &[f32], k: usize) -> (Vec<i8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len() / BLOCK + 1);
    for row in values.chunks(k) {
        for block in row.chunks(BLOCK) {
            let largest = block.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            let scale = largest / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            codes.extend(block.iter().map(|value| (value * inverse).round_ties_even() as i8));
            scales.push(scale);
        }
    }
    (codes, scales)
}

/// The largest error that [`quantize`] leaves in a block: half a step.
pub fn error_bound(scale: f32) -> f32 {
    0.501 * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_round_trip_stays_within_half_a_step_of_each_block() {
        let k = 150; // the last block of a row is short
        let values: Vec<f32> = (0..3 * k).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 77.0).collect();
        let (codes, scales) = quantize(&values, k);
        assert_eq!((codes.len(), scales.len()), (3 * k, 9));
        let weight = Q8 { codes: &codes, scales: &scales };
        for (index, row) in values.chunks(k).enumerate() {
            let mut read = vec![f32::NAN; k];
            weight.read_row(index, &mut read);
            for (i, (read, value)) in read.iter().zip(row).enumerate() {
                let bound = error_bound(scales[index * 3 + i / BLOCK]);
                assert!((read - value).abs() <= bound, "{index},{i}: {read} {value}");
            }
        }
    }

    #[test]
    fn zeros_and_the_largest_value_are_exact() {
        let mut values = vec![0.0f32; 128];
        values[70] = -3.5;
        let (codes, scales) = quantize(&values, 128);
        assert_eq!(scales, [0.0, 3.5 / 127.0]);
        assert_eq!((codes[70], codes[0]), (-127, 0));
    }
}
