//! Looking at the numbers themselves: weights that are not finite.

use half::{bf16, f16};
use rayon::prelude::*;

use super::Weight;

/// How many elements of a weight are not finite.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct NonFinite {
    /// Not a number.
    pub nan: usize,
    /// Plus or minus infinity.
    pub infinite: usize,
}

impl NonFinite {
    /// Whether all elements are finite.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

impl Weight {
    /// Counts the elements that are not finite; reads every page once and keeps nothing.
    pub fn count_non_finite(&self) -> NonFinite {
        // Without sign: infinity is the exponent alone, and everything above is no number.
        let count_16 = |infinity: u16| {
            let bits: &[u16] = bytemuck::cast_slice(self.bytes());
            count(bits, |bits| (bits & 0x7fff).cmp(&infinity))
        };
        match self.dtype() {
            super::DType::F16 => count_16(f16::INFINITY.to_bits()),
            super::DType::Bf16 => count_16(bf16::INFINITY.to_bits()),
            super::DType::F32 => {
                let bits: &[u32] = bytemuck::cast_slice(self.bytes());
                count(bits, |bits| (bits & 0x7fff_ffff).cmp(&f32::INFINITY.to_bits()))
            }
        }
    }
}

fn count<T: Copy + Sync>(bits: &[T], compare: impl Fn(T) -> std::cmp::Ordering + Sync) -> NonFinite {
    let chunk = |chunk: &[T]| {
        let mut found = NonFinite::default();
        for &bits in chunk {
            let order = compare(bits);
            found.nan += usize::from(order.is_gt());
            found.infinite += usize::from(order.is_eq());
        }
        found
    };
    let add =
        |a: NonFinite, b: NonFinite| NonFinite { nan: a.nan + b.nan, infinite: a.infinite + b.infinite };
    bits.par_chunks(1 << 16).map(chunk).reduce(NonFinite::default, add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::DType;

    #[test]
    fn every_kind_is_counted_in_every_type() {
        let mut values = vec![0.5; 200_000];
        values[3] = f32::NAN;
        values[70_000] = -f32::NAN;
        values[131_072] = f32::INFINITY;
        values[199_998] = f32::NEG_INFINITY;
        values[199_999] = f32::INFINITY;
        values[5] = -0.0;
        values[6] = 65504.0;
        let weight = Weight::from_f32(values, [200, 1000]);
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            assert_eq!(
                weight.to_dtype(dtype).count_non_finite(),
                NonFinite { nan: 2, infinite: 3 },
                "{dtype}"
            );
        }
        assert!(weight.rows(1..2).count_non_finite().is_none());
        assert!(Weight::from_f32(vec![f32::MAX, f32::MIN_POSITIVE / 2.0], [2]).count_non_finite().is_none());
    }
}
