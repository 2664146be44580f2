//! The configuration of a run: a TOML file, every value of which a flag can replace.
//!
//! Unknown fields are errors. Relative paths begin where the command runs, as those of its flags do; what a run
//! writes of its configuration has none.

use std::path::{Path, PathBuf};

use idefics::{
    ComputeType,
    adapter::{LoraConfig, Targets},
    checkpoint::Part,
    model::Tape,
    quantize::{Format, Recipe},
};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    data::{Paths, RandomResizedCrop, SequenceConfig, SourceConfig},
    freeze::{Rate, Trainable},
    moments::MomentFormat,
    optim::AdamW,
    packing::BatchConfig,
    parameters::Precision,
    schedule::Shape,
};

/// How a file begins that a run wrote.
const HEAD: &str =
    "# Written by `idefics train`: the configuration with what flags and defaults made of it.\n";

/// Everything that a run depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Directory of the model to begin with, or its name on the hub.
    pub model: String,
    /// Directory of the run: checkpoints, metrics, samples, the result.
    pub output: PathBuf,
    /// Seed of shuffles, crops and dropout.
    #[serde(default)]
    pub seed: u64,
    /// How long, and how it is computed.
    #[serde(default)]
    pub run: RunConfig,
    /// Which weights move.
    #[serde(default)]
    pub trainable: Trainable,
    /// Low-rank factors beside frozen layers, if there are to be any.
    pub lora: Option<LoraOptions>,
    /// Packs frozen layers while the model is loaded (QLoRA), if asked to.
    pub quantize: Option<QuantizeOptions>,
    /// What is learned from.
    pub data: Vec<SourceConfig>,
    /// How samples become sequences.
    #[serde(default)]
    pub sequence: SequenceConfig,
    /// How sequences become batches.
    #[serde(default)]
    pub batch: BatchConfig,
    /// Random crops of the pictures, if there are to be any.
    pub augment: Option<RandomResizedCrop>,
    /// How weights move.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The loss on data that is not learned from.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// What is written on the way.
    #[serde(default)]
    pub checkpoints: CheckpointConfig,
    /// Answers of the model on the way.
    #[serde(default)]
    pub samples: SamplesConfig,
    /// What is taken for an accident.
    #[serde(default)]
    pub spikes: SpikeConfig,
    /// Reading ahead, and broken samples.
    #[serde(default)]
    pub loading: LoadingConfig,
}

/// LoRA, under the names that PEFT has for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraOptions {
    /// Rank.
    pub r: usize,
    /// What the factors add is scaled by `alpha / r`.
    pub alpha: f64,
    /// Share of the inputs that the factors do not see.
    pub dropout: f64,
    /// Linear layers by the ends of their names, or a regular expression for whole names.
    pub targets: Targets,
    /// Layers that are left out all the same.
    pub exclude: Option<Targets>,
    /// Scale by `alpha / √r`.
    pub rslora: bool,
    /// Directory of an adapter to go on with; rank and targets are its own.
    pub start: Option<PathBuf>,
}

impl Default for LoraOptions {
    /// The recipe that Hugging Face published for IDEFICS.
    fn default() -> Self {
        let targets = ["q_proj", "k_proj", "v_proj"].map(str::to_owned).to_vec();
        Self {
            r: 16,
            alpha: 32.0,
            dropout: 0.05,
            targets: Targets::Names(targets),
            exclude: None,
            rslora: false,
            start: None,
        }
    }
}

impl LoraOptions {
    /// As PEFT's file has it.
    pub fn to_peft(&self) -> LoraConfig {
        LoraConfig {
            r: self.r,
            lora_alpha: self.alpha,
            lora_dropout: self.dropout,
            target_modules: Some(self.targets.clone()),
            exclude_modules: self.exclude.clone(),
            rank_pattern: serde_json::Map::new(),
            alpha_pattern: serde_json::Map::new(),
            use_rslora: self.rslora,
            modules_to_save: None,
        }
    }
}

/// How frozen layers are packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizeOptions {
    /// `nf4`, `nf4+dq` or `q8`.
    pub format: Format,
    /// Whose linear layers; those of the text model and the gated blocks if nothing is said.
    pub parts: Option<Vec<Part>>,
}

impl QuantizeOptions {
    /// For the packer.
    pub fn recipe(&self) -> Recipe {
        let recipe = Recipe::new(self.format);
        match &self.parts {
            Some(parts) => Recipe { parts: parts.iter().copied().collect(), ..recipe },
            None => recipe,
        }
    }
}

/// How long a run is, and how it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Steps of the optimiser.
    pub steps: Option<u64>,
    /// In place of steps: how often each sample is seen.
    pub epochs: Option<f64>,
    /// What trained weights are kept as.
    pub precision: Precision,
    /// What products are rounded to.
    pub compute: ComputeName,
    /// Whether intermediate values are kept for the backward pass or computed twice.
    pub tape: TapeName,
}

/// [`ComputeType`] by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeName {
    /// By the weights.
    #[default]
    Auto,
    /// `f32`.
    F32,
    /// bf16 factors, `f32` sums.
    Bf16,
}

impl From<ComputeName> for ComputeType {
    fn from(name: ComputeName) -> Self {
        match name {
            ComputeName::Auto => Self::Auto,
            ComputeName::F32 => Self::F32,
            ComputeName::Bf16 => Self::Bf16,
        }
    }
}

/// [`Tape`] by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TapeName {
    /// Layers run twice; memory is that of one layer.
    #[default]
    Recompute,
    /// Layers run once; memory grows with the depth.
    Keep,
}

impl From<TapeName> for Tape {
    fn from(name: TapeName) -> Self {
        match name {
            TapeName::Recompute => Self::Recompute,
            TapeName::Keep => Self::Keep,
        }
    }
}

/// AdamW and its learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// The learning rate after the last step, for schedules that fall.
    pub end_learning_rate: f64,
    /// How it changes.
    pub schedule: Shape,
    /// Steps in which it rises.
    pub warmup_steps: u64,
    /// Largest norm of all gradients together; longer ones are scaled down. 0 for no bound.
    pub clip_norm: f64,
    /// Weight of the squared log-sum of the logits.
    pub z_loss: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// What the moments are kept as: `f32`, or in 8 bits, which is a quarter of the memory.
    pub moments: MomentFormat,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        let AdamW { beta1, beta2, eps, weight_decay } = AdamW::default();
        Self {
            learning_rate: 1e-5,
            end_learning_rate: 0.0,
            schedule: Shape::Constant,
            warmup_steps: 0,
            clip_norm: 1.0,
            z_loss: 0.0,
            beta1,
            beta2,
            eps,
            weight_decay,
            moments: MomentFormat::F32,
        }
    }
}

impl OptimizerConfig {
    /// The constants of AdamW.
    pub fn adamw(&self) -> AdamW {
        let Self { beta1, beta2, eps, weight_decay, .. } = *self;
        AdamW { beta1, beta2, eps, weight_decay }
    }
}

/// Evaluation on the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationConfig {
    /// Share of the training data that is kept for evaluation.
    pub held_out: f64,
    /// Data of its own for evaluation.
    pub data: Vec<SourceConfig>,
    /// Steps between two evaluations; there is one at the end, too.
    pub every: u64,
    /// Most samples of an evaluation.
    pub max_samples: usize,
    /// Evaluations without a lower loss after which the run ends; 0 for never.
    pub patience: u64,
    /// How much lower a loss must be to count.
    pub min_delta: f64,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self { held_out: 0.0, data: Vec::new(), every: 100, max_samples: 256, patience: 0, min_delta: 0.0 }
    }
}

impl EvaluationConfig {
    /// Whether there is anything to evaluate on.
    pub fn has_data(&self) -> bool {
        self.held_out > 0.0 || !self.data.is_empty()
    }
}

/// What is written on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between two checkpoints; there is one at the end, too, and one whenever an evaluation is the best so
    /// far, unless a run has fewer steps than this.
    pub every: u64,
    /// How many of the newest are kept; the best one is kept besides.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 200, keep: 2 }
    }
}

/// Answers on the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplesConfig {
    /// Steps between two rounds of answers.
    pub every: u64,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// What is asked.
    pub prompts: Vec<Vec<PromptPart>>,
}

impl Default for SamplesConfig {
    fn default() -> Self {
        Self { every: 100, max_new_tokens: 30, prompts: Vec::new() }
    }
}

/// A part of a prompt: `{ text = ".." }` or `{ image = ".." }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptPart {
    /// Words.
    Text(String),
    /// A file.
    Image(PathBuf),
}

/// What is taken for an accident of training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpikeConfig {
    /// A loss above this multiple of the running mean is one, if it is also `sigmas` above; 0 for none.
    pub factor: f64,
    /// Standard deviations above the running mean.
    pub sigmas: f64,
    /// Steps before anything is compared with a mean.
    pub warmup_steps: u64,
    /// Accidents in a row after which the run goes back to its last checkpoint.
    pub patience: u64,
}

impl Default for SpikeConfig {
    fn default() -> Self {
        Self { factor: 2.0, sigmas: 8.0, warmup_steps: 50, patience: 3 }
    }
}

/// Reading ahead, and broken samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoadingConfig {
    /// Threads that read and decode.
    pub threads: usize,
    /// Samples that are read in advance.
    pub ahead: usize,
    /// Largest share of broken samples.
    pub max_broken: f64,
    /// Most samples of each source that are checked before the run begins.
    pub check: u64,
    /// Memory for what a frozen tower makes of pictures, in GB (10⁹ bytes): a picture that comes again is not read
    /// again.
    pub image_cache_gb: f64,
}

impl Default for LoadingConfig {
    fn default() -> Self {
        Self { threads: 2, ahead: 64, max_broken: 0.01, check: 50_000, image_cache_gb: 0.0 }
    }
}

impl LoadingConfig {
    /// Bytes of the memory for pictures that were read.
    pub fn kept_image_bytes(&self) -> usize {
        (self.image_cache_gb * 1e9) as usize
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown field, or a value of another kind.
    #[error("{origin}: {reason}")]
    Parse {
        /// The file or flag.
        origin: String,
        /// What is wrong, on one line.
        reason: String,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {reason}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A value that makes no sense.
    #[error("{field}: expected {expected}, got {got}")]
    Value {
        /// Its name.
        field: &'static str,
        /// What would make sense.
        expected: &'static str,
        /// As it was given.
        got: String,
    },
}

impl TrainConfig {
    /// Reads a file and puts `overrides` over it: `optimizer.learning_rate=1e-4`, with values as in TOML; what is
    /// no value of TOML is a text. `run.steps` takes the place of `run.epochs`, and the reverse.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&path.display().to_string(), &text, overrides)
    }

    /// The same of a text.
    pub fn parse(origin: &str, text: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let bad = |error: toml::de::Error| ConfigError::Parse {
            origin: match error.span() {
                Some(span) => format!("{origin}, line {}", text[..span.start].matches('\n').count() + 1),
                None => origin.to_owned(),
            },
            reason: error.message().replace('\n', " "),
        };
        // Read once as it is, so that an error has its line; and again with what replaces parts of it.
        let config: Self = if overrides.is_empty() {
            toml::from_str(text).map_err(bad)?
        } else {
            let mut table: Table = text.parse().map_err(bad)?;
            overrides.iter().try_for_each(|text| set(&mut table, text))?;
            table.try_into().map_err(bad)?
        };
        config.validate()?;
        Ok(config)
    }

    /// Writes the file of this configuration, flags and defaults included; [`load`](Self::load) has it from anywhere.
    /// A file of that name that somebody else wrote stays, and the answer is false.
    pub fn write(&self, path: &Path) -> Result<bool, ConfigError> {
        let bad = |reason: String| ConfigError::Write { path: path.to_owned(), reason };
        if std::fs::read_to_string(path).is_ok_and(|text| !text.starts_with(HEAD)) {
            return Ok(false);
        }
        let text =
            toml::to_string(&self.clone().with_absolute_paths()).map_err(|error| bad(error.to_string()))?;
        let partial = path.with_extension("toml.partial");
        std::fs::write(&partial, format!("{HEAD}{text}"))
            .and_then(|()| std::fs::rename(&partial, path))
            .map_err(|error| bad(error.to_string()))?;
        Ok(true)
    }

    /// The same with paths that do not depend on where the command runs.
    fn with_absolute_paths(mut self) -> Self {
        // Names on the hub are no paths.
        if Path::new(&self.model).is_dir() {
            self.model = absolute(Path::new(&self.model)).to_string_lossy().into_owned();
        }
        self.output = absolute(&self.output);
        for source in self.data.iter_mut().chain(&mut self.evaluation.data) {
            source.image_root = source.image_root.as_deref().map(absolute);
            source.path = match &source.path {
                Paths::One(path) => Paths::One(absolute(path)),
                Paths::Many(paths) => Paths::Many(paths.iter().map(absolute).collect()),
            };
        }
        if let Some(lora) = &mut self.lora {
            lora.start = lora.start.as_deref().map(absolute);
        }
        for part in self.samples.prompts.iter_mut().flatten() {
            if let PromptPart::Image(path) = part {
                *path = absolute(&*path);
            }
        }
        self
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let check = |ok: bool, field, expected, got: &dyn std::fmt::Display| {
            if ok { Ok(()) } else { Err(ConfigError::Value { field, expected, got: got.to_string() }) }
        };
        let (run, batch, sequence, optimizer) = (&self.run, &self.batch, &self.sequence, &self.optimizer);
        check(!self.data.is_empty(), "data", "at least one source", &"none")?;
        check(
            run.steps.is_some() != run.epochs.is_some(),
            "run",
            "either `steps` or `epochs`",
            &if run.steps.is_some() { "both" } else { "neither" },
        )?;
        check(run.steps != Some(0), "run.steps", "at least 1", &0)?;
        let epochs = run.epochs.unwrap_or(1.0);
        check(epochs > 0.0 && epochs.is_finite(), "run.epochs", "a number above 0", &epochs)?;
        check(
            run.epochs.is_none() || self.loading.check > 0,
            "loading.check",
            "at least 1 with `run.epochs`, whose steps are counted over what is checked",
            &0,
        )?;
        check(sequence.length >= 8, "sequence.length", "at least 8", &sequence.length)?;
        check(sequence.max_images > 0, "sequence.max_images", "at least 1", &0)?;
        check(batch.tokens >= sequence.length, "batch.tokens", "at least `sequence.length`", &batch.tokens)?;
        check(
            batch.images >= sequence.max_images,
            "batch.images",
            "at least `sequence.max_images`",
            &batch.images,
        )?;
        check(batch.sequences != Some(0), "batch.sequences", "at least 1", &0)?;
        check(batch.accumulation > 0, "batch.accumulation", "at least 1", &0)?;
        let rate = |rate: f64| rate >= 0.0 && rate.is_finite();
        check(
            rate(optimizer.learning_rate),
            "optimizer.learning_rate",
            "a number that is not negative",
            &optimizer.learning_rate,
        )?;
        check(
            rate(optimizer.end_learning_rate),
            "optimizer.end_learning_rate",
            "a number that is not negative",
            &optimizer.end_learning_rate,
        )?;
        for Rate { factor, .. } in &self.trainable.rates {
            check(rate(*factor), "trainable.rates.factor", "a number that is not negative", factor)?;
        }
        for (field, beta) in [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)] {
            check((0.0..1.0).contains(&beta), field, "a number from 0 to below 1", &beta)?;
        }
        check(rate(optimizer.eps), "optimizer.eps", "a number that is not negative", &optimizer.eps)?;
        check(
            rate(optimizer.weight_decay),
            "optimizer.weight_decay",
            "a number that is not negative",
            &optimizer.weight_decay,
        )?;
        check(
            rate(optimizer.clip_norm),
            "optimizer.clip_norm",
            "a number that is not negative",
            &optimizer.clip_norm,
        )?;
        check(
            rate(optimizer.z_loss),
            "optimizer.z_loss",
            "a number that is not negative",
            &optimizer.z_loss,
        )?;
        check(
            (0.0..1.0).contains(&self.evaluation.held_out),
            "evaluation.held_out",
            "a share from 0 to below 1",
            &self.evaluation.held_out,
        )?;
        check(self.evaluation.every > 0, "evaluation.every", "at least 1", &0)?;
        check(self.evaluation.max_samples > 0, "evaluation.max_samples", "at least 1", &0)?;
        check(
            self.evaluation.patience == 0 || self.evaluation.has_data(),
            "evaluation.patience",
            "0 without `evaluation.held_out` or `evaluation.data`",
            &self.evaluation.patience,
        )?;
        check(self.checkpoints.every > 0, "checkpoints.every", "at least 1", &0)?;
        check(self.checkpoints.keep > 0, "checkpoints.keep", "at least 1", &0)?;
        check(self.samples.every > 0, "samples.every", "at least 1", &0)?;
        check(
            (0.0..=1.0).contains(&self.loading.max_broken),
            "loading.max_broken",
            "a share from 0 to 1",
            &self.loading.max_broken,
        )?;
        let cache = self.loading.image_cache_gb;
        check(rate(cache), "loading.image_cache_gb", "a number that is not negative", &cache)?;
        check(
            cache == 0.0 || self.augment.is_none(),
            "loading.image_cache_gb",
            "0 with `augment`, which shows no picture twice",
            &cache,
        )?;
        if let Some(lora) = &self.lora {
            check(lora.r > 0, "lora.r", "at least 1", &0)?;
            check(lora.alpha.is_finite(), "lora.alpha", "a number", &lora.alpha)?;
            let is_share = (0.0..1.0).contains(&lora.dropout);
            check(is_share, "lora.dropout", "a share from 0 to below 1", &lora.dropout)?;
        }
        let sound = self.augment.is_none_or(|augment| augment.is_sound());
        check(sound, "augment", "ranges above 0, a scale up to 1", &format!("{:?}", self.augment))
    }
}

/// Where a path leads from here; it need not be there.
fn absolute(path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref();
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Puts one `a.b=value` into a table.
fn set(table: &mut Table, text: &str) -> Result<(), ConfigError> {
    let bad = |reason: &str| ConfigError::Parse { origin: text.to_owned(), reason: reason.to_owned() };
    let (key, value) = text.split_once('=').ok_or_else(|| bad("expected FIELD=VALUE"))?;
    let (key, value) = (key.trim(), value.trim());
    // A document of one value is the shortest way to read a value.
    let parsed = format!("value = {value}").parse::<Table>().ok().and_then(|mut table| table.remove("value"));
    let value = parsed.unwrap_or_else(|| Value::String(value.to_owned()));
    // A run is bounded by one of the two: the other goes, wherever it was said.
    let other = match key {
        "run.steps" => Some("epochs"),
        "run.epochs" => Some("steps"),
        _ => None,
    };
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().filter(|last| !last.is_empty()).ok_or_else(|| bad("expected FIELD=VALUE"))?;
    let mut table = table;
    for part in parts {
        let entry = table.entry(part).or_insert_with(|| Value::Table(Table::new()));
        table = entry.as_table_mut().ok_or_else(|| bad("there are no fields in it"))?;
    }
    other.map(|other| table.remove(other));
    table.insert(last.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORTEST: &str =
        "model = 'm'\noutput = 'o'\n[run]\nsteps = 10\n[[data]]\nformat = 'jsonl'\npath = 'x'\n";

    fn parse(text: &str, overrides: &[&str]) -> Result<TrainConfig, String> {
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        TrainConfig::parse("run.toml", text, &overrides).map_err(|error| error.to_string())
    }

    #[test]
    fn a_short_file_is_enough() {
        let config = parse(SHORTEST, &[]).unwrap();
        assert_eq!(config.optimizer, OptimizerConfig::default());
        assert_eq!((config.batch.accumulation, config.augment), (1, None));
        // What a run remembers of its configuration is the whole of it.
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<TrainConfig>(&json).unwrap(), config);
    }

    /// The guide's configurations are read, and the one with all options has the defaults.
    #[test]
    fn the_guide_is_right() {
        let guide = include_str!("../../../docs/fine-tuning.md");
        let blocks: Vec<String> = guide
            .split("```toml\n")
            .skip(1)
            .map(|block| block.split("```").next().unwrap().replace("\n   ", "\n"))
            .collect();
        assert_eq!(blocks.len(), 3);
        parse(&blocks[0], &[]).unwrap();
        let head = "model = 'm'\noutput = 'o'\n";
        let tail = "[[data]]\nformat = 'jsonl'\npath = 'x'\n";
        let rates = parse(&format!("{SHORTEST}{}", blocks[1]), &[]).unwrap();
        assert_eq!(rates.trainable.rate_factor("model.vision_model.x"), 0.1);
        let all = parse(&format!("{head}{}{tail}", blocks[2]), &[]).unwrap();
        let plain = parse(&format!("{head}[run]\nsteps = 1000\n{tail}"), &[]).unwrap();
        assert_eq!(all.lora, Some(LoraOptions::default()));
        assert_eq!(all.augment.unwrap().scale, RandomResizedCrop::default().scale);
        assert_eq!(all.quantize.as_ref().unwrap().recipe(), Recipe::new(Format::Nf4));
        assert_eq!(TrainConfig { lora: None, augment: None, quantize: None, ..all }, plain);
    }

    #[test]
    fn flags_have_the_last_word() {
        let overrides = [
            "optimizer.learning_rate=2e-4",
            "output = elsewhere/run 1",
            "augment.scale = [0.8, 1.0]",
            "trainable.preset=frozen-backbones",
            "run.steps=5",
        ];
        let config = parse(SHORTEST, &overrides).unwrap();
        assert_eq!((config.optimizer.learning_rate, config.run.steps), (2e-4, Some(5)));
        assert_eq!(config.output, Path::new("elsewhere/run 1"));
        assert_eq!(config.augment.unwrap().scale, [0.8, 1.0]);
        // Either bound of a run takes the place of the other.
        let bounds = |overrides: &[&str]| {
            let run = parse(SHORTEST, overrides).unwrap().run;
            (run.steps, run.epochs)
        };
        assert_eq!(bounds(&["run.epochs=2"]), (None, Some(2.0)));
        assert_eq!(bounds(&["run.epochs=2", "run.steps=7"]), (Some(7), None));
        assert!(parse(SHORTEST, &["steps"]).unwrap_err().contains("FIELD=VALUE"));
        assert!(parse(SHORTEST, &["model.x=1"]).unwrap_err().contains("no fields in it"));
    }

    #[test]
    fn what_a_run_writes_is_read_again_from_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let text = "model = 'some/name'\noutput = 'o'\n[run]\nepochs = 2\n[lora]\nstart = 'a'\n[quantize]\n\
            format = 'nf4+dq'\n[trainable]\nunfreeze = [['a', 'b']]\nrates = [{parts = ['a'], factor = 0.5}]\n\
            [augment]\n[optimizer]\nmoments = '8bit'\n[samples]\nprompts = [[{text = 'x'}, {image = 'i.png'}]]\n\
            [[evaluation.data]]\nformat = 'csv'\npath = ['x', 'y*.csv']\nprompt = 'p'\n\
            [[data]]\nformat = 'jsonl'\npath = 'x'\nimage_root = 'r'\n";
        let config = parse(text, &["run.steps=7", "seed=3"]).unwrap();
        assert!(config.write(&path).unwrap());
        let read = TrainConfig::load(&path, &[]).unwrap();
        assert_eq!(read, config.clone().with_absolute_paths());
        assert_eq!((read.run.steps, read.run.epochs, read.model.as_str()), (Some(7), None, "some/name"));
        let here = std::env::current_dir().unwrap();
        assert_eq!(read.output, here.join("o"));
        assert_eq!(read.data[0].path, Paths::One(here.join("x")));
        assert_eq!(read.evaluation.data[0].path, Paths::Many(vec![here.join("x"), here.join("y*.csv")]));
        // A second time as the first, and over nothing that a person wrote.
        assert!(read.write(&path).unwrap());
        assert_eq!(TrainConfig::load(&path, &[]).unwrap(), read);
        std::fs::write(&path, "# mine\n").unwrap();
        assert!(!config.write(&path).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "# mine\n");
    }

    #[test]
    fn mistakes_are_named() {
        let check = |addition: &str, expected: &str| {
            let error = parse(&format!("{SHORTEST}{addition}"), &[]).unwrap_err();
            assert!(error.contains(expected), "{addition}: {error}");
        };
        check("[optimiser]\n", "run.toml, line 8: unknown field `optimiser`");
        check("[optimizer]\nlr = 1\n", "line 9: unknown field `lr`");
        check("[batch]\ntokens = 'many'\n", "line 9: invalid type");
        check("[batch]\ntokens = 10\n", "batch.tokens: expected at least `sequence.length`, got 10");
        check("[sequence]\nmax_images = 0\n", "sequence.max_images: expected at least 1, got 0");
        check("[evaluation]\nheld_out = 1.5\n", "evaluation.held_out: expected a share");
        check(
            "[evaluation]\npatience = 2\n",
            "evaluation.patience: expected 0 without `evaluation.held_out` or `evaluation.data`, got 2",
        );
        check(
            "[evaluation]\nheld_out = 0.1\nmax_samples = 0\n",
            "evaluation.max_samples: expected at least 1",
        );
        check("[augment]\nscale = [0.5, 2.0]\n", "augment: expected ranges");
        check(
            "[[trainable.rates]]\nparts = ['vision']\nfactor = -1.0\n",
            "trainable.rates.factor: expected a number that is not negative, got -1",
        );
        check(
            "[loading]\nimage_cache_gb = 1.0\n[augment]\n",
            "loading.image_cache_gb: expected 0 with `augment`",
        );
        let uncounted = SHORTEST.replace("steps = 10", "epochs = 1") + "[loading]\ncheck = 0\n";
        let error = parse(&uncounted, &[]).unwrap_err();
        assert!(error.contains("loading.check: expected at least 1 with `run.epochs`"), "{error}");
        let neither = parse(&SHORTEST.replace("steps = 10", ""), &[]).unwrap_err();
        assert_eq!(neither, "run: expected either `steps` or `epochs`, got neither");
    }
}
