//! Adapters in PEFT's layout: low-rank factors beside linear layers (LoRA, Hu et al., 2021), read from a directory,
//! used beside the weights or merged into them.
//!
//! Several adapters can be in use at once, each with a weight of its own: what they add to a layer is summed, as PEFT
//! does with several active adapters. A module that was trained whole (`modules_to_save`, or the biases that
//! `bias="all"` trains) replaces the model's.

mod config;
mod error;
mod merge;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

pub use config::{CONFIG_FILE, LoraConfig, Targets};
pub use error::AdapterError;
pub use merge::{MergeSummary, Merger};

use crate::{
    checkpoint::{DType, LinearWeight, Part, Weight, Weights, file_tensors, read_tensor_file},
    config::IdeficsConfig,
    model::WeightSource,
    ops::LowRank,
};

/// The file of an adapter's weights.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What the names of all its tensors begin with: PEFT's two wrappers around the model.
pub const PREFIX: &str = "base_model.model.";
/// The file that old versions of PEFT wrote.
const PICKLE: &str = "adapter_model.bin";

/// Where an adapter lies, and how much of it to use.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSource {
    /// Its directory.
    pub directory: PathBuf,
    /// Factor on everything that it adds.
    pub weight: f32,
}

/// Factors beside one linear layer.
#[derive(Debug, Clone)]
pub struct Factors {
    /// `A`, `[r, K]`, in `f32`.
    pub a: Weight,
    /// `B`, `[N, r]`, in `f32`.
    pub b: Weight,
    /// Factor on what they add.
    pub scale: f32,
}

/// One adapter, checked against a model's configuration.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its directory.
    pub directory: PathBuf,
    /// What it was trained as.
    pub config: LoraConfig,
    /// By the name of the linear layer, without `.weight`.
    pub factors: BTreeMap<String, Factors>,
    /// Weights that replace the model's.
    pub replaced: BTreeMap<String, Weight>,
}

/// Adapters in use together.
#[derive(Debug, Clone, Default)]
pub struct Adapters(Vec<(Adapter, f32)>);

/// A model's weights with adapters beside them.
#[derive(Debug, Clone, Copy)]
pub struct Adapted<'a> {
    /// The model's own.
    pub weights: &'a Weights,
    /// What is beside them.
    pub adapters: &'a Adapters,
}

impl Adapter {
    /// Opens a directory and checks that every tensor in it has its place in a model of that configuration.
    pub fn open(directory: impl AsRef<Path>, model: &IdeficsConfig) -> Result<Self, AdapterError> {
        let directory = directory.as_ref();
        let config = LoraConfig::open(directory)?;
        let path = directory.join(WEIGHTS_FILE);
        if !path.exists() && directory.join(PICKLE).exists() {
            return Err(AdapterError::Pickle { path: directory.join(PICKLE) });
        }
        let shapes: BTreeMap<String, Vec<usize>> = file_tensors(model).collect();
        let mut halves: BTreeMap<String, Halves> = BTreeMap::new();
        let mut replaced = BTreeMap::new();
        for (name, weight) in read_tensor_file(&path)?.iter() {
            match place(name) {
                Place::Unsupported(what) => {
                    return Err(AdapterError::Kind { path, name: name.to_owned(), what });
                }
                Place::A(module) => halves.entry(module.to_owned()).or_default().a = Some(weight.clone()),
                Place::B(module) => halves.entry(module.to_owned()).or_default().b = Some(weight.clone()),
                Place::Whole(target) => match shapes.get(&target) {
                    None => return Err(AdapterError::UnknownTensor { path, name: name.to_owned() }),
                    Some(shape) if weight.shape() != *shape => {
                        return Err(wrong_shape(&path, name, format!("{shape:?}"), weight));
                    }
                    Some(_) => _ = replaced.insert(target, weight.clone()),
                },
            }
        }
        if halves.is_empty() && replaced.is_empty() {
            return Err(AdapterError::Empty { path });
        }
        let mut factors = BTreeMap::new();
        for (module, halves) in halves {
            let made = halves.join(&path, &module, &config, &shapes)?;
            factors.insert(module, made);
        }
        Ok(Self { directory: directory.to_owned(), config, factors, replaced })
    }

    /// Numbers in the factors and the replaced weights.
    pub fn num_parameters(&self) -> usize {
        let factors = self.factors.values().map(|factors| factors.a.len() + factors.b.len());
        factors.chain(self.replaced.values().map(Weight::len)).sum()
    }
}

impl Adapters {
    /// Opens all of them for a model of that configuration.
    pub fn open(sources: &[AdapterSource], model: &IdeficsConfig) -> Result<Self, AdapterError> {
        let mut adapters: Vec<(Adapter, f32)> = Vec::new();
        let mut replaced: BTreeMap<String, PathBuf> = BTreeMap::new();
        for AdapterSource { directory, weight } in sources {
            if !weight.is_finite() {
                return Err(AdapterError::Weight { path: directory.clone(), weight: *weight });
            }
            let adapter = Adapter::open(directory, model)?;
            for name in adapter.replaced.keys() {
                let (path, name) = (directory.clone(), name.clone());
                if *weight != 1.0 {
                    return Err(AdapterError::PartOfWhole { path, name, weight: *weight });
                }
                if let Some(first) = replaced.insert(name.clone(), path.clone()) {
                    return Err(AdapterError::TwoWholes { first, second: path, name });
                }
            }
            adapters.push((adapter, *weight));
        }
        Ok(Self(adapters))
    }

    /// Each adapter with its weight.
    pub fn iter(&self) -> impl Iterator<Item = (&Adapter, f32)> {
        self.0.iter().map(|(adapter, weight)| (adapter, *weight))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The weight that replaces the model's of that name.
    pub fn replacement(&self, name: &str) -> Option<&Weight> {
        self.0.iter().find_map(|(adapter, _)| adapter.replaced.get(name))
    }

    /// Factors beside the linear layer of that name, spelled without `.weight`, with all that scales them.
    pub fn factors<'a>(&'a self, module: &'a str) -> impl Iterator<Item = (&'a Factors, f32)> {
        self.0.iter().filter_map(move |(adapter, weight)| {
            let factors = adapter.factors.get(module)?;
            Some((factors, factors.scale * weight))
        })
    }
}

impl WeightSource for Adapted<'_> {
    fn weight(&self, name: &str) -> Option<Weight> {
        self.adapters.replacement(name).cloned().or_else(|| self.weights.weight(name))
    }

    fn linear_weight(&self, name: &str) -> Option<LinearWeight> {
        let replacement = self.adapters.replacement(name).cloned().map(LinearWeight::Dense);
        replacement.or_else(|| self.weights.linear_weight(name))
    }

    fn low_rank(&self, name: &str) -> Vec<LowRank> {
        let used = self.adapters.factors(name).filter(|(_, scale)| *scale != 0.0);
        used.map(|(factors, scale)| LowRank {
            a: factors.a.clone(),
            b: factors.b.clone(),
            scale,
            dropout: 0.0,
            dropout_seed: 0,
            a_gradient: None,
            b_gradient: None,
        })
        .collect()
    }
}

/// What a tensor of an adapter is.
enum Place<'a> {
    A(&'a str),
    B(&'a str),
    /// A weight of the model by its checkpoint name.
    Whole(String),
    Unsupported(&'static str),
}

fn place(name: &str) -> Place<'_> {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    for (word, what) in [
        (".lora_embedding_", "a factor of an embedding"),
        (".lora_magnitude_vector", "a magnitude of DoRA"),
        (".lora_A.bias", "a bias of a factor"),
        (".lora_B.bias", "a bias of a factor"),
        (".token_adapter.", "a set of trained tokens"),
    ] {
        if name.contains(word) {
            return Place::Unsupported(what);
        }
    }
    // Behind the factor stands `weight`, with the adapter's name before it in some files.
    if let Some((module, _)) = name.split_once(".lora_A.") {
        return Place::A(module);
    }
    if let Some((module, _)) = name.split_once(".lora_B.") {
        return Place::B(module);
    }
    let whole = match name.split_once(".modules_to_save.") {
        // Between the two parts stands the adapter's name, which has no dot.
        Some((module, rest)) => format!("{module}.{}", rest.split_once('.').map_or(rest, |(_, rest)| rest)),
        None => name.replace(".base_layer.", "."),
    };
    Place::Whole(whole)
}

/// The factors of one layer as they are found.
#[derive(Default)]
struct Halves {
    a: Option<Weight>,
    b: Option<Weight>,
}

impl Halves {
    fn join(
        self,
        path: &Path,
        module: &str,
        config: &LoraConfig,
        shapes: &BTreeMap<String, Vec<usize>>,
    ) -> Result<Factors, AdapterError> {
        let path = || path.to_owned();
        let unpaired = |there, missing| {
            Err(AdapterError::Unpaired { path: path(), module: module.to_owned(), there, missing })
        };
        let (a, b) = match (self.a, self.b) {
            (Some(a), Some(b)) => (a, b),
            (Some(_), None) => return unpaired("lora_A", "lora_B"),
            _ => return unpaired("lora_B", "lora_A"),
        };
        let name = format!("{module}.weight");
        let Some([n, k]) = shapes.get(&name).filter(|_| Part::of_linear(&name).is_some()).map(Vec::as_slice)
        else {
            return Err(AdapterError::UnknownTensor { path: path(), name: format!("{module}.lora_A") });
        };
        let rank = a.shape().first().copied().unwrap_or(0);
        if rank == 0 || *a.shape() != [rank, *k] {
            return Err(wrong_shape(&path(), &format!("{module}.lora_A"), format!("[r, {k}]"), &a));
        }
        if *b.shape() != [*n, rank] {
            return Err(wrong_shape(&path(), &format!("{module}.lora_B"), format!("[{n}, {rank}]"), &b));
        }
        let scale = config.scale(module, rank)?;
        Ok(Factors { a: a.to_dtype(DType::F32), b: b.to_dtype(DType::F32), scale })
    }
}

fn wrong_shape(path: &Path, name: &str, expected: String, weight: &Weight) -> AdapterError {
    let (name, got) = (name.to_owned(), weight.shape().to_vec());
    AdapterError::Shape { path: path.to_owned(), name, expected, got }
}

#[cfg(test)]
mod tests;
