//! `idefics quantize`: a model into fewer bits, as a directory of its own.

use std::{collections::BTreeSet, path::PathBuf};

use clap::ValueEnum;
use idefics::{
    checkpoint::Part,
    quantize::{Format, Quantizer, Recipe, Summary},
};
use indicatif::HumanBytes;

use crate::{model::start_threads, output, progress::ByteProgress, source::files_of};

const EXAMPLES: &str = "\
Examples:
  idefics quantize HuggingFaceM4/idefics-9b-instruct ./idefics-9b-nf4 --format nf4 --double-quant
  idefics quantize ./model ./model-q8 --format q8 --parts text,cross,vision

Memory is bounded by the largest tensor. The model is read twice, to write it and to compare what was written.
An interrupted run is continued by the same command. An nf4 directory loads in transformers with bitsandbytes.";

/// Write a model with the weights of its linear layers in 4 or 8 bits
///
/// Heads, embeddings, norms and gates stay as they are.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Model directory, or model on the hub (`ORG/NAME[@REVISION]`)
    #[arg(value_name = "IN")]
    model: String,

    /// Directory to write: new, empty, or left by an interrupted run
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// How weights are stored
    #[arg(long, value_enum)]
    format: FormatName,

    /// Quantize the scales, too: 4.13 instead of 4.5 bits an element (nf4 only)
    #[arg(long)]
    double_quant: bool,

    /// Parts whose linear layers are packed
    #[arg(long, value_enum, value_name = "PART,..", value_delimiter = ',', default_value = "text,cross")]
    parts: Vec<PartName>,

    /// Largest weight file in GB (10^9 bytes); no tensor is split
    #[arg(long, value_name = "GB", default_value_t = 5.0, value_parser = positive)]
    max_shard_gb: f64,

    /// Threads to compute with [default: all processors]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A format by the name that its flag has.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum FormatName {
    /// 4 bits, in the layout of bitsandbytes
    Nf4,
    /// 8 bits
    Q8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PartName {
    /// The LLaMA layers
    Text,
    /// The gated cross-attention blocks
    Cross,
    /// The CLIP tower
    Vision,
    /// The perceiver resampler
    Perceiver,
}

impl FormatName {
    /// The name.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Q8 => "q8",
        }
    }

    /// The format with plain scales.
    pub(crate) fn plain(self) -> Format {
        match self {
            Self::Nf4 => Format::Nf4,
            Self::Q8 => Format::Q8,
        }
    }
}

impl From<PartName> for Part {
    fn from(name: PartName) -> Self {
        match name {
            PartName::Text => Self::Text,
            PartName::Cross => Self::Cross,
            PartName::Vision => Self::Vision,
            PartName::Perceiver => Self::Perceiver,
        }
    }
}

/// A number above 0.
pub(crate) fn positive(word: &str) -> Result<f64, String> {
    let number: f64 = word.parse().map_err(|_| "expected a number".to_owned())?;
    if number > 0.0 && number.is_finite() { Ok(number) } else { Err("expected a number above 0".to_owned()) }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let format = match (args.format, args.double_quant) {
        (FormatName::Nf4, true) => Format::Nf4DoubleQuant,
        (FormatName::Q8, true) => anyhow::bail!("--double-quant: only nf4 has scales of that kind"),
        (format, false) => format.plain(),
    };
    start_threads(args.threads)?;
    let parts: BTreeSet<Part> = args.parts.iter().map(|name| Part::from(*name)).collect();
    let quantizer = Quantizer::open(files_of(&args.model)?, &Recipe { format, parts })?
        .with_max_shard_bytes((args.max_shard_gb * 1e9) as u64)?;
    let mut progress = ByteProgress::start("quantizing", 0, quantizer.work_bytes());
    let summary = quantizer.write(&args.out, &mut |bytes| progress.advance(bytes))?;
    progress.finish();
    let text = if args.json { serde_json::to_string(&summary)? } else { describe(&summary, format) };
    Ok(output::print(&text)?)
}

fn describe(summary: &Summary, format: Format) -> String {
    let kept = match summary.kept {
        0 => String::new(),
        kept => format!(", {kept} of them finished before"),
    };
    format!(
        "{}: {} weights in {format}, {} as they were; {} to {} in {} file{}{kept}; read back and compared",
        summary.directory.display(),
        summary.packed,
        summary.copied,
        HumanBytes(summary.source_bytes),
        HumanBytes(summary.bytes),
        summary.files,
        if summary.files == 1 { "" } else { "s" },
    )
}
