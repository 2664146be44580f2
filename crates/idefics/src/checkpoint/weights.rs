//! The tensors of a model by name.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    CheckpointError, LinearWeight, PackedWeight, Weight, WeightFile,
    assemble::{PackedError, RawTensor, Scheme, assemble},
    error::io_error,
    header::{parse_header, printable},
    layout::is_ignored,
    mmap::MappedFile,
    weight::{Bytes, DType, Owner},
};

/// Named weights, in the order of their names. Those of linear layers may be packed.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    dense: BTreeMap<String, Weight>,
    packed: BTreeMap<String, PackedWeight>,
}

impl Weights {
    /// The dense weight of this name.
    pub fn get(&self, name: &str) -> Option<&Weight> {
        self.dense.get(name)
    }

    /// The packed weight of this name.
    pub fn get_packed(&self, name: &str) -> Option<&PackedWeight> {
        self.packed.get(name)
    }

    /// The element type of most bytes that are not packed.
    pub(crate) fn main_dtype(&self) -> DType {
        let bytes = |dtype: DType| -> usize {
            let weights = self.iter().filter(|(_, weight)| weight.dtype() == dtype);
            weights.map(|(_, weight)| weight.bytes().len()).sum()
        };
        let most = [DType::F32, DType::F16, DType::Bf16].into_iter().max_by_key(|dtype| bytes(*dtype));
        most.unwrap_or(DType::F32)
    }

    /// The weight of this name in whatever form it is stored.
    pub fn get_linear(&self, name: &str) -> Option<LinearWeight> {
        let dense = || self.dense.get(name).cloned().map(LinearWeight::Dense);
        self.packed.get(name).cloned().map(LinearWeight::Packed).or_else(dense)
    }

    /// Moves the dense weight of this name out.
    pub fn take(&mut self, name: &str) -> Result<Weight, CheckpointError> {
        self.dense.remove(name).ok_or_else(|| CheckpointError::NoSuchTensor { name: name.to_owned() })
    }

    /// Adds a weight, or replaces the one of this name.
    pub fn insert(&mut self, name: impl Into<String>, weight: Weight) {
        let name = name.into();
        self.packed.remove(&name);
        self.dense.insert(name, weight);
    }

    /// Adds a packed weight, or replaces the one of this name.
    pub fn insert_packed(&mut self, name: impl Into<String>, weight: PackedWeight) {
        let name = name.into();
        self.dense.remove(&name);
        self.packed.insert(name, weight);
    }

    /// All dense weights with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.dense.iter().map(|(name, weight)| (name.as_str(), weight))
    }

    /// All packed weights with their names.
    pub fn iter_packed(&self) -> impl Iterator<Item = (&str, &PackedWeight)> {
        self.packed.iter().map(|(name, weight)| (name.as_str(), weight))
    }

    /// Number of weights, dense and packed.
    pub fn len(&self) -> usize {
        self.dense.len() + self.packed.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<N: Into<String>> FromIterator<(N, Weight)> for Weights {
    fn from_iter<I: IntoIterator<Item = (N, Weight)>>(weights: I) -> Self {
        let dense = weights.into_iter().map(|(name, weight)| (name.into(), weight)).collect();
        Self { dense, packed: BTreeMap::new() }
    }
}

/// The tensors of several files while they are gathered, and where each came from.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) weights: Weights,
    /// The files.
    pub(super) files: Vec<WeightFile>,
    /// Names that a loader may pass over.
    pub(super) ignored: Vec<String>,
    /// Which file holds a tensor, ignored ones included.
    pub(super) file_of: BTreeMap<String, PathBuf>,
    /// Tensors that are no dense weights, and may be parts of packed ones.
    raw: BTreeMap<String, RawTensor>,
}

impl Gathered {
    /// Maps a file and adds its tensors. Reads the header and touches no other page, unless a tensor is
    /// misaligned.
    pub(super) fn add_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        self.add_some(path, &|_| true)
    }

    /// Adds the tensors of the wanted names only.
    pub(super) fn add_some(
        &mut self,
        path: &Path,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<(), CheckpointError> {
        let map = MappedFile::open(path).map_err(io_error(path))?;
        self.add(path, &(Arc::new(map) as _), wanted)
    }

    /// Adds the tensors of a file that is in memory.
    pub(super) fn add_bytes(&mut self, path: &Path, bytes: &'static [u8]) -> Result<(), CheckpointError> {
        self.add(path, &(Arc::new(bytes) as _), &|_| true)
    }

    fn add(
        &mut self,
        path: &Path,
        file: &Owner,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<(), CheckpointError> {
        let bytes = (**file).as_ref();
        self.files.push(WeightFile { path: path.to_owned(), bytes: bytes.len() as u64 });
        let header = |source| CheckpointError::Safetensors { path: path.to_owned(), source };
        let tensors = parse_header(bytes).map_err(header)?;
        for info in tensors.into_iter().filter(|info| wanted(&info.name)) {
            if let Some(first) = self.file_of.insert(info.name.clone(), path.to_owned()) {
                let (name, second) = (printable(&info.name), path.to_owned());
                return Err(CheckpointError::TwoFiles { name, first, second });
            }
            if is_ignored(&info.name) {
                self.ignored.push(info.name);
                continue;
            }
            let bytes = Bytes::new(Arc::clone(file), info.bytes);
            if let Some(dtype) = DType::from_name(&info.dtype) {
                self.weights.insert(info.name, bytes.into_weight(dtype, info.shape));
            } else {
                let tensor = RawTensor { dtype: info.dtype, shape: info.shape, bytes };
                self.raw.insert(info.name, tensor);
            }
        }
        Ok(())
    }

    /// Makes packed weights of their tensors; returns the unsound ones. No other tensor may be left that is no
    /// dense weight.
    pub(super) fn assemble(
        &mut self,
        scheme: Option<Scheme>,
    ) -> Result<Vec<(String, PackedError)>, CheckpointError> {
        let unsound = match scheme {
            Some(scheme) => assemble(scheme, &mut self.weights, &mut self.raw),
            None => Vec::new(),
        };
        let mut names = self.weights.iter().map(|(name, _)| name).chain(self.raw.keys().map(String::as_str));
        if let Some((name, method)) = names.find_map(|name| Some((name, quantized_by(name)?))) {
            let path = self.file_of[name].clone();
            return Err(match scheme {
                None if method == BITSANDBYTES => CheckpointError::Undeclared { path, name: printable(name) },
                _ => CheckpointError::Quantized { path, method: method.to_owned() },
            });
        }
        match self.raw.pop_first() {
            None => Ok(unsound),
            Some((name, tensor)) => Err(CheckpointError::ElementType {
                path: self.file_of[&name].clone(),
                name: printable(&name),
                dtype: tensor.dtype,
            }),
        }
    }
}

const BITSANDBYTES: &str = "bitsandbytes";

/// The method whose companion tensors have such names: scales and code books beside each weight.
fn quantized_by(name: &str) -> Option<&'static str> {
    let (rest, last) = name.rsplit_once('.')?;
    match last {
        "absmax" | "quant_map" | "nested_absmax" | "nested_quant_map" => Some(BITSANDBYTES),
        "SCB" => Some("bitsandbytes in 8 bits"),
        _ if rest.ends_with(".quant_state") => Some(BITSANDBYTES),
        "qweight" | "qzeros" | "g_idx" => Some("GPTQ or AWQ"),
        _ => None,
    }
}
