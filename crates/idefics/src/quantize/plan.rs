//! What will be written, known to the byte before anything is.
//!
//! Every size follows from the shapes. The one text of variable length, the state beside an NF4 weight, is
//! padded with spaces, which also keeps every packed weight at a multiple of 64 bytes.

use std::borrow::Cow;

use idefics_kernels::{
    nf4::{self, CODE_VALUES},
    q8,
};
use serde_json::Value;

use super::{Format, QuantizeError, Recipe, error, pack::pack};
use crate::checkpoint::{
    Checkpoint, PackedWeight, Weight, file_tensors, torch_name,
    write::{self, ALIGN, Piece, file_header, shard_name, split},
};

/// Bytes of the longest number that a state may hold.
const LONGEST_NUMBER: usize = 24;

/// One weight of the model and the form it will have.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) source: Weight,
    /// The format, or nothing if it is copied.
    pub(super) format: Option<Format>,
}

/// One file.
pub(super) struct Shard {
    pub(super) name: String,
    pub(super) entries: Vec<Entry>,
}

/// All files.
pub(super) struct Plan {
    pub(super) shards: Vec<Shard>,
}

impl Plan {
    /// Lays the weights of a checkpoint out in files of about `max_shard_bytes`.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        max_shard_bytes: u64,
    ) -> Result<Self, QuantizeError> {
        let weights = &checkpoint.weights;
        let mut entries = Vec::new();
        for (name, _) in file_tensors(&checkpoint.config) {
            let Some(source) = weights.get(&name) else { continue };
            let format = recipe.format_of(&name);
            let entry = Entry { name, source: source.clone(), format };
            if format.is_some() && format != Some(Format::Q8) && !source.len().is_multiple_of(2) {
                return Err(QuantizeError::Shape { name: entry.name, shape: source.shape().to_vec() });
            }
            entries.push(entry);
        }
        if entries.iter().all(|entry| entry.format.is_none()) {
            return Err(QuantizeError::NothingChosen { parts: error::list(&recipe.parts) });
        }
        let groups = split(entries, max_shard_bytes, Entry::bytes);
        let count = groups.len();
        let shard = |(index, mut entries): (usize, Vec<Entry>)| {
            // Packed weights first, as they keep their alignment; then by falling element size, which keeps it.
            entries.sort_by_key(|entry| {
                (entry.format.is_none(), std::cmp::Reverse(entry.source.dtype().size()))
            });
            Shard { name: shard_name(index, count), entries }
        };
        Ok(Self { shards: groups.into_iter().enumerate().map(shard).collect() })
    }

    /// Bytes of all weights as they are.
    pub(super) fn source_bytes(&self) -> u64 {
        self.shards.iter().map(Shard::source_bytes).sum()
    }

    /// The file of each tensor, and the bytes of all tensors.
    pub(super) fn index(&self) -> Value {
        write::index(self.shards.iter().map(|shard| (shard.name.as_str(), shard.pieces().collect())))
    }
}

impl Shard {
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.entries.iter().flat_map(Entry::pieces)
    }

    /// Bytes of its weights as they are.
    pub(super) fn source_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.source.bytes().len() as u64).sum()
    }

    /// Length and text of the header, padded so that the data after it is aligned.
    pub(super) fn header(&self) -> Vec<u8> {
        file_header(self.pieces())
    }

    /// Bytes of the file.
    pub(super) fn bytes(&self) -> u64 {
        self.header().len() as u64 + self.pieces().map(|piece| piece.bytes).sum::<u64>()
    }
}

impl Entry {
    /// The tensors that it becomes, in the order of the file.
    pub(super) fn pieces(&self) -> Vec<Piece> {
        let piece = |suffix: &str, dtype, shape: &[usize], size| Piece {
            name: format!("{}{suffix}", self.name),
            dtype,
            shape: shape.to_vec(),
            bytes: (shape.iter().product::<usize>() * size) as u64,
        };
        let (shape, elements) = (self.source.shape(), self.source.len());
        let blocks = elements.div_ceil(nf4::BLOCK);
        let mut pieces = match self.format {
            None => {
                let dtype = self.source.dtype();
                return vec![piece("", dtype.name(), shape, dtype.size())];
            }
            Some(Format::Q8) => {
                let rows = shape[0];
                let row_blocks = shape[1].div_ceil(q8::BLOCK);
                return vec![piece(".scales", "F32", &[rows, row_blocks], 4), piece("", "I8", shape, 1)];
            }
            Some(Format::Nf4) => vec![
                piece(".quant_map", "F32", &[16], 4),
                piece(".absmax", "F32", &[blocks], 4),
                piece("", "U8", &[elements / 2, 1], 1),
            ],
            Some(Format::Nf4DoubleQuant) => vec![
                piece(".quant_map", "F32", &[16], 4),
                piece(".nested_quant_map", "F32", &[256], 4),
                piece(".nested_absmax", "F32", &[blocks.div_ceil(nf4::NESTED_BLOCK)], 4),
                piece("", "U8", &[elements / 2, 1], 1),
                piece(".absmax", "U8", &[blocks], 1),
            ],
        };
        let before: u64 = pieces.iter().map(|piece| piece.bytes).sum();
        let state = self.state(None).len() + LONGEST_NUMBER;
        let state = ((before + state as u64).next_multiple_of(ALIGN) - before) as usize;
        pieces.push(piece(".quant_state.bitsandbytes__nf4", "U8", &[state], 1));
        pieces
    }

    fn bytes(&self) -> u64 {
        self.pieces().iter().map(|piece| piece.bytes).sum()
    }

    /// The weight as it will be stored, if it is packed.
    pub(super) fn packed(&self) -> Result<Option<PackedWeight>, QuantizeError> {
        self.format.map(|format| pack(&self.name, &self.source, format)).transpose()
    }

    /// The bytes of each piece.
    pub(super) fn data<'a>(&'a self, packed: Option<&'a PackedWeight>) -> Vec<Cow<'a, [u8]>> {
        let lent = |bytes: &'a [u8]| Cow::Borrowed(bytes);
        let map = || lent(bytemuck::cast_slice(&CODE_VALUES));
        match packed {
            None => vec![lent(self.source.bytes())],
            Some(PackedWeight::Q8(weight)) => {
                let view = weight.view();
                vec![lent(bytemuck::cast_slice(view.scales)), lent(bytemuck::cast_slice(view.codes))]
            }
            Some(PackedWeight::Nf4(weight)) => {
                let view = weight.view();
                let (mut data, offset) = match view.scales {
                    nf4::Scales::Plain(scales) => {
                        (vec![map(), lent(bytemuck::cast_slice(scales)), lent(view.codes)], None)
                    }
                    nf4::Scales::Nested { codes, map: values, absmax, offset } => {
                        let (values, absmax) = (bytemuck::cast_slice(values), bytemuck::cast_slice(absmax));
                        (vec![map(), lent(values), lent(absmax), lent(view.codes), lent(codes)], Some(offset))
                    }
                };
                let mut state = self.state(offset).into_bytes();
                let pieces = self.pieces();
                let state_bytes = pieces.last().map_or(0, |piece| piece.bytes as usize);
                assert!(state.len() <= state_bytes, "no number is longer than what was left for it");
                state.resize(state_bytes, b' ');
                data.push(Cow::Owned(state));
                data
            }
        }
    }

    /// The JSON text beside an NF4 weight, in the order and spacing of Python's.
    fn state(&self, offset: Option<f32>) -> String {
        let dtype = torch_name(self.source.dtype());
        let [n, k] = [self.source.shape()[0], self.source.shape()[1]];
        let plain =
            format!(r#"{{"quant_type": "nf4", "blocksize": 64, "dtype": "{dtype}", "shape": [{n}, {k}]"#);
        let nested = match (self.format, offset) {
            (Some(Format::Nf4DoubleQuant), offset) => {
                let number =
                    offset.map_or(String::new(), |offset| Value::from(f64::from(offset)).to_string());
                format!(r#", "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {number}"#)
            }
            _ => String::new(),
        };
        format!("{plain}{nested}}}")
    }
}
