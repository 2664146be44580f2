//! Checkpoints of a run: a model directory that any command opens, and in `training/` what a run needs to go on.
//!
//! `checkpoint-00000200/` has the model as it is in use. `training/optimizer.safetensors` has the moments
//! (`first.NAME`, `second.NAME`; in 8 bits with `scales.NAME`) and the numbers behind rounded weights (`value.NAME`);
//! `training/state.json` has the rest. A checkpoint gets its name when all of it is on the disk, and one
//! that is written anew takes the place of the old one then; so a run can be killed at any moment.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use idefics::{
    adapter::LoraConfig,
    checkpoint::{Checkpoint, CheckpointWriter, DType, TensorSpec, Weights, WriteError, expected_tensors},
};
use safetensors::{Dtype, View, tensor::Metadata};
use serde::{Deserialize, Serialize};

use crate::{
    TrainError,
    adapter::write_adapter_files,
    error::io_error,
    moments::Moments,
    packing::Position,
    parameters::{Parameter, Parameters},
};

/// Changes when older checkpoints cannot be resumed any more.
const VERSION: u32 = 1;
const FOLDER: &str = "training";
const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";
/// Ends the name of a directory that gives its place to a new one.
const REPLACED: &str = "replaced";
/// The largest header of a file of tensors that is read.
const MAX_HEADER: u64 = 256 << 20;

/// What a run remembers besides numbers of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    version: u32,
    /// Steps that were made.
    pub step: u64,
    /// All steps of the run.
    pub total_steps: u64,
    /// What the data was.
    pub data: DataIdentity,
    /// The place in the data.
    pub position: Position,
    /// Tokens that were read.
    pub tokens: u64,
    /// Pictures that were read.
    pub images: u64,
    /// Samples that could not be used.
    pub broken_samples: u64,
    /// Steps whose data was skipped as an accident.
    pub skipped_steps: u64,
    /// The running loss.
    pub spikes: crate::spikes::SpikeState,
    /// The lowest evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub evaluations_since_best: u64,
}

/// What the order of samples follows from. A place means something in the same data alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataIdentity {
    /// Of the shuffles.
    pub seed: u64,
    /// Share that is held out.
    pub held_out: f64,
    /// Samples of each source.
    pub samples: Vec<u64>,
}

/// The lowest evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// When it was.
    pub step: u64,
    /// Its loss.
    pub loss: f64,
}

impl RunState {
    /// The state of a run that begins.
    pub fn new(total_steps: u64, data: DataIdentity, position: Position) -> Self {
        Self {
            version: VERSION,
            step: 0,
            total_steps,
            data,
            position,
            tokens: 0,
            images: 0,
            broken_samples: 0,
            skipped_steps: 0,
            spikes: crate::spikes::SpikeState::default(),
            best: None,
            evaluations_since_best: 0,
        }
    }
}

/// What a run makes.
#[derive(Debug, Clone, Copy)]
pub enum Product<'a> {
    /// A model, of the one that the run began with.
    Model(&'a Checkpoint),
    /// An adapter for that model, in PEFT's layout.
    Adapter {
        /// What kind of adapter.
        lora: &'a LoraConfig,
        /// How the model is called.
        base_model: &'a str,
    },
}

/// Writes a checkpoint of a run into its output directory.
pub fn save(
    output: &Path,
    product: Product<'_>,
    parameters: &Parameters,
    state: &RunState,
) -> Result<PathBuf, TrainError> {
    let path = output.join(format!("{PREFIX}{:08}", state.step));
    write_over(&path, |writer| {
        product.write(writer, parameters)?;
        let folder = writer.directory().join(FOLDER);
        fs::create_dir(&folder).map_err(io_error("create", &folder))?;
        let optimizer = folder.join(OPTIMIZER);
        write_optimizer(&optimizer, parameters)?;
        writer.write_json(
            &format!("{FOLDER}/{STATE}"),
            &serde_json::to_value(state)
                .map_err(|error| TrainError::State { path: path.clone(), reason: error.to_string() })?,
        )?;
        sync(&folder)
    })?;
    Ok(path)
}

/// Writes the result of a run, without what a run needs to go on.
pub fn save_result(path: &Path, product: Product<'_>, parameters: &Parameters) -> Result<(), TrainError> {
    write_over(path, |writer| product.write(writer, parameters))
}

/// Writes a directory; what had its name before goes when all of the new one is on the disk.
fn write_over(
    path: &Path,
    write: impl FnOnce(&CheckpointWriter) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    put_back(path)?;
    if !path.exists() {
        let writer = CheckpointWriter::create(path)?;
        write(&writer)?;
        writer.finish()?;
        return Ok(());
    }
    let (new, old) = (hidden(path, "new"), hidden(path, REPLACED));
    if new.exists() {
        fs::remove_dir_all(&new).map_err(io_error("remove", &new))?;
    }
    let writer = CheckpointWriter::create(&new)?;
    write(&writer)?;
    writer.finish()?;
    fs::rename(path, &old).map_err(io_error("rename", path))?;
    fs::rename(&new, path).map_err(io_error("rename", &new))?;
    sync(path.parent().unwrap_or(Path::new(".")))?;
    remove(&old)
}

/// Gives a directory its name back if a kill came while another took its place; else removes what is left of it.
fn put_back(path: &Path) -> Result<(), TrainError> {
    let old = hidden(path, REPLACED);
    if !old.exists() {
        return Ok(());
    }
    if path.exists() {
        return remove(&old);
    }
    fs::rename(&old, path).map_err(io_error("rename", &old))
}

/// Makes whole again what a kill interrupted between two names: checkpoints that [`list`] would not find.
pub fn recover(output: &Path) -> Result<(), TrainError> {
    for entry in fs::read_dir(output).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name =
            name.to_str().and_then(|name| name.strip_prefix('.')?.strip_suffix(REPLACED)?.strip_suffix('.'));
        if let Some(name) = name.filter(|name| name.starts_with(PREFIX)) {
            put_back(&output.join(name))?;
        }
    }
    Ok(())
}

/// The name beside a directory for what it is not now.
fn hidden(path: &Path, ending: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{ending}"))
}

impl Product<'_> {
    fn write(self, writer: &CheckpointWriter, parameters: &Parameters) -> Result<(), TrainError> {
        match self {
            Self::Model(source) => write_model(writer, source, parameters),
            Self::Adapter { lora, base_model } => {
                let (layers, replaced) = (parameters.lora_layers(), parameters.replaced());
                Ok(write_adapter_files(writer, lora, base_model, &layers, &replaced)?)
            }
        }
    }
}

fn write_model(
    writer: &CheckpointWriter,
    source: &Checkpoint,
    parameters: &Parameters,
) -> Result<(), TrainError> {
    use idefics::model::WeightSource;
    let specs: Vec<TensorSpec> = expected_tensors(&source.config)
        .into_iter()
        .filter(|(name, _)| !parameters.is_tied_head(name))
        .filter_map(|(name, shape)| {
            let dtype = parameters.weight(&name)?.dtype();
            Some(TensorSpec::new(name, dtype, shape))
        })
        .collect();
    writer.write_weights(&specs, |spec| -> Result<_, WriteError> {
        let Some(weight) = parameters.weight(&spec.name) else {
            unreachable!("the list was made of weights")
        };
        Ok(weight)
    })?;
    writer.copy_side_files(&source.origin)?;
    let bytes = |dtype: DType| -> u64 {
        specs.iter().filter(|spec| spec.dtype == dtype).map(TensorSpec::num_bytes).sum()
    };
    let main = [DType::F32, DType::F16, DType::Bf16].into_iter().max_by_key(|dtype| bytes(*dtype));
    writer.copy_config(&source.origin, |config| {
        let name = match main {
            Some(DType::Bf16) => "bfloat16",
            Some(DType::F16) => "float16",
            _ => "float32",
        };
        config.remove("torch_dtype");
        config.insert("dtype".to_owned(), name.into());
    })?;
    Ok(())
}

/// A type of numbers in a file.
trait Number: bytemuck::Pod {
    const DTYPE: Dtype;
}

impl Number for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Number for i8 {
    const DTYPE: Dtype = Dtype::I8;
}

impl Number for u8 {
    const DTYPE: Dtype = Dtype::U8;
}

/// Numbers lent to the writer of a file.
struct Numbers<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    /// One dimension: the rest follows from the weight's own shape.
    shape: [usize; 1],
}

impl<'a> Numbers<'a> {
    fn new<T: Number>(values: &'a [T]) -> Self {
        Self { bytes: bytemuck::cast_slice(values), dtype: T::DTYPE, shape: [values.len()] }
    }
}

impl View for Numbers<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

fn write_optimizer(path: &Path, parameters: &Parameters) -> Result<(), TrainError> {
    let mut tensors: Vec<(String, Numbers<'_>)> = Vec::new();
    for (name, parameter) in parameters.trained() {
        match parameter.moments() {
            Moments::F32 { first, second } => {
                tensors.push((format!("first.{name}"), Numbers::new(first)));
                tensors.push((format!("second.{name}"), Numbers::new(second)));
            }
            Moments::EightBit { first, second, scales } => {
                tensors.push((format!("first.{name}"), Numbers::new(first)));
                tensors.push((format!("second.{name}"), Numbers::new(second)));
                tensors.push((format!("scales.{name}"), Numbers::new(scales.as_flattened())));
            }
        }
        if is_apart(parameters.has_lora(), parameter) {
            tensors.push((format!("value.{name}"), Numbers::new(parameter.values())));
        }
    }
    safetensors::serialize_to_file(tensors, None, path)
        .map_err(|error| io_error("write", path)(std::io::Error::other(error)))?;
    File::open(path).and_then(|file| file.sync_all()).map_err(io_error("write", path))
}

/// Whether the numbers of a weight lie beside the moments: a model in `f32` has them itself.
fn is_apart(has_lora: bool, parameter: &Parameter) -> bool {
    has_lora || parameter.is_rounded()
}

/// The checkpoints of a run, oldest first.
pub fn list(output: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(output).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let step = name.to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
            entry.path().join(FOLDER).join(STATE).is_file().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// Removes all checkpoints but the newest `keep` and that of step `best`.
pub fn prune(output: &Path, keep: usize, best: Option<u64>) -> Result<(), TrainError> {
    let found = list(output);
    let old = found.len().saturating_sub(keep);
    for (step, path) in &found[..old] {
        if Some(*step) != best {
            remove(path)?;
        }
    }
    Ok(())
}

/// Removes a directory in such a way that half of it never has its name.
fn remove(path: &Path) -> Result<(), TrainError> {
    let gone = hidden(path, "removed");
    if gone.exists() {
        fs::remove_dir_all(&gone).map_err(io_error("remove", &gone))?;
    }
    fs::rename(path, &gone).map_err(io_error("rename", path))?;
    fs::remove_dir_all(&gone).map_err(io_error("remove", &gone))
}

/// Takes over the weights, moments and state of a checkpoint.
pub fn restore(path: &Path, parameters: &mut Parameters) -> Result<RunState, TrainError> {
    let bad = |reason: String| TrainError::State { path: path.to_owned(), reason };
    let state_path = path.join(FOLDER).join(STATE);
    let text = fs::read_to_string(&state_path).map_err(io_error("read", &state_path))?;
    let state: RunState = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    if state.version != VERSION {
        return Err(bad(format!("written by version {}, expected {VERSION}", state.version)));
    }
    let model = if parameters.has_lora() { Weights::default() } else { Checkpoint::open(path)?.weights };
    let has_lora = parameters.has_lora();
    let mut file = TensorFile::open(&path.join(FOLDER).join(OPTIMIZER))?;
    let mut expected = 0;
    for (name, parameter) in parameters.trained_mut() {
        let len = parameter.len();
        let moments = match parameter.moments() {
            Moments::F32 { .. } => {
                expected += 2;
                Moments::F32 {
                    first: file.read(&format!("first.{name}"), len)?,
                    second: file.read(&format!("second.{name}"), len)?,
                }
            }
            Moments::EightBit { .. } => {
                expected += 3;
                let scales = file.read(&format!("scales.{name}"), 2 * Moments::num_scales(len))?;
                Moments::EightBit {
                    first: file.read(&format!("first.{name}"), len)?,
                    second: file.read(&format!("second.{name}"), len)?,
                    scales: scales.as_chunks().0.to_vec(),
                }
            }
        };
        let values = if is_apart(has_lora, parameter) {
            expected += 1;
            file.read(&format!("value.{name}"), len)?
        } else {
            let weight = model.get(name).ok_or_else(|| bad(format!("there is no {name}")))?;
            weight.to_f32_vec()
        };
        if values.len() != parameter.len() {
            return Err(bad(format!("{name}: expected {} numbers, got {}", parameter.len(), values.len())));
        }
        parameter.restore(values, moments);
    }
    if file.tensors.len() != expected {
        let extra = file.tensors.len() - expected;
        return Err(bad(format!("it trains other weights: {extra} tensors too many")));
    }
    Ok(state)
}

/// A file of which one tensor is read at a time.
struct TensorFile {
    path: PathBuf,
    file: File,
    /// First byte of the data.
    start: u64,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor lies in a file.
#[derive(Debug, Clone, Copy)]
struct Place {
    dtype: Dtype,
    /// First byte behind the header.
    from: u64,
    bytes: u64,
}

impl TensorFile {
    fn open(path: &Path) -> Result<Self, TrainError> {
        let io = io_error("read", path);
        let bad = |reason: &str| TrainError::State { path: path.to_owned(), reason: reason.to_owned() };
        let mut file = File::open(path).map_err(&io)?;
        let mut header = vec![0; 8];
        file.read_exact(&mut header).map_err(&io)?;
        let length = header.iter().rev().fold(0, |length, &byte| (length << 8) | u64::from(byte));
        if length > MAX_HEADER {
            return Err(bad("its header is too long"));
        }
        header.resize(8 + length as usize, 0);
        file.read_exact(&mut header[8..]).map_err(&io)?;
        let metadata: Metadata =
            serde_json::from_slice(&header[8..]).map_err(|error| bad(&error.to_string()))?;
        let tensors = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let (from, to) = info.data_offsets;
                (name, Place { dtype: info.dtype, from: from as u64, bytes: (to - from) as u64 })
            })
            .collect();
        Ok(Self { path: path.to_owned(), file, start: 8 + length, tensors })
    }

    fn read<T: Number>(&mut self, name: &str, len: usize) -> Result<Vec<T>, TrainError> {
        let bad = |reason: String| TrainError::State { path: self.path.clone(), reason };
        let Some(&Place { dtype, from, bytes }) = self.tensors.get(name) else {
            let other = self.tensors.keys().any(|name| name.starts_with("scales."));
            let wanted = name.starts_with("scales.");
            return Err(bad(if wanted && !other {
                "its moments are f32: `optimizer.moments` must be the same as before".to_owned()
            } else {
                format!("it trains other weights: there is no {name}")
            }));
        };
        if dtype != T::DTYPE {
            let (was, is) = (dtype, T::DTYPE);
            return Err(bad(format!(
                "{name}: expected {is:?}, got {was:?}; `optimizer.moments` must be the same as before"
            )));
        }
        if bytes != (len * size_of::<T>()) as u64 {
            return Err(bad(format!("{name}: expected {len} numbers, got {bytes} bytes")));
        }
        let mut values = vec![T::zeroed(); len];
        self.file
            .seek(SeekFrom::Start(self.start + from))
            .and_then(|_| self.file.read_exact(bytemuck::cast_slice_mut(&mut values)))
            .map_err(io_error("read", &self.path))?;
        Ok(values)
    }
}

fn sync(directory: &Path) -> Result<(), TrainError> {
    #[cfg(unix)]
    File::open(directory).and_then(|file| file.sync_all()).map_err(io_error("sync", directory))?;
    let _ = directory;
    Ok(())
}
