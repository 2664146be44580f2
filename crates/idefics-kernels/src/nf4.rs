//! NF4 weights in the layout that bitsandbytes serialises (`Linear4bit`, `quant_type="nf4"`).
//!
//! Two elements a byte, the first in the high nibble; 64 elements in a row-major run share one scale, the
//! largest magnitude of the block (`absmax`); an element is `map[code] · absmax`. With double quantization the
//! scales are themselves 8-bit codes in blocks of 256. Source: QLoRA (Dettmers et al., 2023) and bitsandbytes
//! `functional.py`.
//!
//! What a product uses is `f32(map[code] · absmax)` in `f32` arithmetic and that number rounded to bf16 in bf16
//! arithmetic, the same values to which the reference dequantizes.

use std::borrow::Cow;

/// Elements that share a scale.
pub const BLOCK: usize = 64;
/// Scales that share a scale of their own under double quantization.
pub const NESTED_BLOCK: usize = 256;

/// The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1], zero included.
pub const CODE_VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A borrowed NF4 weight of `[N, K]`.
#[derive(Debug, Clone, Copy)]
pub struct Nf4<'a> {
    /// Two elements a byte: `[N · K / 2]`.
    pub codes: &'a [u8],
    /// Scales of the blocks: `[N · K / 64]`.
    pub scales: Scales<'a>,
    /// The value of each code.
    pub map: &'a [f32; 16],
}

/// Scales of the blocks of an NF4 weight.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// Themselves quantized: scale `i` is `map[codes[i]] · absmax[i / 256] + offset`.
    Nested {
        /// A code per block.
        codes: &'a [u8],
        /// The value of each code.
        map: &'a [f32; 256],
        /// Largest magnitude of each group of 256 scales.
        absmax: &'a [f32],
        /// The mean that was taken off before quantizing.
        offset: f32,
    },
}

impl Scales<'_> {
    /// Number of scales.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Nested { codes, .. } => codes.len(),
        }
    }

    /// Whether there are no scales.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Scale `index`.
    #[inline]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[index],
            Self::Nested { codes, map, absmax, offset } => {
                map[codes[index] as usize] * absmax[index / NESTED_BLOCK] + offset
            }
        }
    }

    /// Scales `first..first + count`: lent where they are plain, decoded otherwise.
    pub(crate) fn range(&self, first: usize, count: usize) -> Cow<'_, [f32]> {
        match self {
            Self::Plain(scales) => Cow::Borrowed(&scales[first..first + count]),
            Self::Nested { .. } => (first..first + count).map(|index| self.get(index)).collect(),
        }
    }
}

impl Nf4<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.codes.len() * 2
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// Element `index` of the flattened weight: the plain twin of every fast path.
    #[inline]
    pub fn get(&self, index: usize) -> f32 {
        let byte = self.codes[index / 2];
        let code = if index.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
        self.map[code as usize] * self.scales.get(index / BLOCK)
    }

    /// Elements `first..first + out.len()`, in order.
    pub fn read(&self, first: usize, out: &mut [f32]) {
        if first.is_multiple_of(BLOCK) && out.len().is_multiple_of(BLOCK) {
            for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                let at = first + block * BLOCK;
                let scale = self.scales.get(at / BLOCK);
                let values = self.map.map(|value| value * scale);
                for (pair, byte) in out.chunks_exact_mut(2).zip(&self.codes[at / 2..]) {
                    pair[0] = values[(byte >> 4) as usize];
                    pair[1] = values[(byte & 15) as usize];
                }
            }
        } else {
            for (i, out) in out.iter_mut().enumerate() {
                *out = self.get(first + i);
            }
        }
    }
}

/// Quantizes a flattened weight; returns codes, two a byte, and the scale of each block. An odd last element is
/// paired with the code of zero.
///
/// As bitsandbytes does on a CPU (`backends/default/ops.py`): a block is multiplied by the reciprocal of its
/// largest magnitude, a short last block divided by it, and an element takes the code whose interval between
/// midpoints holds it, the lower one at a midpoint.
pub fn quantize(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let midpoints: [f32; 15] = std::array::from_fn(|i| f32::midpoint(CODE_VALUES[i], CODE_VALUES[i + 1]));
    let code_of = |scaled: f32| midpoints.iter().filter(|midpoint| scaled > **midpoint).count() as u8;
    let mut codes = Vec::with_capacity(values.len().div_ceil(2));
    let mut scales = Vec::with_capacity(values.len().div_ceil(BLOCK));
    for block in values.chunks(BLOCK) {
        let largest = block.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let floored = largest.max(1e-38);
        let short = block.len() < BLOCK;
        let scaled = |value: f32| if short { value / floored } else { value * (1.0 / floored) };
        for pair in block.chunks(2) {
            let [high, low] =
                [pair[0], pair.get(1).copied().unwrap_or(0.0)].map(|v| code_of(scaled(v).clamp(-1.0, 1.0)));
            codes.push(high << 4 | low);
        }
        scales.push(if short { floored } else { largest });
    }
    (codes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_the_code_values_are_their_indices() {
        let mut block: Vec<f32> = CODE_VALUES.iter().map(|v| v * 3.0).collect();
        block.extend([0.0; 48]);
        let (codes, scales) = quantize(&block);
        assert_eq!(scales, [3.0]);
        assert_eq!(codes[..8], [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        let weight = Nf4 { codes: &codes, scales: Scales::Plain(&scales), map: &CODE_VALUES };
        let mut read = vec![f32::NAN; 64];
        weight.read(0, &mut read);
        assert_eq!(read, block);
    }

    #[test]
    fn every_element_is_within_half_the_widest_gap_of_its_block() {
        let values: Vec<f32> = (0..1000).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 77.0).collect();
        let (codes, scales) = quantize(&values);
        assert_eq!((codes.len(), scales.len()), (500, 16));
        let weight = Nf4 { codes: &codes, scales: Scales::Plain(&scales), map: &CODE_VALUES };
        let mut read = vec![f32::NAN; 1000];
        weight.read(0, &mut read);
        let widest = CODE_VALUES.windows(2).map(|w| w[1] - w[0]).fold(0.0, f32::max);
        for (i, (read, value)) in read.iter().zip(&values).enumerate() {
            assert_eq!(*read, weight.get(i), "the block reader and the plain one");
            assert!((read - value).abs() <= 0.5001 * widest * scales[i / BLOCK], "{i}: {read} {value}");
        }
    }

    #[test]
    fn nested_scales_decode_by_group() {
        let codes: Vec<u8> = (0..300).map(|i| (i % 256) as u8).collect();
        let map: [f32; 256] = std::array::from_fn(|i| i as f32 / 255.0);
        let scales = Scales::Nested { codes: &codes, map: &map, absmax: &[2.0, 10.0], offset: 0.5 };
        assert_eq!(scales.get(255), 2.5);
        assert_eq!(scales.get(299), map[43] * 10.0 + 0.5);
        assert_eq!(scales.range(250, 10)[5..7], [2.5, 0.5]);
    }
}
