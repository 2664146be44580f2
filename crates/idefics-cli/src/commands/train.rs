//! `idefics train`: a model learns from pictures and texts.

use std::{
    io::IsTerminal,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context;
use idefics_kernels::allocator::pack_large_blocks;
use idefics_train::{
    config::TrainConfig,
    memory::{gigabytes, peak_bytes},
    metrics::StepRecord,
    trainer::{End, Event, Start, Summary, Trainer},
};
use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressStyle};
use serde_json::json;

use crate::{cancel, model::start_threads, output, source::files_of};

const EXAMPLES: &str = "\
Examples:
  idefics train pets.toml
  idefics train pets.toml --steps 200 --learning-rate 2e-5 --output runs/pets-2
  idefics train pets.toml --set batch.accumulation=8 --set optimizer.moments=8bit
  idefics train pets.toml --resume
  idefics train runs/pets-2/config.toml --resume

The configuration and how to choose it: docs/fine-tuning.md. Ctrl-C saves and ends; --resume goes on as if nothing
had happened. A run whose flags changed its configuration goes on from the config.toml in its output directory.";

/// Train a model: all of it, some of its parts, or LoRA beside it
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// What is trained on what, in TOML
    #[arg(value_name = "CONFIG")]
    config: PathBuf,

    /// Go on with the run in the output directory
    #[arg(long)]
    resume: bool,

    /// Check everything, try the longest sequence, and end
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,

    /// Replace a value of the configuration, with its name as in the file; may be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,

    /// Model to begin with: a directory, a name on the hub, or idefics-tiny, the small built-in model
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,

    /// Directory of the run
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,

    /// Steps of the optimiser, in place of the configuration's steps or epochs
    #[arg(long, value_name = "N")]
    steps: Option<u64>,

    /// Highest learning rate
    #[arg(long, value_name = "X")]
    learning_rate: Option<f64>,

    /// Seed of shuffles, crops and dropout
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Threads to compute with [default: all processors]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

impl Args {
    /// All that is put over the file, in TOML's own words.
    fn overrides(&self) -> Vec<String> {
        let text = |text: &str| toml_text(text);
        let flags = [
            self.model.as_ref().map(|model| format!("model={}", text(model))),
            self.output.as_ref().map(|output| format!("output={}", text(&output.to_string_lossy()))),
            self.steps.map(|steps| format!("run.steps={steps}")),
            self.learning_rate.map(|rate| format!("optimizer.learning_rate={rate:?}")),
            self.seed.map(|seed| format!("seed={seed}")),
        ];
        self.set.iter().cloned().chain(flags.into_iter().flatten()).collect()
    }
}

/// A text as a value of TOML: JSON's strings are strings there, too.
fn toml_text(text: &str) -> String {
    json!(text).to_string()
}

/// A text as one word of a command line.
fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/\\._-+=:@%".contains(c);
    if text.chars().all(is_plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    pack_large_blocks();
    let config = TrainConfig::load(&args.config, &args.overrides())?;
    start_threads(args.threads)?;
    cancel::on_interrupt()?;
    let files = files_of(&config.model)?;
    let start = if args.resume { Start::Resume } else { Start::Fresh };
    eprintln!("reading the data ...");
    let mut trainer = Trainer::new(config, files, start)?;
    describe(&trainer);
    let begun = Instant::now();
    trainer.try_longest().context("the longest sequence")?;
    let peak = peak_bytes().map_or(String::new(), |bytes| format!(", memory so far {}", gigabytes(bytes)));
    eprintln!("largest pass: {:.2} s forward and backward{peak}", begun.elapsed().as_secs_f64());
    if args.dry_run {
        return Ok(output::print("everything fits together")?);
    }
    let mut display = Display::start(&trainer);
    let summary = trainer.run(cancel::flag(), &mut |event| display.show(&event));
    display.finish();
    let summary = summary?;
    if args.json {
        return Ok(output::print(&summary_json(&summary).to_string())?);
    }
    // The run's own file has what flags said, too.
    let config = trainer.written_config().unwrap_or(&args.config);
    let resume = format!("idefics train {} --resume", shell_word(&config.to_string_lossy()));
    Ok(output::print(&summary_text(&summary, &resume))?)
}

/// Broken samples of the evaluation that are named.
const NAMED: usize = 20;

/// What is about to happen, on stderr.
fn describe(trainer: &Trainer) {
    let (report, parameters) = (trainer.data_report(), trainer.parameters());
    let frozen: usize = parameters.frozen().iter().map(|(_, weight)| weight.len()).sum::<usize>()
        + parameters.frozen().iter_packed().map(|(_, weight)| weight.len()).sum::<usize>();
    eprintln!(
        "weights: {} trained in {} tensors, {} frozen",
        HumanCount(parameters.num_trained() as u64),
        parameters.trained().count(),
        HumanCount(frozen as u64),
    );
    let per = |count: u64| count as f64 / report.sequences.max(1) as f64;
    eprintln!(
        "data: {} samples; of {} checked {} are broken; a sequence has {:.0} tokens and {:.1} pictures in the mean",
        HumanCount(report.samples),
        HumanCount(report.checked),
        report.num_broken,
        per(report.tokens),
        per(report.images),
    );
    for broken in &report.broken {
        eprintln!("broken: {broken}");
    }
    let not_evaluated = trainer.broken_evaluation_samples();
    for broken in not_evaluated.iter().take(NAMED) {
        eprintln!("broken, of the evaluation: {broken}");
    }
    if let Some((_, tokens, images)) = report.longest {
        eprintln!("longest sequence: {tokens} tokens, {images} pictures");
    }
    let memory = trainer.memory();
    let images = match memory.images {
        0 => String::new(),
        bytes => format!(" + up to {} pictures that were read", gigabytes(bytes)),
    };
    let reused = match memory.reused {
        0 => String::new(),
        bytes => format!(" - {} that gradients take over from it", gigabytes(bytes)),
    };
    eprintln!(
        "memory: {} = {} frozen + {} trained + {} gradients + {} moments + {} for the largest pass (estimated){reused}\
         {images}",
        gigabytes(memory.total()),
        gigabytes(memory.frozen),
        gigabytes(memory.trained),
        gigabytes(memory.gradients),
        gigabytes(memory.moments),
        gigabytes(memory.activations),
    );
    let state = trainer.state();
    if state.step > 0 {
        eprintln!("resuming after step {}", state.step);
    }
    let broken = match not_evaluated.len() {
        0 => String::new(),
        count => format!(", {count} samples are broken"),
    };
    let sequences = trainer.num_evaluation_sequences();
    eprintln!("steps: {}; evaluation: {sequences} sequences{broken}", state.total_steps);
}

fn summary_text(summary: &Summary, resume: &str) -> String {
    let evaluation = summary.evaluation.map_or(String::new(), |record| {
        format!(", held-out loss {:.4}, accuracy {:.3}", record.loss, record.accuracy)
    });
    let best = match summary.best.filter(|best| best.step != summary.step) {
        Some(best) => format!(" (the lowest was {:.4} at step {})", best.loss, best.step),
        None => String::new(),
    };
    let steps = format!("{} of {} steps{evaluation}{best}", summary.step, summary.total_steps);
    match (summary.end, &summary.model) {
        (End::Interrupted, _) if summary.step == 0 => {
            "stopped before the first step; nothing was saved".to_owned()
        }
        (End::Interrupted, _) => format!("stopped after {steps}; go on with: {resume}"),
        (end, model) => {
            let model =
                model.as_ref().map_or(String::new(), |model| format!("; model in {}", model.display()));
            let why = if end == End::StoppedEarly { " (it did not get better any more)" } else { "" };
            format!("finished after {steps}{why}{model}")
        }
    }
}

fn summary_json(summary: &Summary) -> serde_json::Value {
    let end = match summary.end {
        End::Finished => "finished",
        End::StoppedEarly => "stopped_early",
        End::Interrupted => "interrupted",
    };
    json!({
        "end": end,
        "step": summary.step,
        "total_steps": summary.total_steps,
        "evaluation": summary.evaluation,
        "best": summary.best,
        "model": summary.model,
    })
}

/// Shows a run: a bar on a terminal, plain lines elsewhere.
struct Display {
    bar: Option<ProgressBar>,
    total: u64,
    first_step: u64,
    begun: Instant,
    last_line: Option<Instant>,
    /// Loss, tokens per second, pictures per second: running means.
    means: Option<[f64; 3]>,
}

/// Time between two plain lines.
const LINE_PAUSE: Duration = Duration::from_secs(10);

impl Display {
    fn start(trainer: &Trainer) -> Self {
        let (total, first_step) = (trainer.state().total_steps, trainer.state().step);
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("[{wide_bar}] {pos}/{len} {msg} ({eta})");
            let style = style.expect("the template is right").progress_chars("=> ");
            ProgressBar::new(total).with_style(style).with_position(first_step)
        });
        let now = Instant::now();
        Self { bar, total, first_step, begun: now, last_line: None, means: None }
    }

    fn show(&mut self, event: &Event<'_>) {
        match event {
            Event::Step(record) => self.step(record),
            Event::Skipped(record) => {
                self.line(&format!("step {}: data skipped: {}", record.step, record.reason));
            }
            Event::RolledBack { step } => {
                self.line(&format!("went back to step {step}; the data since then is skipped"));
            }
            Event::Evaluated(record) => self.line(&format!(
                "step {}: held-out loss {:.4}, accuracy {:.3} ({} targets, {:.1} s)",
                record.step, record.loss, record.accuracy, record.targets, record.seconds
            )),
            Event::Sampled { prompt, text } => self.line(&format!("prompt {prompt}: {text:?}")),
            Event::Broken(error) => self.line(&format!("broken: {error}")),
            Event::Saved(path) => self.line(&format!("saved {}", path.display())),
            Event::NotDrawn(error) => self.line(&format!("no curves: {error}")),
        }
    }

    fn step(&mut self, record: &StepRecord) {
        let per_second = |count: u64| count as f64 / record.seconds.max(1e-9);
        let now = [record.loss, per_second(record.tokens), per_second(record.images)];
        let means = self.means.get_or_insert(now);
        means.iter_mut().zip(now).for_each(|(mean, now)| *mean += 0.1 * (now - *mean));
        let [loss, tokens, images] = *means;
        let text = format!("loss {loss:.4}  {tokens:.0} tokens/s  {images:.1} pictures/s");
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            bar.set_position(record.step);
        } else if self.last_line.is_none_or(|line| line.elapsed() >= LINE_PAUSE) {
            let done = (record.step - self.first_step).max(1) as u32;
            let left = self.begun.elapsed() / done * self.total.saturating_sub(record.step) as u32;
            eprintln!("step {} of {}: {text}  {} left", record.step, self.total, HumanDuration(left));
            self.last_line = Some(Instant::now());
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn flags_become_values_of_the_configuration() {
        let line = Line::try_parse_from([
            "train",
            "x.toml",
            "--set",
            "seed=1",
            "--output",
            "a \"b\"",
            "--learning-rate",
            "1e-5",
            "--steps",
            "7",
        ])
        .expect("the test's own line");
        let file = "model='m'\noutput='o'\n[run]\nsteps=1\n[[data]]\nformat='jsonl'\npath='x'\n";
        let config = TrainConfig::parse("x.toml", file, &line.args.overrides()).unwrap();
        assert_eq!((config.seed, config.run.steps), (1, Some(7)));
        assert_eq!(config.output, PathBuf::from("a \"b\""));
        assert_eq!(config.optimizer.learning_rate, 1e-5);
    }

    #[test]
    fn what_goes_on_is_one_line_or_nothing() {
        let summary = |step| Summary {
            end: End::Interrupted,
            step,
            total_steps: 9,
            evaluation: None,
            best: None,
            model: None,
        };
        let resume = format!("idefics train {} --resume", shell_word("my runs/it's/config.toml"));
        assert_eq!(
            summary_text(&summary(3), &resume),
            r"stopped after 3 of 9 steps; go on with: idefics train 'my runs/it'\''s/config.toml' --resume"
        );
        assert!(!summary_text(&summary(0), &resume).contains("--resume"));
    }

    /// What `--help` and the README show can be typed with the guide's configuration.
    #[test]
    fn examples_fit_the_guide() {
        let guide = include_str!("../../../../docs/fine-tuning.md");
        let block = guide.split("```toml\n").nth(1).and_then(|block| block.split("```").next()).unwrap();
        let readme = include_str!("../../../../README.md");
        let lines = EXAMPLES.lines().chain(readme.lines()).map(str::trim);
        let mut seen = 0;
        for example in lines.filter_map(|line| line.strip_prefix("idefics train pets.toml")) {
            let words = ["train", "pets.toml"].into_iter().chain(example.split_whitespace());
            let args = Line::try_parse_from(words).expect(example).args;
            let config = TrainConfig::parse("pets.toml", block, &args.overrides()).expect(example);
            let bound = (args.steps, args.steps.is_none().then_some(3.0));
            assert_eq!((config.run.steps, config.run.epochs), bound, "{example}");
            // Packed layers are not trained themselves.
            assert!(config.trainable.preset.is_none(), "{example}");
            seen += 1;
        }
        assert!(seen >= 4, "{seen}");
    }
}
