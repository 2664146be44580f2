//! Why a training run cannot start or go on.

use std::path::{Path, PathBuf};

use idefics::{
    adapter::AdapterError,
    checkpoint::{CheckpointError, WriteError},
    generate::GenerateError,
    model::ModelError,
    processor::ProcessorError,
    quantize::QuantizeError,
};

use crate::{
    adapter::LoraError,
    config::ConfigError,
    data::{DataError, SampleError},
    freeze::UnknownModuleType,
};

/// Any failure of a training run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model itself.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer or the image settings.
    #[error(transparent)]
    Processor(#[from] ProcessorError),
    /// A checkpoint cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// An answer of the model in training.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// Low-rank factors.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// An adapter to begin with.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// An adapter to begin with that has more than factors.
    #[error("adapter {}: it replaces {name}, which training cannot go on with", path.display())]
    ReplacedStart {
        /// The adapter.
        path: PathBuf,
        /// A weight that it replaces.
        name: String,
    },
    /// The frozen layers cannot be packed.
    #[error(transparent)]
    Quantize(#[from] QuantizeError),
    /// A freeze flag of the configuration.
    #[error(transparent)]
    Freeze(#[from] UnknownModuleType),
    /// A weight in few bits cannot move.
    #[error("{name} is packed as {format} and cannot be trained: expected it frozen, with LoRA beside it")]
    PackedTrained {
        /// The weight.
        name: String,
        /// How it is packed.
        format: &'static str,
    },
    /// The rules leave no weight to train.
    #[error("nothing is trained: every weight is frozen and there is no LoRA")]
    NothingTrained,

    /// A learning rate for weights that are not there, or are frozen.
    #[error("trainable.rates: no trained weight has all of {parts:?} in its name")]
    UnusedRate {
        /// The parts of the names.
        parts: Vec<String>,
    },
    /// A pattern for weights that are not there.
    #[error("{field}: no weight of the model has all of {parts:?} in its name")]
    UnusedPattern {
        /// Where it stands.
        field: &'static str,
        /// The parts of the names.
        parts: Vec<String>,
    },
    /// Evaluation was asked for, but no sample of it can be used.
    #[error("evaluation: none of the {read} samples can be used; the last one: {last}")]
    NoEvaluation {
        /// How many were read.
        read: usize,
        /// One of them.
        last: SampleError,
    },
    /// Room for pictures that a tower has read, where the next step would read them otherwise.
    #[error(
        "loading.image_cache_gb: expected 0 where the vision tower is trained, as {trained} is (`lora.exclude` leaves \
         layers out)"
    )]
    TrainedTower {
        /// A weight of it, or a layer with factors beside it.
        trained: String,
    },
    /// The tokenizer has ids that the model has no rows for.
    #[error("the tokenizer has {tokenizer} token ids, but the model has embeddings for {model}")]
    Vocabulary {
        /// One more than the largest id.
        tokenizer: usize,
        /// Rows of the embeddings.
        model: usize,
    },
    /// Sequences longer than the model has positions.
    #[error("sequences of {length} tokens do not fit the model's {positions} positions")]
    Positions {
        /// What was asked for.
        length: usize,
        /// What the model has.
        positions: usize,
    },
    /// The run would need more memory than there is.
    #[error("the run needs {needed} of memory, but {available} are there: {advice}")]
    Memory {
        /// Bytes, for reading.
        needed: String,
        /// Bytes, for reading.
        available: String,
        /// What would help.
        advice: String,
    },
    /// Too many spikes in a row.
    #[error(
        "training diverged: {rollbacks} rollbacks without a new checkpoint between them, the last at step {step}"
    )]
    Diverged {
        /// How often the run went back.
        rollbacks: u64,
        /// Where it gave up.
        step: u64,
    },
    /// The output directory belongs to another run, or there is nothing to resume.
    #[error("{}: {reason}", path.display())]
    Output {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A checkpoint of this run that does not fit it.
    #[error("checkpoint {}: {reason}", path.display())]
    State {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system refused to read or write.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Wraps an input or output error with what was tried.
pub(crate) fn io_error(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> TrainError + use<> {
    let path = path.to_owned();
    move |source| TrainError::Io { action, path: path.clone(), source }
}
