//! What `inspect` found, as an object for programs and as text for people.

use std::{collections::BTreeMap, fmt};

use idefics::{
    ModelFiles,
    checkpoint::{Checkpoint, Component, DType, NonFinite, PackedWeight, Weight, expected_tensors},
    config::{IdeficsConfig, Memory, Workload},
    processor::SpecialToken,
};
use idefics_kernels::Isa;
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use super::file_name;

/// Everything that is shown.
#[derive(Serialize)]
pub(super) struct Report {
    directory: String,
    config: IdeficsConfig,
    files: Vec<FileReport>,
    components: Vec<ComponentReport>,
    parameters: u64,
    /// Tensors that are stored, but not used.
    ignored: Vec<String>,
    special_tokens: Vec<TokenReport>,
    cpu: CpuReport,
    pub(super) memory: MemoryReport,
    pub(super) values: Option<ValuesReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tensors: Option<Vec<TensorReport>>,
    pub(super) problems: Vec<String>,
}

#[derive(Serialize)]
struct FileReport {
    name: String,
    bytes: u64,
}

/// One part of the model: what the configuration calls for, and how it is stored.
#[derive(Serialize)]
struct ComponentReport {
    name: String,
    tensors: usize,
    parameters: u64,
    bytes: u64,
    /// Parameters by element type.
    dtypes: BTreeMap<String, u64>,
}

/// A token with a meaning of its own.
#[derive(Serialize)]
struct TokenReport {
    role: &'static str,
    token: String,
    id: u32,
}

#[derive(Serialize)]
struct CpuReport {
    /// The kernels that will run.
    kernels: String,
    /// All that could run here.
    available: Vec<String>,
    threads: usize,
}

/// Bytes that a workload needs.
#[derive(Serialize, Default)]
pub(super) struct MemoryReport {
    context: usize,
    batch: usize,
    images: usize,
    dtype: String,
    weights_mapped: u64,
    #[serde(flatten)]
    kept: Option<Memory>,
    kv_bytes_per_token: u128,
    total: u128,
}

/// What the check of values found.
#[derive(Serialize)]
pub(super) struct ValuesReport {
    pub(super) tensors: usize,
    pub(super) not_finite: BTreeMap<String, NonFinite>,
}

#[derive(Serialize)]
pub(super) struct TensorReport {
    pub(super) name: String,
    dtype: String,
    shape: Vec<usize>,
}

impl TensorReport {
    pub(super) fn new(name: &str, weight: &Weight) -> Self {
        Self { name: name.to_owned(), dtype: weight.dtype().to_string(), shape: weight.shape().to_vec() }
    }

    pub(super) fn packed(name: &str, weight: &PackedWeight) -> Self {
        let dtype = weight.format_name().to_owned();
        Self { name: name.to_owned(), dtype, shape: weight.shape().to_vec() }
    }
}

impl MemoryReport {
    pub(super) fn new(config: &IdeficsConfig, workload: Workload, weights: u64) -> Self {
        let kept = config.memory(workload);
        Self {
            context: workload.context,
            batch: workload.batch,
            images: workload.images,
            dtype: workload.compute.to_string(),
            weights_mapped: weights,
            kept: Some(kept),
            kv_bytes_per_token: config.kv_bytes_per_token(workload.compute),
            total: u128::from(weights) + kept.total(),
        }
    }
}

impl Report {
    /// What the configuration alone says.
    pub(super) fn new(files: &ModelFiles, config: &IdeficsConfig) -> Self {
        let mut components: BTreeMap<Component, ComponentReport> = BTreeMap::new();
        for (name, shape) in expected_tensors(config) {
            let component = Component::of(&name);
            let entry = components.entry(component).or_insert_with(|| ComponentReport {
                name: component.to_string(),
                tensors: 0,
                parameters: 0,
                bytes: 0,
                dtypes: BTreeMap::new(),
            });
            entry.tensors += 1;
            entry.parameters += shape.iter().product::<usize>() as u64;
        }
        let components: Vec<_> = components.into_values().collect();
        Self {
            directory: files.name().display().to_string(),
            config: config.clone(),
            files: Vec::new(),
            parameters: components.iter().map(|component| component.parameters).sum(),
            components,
            ignored: Vec::new(),
            special_tokens: Vec::new(),
            cpu: CpuReport {
                kernels: Isa::best().tier().to_string(),
                available: Isa::available().map(|isa| isa.tier().to_string()).collect(),
                threads: std::thread::available_parallelism().map_or(1, usize::from),
            },
            memory: MemoryReport::default(),
            values: None,
            tensors: None,
            problems: Vec::new(),
        }
    }

    /// Adds files, sizes and types.
    pub(super) fn add_weights(&mut self, checkpoint: &Checkpoint) {
        for file in &checkpoint.files {
            self.files.push(FileReport { name: file_name(&file.path), bytes: file.bytes });
        }
        let weights = &checkpoint.weights;
        let dense = weights
            .iter()
            .map(|(name, weight)| (name, weight.dtype().to_string(), weight.bytes().len(), weight.len()));
        let packed = weights
            .iter_packed()
            .map(|(name, weight)| (name, weight.format_name().to_owned(), weight.num_bytes(), weight.len()));
        for (name, dtype, bytes, elements) in dense.chain(packed) {
            let component = Component::of(name).to_string();
            if let Some(entry) = self.components.iter_mut().find(|entry| entry.name == component) {
                entry.bytes += bytes as u64;
                *entry.dtypes.entry(dtype).or_default() += elements as u64;
            }
        }
        self.ignored.clone_from(&checkpoint.ignored);
    }

    /// Adds special tokens with their roles.
    pub(super) fn add_special_tokens<'a>(
        &mut self,
        tokens: impl Iterator<Item = (&'static str, &'a SpecialToken)>,
    ) {
        let report =
            |(role, token): (_, &SpecialToken)| TokenReport { role, token: token.text.clone(), id: token.id };
        self.special_tokens.extend(tokens.map(report));
    }

    /// Bytes of all weights together; tied heads count once more, as they are looked at once more.
    pub(super) fn weight_bytes(&self) -> u64 {
        self.components.iter().map(|component| component.bytes).sum()
    }

    /// The type that most parameters have that are not packed.
    pub(super) fn main_dtype(&self) -> Option<DType> {
        let mut totals = BTreeMap::new();
        for (name, parameters) in self.components.iter().flat_map(|component| &component.dtypes) {
            if let Some(dtype) = DType::from_name(&name.to_uppercase()) {
                *totals.entry(dtype).or_insert(0) += parameters;
            }
        }
        totals.into_iter().max_by_key(|(_, parameters)| *parameters).map(|(dtype, _)| dtype)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.directory)?;
        self.write_config(f)?;
        self.write_components(f)?;
        if !self.files.is_empty() {
            writeln!(f, "\nfiles")?;
            for file in &self.files {
                writeln!(f, "  {:<46} {:>12}", file.name, HumanBytes(file.bytes).to_string())?;
            }
        }
        if !self.ignored.is_empty() {
            writeln!(f, "  {} stored buffers of old versions are not used", self.ignored.len())?;
        }
        if !self.special_tokens.is_empty() {
            writeln!(f, "\nspecial tokens")?;
            for TokenReport { role, token, id } in &self.special_tokens {
                writeln!(f, "  {id:>6}  {:<26}  {role}", token.escape_debug().to_string())?;
            }
        }
        writeln!(f, "\nthis processor")?;
        writeln!(f, "  kernels  {} (available: {})", self.cpu.kernels, self.cpu.available.join(", "))?;
        writeln!(f, "  threads  {}", self.cpu.threads)?;
        self.memory.fmt(f)?;
        match &self.values {
            None => writeln!(f, "\nvalues\n  not checked; --check-values reads them all")?,
            Some(values) if values.not_finite.is_empty() => {
                writeln!(f, "\nvalues\n  all finite in {} tensors", values.tensors)?;
            }
            Some(values) => {
                writeln!(f, "\nvalues")?;
                for (name, found) in &values.not_finite {
                    writeln!(f, "  {name}: {} NaN, {} infinite", found.nan, found.infinite)?;
                }
            }
        }
        if let Some(tensors) = &self.tensors {
            writeln!(f, "\ntensors")?;
            for tensor in tensors {
                writeln!(f, "  {:<6}  {}  {:?}", tensor.dtype, tensor.name, tensor.shape)?;
            }
        }
        match self.problems.as_slice() {
            [] => writeln!(f, "\nno problems found"),
            problems => {
                writeln!(f, "\nproblems")?;
                problems.iter().try_for_each(|problem| writeln!(f, "  {problem}"))
            }
        }
    }
}

impl Report {
    fn write_config(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = &self.config;
        let (vision, perceiver) = (&config.vision_config, &config.perceiver_config);
        let on = |flag| if flag { "on" } else { "off" };
        writeln!(f, "\nconfiguration")?;
        writeln!(
            f,
            "  text       {} layers, width {}, MLP {}, {} heads of {}, vocabulary {} + {}, {} positions",
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.head_dim(),
            config.vocab_size,
            config.additional_vocab_size,
            config.max_position_embeddings,
        )?;
        writeln!(
            f,
            "  gated      {} cross-attention blocks (interval {}), query and key norms {}, gates by {}",
            config.num_cross_layers(),
            config.cross_layer_interval,
            on(config.qk_layer_norms),
            match config.alpha_type {
                idefics::config::AlphaType::Float => "block",
                idefics::config::AlphaType::Vector => "channel",
            },
        )?;
        writeln!(
            f,
            "  vision     {} layers, width {}, MLP {}, {} heads, {size} x {size} pixels in patches of {}",
            vision.num_hidden_layers,
            vision.embed_dim,
            vision.intermediate_size,
            vision.num_attention_heads,
            vision.patch_size,
            size = vision.image_size,
        )?;
        if config.use_resampler {
            writeln!(
                f,
                "  perceiver  {} latents, {} blocks, {} heads of {}, query and key norms {}",
                perceiver.resampler_n_latents,
                perceiver.resampler_depth,
                perceiver.resampler_n_heads,
                perceiver.resampler_head_dim,
                on(perceiver.qk_layer_norms_perceiver),
            )?;
        } else {
            writeln!(
                f,
                "  perceiver  off: the text sees all {} vectors of the tower",
                config.image_seq_len()
            )?;
        }
        let declared =
            config.declared_dtype().map_or_else(|| "not stated".to_owned(), |dtype| dtype.to_string());
        let quantization = config.quantization_config.as_ref();
        let packed = match quantization.and_then(|quantization| quantization.quant_method.as_deref()) {
            Some(method) => format!(", quantized ({})", method.escape_debug()),
            None => String::new(),
        };
        writeln!(
            f,
            "  weights    {declared} by the configuration{packed}, heads {}",
            if config.tie_word_embeddings { "tied to the embeddings" } else { "of their own" }
        )
    }

    fn write_components(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<23} {:>7} {:>16} {:>12}  types", "parameters", "tensors", "parameters", "size")?;
        let mut tensors = 0;
        for component in &self.components {
            tensors += component.tensors;
            let dtypes: Vec<_> = component.dtypes.keys().map(String::as_str).collect();
            writeln!(
                f,
                "  {:<21} {:>7} {:>16} {:>12}  {}",
                component.name,
                component.tensors,
                HumanCount(component.parameters).to_string(),
                HumanBytes(component.bytes).to_string(),
                dtypes.join(", "),
            )?;
        }
        let (parameters, bytes) = (HumanCount(self.parameters), HumanBytes(self.weight_bytes()));
        writeln!(f, "  {:<21} {tensors:>7} {:>16} {:>12}", "total", parameters.to_string(), bytes.to_string())
    }
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(kept) = &self.kept else { return Ok(()) };
        let bytes = |bytes: u128| HumanBytes(u64::try_from(bytes).unwrap_or(u64::MAX)).to_string();
        let each = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let (sequences, tokens, images) =
            (each(self.batch, "sequence"), each(self.context, "token"), each(self.images, "image"));
        writeln!(f, "\nmemory for {sequences} of {tokens} with {images} each, computed in {}", self.dtype)?;
        writeln!(f, "  {:<28} {:>12}", "weights (mapped)", bytes(self.weights_mapped.into()))?;
        let per_token = bytes(self.kv_bytes_per_token);
        writeln!(f, "  {:<28} {:>12}  {per_token} a token", "key-value cache", bytes(kept.kv_cache))?;
        writeln!(f, "  {:<28} {:>12}", "cross-attention of images", bytes(kept.cross_attention))?;
        writeln!(f, "  {:<28} {:>12}", "image states", bytes(kept.image_states))?;
        writeln!(f, "  {:<28} {:>12}", "total", bytes(self.total))
    }
}
