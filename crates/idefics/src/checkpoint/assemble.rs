//! Packed weights from the tensors that make them up, each of which is checked against the others.
//!
//! bitsandbytes stores `X.weight` (codes, `[N · K / 2, 1]`), `X.weight.absmax`, `.quant_map`, a JSON text as
//! `.quant_state.bitsandbytes__nf4`, and with double quantization `.nested_absmax` and `.nested_quant_map`
//! (`QuantState.as_dict(packed=True)` in its `functional.py`). Q8 is `X.weight` `[N, K]` and `X.weight.scales`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use idefics_kernels::{nf4, q8};
use serde::Deserialize;

use super::{
    Weight, Weights,
    header::printable,
    packed::{Nf4Scales, Nf4Weight, PackedWeight, Q8Weight},
    weight::{Bytes, DType},
};

/// What is wrong with a packed weight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackedError {
    /// One of its tensors is not there.
    #[error("`{part}` is missing")]
    Missing {
        /// What its name ends with.
        part: &'static str,
    },
    /// One of its tensors has another type.
    #[error("`{part}` has element type {got}, expected {expected}")]
    ElementType {
        /// What its name ends with.
        part: &'static str,
        /// The type of the format.
        expected: &'static str,
        /// The type in the file.
        got: String,
    },
    /// One of its tensors has another shape.
    #[error("`{part}` has shape {got:?}, expected {expected:?}")]
    Shape {
        /// What its name ends with.
        part: &'static str,
        /// The shape that follows from the weight's.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// The state is no JSON object of the known fields.
    #[error("its quantization state cannot be read: {0}")]
    State(String),
    /// A setting that is not supported.
    #[error("`{field}` is {got}, expected {expected}")]
    Setting {
        /// The field of the state.
        field: &'static str,
        /// What is supported.
        expected: &'static str,
        /// What the file says.
        got: String,
    },
    /// A code does not stand for the value that the format gives it.
    #[error("`{part}` holds other values than the format's")]
    Values {
        /// What the tensor's name ends with.
        part: &'static str,
    },
}

/// A tensor that is no dense weight.
pub(super) struct RawTensor {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Bytes,
}

/// How weights are packed, as the configuration says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    Nf4,
    Q8,
}

/// What the names of the tensors beside a packed weight end with.
const NF4_PARTS: [&str; 6] =
    ["absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE, "quant_state.bitsandbytes__fp4"];
const NF4_STATE: &str = "quant_state.bitsandbytes__nf4";
const Q8_PARTS: [&str; 1] = ["scales"];
/// Stands for the codes themselves in error messages.
const CODES: &str = "weight";

/// Takes the tensors of packed weights out of both maps and puts the weights in. Returns those that are unsound.
pub(super) fn assemble(
    scheme: Scheme,
    weights: &mut Weights,
    raw: &mut BTreeMap<String, RawTensor>,
) -> Vec<(String, PackedError)> {
    let parts: &[&str] = match scheme {
        Scheme::Nf4 => &NF4_PARTS,
        Scheme::Q8 => &Q8_PARTS,
    };
    let names = weights.iter().map(|(name, _)| name).chain(raw.keys().map(String::as_str));
    let base_of = |name: &str| -> Option<String> {
        parts.iter().find_map(|part| Some(name.strip_suffix(part)?.strip_suffix('.')?.to_owned()))
    };
    let bases: BTreeSet<String> = names.filter_map(base_of).collect();
    let mut unsound = Vec::new();
    for base in bases {
        let mut tensors = Tensors::take(&base, parts, weights, raw);
        let weight = match scheme {
            Scheme::Nf4 => tensors.nf4().map(PackedWeight::Nf4),
            Scheme::Q8 => tensors.q8().map(PackedWeight::Q8),
        };
        match weight {
            Ok(weight) => weights.insert_packed(base, weight),
            Err(error) => unsound.push((base, error)),
        }
    }
    unsound
}

/// The tensors of one packed weight, by what their names end with.
struct Tensors {
    dense: BTreeMap<&'static str, Weight>,
    raw: BTreeMap<&'static str, RawTensor>,
}

impl Tensors {
    fn take(
        base: &str,
        parts: &[&'static str],
        weights: &mut Weights,
        raw: &mut BTreeMap<String, RawTensor>,
    ) -> Self {
        let mut tensors = Self { dense: BTreeMap::new(), raw: BTreeMap::new() };
        for part in parts.iter().copied().chain([CODES]) {
            let name = if part == CODES { base.to_owned() } else { format!("{base}.{part}") };
            if let Some(tensor) = raw.remove(&name) {
                tensors.raw.insert(part, tensor);
            } else if let Ok(weight) = weights.take(&name) {
                tensors.dense.insert(part, weight);
            }
        }
        tensors
    }

    /// The `f32` numbers of a part, of any shape.
    fn f32(&mut self, part: &'static str) -> Result<Weight, PackedError> {
        let got = match (self.dense.remove(part), self.raw.remove(part)) {
            (Some(weight), _) if weight.dtype() == DType::F32 => return Ok(weight),
            (Some(weight), _) => weight.dtype().name().to_owned(),
            (None, Some(tensor)) => tensor.dtype,
            (None, None) => return Err(PackedError::Missing { part }),
        };
        Err(PackedError::ElementType { part, expected: "F32", got })
    }

    fn f32_of_shape(&mut self, part: &'static str, shape: &[usize]) -> Result<Weight, PackedError> {
        let weight = self.f32(part)?;
        check_shape(part, shape, weight.shape())?;
        Ok(weight)
    }

    /// The bytes of a part of that type, of any shape.
    fn bytes(&mut self, part: &'static str, expected: &'static str) -> Result<RawTensor, PackedError> {
        let got = match (self.raw.remove(part), self.dense.remove(part)) {
            (Some(tensor), _) if tensor.dtype == expected => return Ok(tensor),
            (Some(tensor), _) => tensor.dtype,
            (None, Some(weight)) => weight.dtype().name().to_owned(),
            (None, None) => return Err(PackedError::Missing { part }),
        };
        Err(PackedError::ElementType { part, expected, got })
    }

    fn bytes_of_shape(
        &mut self,
        part: &'static str,
        dtype: &'static str,
        shape: &[usize],
    ) -> Result<Bytes, PackedError> {
        let tensor = self.bytes(part, dtype)?;
        check_shape(part, shape, &tensor.shape)?;
        Ok(tensor.bytes)
    }

    fn nf4(&mut self) -> Result<Nf4Weight, PackedError> {
        if self.raw.contains_key("quant_state.bitsandbytes__fp4") {
            return Err(PackedError::Setting { field: "quant_type", expected: "nf4", got: "fp4".to_owned() });
        }
        let state = State::parse(&self.bytes(NF4_STATE, "U8")?.bytes)?;
        let (shape, elements) = state.check()?;
        let codes = self.bytes_of_shape(CODES, "U8", &[elements / 2, 1])?;
        let map = self.f32_of_shape("quant_map", &[16])?;
        // bitsandbytes computes with the format's own values, whatever the file holds.
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6;
        if !map.to_f32_vec().iter().zip(&nf4::CODE_VALUES).all(same) {
            return Err(PackedError::Values { part: "quant_map" });
        }
        let blocks = elements.div_ceil(nf4::BLOCK);
        let scales = match state.nested_offset {
            None => {
                for part in ["nested_absmax", "nested_quant_map"] {
                    if self.dense.contains_key(part) || self.raw.contains_key(part) {
                        return Err(PackedError::State(format!("no `nested_offset`, but there is `{part}`")));
                    }
                }
                Nf4Scales::Plain(self.f32_of_shape("absmax", &[blocks])?)
            }
            Some(offset) => {
                let map = self.f32_of_shape("nested_quant_map", &[256])?.to_f32_vec();
                if !map.iter().all(|value| value.is_finite()) {
                    return Err(PackedError::Values { part: "nested_quant_map" });
                }
                Nf4Scales::Nested {
                    codes: self.bytes_of_shape("absmax", "U8", &[blocks])?,
                    map: Arc::new(map.try_into().expect("the shape was checked")),
                    absmax: self.f32_of_shape("nested_absmax", &[blocks.div_ceil(nf4::NESTED_BLOCK)])?,
                    offset: offset as f32,
                }
            }
        };
        Ok(Nf4Weight { shape, codes, scales })
    }

    fn q8(&mut self) -> Result<Q8Weight, PackedError> {
        let codes = self.bytes(CODES, "I8")?;
        let &[n, k] = codes.shape.as_slice() else {
            return Err(PackedError::Setting {
                field: "shape",
                expected: "[N, K]",
                got: format!("{:?}", codes.shape),
            });
        };
        let scales = self.f32_of_shape("scales", &[n, k.div_ceil(q8::BLOCK)])?;
        Ok(Q8Weight { shape: [n, k], codes: codes.bytes, scales })
    }
}

fn check_shape(part: &'static str, expected: &[usize], got: &[usize]) -> Result<(), PackedError> {
    if expected == got {
        return Ok(());
    }
    Err(PackedError::Shape { part, expected: expected.to_vec(), got: got.to_vec() })
}

/// The JSON text beside an NF4 weight.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: u64,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<u64>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

impl State {
    fn parse(bytes: &[u8]) -> Result<Self, PackedError> {
        serde_json::from_slice(bytes).map_err(|error| PackedError::State(printable(&error.to_string())))
    }

    /// The shape of the weight and its number of elements.
    fn check(&self) -> Result<([usize; 2], usize), PackedError> {
        let setting = |field, expected, got: &dyn std::fmt::Display| {
            Err(PackedError::Setting { field, expected, got: printable(&got.to_string()) })
        };
        if self.quant_type != "nf4" {
            return setting("quant_type", "nf4", &self.quant_type);
        }
        if self.blocksize != nf4::BLOCK as u64 {
            return setting("blocksize", "64", &self.blocksize);
        }
        if !matches!(self.dtype.as_str(), "float32" | "float16" | "bfloat16") {
            return setting("dtype", "float32, float16 or bfloat16", &self.dtype);
        }
        match (self.nested_offset, self.nested_blocksize) {
            (Some(_), Some(size)) if size != nf4::NESTED_BLOCK as u64 => {
                return setting("nested_blocksize", "256", &size);
            }
            (Some(offset), Some(_)) if !(offset as f32).is_finite() => {
                return setting("nested_offset", "a finite number", &offset);
            }
            (Some(_), Some(_)) | (None, None) => {}
            (None, Some(_)) => return setting("nested_offset", "a number", &"missing"),
            (Some(_), None) => return setting("nested_blocksize", "256", &"missing"),
        }
        if let Some(dtype) = self.nested_dtype.as_deref().filter(|dtype| *dtype != "float32") {
            return setting("nested_dtype", "float32", &dtype);
        }
        let elements = match self.shape.as_slice() {
            [n, k] => n.checked_mul(*k).filter(|elements| elements.is_multiple_of(2)).map(|e| ([*n, *k], e)),
            _ => None,
        };
        match elements {
            Some(found) => Ok(found),
            None => setting("shape", "[N, K] of an even number of elements", &format!("{:?}", self.shape)),
        }
    }
}
