//! Files of weights, known to the byte before anything is written: headers, names of shards, the index.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::checkpoint::weight::DType;

/// Alignment of the first tensor of a file.
pub(crate) const ALIGN: u64 = 64;
/// Bytes of a file from which the next tensor goes to another one, as transformers splits models.
pub(crate) const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// A dense tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// The type that its elements will have.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
}

/// A stretch of a file: one tensor as the header describes it.
pub(crate) struct Piece {
    pub(crate) name: String,
    /// The type by its safetensors name.
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: u64,
}

impl TensorSpec {
    /// A tensor of that name, type and shape.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }

    /// Bytes of its elements.
    pub fn num_bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }

    pub(crate) fn piece(&self) -> Piece {
        let (dtype, bytes) = (self.dtype.name(), self.num_bytes());
        Piece { name: self.name.clone(), dtype, shape: self.shape.clone(), bytes }
    }
}

/// Length and text of a file's header, padded so that the data after it is aligned.
pub(crate) fn file_header(pieces: impl Iterator<Item = Piece>) -> Vec<u8> {
    let mut tensors = Map::new();
    // Without it transformers refuses the file.
    tensors.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut start = 0;
    for Piece { name, dtype, shape, bytes } in pieces {
        let end = start + bytes;
        tensors.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
        start = end;
    }
    let mut text = Value::Object(tensors).to_string().into_bytes();
    text.resize((text.len() + 8).next_multiple_of(ALIGN as usize) - 8, b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

/// The name of one of `count` weight files.
pub(crate) fn shard_name(index: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

/// The file of each tensor, and the bytes of all tensors.
pub(crate) fn index<'a>(shards: impl Iterator<Item = (&'a str, Vec<Piece>)>) -> Value {
    let mut weight_map = BTreeMap::new();
    let mut total = 0;
    for (shard, pieces) in shards {
        for piece in pieces {
            total += piece.bytes;
            weight_map.insert(piece.name, shard.to_owned());
        }
    }
    json!({"metadata": {"total_size": total}, "weight_map": weight_map})
}

/// Splits items into runs of about `most` bytes each; a run has one item at least.
pub(crate) fn split<T>(
    items: impl IntoIterator<Item = T>,
    most: u64,
    bytes: impl Fn(&T) -> u64,
) -> Vec<Vec<T>> {
    let mut runs: Vec<Vec<T>> = Vec::new();
    let mut filled = 0u64;
    for item in items {
        let size = bytes(&item);
        match runs.last_mut() {
            Some(run) if filled.saturating_add(size) <= most => {
                filled += size;
                run.push(item);
            }
            _ => {
                filled = size;
                runs.push(vec![item]);
            }
        }
    }
    runs
}
