//! Reading back what was written: dense weights byte for byte, packed ones within the error of their format.
//!
//! The numbers are decoded by the code that the model runs on, and the bounds are computed from the source
//! alone, so a slip in packing or in the layout of the file does not pass.

use std::path::Path;

use idefics_kernels::{
    nested::dynamic_map,
    nf4::{self, CODE_VALUES, Nf4, Scales},
    q8,
};
use rayon::prelude::*;

use super::{
    QuantizeError,
    pack::read_f32,
    plan::{Entry, Shard},
};
use crate::checkpoint::{PackedWeight, Weight, Weights, read_packed_file};

/// Elements that a thread takes at a time: whole blocks.
const CHUNK: usize = 1 << 16;

/// Checks a written file against its plan. `progress` gets the source bytes of each weight.
pub(super) fn verify(path: &Path, shard: &Shard, progress: &mut dyn FnMut(u64)) -> Result<(), QuantizeError> {
    let bad = |problem: String| QuantizeError::Verify { path: path.to_owned(), problem };
    let weights = read_packed_file(path, shard.entries.iter().find_map(|entry| entry.format))?;
    if weights.len() != shard.entries.len() {
        return Err(bad(format!("{} weights, expected {}", weights.len(), shard.entries.len())));
    }
    for entry in &shard.entries {
        if !reads_back(entry, &weights) {
            return Err(bad(format!("tensor `{}`", entry.name)));
        }
        progress(entry.source.bytes().len() as u64);
    }
    Ok(())
}

fn reads_back(entry: &Entry, weights: &Weights) -> bool {
    let source = &entry.source;
    if entry.format.is_none() {
        return weights.get(&entry.name).is_some_and(|weight| {
            weight.dtype() == source.dtype()
                && weight.shape() == source.shape()
                && weight.bytes() == source.bytes()
        });
    }
    let Some(packed) = weights.get_packed(&entry.name).filter(|packed| packed.shape() == *source.shape())
    else {
        return false;
    };
    match packed {
        PackedWeight::Nf4(weight) => is_near_nf4(source, weight.view()),
        PackedWeight::Q8(weight) => is_near_q8(source, weight.view()),
    }
}

/// Whether every element is within half the widest gap of its block's largest magnitude, and the scale is that
/// magnitude, or as near as double quantization brings it.
fn is_near_nf4(source: &Weight, weight: Nf4<'_>) -> bool {
    let widest = |values: &[f32]| values.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max);
    let (half_gap, nested_half_gap) = (0.5001 * widest(&CODE_VALUES), 0.51 * widest(dynamic_map()));
    let block_is_near = |index: usize, values: &[f32], read: &[f32]| {
        let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = weight.scales.get(index);
        let allowed = match weight.scales {
            // A short last block has a smallest scale that is not quite zero.
            Scales::Plain(_) => 1e-38,
            Scales::Nested { absmax, offset, .. } => {
                nested_half_gap * absmax[index / nf4::NESTED_BLOCK] + 1e-6 * offset.abs()
            }
        };
        let bound = half_gap * largest + allowed;
        (scale - largest).abs() <= allowed
            && values.iter().zip(read).all(|(value, read)| (value - read).abs() <= bound)
    };
    (0..source.len().div_ceil(CHUNK)).into_par_iter().all(|chunk| {
        let range = chunk * CHUNK..((chunk + 1) * CHUNK).min(source.len());
        let mut values = Vec::new();
        read_f32(source, range.clone(), &mut values);
        let mut read = vec![0.0; values.len()];
        weight.read(range.start, &mut read);
        let blocks = values.chunks(nf4::BLOCK).zip(read.chunks(nf4::BLOCK)).enumerate();
        let first = range.start / nf4::BLOCK;
        blocks.into_iter().all(|(index, (values, read))| block_is_near(first + index, values, read))
    })
}

/// Whether every element is within half a step of its block.
fn is_near_q8(source: &Weight, weight: q8::Q8<'_>) -> bool {
    let &[n, k] = source.shape() else { return false };
    (0..n).into_par_iter().all(|row| {
        let mut values = Vec::new();
        read_f32(source, row * k..(row + 1) * k, &mut values);
        let mut read = vec![0.0; k];
        weight.read_row(row, &mut read);
        values.chunks(q8::BLOCK).zip(read.chunks(q8::BLOCK)).all(|(values, read)| {
            let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            // The smallest numbers have no exact 127th.
            let bound = q8::error_bound(largest / 127.0) + f32::MIN_POSITIVE;
            values.iter().zip(read).all(|(value, read)| (value - read).abs() <= bound)
        })
    })
}
