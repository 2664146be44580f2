//! From files to sequences: sources, their mixture, tokens and labels, reading ahead.
//!
//! `Source` (samples by number) → `Mixture` (which comes next) → `Encoder` (tokens, labels, pixels) → `Loader`
//! (on threads, in order). Nothing here knows a model or a batch.

mod augment;
mod encode;
mod files;
mod json;
mod jsonl;
mod loader;
mod mixture;
mod obelics;
mod sample;
mod source;
mod template;
mod webdataset;

use std::path::{Path, PathBuf};

pub use augment::RandomResizedCrop;
pub use encode::{Encoder, LossOn, SequenceConfig, Tokens};
pub use loader::{Loaded, Loader, load};
pub use mixture::{Address, Mixture, MixturePosition, Share};
pub use sample::{Piece, Role, Sample, SampleError, SampleKind};
pub use source::{Format, Paths, Source, SourceConfig};

/// Why data cannot be used at all; what is wrong with one sample is a [`SampleError`].
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Nothing at a path.
    #[error("no such file: {}", pattern.display())]
    NoFiles {
        /// The path or pattern.
        pattern: PathBuf,
    },
    /// A key that the chosen format does not read.
    #[error("data: the format {format} does not read `{key}`: expected it with {readers}")]
    UnreadKey {
        /// The key.
        key: &'static str,
        /// The format.
        format: Format,
        /// The formats that read it.
        readers: String,
    },
    /// A source without samples.
    #[error("{}: no samples", path.display())]
    Empty {
        /// The first of its files.
        path: PathBuf,
    },
    /// A table or parquet file that cannot be read.
    #[error("{}: {reason}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A template with a brace too many.
    #[error("template `{template}`: {reason}")]
    Template {
        /// As it was given.
        template: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A share of the mixture that is none.
    #[error("weight of a source: expected a number above 0, got {weight}")]
    Weight {
        /// As it was given.
        weight: f64,
    },
    /// All samples are held out.
    #[error("all {samples} samples of a source are held out: nothing is left to train on")]
    NothingLeft {
        /// How many it has.
        samples: u64,
    },
    /// A position of another mixture.
    #[error("the data has {expected} sources, but the checkpoint was written with {got}")]
    OtherSources {
        /// Sources of this run.
        expected: usize,
        /// Sources of the run that was left.
        got: usize,
    },
    /// Too many samples are broken.
    #[error(
        "{broken} of {read} samples are broken, more than the share {limit} allows; the last one: {last}"
    )]
    TooManyBroken {
        /// How many could not be used.
        broken: u64,
        /// Out of how many.
        read: u64,
        /// The configured share.
        limit: f64,
        /// One of them.
        last: SampleError,
    },
    /// Threads cannot be started.
    #[error("cannot start the threads that read data: {reason}")]
    Threads {
        /// Why.
        reason: String,
    },
    /// The system refused to read.
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

impl DataError {
    fn io(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path: path.clone(), source }
    }
}
