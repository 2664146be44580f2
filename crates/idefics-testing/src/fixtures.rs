//! The files under `fixtures/`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Where a file of `fixtures/` lies.
///
/// # Panics
/// When there is no such file or directory.
pub fn fixture(path: &str) -> PathBuf {
    let full = workspace_root().join("fixtures").join(path);
    assert!(full.exists(), "no fixture {}: `python reference/make_fixtures.py` writes it", full.display());
    full
}

/// A JSON file of `fixtures/`.
///
/// # Panics
/// When the file is missing or not JSON.
pub fn fixture_json(path: &str) -> Value {
    let full = fixture(path);
    let bytes = read(&full);
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", full.display()))
}

/// The tensors of one safetensors file, read whole.
#[derive(Debug)]
pub struct Tensors {
    path: PathBuf,
    tensors: BTreeMap<String, (Vec<usize>, Values)>,
}

/// The dtypes that fixtures use.
#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    I64(Vec<i64>),
    U8(Vec<u8>),
}

impl Tensors {
    /// Reads a file of `fixtures/`.
    ///
    /// # Panics
    /// As [`Tensors::load`].
    pub fn fixture(path: &str) -> Self {
        Self::load(fixture(path))
    }

    /// Reads any safetensors file whose tensors are f32, i64, u8 or bool (read as u8).
    ///
    /// # Panics
    /// When the file cannot be read or holds another dtype.
    pub fn load(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let bytes = read(&path);
        let file =
            SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tensors = file
            .iter()
            .map(|(name, view)| {
                let data = view.data();
                let values = match view.dtype() {
                    Dtype::F32 => Values::F32(from_le_bytes(data, f32::from_le_bytes)),
                    Dtype::I64 => Values::I64(from_le_bytes(data, i64::from_le_bytes)),
                    Dtype::U8 | Dtype::BOOL => Values::U8(data.to_vec()),
                    other => panic!("{}: {name}: fixtures do not use {other:?}", path.display()),
                };
                (name.to_owned(), (view.shape().to_vec(), values))
            })
            .collect();
        Self { path, tensors }
    }

    /// Every name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape and values of an f32 tensor.
    ///
    /// # Panics
    /// When there is none of that name and dtype.
    pub fn f32(&self, name: &str) -> (&[usize], &[f32]) {
        match self.get(name) {
            (shape, Values::F32(values)) => (shape, values),
            _ => self.wrong_dtype(name, "f32"),
        }
    }

    /// Shape and values of an i64 tensor.
    ///
    /// # Panics
    /// When there is none of that name and dtype.
    pub fn i64(&self, name: &str) -> (&[usize], &[i64]) {
        match self.get(name) {
            (shape, Values::I64(values)) => (shape, values),
            _ => self.wrong_dtype(name, "i64"),
        }
    }

    /// Shape and values of a u8 or bool tensor.
    ///
    /// # Panics
    /// When there is none of that name and dtype.
    pub fn u8(&self, name: &str) -> (&[usize], &[u8]) {
        match self.get(name) {
            (shape, Values::U8(values)) => (shape, values),
            _ => self.wrong_dtype(name, "u8"),
        }
    }

    fn get(&self, name: &str) -> &(Vec<usize>, Values) {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.path.display()))
    }

    fn wrong_dtype(&self, name: &str, wanted: &str) -> ! {
        panic!("{}: {name} is not {wanted}", self.path.display())
    }
}

/// The folder of the workspace's `Cargo.toml`.
pub(crate) fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("this crate lies in crates/ of the workspace")
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn from_le_bytes<const N: usize, T>(data: &[u8], convert: fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, rest) = data.as_chunks::<N>();
    assert!(rest.is_empty(), "safetensors checks that the length is a multiple of the element size");
    chunks.iter().map(|&chunk| convert(chunk)).collect()
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn every_file_is_the_one_in_the_manifest() {
        let manifest = fixture_json("manifest.json");
        let listed: BTreeMap<String, Value> = serde_json::from_value(manifest["files"].clone()).unwrap();
        let root = fixture("");
        let mut found = Vec::new();
        collect_files(&root, &mut found);
        let found: BTreeMap<String, String> = found
            .into_iter()
            // The sample of pictures is the recipe's: no reference is behind it.
            .filter(|path| !path.ends_with("manifest.json") && !path.starts_with(root.join("naming")))
            .map(|path| {
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
                (name, format!("{:x}", Sha256::digest(read(&path))))
            })
            .collect();
        let listed: BTreeMap<String, String> = listed
            .into_iter()
            .map(|(name, entry)| (name, entry["sha256"].as_str().unwrap().to_owned()))
            .collect();
        assert_eq!(found, listed, "fixtures/ and fixtures/manifest.json disagree");
    }

    fn collect_files(dir: &Path, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { collect_files(&path, into) } else { into.push(path) }
        }
    }
}
