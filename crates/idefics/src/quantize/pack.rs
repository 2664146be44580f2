//! One weight into few bits, on all threads.

use half::slice::HalfFloatSliceExt;
use idefics_kernels::{nf4, q8};
use rayon::prelude::*;

use super::{Format, QuantizeError};
use crate::checkpoint::{DType, Nf4Weight, PackedWeight, Q8Weight, Weight};

/// Elements that a thread takes at a time, about: whole blocks, or whole rows.
const CHUNK: usize = 1 << 16;

/// Packs a weight `[N, K]`; `name` is for errors. The result does not depend on the number of threads.
pub(super) fn pack(name: &str, weight: &Weight, format: Format) -> Result<PackedWeight, QuantizeError> {
    let bad_shape = || QuantizeError::Shape { name: name.to_owned(), shape: weight.shape().to_vec() };
    let &[n, k] = weight.shape() else { return Err(bad_shape()) };
    let not_finite = || QuantizeError::NotFinite { name: name.to_owned() };
    match format {
        Format::Q8 => {
            let rows = (CHUNK / k.max(1)).max(1);
            let quantize = |values: &[f32]| q8::quantize(values, k);
            let (codes, scales) = in_chunks(weight, rows * k.max(1), quantize).ok_or_else(not_finite)?;
            Ok(PackedWeight::Q8(Q8Weight::new([n, k], codes, scales)))
        }
        Format::Nf4 | Format::Nf4DoubleQuant => {
            if !weight.len().is_multiple_of(2) {
                return Err(bad_shape());
            }
            let (codes, scales) = in_chunks(weight, CHUNK, nf4::quantize).ok_or_else(not_finite)?;
            let plain = Nf4Weight::new([n, k], codes, scales);
            Ok(PackedWeight::Nf4(match format {
                Format::Nf4DoubleQuant => plain.with_double_quantization(),
                _ => plain,
            }))
        }
    }
}

/// Widens and quantizes chunks of so many elements; nothing if any is not finite.
fn in_chunks<C: Copy + Send>(
    weight: &Weight,
    chunk: usize,
    quantize: impl Fn(&[f32]) -> (Vec<C>, Vec<f32>) + Sync,
) -> Option<(Vec<C>, Vec<f32>)> {
    let parts: Option<Vec<_>> = (0..weight.len().div_ceil(chunk))
        .into_par_iter()
        .map(|index| {
            let mut values = Vec::new();
            read_f32(weight, index * chunk..((index + 1) * chunk).min(weight.len()), &mut values);
            values.iter().all(|value| value.is_finite()).then(|| quantize(&values))
        })
        .collect();
    let parts = parts?;
    let codes = parts.iter().flat_map(|(codes, _)| codes.iter().copied()).collect();
    let scales = parts.iter().flat_map(|(_, scales)| scales.iter().copied()).collect();
    Some((codes, scales))
}

/// Elements of the flattened weight, widened.
pub(super) fn read_f32(weight: &Weight, range: std::ops::Range<usize>, out: &mut Vec<f32>) {
    let size = weight.dtype().size();
    let bytes = &weight.bytes()[range.start * size..range.end * size];
    out.resize(range.len(), 0.0);
    match weight.dtype() {
        DType::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        DType::F16 => bytemuck::cast_slice::<_, half::f16>(bytes).convert_to_f32_slice(out),
        DType::Bf16 => bytemuck::cast_slice::<_, half::bf16>(bytes).convert_to_f32_slice(out),
    }
}
