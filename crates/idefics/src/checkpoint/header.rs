//! The header of a safetensors file, trusted in nothing.
//!
//! A file is 8 bytes of header length (little-endian), a JSON object, and the elements. The rules are those of
//! the safetensors crate (`safetensors/src/tensor.rs`, `Metadata::validate`); it is not used itself because its
//! errors often do not name the tensor and because it lets a key that stands twice overwrite the first.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    ops::Range,
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

/// Largest header that is read, the format's own limit.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes of the header length.
const LENGTH_BYTES: usize = 8;
/// Most dimensions a tensor may have; no weight has more than four.
const MAX_RANK: usize = 16;

/// Element types of the format, with their sizes in bits.
const ELEMENT_BITS: [(&str, u64); 21] = [
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E5M2FNUZ", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E8M0", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("I64", 64),
    ("U64", 64),
    ("F64", 64),
];

/// What is wrong with a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Too short for the header length.
    #[error("the file has {got} bytes, a safetensors file has at least {LENGTH_BYTES}")]
    TooShort {
        /// Bytes in the file.
        got: usize,
    },
    /// A header length beyond the format's limit.
    #[error("the header is said to be {got} bytes long, at most {MAX_HEADER} are allowed")]
    TooLarge {
        /// The length in the file.
        got: u64,
    },
    /// A header length beyond the end of the file.
    #[error("the header is said to be {header} bytes long, but the file has {file} bytes: is it truncated")]
    PastEnd {
        /// The length in the file.
        header: u64,
        /// Bytes in the file.
        file: usize,
    },
    /// Bytes that are not text.
    #[error("the header is not UTF-8")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// Text that is not a header.
    #[error("the header is not a JSON object of tensors")]
    Json(#[source] serde_json::Error),
    /// A word that names no element type.
    #[error("tensor `{name}`: unknown element type `{dtype}`")]
    UnknownType {
        /// Tensor name, made printable.
        name: String,
        /// The word, made printable.
        dtype: String,
    },
    /// More dimensions than any tensor has.
    #[error("tensor `{name}`: {got} dimensions, at most {MAX_RANK} are allowed")]
    Rank {
        /// Tensor name, made printable.
        name: String,
        /// Number of dimensions.
        got: usize,
    },
    /// A shape whose size overflows.
    #[error("tensor `{name}`: the size of its shape overflows")]
    Overflow {
        /// Tensor name, made printable.
        name: String,
    },
    /// Sub-byte elements that end inside a byte.
    #[error("tensor `{name}`: its elements do not fill whole bytes")]
    PartialByte {
        /// Tensor name, made printable.
        name: String,
    },
    /// Shape and offsets disagree.
    #[error("tensor `{name}`: its shape and type take {expected} bytes, its offsets give it {got}")]
    Size {
        /// Tensor name, made printable.
        name: String,
        /// Bytes by shape.
        expected: u64,
        /// Bytes by offsets.
        got: u64,
    },
    /// Offsets that run backwards.
    #[error("tensor `{name}`: its data ends at {end}, before its start {start}")]
    Backwards {
        /// Tensor name, made printable.
        name: String,
        /// First offset.
        start: u64,
        /// Second offset.
        end: u64,
    },
    /// Two tensors on the same bytes, or bytes that belong to none.
    #[error("tensor `{name}`: its data starts at {got}, expected {expected} (no holes and no overlaps)")]
    NotContiguous {
        /// Tensor name, made printable.
        name: String,
        /// End of the tensor before.
        expected: u64,
        /// The offset in the file.
        got: u64,
    },
    /// Tensors that end before or after the file does.
    #[error("the tensors take {expected} bytes, the file holds {got}: is it truncated")]
    DataLength {
        /// Bytes by the header.
        expected: u64,
        /// Bytes in the file after the header.
        got: u64,
    },
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, as it stands in the file.
    pub name: String,
    /// Element type in the format's spelling, `BF16` for example; always one that the format knows.
    pub dtype: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub bytes: Range<usize>,
}

/// Reads the header of a whole safetensors file and checks it against the file. Tensors come in the order of
/// their bytes.
pub fn parse_header(file: &[u8]) -> Result<Vec<TensorInfo>, HeaderError> {
    let (length, rest) =
        file.split_first_chunk::<LENGTH_BYTES>().ok_or(HeaderError::TooShort { got: file.len() })?;
    let header = u64::from_le_bytes(*length);
    if header > MAX_HEADER {
        return Err(HeaderError::TooLarge { got: header });
    }
    let (json, data) =
        rest.split_at_checked(header as usize).ok_or(HeaderError::PastEnd { header, file: file.len() })?;
    let text = std::str::from_utf8(json).map_err(HeaderError::NotUtf8)?;
    let Header(entries) = serde_json::from_str(text).map_err(HeaderError::Json)?;
    locate(entries, data.len() as u64, LENGTH_BYTES + json.len())
}

/// Checks sizes and offsets of the tensors that share `data` bytes, which start `base` bytes into the file.
fn locate(mut entries: Vec<(String, Entry)>, data: u64, base: usize) -> Result<Vec<TensorInfo>, HeaderError> {
    // Empty tensors sort before the one that starts where they lie.
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut next = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (raw_name, entry) in entries {
        let name = || printable(&raw_name);
        let (start, end) = entry.data_offsets;
        if end < start {
            return Err(HeaderError::Backwards { name: name(), start, end });
        }
        if start != next {
            return Err(HeaderError::NotContiguous { name: name(), expected: next, got: start });
        }
        let expected = entry.num_bytes(&name)?;
        if end - start != expected {
            return Err(HeaderError::Size { name: name(), expected, got: end - start });
        }
        if end > data {
            return Err(HeaderError::DataLength { expected: end, got: data });
        }
        next = end;
        let shape: Result<_, _> = entry.shape.iter().map(|&extent| usize::try_from(extent)).collect();
        tensors.push(TensorInfo {
            dtype: entry.dtype,
            shape: shape.map_err(|_| HeaderError::Overflow { name: name() })?,
            bytes: base + start as usize..base + end as usize,
            name: raw_name,
        });
    }
    if next != data {
        return Err(HeaderError::DataLength { expected: next, got: data });
    }
    Ok(tensors)
}

/// A tensor as the JSON describes it.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Entry {
    fn num_bytes(&self, name: &dyn Fn() -> String) -> Result<u64, HeaderError> {
        let Some((_, bits)) = ELEMENT_BITS.iter().find(|(dtype, _)| *dtype == self.dtype) else {
            return Err(HeaderError::UnknownType { name: name(), dtype: printable(&self.dtype) });
        };
        if self.shape.len() > MAX_RANK {
            return Err(HeaderError::Rank { name: name(), got: self.shape.len() });
        }
        let bits = self.shape.iter().try_fold(*bits, |bits, &extent| bits.checked_mul(extent));
        let bits = bits.ok_or_else(|| HeaderError::Overflow { name: name() })?;
        if bits.is_multiple_of(8) { Ok(bits / 8) } else { Err(HeaderError::PartialByte { name: name() }) }
    }
}

/// All entries but `__metadata__`, in the order of the file.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut seen = UniqueKeys::default();
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            seen.add(&name)?;
            if name == "__metadata__" {
                map.next_value::<HashMap<String, String>>()?;
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(Header(entries))
    }
}

/// The keys of a JSON object so far: none may stand there twice, as nobody could say which one counts.
#[derive(Default)]
pub(super) struct UniqueKeys(HashSet<String>);

impl UniqueKeys {
    pub(super) fn add<E: serde::de::Error>(&mut self, key: &str) -> Result<(), E> {
        if self.0.insert(key.to_owned()) {
            Ok(())
        } else {
            Err(E::custom(format_args!("`{}` stands there twice", printable(key))))
        }
    }
}

/// A name from a file as it may be shown: no control characters, not endless.
pub(super) fn printable(name: &str) -> String {
    const LONGEST: usize = 200;
    let mut shown: String = name.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if name.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of this header and so many zero bytes.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn a_file_of_the_safetensors_crate_is_read() {
        use safetensors::tensor::{Dtype, TensorView, serialize};
        let data: Vec<u8> = (0..24).collect();
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        let tensors = [
            ("w", view(Dtype::F32, &[2, 2], &data[..16])),
            ("h", view(Dtype::BF16, &[3], &data[16..22])),
            ("none", view(Dtype::F32, &[0, 7], &[])),
        ];
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let bytes = serialize(tensors.clone(), Some(metadata)).unwrap();
        let mut read = parse_header(&bytes).unwrap();
        read.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(read.len(), 3);
        for (name, view) in tensors {
            let info = read.iter().find(|info| info.name == name).unwrap();
            assert_eq!(info.dtype, view.dtype().to_string());
            assert_eq!(info.shape, view.shape());
            assert_eq!(&bytes[info.bytes.clone()], view.data());
        }
    }

    #[test]
    fn order_and_padding_of_the_header_do_not_matter() {
        let header = r#"{"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]},
            "a":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]},"__metadata__":{"format":"pt"}}      "#;
        let read = parse_header(&file(header, 8)).unwrap();
        let base = 8 + header.len();
        assert_eq!(read[0].name, "a");
        assert_eq!(read[1].bytes, base + 4..base + 8);
        assert_eq!(parse_header(&file("{}", 0)).unwrap(), []);
    }

    #[test]
    fn element_types_agree_with_the_safetensors_crate() {
        for (name, bits) in ELEMENT_BITS {
            let json = format!("\"{name}\"");
            // The crate has no FNUZ types; writers of the format do.
            if let Ok(dtype) = serde_json::from_str::<safetensors::Dtype>(&json) {
                assert_eq!(dtype.bitsize() as u64, bits, "{name}");
            } else {
                assert!(name.ends_with("FNUZ"), "{name}");
            }
        }
    }

    #[test]
    fn malformed_files_are_named_errors() {
        let tensor = |dtype: &str, shape: &str, start: u64, end: u64| {
            format!("{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}")
        };
        let one = |dtype: &str, shape: &str, start, end, data| {
            file(&format!("{{\"x\":{}}}", tensor(dtype, shape, start, end)), data)
        };
        let two = |a: String, b: String, data| file(&format!("{{\"x\":{a},\"y\":{b}}}"), data);
        let good = || tensor("F32", "[1]", 0, 4);
        let mut too_large = file("{}", 0);
        too_large[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut past_end = file("{}", 0);
        past_end[0] = 3;
        let mut not_utf8 = file("{\"x\":1}", 0);
        not_utf8[10] = 0xff;
        let rows: Vec<(&str, Vec<u8>, &str)> = vec![
            ("empty file", vec![], "the file has 0 bytes, a safetensors file has at least 8"),
            ("header too small", vec![0; 7], "the file has 7 bytes"),
            ("header too large", too_large, "said to be 18446744073709551615 bytes long, at most 100000000"),
            ("header past the end", past_end, "3 bytes long, but the file has 10 bytes"),
            ("zero header", vec![0; 8], "not a JSON object of tensors: EOF"),
            ("not UTF-8", not_utf8, "not UTF-8"),
            ("a list", file("[]", 0), "expected an object of tensors"),
            ("not JSON", file("{\"x\":", 0), "not a JSON object of tensors: EOF"),
            ("two objects", file("{}{}", 0), "trailing characters"),
            ("nested without end", file(&"{\"a\":".repeat(100_000), 0), "EOF while parsing"),
            (
                "nested lists",
                file(&format!("{{\"__metadata__\":{}", "[".repeat(100_000)), 0),
                "expected a map",
            ),
            ("metadata of numbers", file("{\"__metadata__\":{\"a\":1}}", 0), "expected a string"),
            ("negative extent", one("F32", "[-1]", 0, 4, 4), "expected u64"),
            (
                "negative offset",
                file("{\"x\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[-4,0]}}", 4),
                "expected u64",
            ),
            (
                "three offsets",
                file("{\"x\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4,8]}}", 4),
                "trailing characters",
            ),
            (
                "no shape",
                file("{\"x\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4),
                "missing field `shape`",
            ),
            (
                "same key twice",
                file(&format!("{{\"x\":{0},\"x\":{0}}}", good()), 4),
                "`x` stands there twice",
            ),
            (
                "metadata twice",
                file("{\"__metadata__\":{},\"__metadata__\":{}}", 0),
                "`__metadata__` stands there twice",
            ),
            ("unknown type", one("Q4", "[1]", 0, 4, 4), "tensor `x`: unknown element type `Q4`"),
            (
                "size of shape",
                one("F32", "[2]", 0, 4, 4),
                "tensor `x`: its shape and type take 8 bytes, its offsets give it 4",
            ),
            (
                "overflow of shape",
                one("F32", "[4294967296,4294967296]", 0, 4, 4),
                "tensor `x`: the size of its shape overflows",
            ),
            (
                "overflow of bits",
                one("F32", "[2305843009213693952]", 0, 4, 4),
                "tensor `x`: the size of its shape overflows",
            ),
            ("half a byte", one("F4", "[3]", 0, 2, 2), "tensor `x`: its elements do not fill whole bytes"),
            (
                "rank",
                one("U8", &format!("[{}1]", "1,".repeat(16)), 0, 1, 1),
                "tensor `x`: 17 dimensions, at most 16",
            ),
            ("backwards", one("F32", "[1]", 4, 0, 4), "tensor `x`: its data ends at 0, before its start 4"),
            ("first byte unused", one("F32", "[1]", 4, 8, 8), "tensor `x`: its data starts at 4, expected 0"),
            (
                "hole",
                two(good(), tensor("F32", "[1]", 8, 12), 12),
                "tensor `y`: its data starts at 8, expected 4",
            ),
            (
                "overlap",
                two(good(), tensor("F32", "[1]", 2, 6), 6),
                "tensor `y`: its data starts at 2, expected 4",
            ),
            ("same bytes", two(good(), good(), 4), "its data starts at 0, expected 4"),
            ("truncated data", one("F32", "[1]", 0, 4, 3), "the tensors take 4 bytes, the file holds 3"),
            ("data left over", one("F32", "[1]", 0, 4, 5), "the tensors take 4 bytes, the file holds 5"),
            (
                "offsets at the limit",
                one("U8", "[0]", u64::MAX, u64::MAX, 0),
                "its data starts at 18446744073709551615, expected 0",
            ),
            (
                "terminal escapes",
                file("{\"\\u001b[2J\":{\"dtype\":\"X\",\"shape\":[],\"data_offsets\":[0,0]}}", 0),
                "tensor `\\u{1b}[2J`: unknown",
            ),
        ];
        for (what, bytes, expected) in rows {
            let error = parse_header(&bytes).expect_err(what);
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let message = format!("{error}: {source}");
            assert!(message.contains(expected), "{what}\n  gave     {message}\n  expected {expected}");
        }
    }
}
