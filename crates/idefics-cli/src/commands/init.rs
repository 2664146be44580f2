//! `idefics init`: a new model from a text model and a vision tower, or from scratch.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::ValueEnum;
use idefics::{
    checkpoint::DType,
    config::{AlphaType, IdeficsConfig, PerceiverConfig},
};
use idefics_train::init::{AddedTokens, Blocks, Initializer, Source, Summary};
use indicatif::HumanBytes;

use crate::{model::start_threads, output, progress::ByteProgress};

const EXAMPLES: &str = "\
Examples:
  idefics init --vision ./clip-vit-h14 --text ./llama-7b --out ./my-idefics
  idefics init --vision ./clip --text ./small-llama --cross-layer-interval 2 --end-of-utterance --out ./small
  idefics init --from-config config.json --tokenizer ./tokenizer --seed 7 --out ./scratch

The new model gives the text model's own logits where there is no picture, and its tower the features of CLIP's;
the blocks between them are new and have to be trained. The same seed gives the same bytes everywhere.";

/// Build a new model from a LLaMA text model and a CLIP vision tower, or from scratch
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Directory of a `CLIPVisionModel`, or of a `CLIPModel`, whose vision half is taken
    #[arg(long, value_name = "DIR", requires = "text")]
    vision: Option<PathBuf>,

    /// Directory of a `LlamaForCausalLM` with its tokenizer
    #[arg(long, value_name = "DIR", requires = "vision")]
    text: Option<PathBuf>,

    /// An IDEFICS `config.json`: make all weights new
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vision", "text"])]
    from_config: Option<PathBuf>,

    /// Directory to write: new or empty
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,

    /// Directory of the tokenizer [default: the text model's]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,

    /// Add `<end_of_utterance>` to the vocabulary, as the instruct models have it
    #[arg(long)]
    end_of_utterance: bool,

    /// Element type of the weights [default: the text model's, or the configuration's]
    #[arg(long, value_enum)]
    dtype: Option<DtypeName>,

    /// What new weights follow from
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    #[command(flatten)]
    blocks: BlockArgs,

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

/// What stands between the two models.
#[derive(clap::Args)]
#[command(next_help_heading = "New blocks (not with --from-config)")]
#[group(conflicts_with = "from_config", multiple = true)]
struct BlockArgs {
    /// A gated cross-attention block before every n-th layer [default: 4]
    #[arg(long, value_name = "N")]
    cross_layer_interval: Option<usize>,

    /// No norms on queries and keys of the gated blocks
    #[arg(long)]
    no_qk_layer_norms: bool,

    /// One gate for a block, or one for each channel [default: float]
    #[arg(long, value_enum)]
    alpha_type: Option<AlphaTypeName>,

    /// How gates start; anything but zeros changes the text model's logits [default: zeros]
    #[arg(long, value_enum, value_name = "HOW")]
    alpha_initializer: Option<AlphaInitializer>,

    /// Standard deviation of gates that start as `normal` [default: 0]
    #[arg(long, value_name = "STD")]
    alphas_initializer_range: Option<f64>,

    /// No resampler: the text model sees every feature of the tower
    #[arg(long)]
    no_resampler: bool,

    /// Latents of a picture that the text model sees [default: 64]
    #[arg(long, value_name = "N", conflicts_with = "no_resampler")]
    resampler_n_latents: Option<usize>,

    /// Blocks of the resampler [default: 6]
    #[arg(long, value_name = "N", conflicts_with = "no_resampler")]
    resampler_depth: Option<usize>,

    /// Attention heads of the resampler [default: 16]
    #[arg(long, value_name = "N", conflicts_with = "no_resampler")]
    resampler_n_heads: Option<usize>,

    /// Width of a head of the resampler [default: 96]
    #[arg(long, value_name = "N", conflicts_with = "no_resampler")]
    resampler_head_dim: Option<usize>,

    /// No norms on queries and keys of the resampler
    #[arg(long, conflicts_with = "no_resampler")]
    no_resampler_qk_layer_norms: bool,
}

/// An element type by the name that its flag has.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum DtypeName {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AlphaTypeName {
    Float,
    Vector,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AlphaInitializer {
    Zeros,
    Ones,
    Normal,
}

impl From<DtypeName> for DType {
    fn from(name: DtypeName) -> Self {
        match name {
            DtypeName::F32 => Self::F32,
            DtypeName::F16 => Self::F16,
            DtypeName::Bf16 => Self::Bf16,
        }
    }
}

impl BlockArgs {
    fn blocks(&self) -> Blocks {
        let default = Blocks::default();
        let resampler = default.resampler.filter(|_| !self.no_resampler).map(|default| PerceiverConfig {
            resampler_n_latents: self.resampler_n_latents.unwrap_or(default.resampler_n_latents),
            resampler_depth: self.resampler_depth.unwrap_or(default.resampler_depth),
            resampler_n_heads: self.resampler_n_heads.unwrap_or(default.resampler_n_heads),
            resampler_head_dim: self.resampler_head_dim.unwrap_or(default.resampler_head_dim),
            qk_layer_norms_perceiver: !self.no_resampler_qk_layer_norms,
            ..default
        });
        Blocks {
            cross_layer_interval: self.cross_layer_interval.unwrap_or(default.cross_layer_interval),
            qk_layer_norms: !self.no_qk_layer_norms,
            alpha_type: match self.alpha_type {
                Some(AlphaTypeName::Vector) => AlphaType::Vector,
                Some(AlphaTypeName::Float) | None => AlphaType::Float,
            },
            alpha_initializer: match self.alpha_initializer {
                Some(AlphaInitializer::Ones) => "ones",
                Some(AlphaInitializer::Normal) => "normal",
                Some(AlphaInitializer::Zeros) | None => "zeros",
            }
            .to_owned(),
            alphas_initializer_range: self
                .alphas_initializer_range
                .unwrap_or(default.alphas_initializer_range),
            resampler,
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    start_threads(args.threads)?;
    let blocks = args.blocks.blocks();
    if blocks.alpha_initializer == "normal" && blocks.alphas_initializer_range == 0.0 {
        bail!("--alpha-initializer normal: expected --alphas-initializer-range above 0");
    }
    if blocks.cross_layer_interval == 0 {
        bail!("--cross-layer-interval: expected at least 1, got 0");
    }
    let source = match (&args.vision, &args.text, &args.from_config) {
        (Some(vision), Some(text), _) => {
            Source::Unimodal { vision: vision.clone(), text: text.clone(), blocks }
        }
        (_, _, Some(path)) => {
            let in_file = || format!("--from-config {}", path.display());
            let text = std::fs::read_to_string(path).with_context(in_file)?;
            Source::Scratch(Box::new(IdeficsConfig::from_json(&text).with_context(in_file)?))
        }
        _ => bail!("expected --vision and --text, or --from-config"),
    };
    let initializer = Initializer {
        tokenizer: args.tokenizer.clone(),
        added_tokens: if args.end_of_utterance { AddedTokens::Instruct } else { AddedTokens::Base },
        dtype: args.dtype.map(DType::from),
        seed: args.seed,
        max_shard_bytes: Some((args.max_shard_gb * 1e9) as u64),
        ..Initializer::new(source)
    };
    let mut progress = None;
    let summary = initializer.write(&args.out, &mut |bytes, total| {
        progress.get_or_insert_with(|| ByteProgress::start("writing", 0, total)).advance(bytes);
    })?;
    if let Some(progress) = progress {
        progress.finish();
    }
    if args.tokenizer.is_none() && args.from_config.is_some() {
        eprintln!("note: no tokenizer was named: put its files into {} yourself", args.out.display());
    }
    let text = if args.json { serde_json::to_string(&summary)? } else { describe(&summary) };
    Ok(output::print(&text)?)
}

fn describe(summary: &Summary) -> String {
    let million = |parameters: u64| format!("{:.1} M", parameters as f64 / 1e6);
    let dropped = match summary.dropped_rows {
        0 => String::new(),
        rows => format!("; {rows} rows of the embedding that no token stands for were left out"),
    };
    format!(
        "{}: text model {}, vision tower {}, new blocks and tokens {} parameters; {} in {}{dropped}",
        summary.directory.display(),
        million(summary.text_parameters),
        million(summary.vision_parameters),
        million(summary.new_parameters),
        HumanBytes(summary.bytes),
        summary.dtype,
    )
}
