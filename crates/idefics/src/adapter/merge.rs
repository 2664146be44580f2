//! Adapters added into the weights, for a model that needs them no more.
//!
//! `W + scale · B·A` is summed in `f64` and rounded to `f32`, then once to the type that is stored. Packed weights of
//! a QLoRA base are unpacked: packing the sum again would round away most of what was learned.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use super::{Adapter, AdapterError, AdapterSource, Adapters};
use crate::{
    checkpoint::{
        Checkpoint, CheckpointWriter, DType, LinearWeight, TensorSpec, Weight, WriteError, check_not_same,
        file_tensors, torch_name,
    },
    files::ModelFiles,
};

/// A model and the adapters to be added to it.
#[derive(Debug)]
pub struct Merger {
    checkpoint: Checkpoint,
    adapters: Adapters,
    dtype: Option<DType>,
    max_shard_bytes: Option<u64>,
}

/// What was merged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MergeSummary {
    /// The directory.
    pub directory: PathBuf,
    /// Weights that factors were added to.
    pub merged: usize,
    /// Weights that were replaced as a whole.
    pub replaced: usize,
    /// Packed weights that were unpacked.
    pub unpacked: usize,
    /// Bytes of all weights.
    pub bytes: u64,
}

impl Merger {
    /// Opens the model and the adapters.
    pub fn open(base: impl Into<ModelFiles>, sources: &[AdapterSource]) -> Result<Self, AdapterError> {
        let checkpoint = Checkpoint::open(base)?;
        let adapters = Adapters::open(sources, &checkpoint.config)?;
        Ok(Self { checkpoint, adapters, dtype: None, max_shard_bytes: None })
    }

    /// Stores all weights in that type instead of their own.
    #[must_use]
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Splits the weights into files of about so many bytes instead of 5 GB.
    #[must_use]
    pub fn with_max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = Some(bytes);
        self
    }

    /// Bytes of the weights to be written.
    pub fn output_bytes(&self) -> u64 {
        self.specs().iter().map(TensorSpec::num_bytes).sum()
    }

    /// Writes the merged model to `out`, a new or empty directory. `progress` is called with the bytes written since
    /// the last call.
    pub fn write(&self, out: &Path, progress: &mut dyn FnMut(u64)) -> Result<MergeSummary, AdapterError> {
        let base = &self.checkpoint.origin;
        if let Some(directory) = base.directory() {
            check_not_same(directory, out)?;
        }
        let specs = self.specs();
        let mut writer = CheckpointWriter::create(out)?;
        if let Some(bytes) = self.max_shard_bytes {
            writer = writer.with_max_shard_bytes(bytes);
        }
        writer.write_weights(&specs, |spec| {
            let weight = self.merged(&spec.name);
            progress(spec.num_bytes());
            Ok::<_, WriteError>(weight)
        })?;
        writer.copy_side_files(base)?;
        let dtype = self.main_dtype();
        writer.copy_config(base, |config| {
            config.remove("quantization_config");
            config.remove("torch_dtype");
            config.insert("dtype".to_owned(), json!(torch_name(dtype)));
        })?;
        let directory = writer.finish()?;
        let count = |which: fn(&Adapter) -> Vec<String>| {
            let names: std::collections::BTreeSet<_> =
                self.adapters.iter().flat_map(|(adapter, _)| which(adapter)).collect();
            names.len()
        };
        Ok(MergeSummary {
            directory,
            merged: count(|adapter| adapter.factors.keys().cloned().collect()),
            replaced: count(|adapter| adapter.replaced.keys().cloned().collect()),
            unpacked: self.checkpoint.weights.iter_packed().count(),
            bytes: specs.iter().map(TensorSpec::num_bytes).sum(),
        })
    }

    /// What packed weights are unpacked to.
    fn main_dtype(&self) -> DType {
        self.dtype.unwrap_or_else(|| self.checkpoint.weights.main_dtype())
    }

    fn specs(&self) -> Vec<TensorSpec> {
        let Checkpoint { config, weights, .. } = &self.checkpoint;
        let main = self.main_dtype();
        file_tensors(config)
            .map(|(name, shape)| {
                let own = weights.get(&name).map_or(main, Weight::dtype);
                TensorSpec::new(name, self.dtype.unwrap_or(own), shape)
            })
            .collect()
    }

    /// A weight with everything that adapters change about it.
    fn merged(&self, name: &str) -> Weight {
        let own = || match self.checkpoint.weights.get_linear(name) {
            Some(LinearWeight::Dense(weight)) => weight,
            Some(LinearWeight::Packed(weight)) => {
                let dense = weight.to_dense();
                weight.release_pages();
                dense
            }
            None => panic!("{name}: an open checkpoint has every tensor of its configuration"),
        };
        let weight = self.adapters.replacement(name).cloned().unwrap_or_else(own);
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let factors: Vec<_> = self.adapters.factors(module).collect();
        if factors.is_empty() {
            return weight;
        }
        let &[n, k] = weight.shape() else { panic!("{name}: only linear layers have factors") };
        let mut values = weight.to_f32_vec();
        let factors: Vec<(&[f32], &[f32], f64)> = factors
            .iter()
            .map(|(factors, scale)| (f32s(&factors.a), f32s(&factors.b), f64::from(*scale)))
            .collect();
        values.par_chunks_mut(k.max(1)).enumerate().for_each(|(row, values)| {
            let mut sum: Vec<f64> = values.iter().map(|value| f64::from(*value)).collect();
            for (a, b, scale) in &factors {
                let rank = b.len() / n;
                for (inner, a) in b[row * rank..(row + 1) * rank].iter().zip(a.chunks_exact(k)) {
                    let inner = scale * f64::from(*inner);
                    for (sum, a) in sum.iter_mut().zip(a) {
                        *sum += inner * f64::from(*a);
                    }
                }
            }
            for (value, sum) in values.iter_mut().zip(sum) {
                *value = sum as f32;
            }
        });
        Weight::from_f32(values, [n, k])
    }
}

fn f32s(factor: &Weight) -> &[f32] {
    factor.as_f32().expect("factors are made as f32 only")
}
