//! `idefics merge`: a model with adapters added into its weights.

use std::path::PathBuf;

use idefics::{
    adapter::{AdapterSource, MergeSummary, Merger},
    checkpoint::DType,
};
use indicatif::HumanBytes;

use super::init::DtypeName;
use crate::{
    model::{adapter_source, start_threads},
    output,
    progress::ByteProgress,
    source::files_of,
};

const EXAMPLES: &str = "\
Examples:
  idefics merge HuggingFaceM4/idefics-9b ./my-adapter ./merged
  idefics merge ./idefics-9b-nf4 ./qlora ./merged --dtype bf16
  idefics merge ./base ./style=0.7 ./merged --adapter ./facts=0.3

Sums are exact to f32 and rounded once to the type of the weights. Packed weights are unpacked first;
`idefics quantize` packs the result again.";

/// Add LoRA adapters into the weights of a model
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Model directory, model on the hub (`ORG/NAME[@REVISION]`), or idefics-tiny, the small built-in model
    #[arg(value_name = "BASE")]
    base: String,

    /// Directory of an adapter as PEFT or `idefics train` writes it, and how much of it to add
    #[arg(value_name = "ADAPTER[=WEIGHT]", value_parser = adapter_source)]
    adapter: AdapterSource,

    /// Directory to write: new or empty
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Another adapter to add; can be given several times
    #[arg(long = "adapter", value_name = "DIR[=WEIGHT]", value_parser = adapter_source)]
    more: Vec<AdapterSource>,

    /// Element type of all weights [default: as they are; of packed ones, that of the rest]
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,

    /// Largest weight file in GB (10^9 bytes); no tensor is split
    #[arg(long, value_name = "GB", default_value_t = 5.0, value_parser = super::quantize::positive)]
    max_shard_gb: f64,

    /// Threads to compute with [default: all processors]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    start_threads(args.threads)?;
    let adapters: Vec<AdapterSource> = std::iter::once(&args.adapter).chain(&args.more).cloned().collect();
    let mut merger = Merger::open(files_of(&args.base)?, &adapters)?
        .with_max_shard_bytes((args.max_shard_gb * 1e9) as u64);
    if let Some(dtype) = args.dtype {
        merger = merger.with_dtype(DType::from(dtype));
    }
    let mut progress = ByteProgress::start("merging", 0, merger.output_bytes());
    let summary = merger.write(&args.out, &mut |bytes| progress.advance(bytes))?;
    progress.finish();
    let text = if args.json { serde_json::to_string(&summary)? } else { describe(&summary) };
    Ok(output::print(&text)?)
}

fn describe(summary: &MergeSummary) -> String {
    let mut parts = vec![format!("factors added to {} weights", summary.merged)];
    if summary.replaced > 0 {
        parts.push(format!("{} replaced", summary.replaced));
    }
    if summary.unpacked > 0 {
        parts.push(format!("{} unpacked", summary.unpacked));
    }
    format!("{}: {}; {}", summary.directory.display(), parts.join(", "), HumanBytes(summary.bytes))
}
