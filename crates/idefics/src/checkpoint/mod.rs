//! Model files: configuration, safetensors (single or sharded), the hub.
//!
//! Everything that comes from a file is checked here, before anything is computed from it: [`Checkpoint::open`]
//! either returns tensors that fit the configuration exactly or says what is wrong. Opening reads the headers
//! only; weights stay where they are mapped.

mod assemble;
mod compare;
mod error;
mod generation_config;
mod header;
pub mod hub;
mod index;
mod layout;
mod mmap;
mod packed;
mod scan;
mod weight;
mod weights;
pub(crate) mod write;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

pub use assemble::PackedError;
pub use compare::{Mismatch, WrongShape};
pub use error::CheckpointError;
pub use generation_config::{EarlyStopping, GenerationConfigFile, StopStrings};
pub use header::{HeaderError, TensorInfo, parse_header};
pub use index::{Index, IndexError};
pub(crate) use layout::file_tensors;
pub use layout::{Component, Part, expected_tensors};
pub(crate) use packed::torch_name;
pub use packed::{LinearWeight, Nf4Weight, PackedWeight, Q8Weight};
pub use scan::NonFinite;
pub use weight::{DType, Weight};
pub use weights::Weights;
pub use write::{CheckpointWriter, TensorSpec, WriteError, check_not_same, config_json};

use crate::{
    config::IdeficsConfig,
    files::{ModelFiles, ReadError},
    quantize::Format,
};
use assemble::Scheme;
use error::io_error;
use weights::Gathered;

/// Largest configuration file that is read.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Largest index that is read; the 80B model's has a fifth of a megabyte.
const MAX_INDEX_BYTES: u64 = 64 << 20;

const WEIGHTS_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// A model, opened and found consistent.
#[derive(Debug)]
pub struct Checkpoint {
    /// Where it lies.
    pub origin: ModelFiles,
    /// `config.json`.
    pub config: IdeficsConfig,
    /// `generation_config.json`, or nothing where there is none.
    pub generation_config: GenerationConfigFile,
    /// All tensors that the configuration calls for, and no other. Tied heads are there too.
    pub weights: Weights,
    /// The files that hold them.
    pub files: Vec<WeightFile>,
    /// Stored tensors that are not used: buffers that old versions of the reference saved.
    pub ignored: Vec<String>,
}

/// A file of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightFile {
    /// Where it lies, or how it is called in memory.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens the model in a directory or in memory: reads the configuration, maps the weights, checks all names and
    /// shapes.
    ///
    /// The weight files of a directory must not be changed or shortened while any weight is in use; replacing them
    /// by new files of the same name is fine. In memory the weights are one file.
    pub fn open(origin: impl Into<ModelFiles>) -> Result<Self, CheckpointError> {
        let origin = origin.into();
        let config = read_config(&origin)?;
        let generation_config = read_generation_config(&origin)?;
        let scheme = scheme(&origin, &config)?;
        let mut gathered = gather(&origin)?;
        let unsound = gathered.assemble(scheme)?;
        let Gathered { mut weights, files, ignored, .. } = gathered;
        compare::check(&mut weights, unsound, &config)?;
        Ok(Self { origin, config, generation_config, weights, files, ignored })
    }
}

/// All tensors of a model, checked against its index if it has one.
fn gather(source: &ModelFiles) -> Result<Gathered, CheckpointError> {
    let mut gathered = Gathered::default();
    match source {
        ModelFiles::Memory(memory) => {
            let bytes = memory
                .get(WEIGHTS_FILE)
                .ok_or_else(|| CheckpointError::NoWeights { path: source.name().to_owned() })?;
            gathered.add_bytes(&source.path(WEIGHTS_FILE), bytes)?;
        }
        ModelFiles::Directory(directory) => {
            let files = weight_files(directory)?;
            for path in &files.paths {
                gathered.add_file(path)?;
            }
            if let Some((path, index)) = &files.index {
                check_index(path, index, &gathered)?;
            }
        }
    }
    Ok(gathered)
}

/// Maps one weight file, packed in that format where it is packed.
pub(crate) fn read_packed_file(path: &Path, format: Option<Format>) -> Result<Weights, CheckpointError> {
    let mut gathered = Gathered::default();
    gathered.add_file(path)?;
    let unsound = gathered.assemble(format.map(|format| match format {
        Format::Nf4 | Format::Nf4DoubleQuant => Scheme::Nf4,
        Format::Q8 => Scheme::Q8,
    }))?;
    if unsound.is_empty() {
        return Ok(gathered.weights);
    }
    Err(CheckpointError::Mismatch(Box::new(Mismatch { unsound, ..Mismatch::default() })))
}

/// Maps the tensors of the wanted names in a directory of any model: other architectures have them under names of
/// their own. What holds of [`Checkpoint::open`] holds here, but for the check of names and shapes.
pub fn read_tensors(directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<Weights, CheckpointError> {
    read_files(&weight_files(directory)?.paths, &wanted)
}

/// Maps the tensors of one file.
pub fn read_tensor_file(path: &Path) -> Result<Weights, CheckpointError> {
    read_files(&[path.to_owned()], &|_| true)
}

fn read_files(paths: &[PathBuf], wanted: &dyn Fn(&str) -> bool) -> Result<Weights, CheckpointError> {
    let mut gathered = Gathered::default();
    for path in paths {
        gathered.add_some(path, wanted)?;
    }
    gathered.assemble(None)?;
    Ok(gathered.weights)
}

/// Reads and validates `config.json`.
pub fn read_config(source: impl Into<ModelFiles>) -> Result<IdeficsConfig, CheckpointError> {
    let source = source.into();
    if let Some(directory) = source.directory()
        && !fs::metadata(directory).map_err(io_error(directory))?.is_dir()
    {
        return Err(CheckpointError::NotADirectory { path: directory.to_owned() });
    }
    let text = read_text(&source, "config.json", MAX_CONFIG_BYTES)?;
    let path = source.path("config.json");
    IdeficsConfig::from_json(&text).map_err(|source| CheckpointError::Config { path, source })
}

/// Reads `generation_config.json`; a model without one proposes nothing.
pub fn read_generation_config(
    source: impl Into<ModelFiles>,
) -> Result<GenerationConfigFile, CheckpointError> {
    const NAME: &str = "generation_config.json";
    let source = source.into();
    if !source.contains(NAME) {
        return Ok(GenerationConfigFile::default());
    }
    let text = read_text(&source, NAME, MAX_CONFIG_BYTES)?;
    let path = source.path(NAME);
    serde_json::from_str(&text).map_err(|source| CheckpointError::GenerationConfig { path, source })
}

/// The weight files of a directory.
struct WeightFiles {
    /// In the order of their names; those that an index names have their links resolved.
    paths: Vec<PathBuf>,
    index: Option<(PathBuf, Placement)>,
}

/// The file in which each tensor lies, as an index says.
type Placement = BTreeMap<String, PathBuf>;

/// Finds the weights: a single file if there is one, as the reference does, else the shards of the index.
fn weight_files(directory: &Path) -> Result<WeightFiles, CheckpointError> {
    let single = directory.join(WEIGHTS_FILE);
    if single.exists() {
        return Ok(WeightFiles { paths: vec![single], index: None });
    }
    let path = directory.join(INDEX_FILE);
    if !path.exists() {
        return Err(no_weights(directory));
    }
    let text = read_text(&directory.into(), INDEX_FILE, MAX_INDEX_BYTES)?;
    let bad = |source| CheckpointError::Index { path: path.clone(), source };
    let index = Index::from_json(&text).map_err(bad)?;
    let mut shards = BTreeMap::new();
    for name in index.shards() {
        shards.insert(name, index::find_shard(directory, name).map_err(bad)?);
    }
    let placement =
        index.weight_map.iter().map(|(tensor, shard)| (tensor.clone(), shards[shard.as_str()].clone()));
    Ok(WeightFiles {
        index: Some((path.clone(), placement.collect())),
        paths: shards.into_values().collect(),
    })
}

/// Checks that every tensor lies in the shard that the index names for it, and that the index names all.
fn check_index(path: &Path, placement: &Placement, gathered: &Gathered) -> Result<(), CheckpointError> {
    if *placement == gathered.file_of {
        return Ok(());
    }
    let odd = |a: &Placement, b: &Placement| -> Vec<String> {
        a.iter()
            .filter(|(tensor, file)| b.get(*tensor) != Some(file))
            .map(|(tensor, _)| tensor.clone())
            .collect()
    };
    let mut tensors = odd(placement, &gathered.file_of);
    tensors.extend(odd(&gathered.file_of, placement));
    tensors.sort();
    tensors.dedup();
    Err(CheckpointError::IndexDisagrees { path: path.to_owned(), tensors: compare::name_list(&tensors) })
}

/// Why there are no weights: pickles get their own message.
fn no_weights(directory: &Path) -> CheckpointError {
    let pickle = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("bin" | "pt" | "pth" | "ckpt"))
    };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(source) => return io_error(directory)(source),
    };
    let mut pickles: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(pickle).collect();
    pickles.sort();
    match pickles.into_iter().next() {
        Some(path) => CheckpointError::Pickle { path },
        None => CheckpointError::NoWeights { path: directory.to_owned() },
    }
}

/// `quant_method` of directories that hold Q8 weights.
pub(crate) const Q8_METHOD: &str = "idefics_q8";

/// How the configuration says that weights are packed; a way that is not supported is an error that names it.
fn scheme(source: &ModelFiles, config: &IdeficsConfig) -> Result<Option<Scheme>, CheckpointError> {
    let refuse =
        |file: &str, method: String| Err(CheckpointError::Quantized { path: source.path(file), method });
    let Some(quantization) = &config.quantization_config else {
        if source.contains("quantize_config.json") {
            return refuse("quantize_config.json", "GPTQ or AWQ".to_owned());
        }
        return Ok(None);
    };
    let method = match quantization.quant_method.as_deref() {
        Some(Q8_METHOD) => return Ok(Some(Scheme::Q8)),
        Some("bitsandbytes") => "bitsandbytes",
        None if quantization.load_in_4bit || quantization.load_in_8bit => "bitsandbytes",
        Some(method) => return refuse("config.json", header::printable(method)),
        None => return refuse("config.json", "by an unnamed method".to_owned()),
    };
    // As bitsandbytes' own configuration: nothing means fp4.
    match quantization.bnb_4bit_quant_type.as_deref().unwrap_or("fp4") {
        _ if quantization.load_in_8bit => refuse("config.json", format!("{method} in 8 bits")),
        "nf4" if quantization.load_in_4bit => Ok(Some(Scheme::Nf4)),
        _ if !quantization.load_in_4bit => {
            refuse("config.json", format!("{method}, neither in 4 nor in 8 bits"))
        }
        kind => refuse("config.json", format!("{method} {}", header::printable(kind))),
    }
}

/// Reads a whole text file that may not be longer than `limit`.
fn read_text(source: &ModelFiles, name: &str, limit: u64) -> Result<String, CheckpointError> {
    let path = source.path(name);
    let bytes = source.read(name, limit).map_err(|error| match error {
        ReadError::Io(source) => CheckpointError::Io { path: path.clone(), source },
        ReadError::NotAFile => CheckpointError::NotAFile { path: path.clone() },
        ReadError::TooLarge => CheckpointError::TooLarge { path: path.clone(), limit },
    })?;
    String::from_utf8(bytes.into_owned()).map_err(|_| CheckpointError::Io {
        path,
        source: io::Error::new(io::ErrorKind::InvalidData, "not valid UTF-8"),
    })
}

#[cfg(test)]
mod tests;
