//! The tensors of a model by name.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    CheckpointError, Weight,
    error::io_error,
    header::{parse_header, printable},
    layout::is_ignored,
    mmap::MappedFile,
    weight::DType,
};

/// Named weights, in the order of their names.
///
/// A model takes each weight out once; what is left at the end was not used.
#[derive(Debug, Clone, Default)]
pub struct Weights(BTreeMap<String, Weight>);

impl Weights {
    /// The weight of this name.
    pub fn get(&self, name: &str) -> Option<&Weight> {
        self.0.get(name)
    }

    /// Moves the weight of this name out.
    pub fn take(&mut self, name: &str) -> Result<Weight, CheckpointError> {
        self.0.remove(name).ok_or_else(|| CheckpointError::NoSuchTensor { name: name.to_owned() })
    }

    /// Adds a weight, or replaces the one of this name.
    pub fn insert(&mut self, name: impl Into<String>, weight: Weight) {
        self.0.insert(name.into(), weight);
    }

    /// All weights with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.0.iter().map(|(name, weight)| (name.as_str(), weight))
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<N: Into<String>> FromIterator<(N, Weight)> for Weights {
    fn from_iter<I: IntoIterator<Item = (N, Weight)>>(weights: I) -> Self {
        Self(weights.into_iter().map(|(name, weight)| (name.into(), weight)).collect())
    }
}

/// The tensors of several files while they are gathered, and where each came from.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) weights: Weights,
    /// Names that a loader may pass over.
    pub(super) ignored: Vec<String>,
    /// Which file holds a tensor, ignored ones included.
    pub(super) file_of: BTreeMap<String, PathBuf>,
}

impl Gathered {
    /// Maps a file and adds its tensors. Reads the header and touches no other page, unless a tensor is
    /// misaligned.
    pub(super) fn add_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let map = Arc::new(MappedFile::open(path).map_err(io_error(path))?);
        let header = |source| CheckpointError::Safetensors { path: path.to_owned(), source };
        let tensors = parse_header((*map).as_ref()).map_err(header)?;
        if let Some(method) = tensors.iter().find_map(|info| quantized_by(&info.name)) {
            return Err(CheckpointError::Quantized { path: path.to_owned(), method: method.to_owned() });
        }
        for info in tensors {
            if let Some(first) = self.file_of.insert(info.name.clone(), path.to_owned()) {
                let (name, second) = (printable(&info.name), path.to_owned());
                return Err(CheckpointError::TwoFiles { name, first, second });
            }
            if is_ignored(&info.name) {
                self.ignored.push(info.name);
                continue;
            }
            let Some(dtype) = DType::from_name(&info.dtype) else {
                let (path, name) = (path.to_owned(), printable(&info.name));
                return Err(CheckpointError::ElementType { path, name, dtype: info.dtype });
            };
            let owner = Arc::clone(&map) as Arc<dyn AsRef<[u8]> + Send + Sync>;
            self.weights.insert(info.name, Weight::from_owner(owner, info.bytes, dtype, info.shape));
        }
        Ok(())
    }
}

/// The method whose companion tensors have such names: scales and code books beside each weight.
fn quantized_by(name: &str) -> Option<&'static str> {
    let (rest, last) = name.rsplit_once('.')?;
    match last {
        "absmax" | "quant_map" | "nested_absmax" | "nested_quant_map" | "SCB" => Some("bitsandbytes"),
        _ if rest.ends_with(".quant_state") => Some("bitsandbytes"),
        "qweight" | "qzeros" | "g_idx" => Some("GPTQ or AWQ"),
        _ => None,
    }
}
