//! `idefics inspect`: what a model is, what it needs, and whether anything is wrong with it.
//!
//! Nothing is loaded: headers are read, weights are mapped, and only the check of values looks at the numbers.

mod processor;
mod report;
mod tokenize;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::bail;
use clap::ValueEnum;
use idefics::{
    checkpoint::{Checkpoint, DType, Weights, read_config},
    config::{IdeficsConfig, Workload},
};

use crate::{output, progress::ByteProgress, source::Source};
use report::{MemoryReport, Report, TensorReport, ValuesReport};

/// Models up to this many bytes have their values checked without being asked.
const SMALL_MODEL: u64 = 1 << 30;

const EXAMPLES: &str = "\
Examples:
  idefics inspect                                               # the small built-in model
  idefics inspect HuggingFaceM4/idefics-9b-instruct
  idefics inspect ./model --context 1024 --batch 8 --images 2   # memory of such a workload
  idefics inspect ./model --keys --json                         # everything, for programs
  idefics inspect ./model --check-values                        # also look for NaN and infinity
  idefics inspect ./model --tokenize lines.txt                  # token ids of each line

The exit status is 0 only if nothing is wrong with the model.";

/// Show configuration, size, memory needs and problems of a model without loading it
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Model directory, or model on the hub (`ORG/NAME[@REVISION]`) [default: what `IDEFICS_MODEL` says, or the small
    /// built-in idefics-tiny]
    #[arg(value_name = "MODEL")]
    model: Option<String>,

    /// List every tensor with type and shape
    #[arg(long)]
    keys: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    /// Tokens of a sequence, for the memory it needs [default: the longest of the model]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,

    /// Sequences at once, for the memory they need
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,

    /// Pictures in each sequence, for the memory they need
    #[arg(long, value_name = "N", default_value_t = 1)]
    images: u32,

    /// Element type of the computation, for the memory it needs
    #[arg(long, value_enum, default_value_t = Compute::Auto)]
    dtype: Compute,

    /// Look at every number for NaN and infinity, even if the model has more than 1 GiB
    #[arg(long)]
    check_values: bool,

    /// Print the token ids of each line of a text file (`-` for stdin) and nothing else, one JSON array a line
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["keys", "json", "context", "batch", "images", "dtype", "check_values"]
    )]
    tokenize: Option<PathBuf>,
}

/// Element type of the computation.
#[derive(Clone, Copy, ValueEnum)]
enum Compute {
    /// 32-bit floats
    F32,
    /// 16-bit brain floats
    Bf16,
    /// bf16 if most weights are, else f32
    Auto,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let files = Source::find_and_tell(args.model.as_deref(), "idefics inspect")?.files;
    if let Some(path) = &args.tokenize {
        return tokenize::run(&files, path);
    }
    let config = read_config(&files)?;
    let mut report = Report::new(&files, &config);
    match Checkpoint::open(&files) {
        Ok(checkpoint) => describe(&mut report, &checkpoint, args),
        Err(error) => report.problems.push(format!("{:#}", anyhow::Error::new(error))),
    }
    processor::describe(&mut report, &files, &config);
    report.memory = memory(&config, report.weight_bytes(), &report, args);
    let text = if args.json { serde_json::to_string(&report)? } else { report.to_string() };
    output::print(&text)?;
    match report.problems.as_slice() {
        [] => Ok(()),
        [problem] => bail!("{problem}"),
        problems => bail!("{} problems: {}", problems.len(), problems.join("; ")),
    }
}

/// Adds what the files say to the report.
fn describe(report: &mut Report, checkpoint: &Checkpoint, args: &Args) {
    report.add_weights(checkpoint);
    if args.keys {
        let weights = &checkpoint.weights;
        let dense = weights.iter().map(|(name, weight)| TensorReport::new(name, weight));
        let packed = weights.iter_packed().map(|(name, weight)| TensorReport::packed(name, weight));
        let mut tensors: Vec<_> = dense.chain(packed).collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        report.tensors = Some(tensors);
    }
    if args.check_values || report.weight_bytes() < SMALL_MODEL {
        let values = check_values(&checkpoint.weights, report.weight_bytes());
        for (name, found) in &values.not_finite {
            let problem =
                format!("tensor `{name}` has {} NaN and {} infinite values", found.nan, found.infinite);
            report.problems.push(problem);
        }
        report.values = Some(values);
    }
}

/// Looks at every number once.
fn check_values(weights: &Weights, bytes: u64) -> ValuesReport {
    // A moment's work needs no bar.
    let mut progress = (bytes > SMALL_MODEL / 8).then(|| ByteProgress::start("checking values", 0, bytes));
    let mut not_finite = BTreeMap::new();
    let dense = weights.iter().map(|(name, weight)| (name, weight.count_non_finite(), weight.bytes().len()));
    let packed =
        weights.iter_packed().map(|(name, weight)| (name, weight.count_non_finite(), weight.num_bytes()));
    for (name, found, bytes) in dense.chain(packed) {
        if !found.is_none() {
            not_finite.insert(name.to_owned(), found);
        }
        if let Some(progress) = &mut progress {
            progress.advance(bytes as u64);
        }
    }
    if let Some(progress) = progress {
        progress.finish();
    }
    ValuesReport { tensors: weights.len(), not_finite }
}

fn memory(config: &IdeficsConfig, weights: u64, report: &Report, args: &Args) -> MemoryReport {
    let compute = match args.dtype {
        Compute::F32 => DType::F32,
        Compute::Bf16 => DType::Bf16,
        Compute::Auto => match report.main_dtype().or(config.declared_dtype()) {
            Some(DType::Bf16) => DType::Bf16,
            Some(DType::F16 | DType::F32) | None => DType::F32,
        },
    };
    let context = args.context.map_or(config.max_position_embeddings, |context| context as usize);
    let workload = Workload { context, batch: args.batch as usize, images: args.images as usize, compute };
    MemoryReport::new(config, workload, weights)
}

/// The name of a file without its directory.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
