//! `idefics bench`: how fast this machine runs a model, beside what the machine can give.

use std::{
    fmt::Write as _,
    io::{IsTerminal, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use idefics::{
    ComputeType, Idefics, LoadOptions, ModelFiles, Processor,
    bench::{self, Plan, Quality, RandomWeights, Report},
    checkpoint::read_config,
    config::IdeficsConfig,
    model::Model,
    ops::{Compute, Context, Isa},
    quantize::{Format, Recipe},
};
use indicatif::HumanBytes;

use crate::{
    model::{Dtype, start_threads},
    output,
    source::Source,
};

const EXAMPLES: &str = "\
Examples:
  idefics bench --shape 9b --format nf4
  idefics bench --shape 80b --format nf4 --layers 8 --prefill 128 --batches 1,8
  idefics bench --model HuggingFaceM4/idefics-9b-instruct --json
  idefics bench --model HuggingFaceM4/idefics-9b-instruct --quality
  idefics bench --shape 9b --format nf4 --layers 8 --compare --python .venv/bin/python

Every round measures the machine and the model in turns, and medians are printed. `share` is the part that the
model's kernels take of what the machine gave: of its reads from memory while decoding, of its bf16 arithmetic
elsewhere. Weights under --shape are random and in memory; under --model they are read from the mapped files.";

/// Measure how fast this machine runs a model
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Random weights of a size: `9b`, `80b`, or the path of a config.json
    #[arg(long, value_name = "9b|80b|CONFIG", conflicts_with_all = ["model", "quality"])]
    shape: Option<String>,

    /// A checkpoint: a directory or a model of the hub [default: what `IDEFICS_MODEL` says, or the small built-in
    /// idefics-tiny]
    #[arg(long, short, value_name = "DIR|ID")]
    model: Option<String>,

    /// How the random weights of the text model and the gated blocks are stored
    #[arg(long, value_enum, default_value = "bf16", requires = "shape")]
    format: Stored,

    /// Only so many layers of the text model and of the tower
    #[arg(long, value_name = "N", requires = "shape")]
    layers: Option<usize>,

    /// What products are computed in; `auto` is bf16 unless the weights are f32. `int8` is bf16 but for packed
    /// weights, which multiply activations rounded to 8 bits
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Dtype,

    /// Threads to compute with [default: all processors]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Lengths of prompts
    #[arg(long, value_name = "TOKENS,..", value_delimiter = ',', default_values_t = Plan::default().prefill)]
    prefill: Vec<usize>,

    /// Sequences that decode together
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = Plan::default().batches)]
    batches: Vec<usize>,

    /// Pictures of each sequence
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = Plan::default().images)]
    images: Vec<usize>,

    /// Rounds, of which the medians are taken
    #[arg(long, value_name = "N", default_value_t = Plan::default().rounds)]
    rounds: usize,

    /// Compare what packed weights and rounded products cost instead of timing: the divergence of the distributions
    /// over the next token from those of the weights as they are, in f32
    #[arg(long, conflicts_with_all = ["dtype", "prefill", "batches", "images", "rounds"])]
    quality: bool,

    /// Time the peers of reference/ too, in turns with this program, where their Python packages are installed
    #[arg(long, requires = "shape", conflicts_with = "quality")]
    compare: bool,

    /// The Python that has the peers
    #[arg(long, value_name = "PROGRAM", default_value = "python3", requires = "compare")]
    python: PathBuf,

    /// Where the scripts that time them are
    #[arg(long, value_name = "DIR", default_value = "reference", requires = "compare")]
    reference: PathBuf,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How random weights are stored.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stored {
    F32,
    Bf16,
    Q8,
    Nf4,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.quality {
        return args.quality();
    }
    let plan = args.plan()?;
    start_threads(args.threads)?;
    let start = Instant::now();
    let loaded = args.load()?;
    let load_s = start.elapsed().as_secs_f64();
    let report = bench::run(loaded.model(), &plan, &mut show)?;
    clear_line();
    let peak_rss_bytes = peak_rss_bytes();
    let text = if args.json {
        let mut value = serde_json::to_value(&report)?;
        let fields = value.as_object_mut().context("a report is an object")?;
        fields.insert("load_s".to_owned(), load_s.into());
        fields.insert("peak_rss_bytes".to_owned(), peak_rss_bytes.into());
        if args.compare {
            drop(loaded); // the peers need the memory
            fields.insert("peers".to_owned(), serde_json::from_str(&args.peers(Peers::Json)?)?);
        }
        value.to_string()
    } else {
        output::print(&table(&report, load_s, peak_rss_bytes))?;
        if !args.compare {
            return Ok(());
        }
        drop(loaded);
        format!("\n{}", args.peers(Peers::Table)?)
    };
    Ok(output::print(&text)?)
}

/// In what form the peers' figures are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peers {
    Table,
    Json,
}

/// A model with random weights, or a real one.
enum Loaded {
    Random(Box<Model>),
    Checkpoint(Box<Idefics>),
}

impl Loaded {
    fn model(&self) -> &Model {
        match self {
            Self::Random(model) => model,
            Self::Checkpoint(idefics) => idefics.model(),
        }
    }
}

impl Args {
    fn plan(&self) -> anyhow::Result<Plan> {
        for (flag, values, least, most) in [
            ("--prefill", self.prefill.as_slice(), 1, 1 << 20),
            ("--batches", &self.batches, 1, 1024),
            ("--images", &self.images, 0, 64),
            ("--rounds", std::slice::from_ref(&self.rounds), 1, 1000),
        ] {
            if let Some(wrong) = values.iter().find(|value| !(least..=most).contains(*value)) {
                bail!("{flag}: expected {least} to {most}, got {wrong}");
            }
        }
        Ok(Plan {
            prefill: self.prefill.clone(),
            batches: self.batches.clone(),
            images: self.images.clone(),
            rounds: self.rounds,
            ..Plan::default()
        })
    }

    /// What `compare_speed.py` prints of the peers and this program, timed in turns.
    fn peers(&self, form: Peers) -> anyhow::Result<String> {
        let script = self.reference.join("compare_speed.py");
        if !script.is_file() {
            bail!("--compare: `{}` is not there; name the directory with --reference", script.display());
        }
        show("the peers, in turns");
        let mut command = Command::new(&self.python);
        command.arg(&script).arg("--binary").arg(std::env::current_exe()?);
        command.args([
            "--shape",
            self.shape.as_deref().unwrap_or("9b"),
            "--rounds",
            &self.rounds.to_string(),
        ]);
        if let Some(layers) = self.layers {
            command.args(["--layers", &layers.to_string()]);
        }
        if form == Peers::Json {
            command.arg("--json");
        }
        let output = command
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("--compare: cannot run `{}`", self.python.display()))?;
        if !output.status.success() {
            bail!("--compare: `{}` ended with {}", script.display(), output.status);
        }
        clear_line();
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// How far every way to store and to compute is from the exact one.
    fn quality(&self) -> anyhow::Result<()> {
        start_threads(self.threads)?;
        let files = self.files()?;
        let token_ids = Processor::from_pretrained(&files)?.tokenize(bench::TEXT)?;
        let distributions = |compute, quantize: Option<Format>| -> anyhow::Result<_> {
            let quantize = quantize.map(Recipe::new);
            show(&format!("{compute:?} {}", quantize.as_ref().map_or("as it is", |_| "packed")));
            let options = LoadOptions { compute, quantize, ..LoadOptions::default() };
            let idefics = Idefics::from_pretrained(&files, &options)?;
            Ok(bench::distributions(idefics.model(), &token_ids)?)
        };
        let exact = distributions(ComputeType::F32, None)?;
        let is_packed = read_config(&files)?.quantization_config.is_some();
        let packed = [Format::Q8, Format::Nf4, Format::Nf4DoubleQuant];
        let forms = std::iter::once(None).chain(packed.into_iter().filter(|_| !is_packed).map(Some));
        let mut found = Vec::new();
        for form in forms {
            let weights = form.map_or_else(|| "as they are".to_owned(), |form| form.to_string());
            let packed = form.map(|form| distributions(ComputeType::F32, Some(form))).transpose()?;
            let unrounded = packed.as_ref().unwrap_or(&exact);
            if let Some(packed) = &packed {
                found.push(exact.compare(packed, packed, &weights, "f32"));
            }
            for (compute, name) in [(ComputeType::Bf16, "bf16"), (ComputeType::Int8, "int8")] {
                // Without packed weights there are no products in 8 bits.
                if compute == ComputeType::Bf16 || is_packed || form.is_some() {
                    found.push(exact.compare(&distributions(compute, form)?, unrounded, &weights, name));
                }
            }
        }
        clear_line();
        Ok(output::print(&if self.json {
            serde_json::json!({"tokens": token_ids.len(), "quality": found}).to_string()
        } else {
            quality_table(&found, token_ids.len())
        })?)
    }

    fn files(&self) -> anyhow::Result<ModelFiles> {
        Ok(Source::find_and_tell(self.model.as_deref(), "--model")?.files)
    }

    fn load(&self) -> anyhow::Result<Loaded> {
        let Some(shape) = &self.shape else {
            let options = LoadOptions { compute: self.dtype.into(), ..LoadOptions::default() };
            return Ok(Loaded::Checkpoint(Box::new(Idefics::from_pretrained(self.files()?, &options)?)));
        };
        let mut config = config_of(shape)?;
        if let Some(layers) = self.layers {
            if layers == 0 {
                bail!("--layers: expected at least 1, got 0");
            }
            config.num_hidden_layers = config.num_hidden_layers.min(layers);
            config.vision_config.num_hidden_layers = config.vision_config.num_hidden_layers.min(layers);
        }
        let format = match self.format {
            Stored::F32 => bench::Format::F32,
            Stored::Bf16 => bench::Format::Bf16,
            Stored::Q8 => bench::Format::Q8,
            Stored::Nf4 => bench::Format::Nf4,
        };
        let compute = match (self.dtype, self.format) {
            (Dtype::F32, _) | (Dtype::Auto, Stored::F32) => Compute::F32,
            (Dtype::Bf16 | Dtype::Auto, _) => Compute::Bf16,
            (Dtype::Int8, _) => Compute::Int8,
        };
        show("random weights");
        let weights = RandomWeights::new(&config, format);
        Ok(Loaded::Random(Box::new(Model::new(config, &weights, Context { isa: Isa::best(), compute })?)))
    }
}

fn config_of(shape: &str) -> anyhow::Result<IdeficsConfig> {
    if let Some(config) = bench::shape(shape) {
        return Ok(config);
    }
    let path = Path::new(shape);
    let directory = if path.is_dir() { Some(path) } else { path.parent() };
    directory
        .filter(|_| path.is_dir() || path.file_name().is_some_and(|name| name == "config.json"))
        .with_context(|| format!("--shape: expected 9b, 80b or the path of a config.json, got `{shape}`"))
        .and_then(|directory| Ok(read_config(directory)?))
}

/// One line on a terminal that the next one replaces; nothing elsewhere.
fn show(what: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{what}");
        // A line that does not show is no reason to stop.
        let _ = std::io::stderr().flush();
    }
}

fn clear_line() {
    show("");
}

/// The most memory this process has held so far, mapped files that were read included; none where the system
/// does not say.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

fn table(report: &Report, load_s: f64, peak_rss_bytes: Option<u64>) -> String {
    let machine = &report.machine;
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "machine   {} threads, {}: reads {:.1} GB/s, bf16 {:.0} GFLOP/s{}",
        machine.threads,
        machine.isa,
        machine.read_gb_per_s,
        machine.bf16_gflops,
        machine.int8_gops.map(|gops| format!(", int8 {gops:.0} GOP/s")).unwrap_or_default(),
    );
    let rss = peak_rss_bytes.map(|bytes| format!(", peak memory {}", HumanBytes(bytes))).unwrap_or_default();
    let _ = writeln!(out, "load      {load_s:.1} s{rss}\n");
    let _ = writeln!(
        out,
        "decode    {:>6} {:>7} {:>11} {:>9} {:>7}",
        "batch", "images", "tokens/s", "GB/s", "share"
    );
    for decode in &report.decode {
        let _ = writeln!(
            out,
            "          {:>6} {:>7} {:>11.2} {:>9.1} {:>6.0}%",
            decode.batch,
            decode.images,
            decode.tokens_per_s,
            decode.weight_gb_per_s,
            100.0 * decode.share
        );
    }
    let _ = writeln!(
        out,
        "\nprefill   {:>6} {:>7} {:>11} {:>9} {:>7}",
        "tokens", "", "tokens/s", "GFLOP/s", "share"
    );
    for prefill in &report.prefill {
        let _ = writeln!(
            out,
            "          {:>6} {:>7} {:>11.1} {:>9.0} {:>6.0}%",
            prefill.tokens,
            "",
            prefill.tokens_per_s,
            prefill.gflops,
            100.0 * prefill.share
        );
    }
    for answer in &report.answers {
        let _ = writeln!(
            out,
            "\nanswer    {:.2} s for a picture, {} tokens of prompt and {} new ones",
            answer.seconds, answer.prompt_tokens, answer.new_tokens
        );
    }
    let _ = writeln!(out, "\nproducts of bf16");
    for product in &report.products {
        let _ = writeln!(
            out,
            "          {:<26} {:>9.0} GFLOP/s {:>4.0}%",
            format!("{} x {} x {}", product.m, product.n, product.k),
            product.gflops,
            100.0 * product.share
        );
    }
    let vision = &report.vision;
    let _ = writeln!(
        out,
        "\nvision    {:.3} s an image, {:.0} GFLOP/s, {:.0}%",
        vision.seconds_per_image,
        vision.gflops,
        100.0 * vision.share
    );
    if let Some(perceiver) = &report.perceiver {
        let _ = writeln!(out, "resampler {:.3} s an image", perceiver.seconds_per_image);
    }
    out
}

fn quality_table(found: &[Quality], tokens: usize) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(out, "divergence from the weights as they are in f32, {tokens} tokens");
    let _ = writeln!(
        out,
        "{:<12} {:<8} {:>10} {:>10} {:>11} {:>9}",
        "weights", "products", "mean KL", "max KL", "of rounding", "same top"
    );
    for Quality { weights, compute, mean_kl, max_kl, rounding_kl, same_top } in found {
        let same = 100.0 * same_top;
        let _ = writeln!(
            out,
            "{weights:<12} {compute:<8} {mean_kl:>10.2e} {max_kl:>10.2e} {rounding_kl:>11.2e} {same:>8.1}%"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_takes_no_option_of_timing() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let parse = |args: &[&str]| {
            let line = [&["bench", "--quality"][..], args].concat();
            <Line as clap::Parser>::try_parse_from(line).map(|line| line.args.quality)
        };
        assert!(parse(&["--json"]).expect("the report as JSON"));
        for option in ["--dtype=f32", "--prefill=8", "--batches=1", "--images=1", "--rounds=2"] {
            assert!(parse(&[option]).is_err(), "{option}");
        }
    }

    #[test]
    fn a_shape_is_a_size_or_a_configuration() {
        assert_eq!(config_of("9b").expect("a published size").num_hidden_layers, 32);
        let fixture = idefics_testing::fixture("tiny");
        assert_eq!(
            config_of(fixture.to_str().expect("a path in UTF-8")).expect("a directory").hidden_size,
            32
        );
        let message = config_of("7b").expect_err("no such size").to_string();
        assert!(message.contains("7b") && message.contains("80b"), "{message}");
    }
}
