//! Flags that every model command shares: which model, how it computes, how prompts become its inputs.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use clap::ValueEnum;
use idefics::{
    ComputeType, Idefics, LoadOptions, Processor,
    adapter::AdapterSource,
    generate::{Engine, EngineOptions, Scheduler},
    processor::{AddEndOfUtterance, ExifOrientation, FetchPolicy, ImageLimits, ProcessOptions},
    quantize::Recipe,
};

use crate::{commands::quantize::FormatName, source::Source};

/// The model and its processor.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Directory of a checkpoint, or a model of the hub, which is downloaded on first use [default: what
    /// `IDEFICS_MODEL` says, or the small built-in idefics-tiny]
    #[arg(long, short, value_name = "DIR|ID")]
    model: Option<String>,

    /// What products are computed in; `auto` follows the checkpoint: f32 or bf16. `int8` is bf16 but for packed
    /// weights (NF4, Q8), which multiply activations rounded to 8 bits: faster with many tokens, less exact
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Dtype,

    /// Pack the weights of the text model and the gated blocks in memory while loading
    #[arg(long, value_enum, value_name = "FORMAT")]
    quantize: Option<FormatName>,

    /// Use a LoRA adapter, as PEFT or `idefics train` writes it, beside the weights, times WEIGHT [default: 1]; can be
    /// given several times
    #[arg(long, value_name = "DIR[=WEIGHT]", value_parser = adapter_source)]
    adapter: Vec<AdapterSource>,

    /// Threads to compute with [default: all processors]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Whether `<end_of_utterance>` goes between neighbouring texts; `auto`: if the vocabulary has it
    #[arg(long, value_enum, default_value = "auto", value_name = "WHEN")]
    add_end_of_utterance: When,

    #[command(flatten)]
    images: ImageArgs,
}

/// What a picture may cost and where it may come from.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Images")]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
struct ImageArgs {
    /// Turn pictures as their EXIF data says; the reference does not
    #[arg(long)]
    apply_exif: bool,

    /// Largest picture, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = ImageLimits::default().max_bytes)]
    max_image_bytes: usize,

    /// Largest picture, in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = ImageLimits::default().max_pixels)]
    max_image_pixels: u64,

    /// Fetch no pictures from the network
    #[arg(long)]
    no_fetch: bool,

    /// Seconds that fetching a picture may take
    #[arg(long, value_name = "SECONDS", default_value_t = FetchPolicy::default().timeout.as_secs())]
    fetch_timeout: u64,

    /// Redirects that are followed
    #[arg(long, value_name = "N", default_value_t = FetchPolicy::default().max_redirects)]
    max_redirects: usize,

    /// Fetch pictures from private addresses too
    #[arg(long)]
    allow_private_addresses: bool,

    /// Fetch pictures from other ports than 80 and 443 too
    #[arg(long)]
    allow_any_port: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    Int8,
    Auto,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum When {
    Auto,
    Always,
    Never,
}

/// A model that is ready.
pub(crate) struct Loaded {
    /// What it is called, as the command line has it.
    pub(crate) name: String,
    pub(crate) model: Arc<Idefics>,
    pub(crate) processor: Processor,
    pub(crate) options: ProcessOptions,
}

/// Starts the one pool of threads, `threads` of them or as many as there are processors.
pub(crate) fn start_threads(threads: Option<usize>) -> anyhow::Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    if threads == 0 {
        bail!("--threads: expected at least 1, got 0");
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build_global().context("cannot start the threads")
}

impl Loaded {
    /// What answers prompts, the same as behind a server. Pictures and beginnings of prompts that come again are
    /// not read again.
    pub(crate) fn engine(&self) -> anyhow::Result<Engine<Idefics>> {
        let options = EngineOptions { scheduler: Scheduler::default(), ..EngineOptions::default() };
        let (model, decoder) = (Arc::clone(&self.model), Arc::new(self.processor.clone()));
        Engine::start(model, decoder, options).context("cannot start a thread")
    }
}

/// Reads `DIR` or `DIR=WEIGHT`. A directory whose own name looks like the latter is found all the same.
pub(crate) fn adapter_source(word: &str) -> Result<AdapterSource, String> {
    let whole = |weight| AdapterSource { directory: PathBuf::from(word), weight };
    if std::path::Path::new(word).is_dir() {
        return Ok(whole(1.0));
    }
    match word.rsplit_once('=') {
        None => Ok(whole(1.0)),
        Some((directory, number)) => {
            let weight: f32 =
                number.parse().map_err(|_| format!("expected a number behind `=`, got `{number}`"))?;
            Ok(AdapterSource { directory: PathBuf::from(directory), weight })
        }
    }
}

impl From<Dtype> for ComputeType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::Int8 => Self::Int8,
            Dtype::Auto => Self::Auto,
        }
    }
}

impl ModelArgs {
    /// The format that weights are packed in while loading, if any.
    pub(crate) fn packed_as(&self) -> Option<&'static str> {
        self.quantize.map(FormatName::as_str)
    }

    /// Finds, downloads and opens the model; says on stderr if it is the small one that nobody named.
    pub(crate) fn load(&self) -> anyhow::Result<Loaded> {
        self.open(Source::find_and_tell(self.model.as_deref(), "--model")?)
    }

    /// Finds and downloads the model.
    pub(crate) fn find(&self) -> anyhow::Result<Source> {
        Source::find(self.model.as_deref())
    }

    /// Opens the model that was found.
    pub(crate) fn open(&self, source: Source) -> anyhow::Result<Loaded> {
        start_threads(self.threads)?;
        let Source { name, files, .. } = source;
        let in_model = || format!("model {}", files.name().display());
        // The processor is small and most often what is missing, so it goes first.
        let processor = Processor::from_pretrained(&files).with_context(in_model)?;
        let quantize = self.quantize.map(|format| Recipe::new(format.plain()));
        let options = LoadOptions {
            compute: self.dtype.into(),
            quantize,
            adapters: self.adapter.clone(),
            ..LoadOptions::default()
        };
        let model = Idefics::from_pretrained(&files, &options).with_context(in_model)?;
        model.check_processor(&processor).with_context(in_model)?;
        Ok(Loaded { name, model: Arc::new(model), processor, options: self.process_options() })
    }

    pub(crate) fn process_options(&self) -> ProcessOptions {
        let images = &self.images;
        ProcessOptions {
            add_end_of_utterance: match self.add_end_of_utterance {
                When::Auto => AddEndOfUtterance::Auto,
                When::Always => AddEndOfUtterance::Always,
                When::Never => AddEndOfUtterance::Never,
            },
            orientation: if images.apply_exif { ExifOrientation::Apply } else { ExifOrientation::Ignore },
            limits: ImageLimits {
                max_bytes: images.max_image_bytes,
                max_pixels: images.max_image_pixels,
                ..ImageLimits::default()
            },
            fetch: FetchPolicy {
                enabled: !images.no_fetch,
                timeout: Duration::from_secs(images.fetch_timeout),
                max_bytes: images.max_image_bytes,
                max_redirects: images.max_redirects,
                allow_private: images.allow_private_addresses,
                allow_any_port: images.allow_any_port,
                ..FetchPolicy::default()
            },
            ..ProcessOptions::default()
        }
    }
}
