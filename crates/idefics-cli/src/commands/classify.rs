//! `idefics classify`: which of some labels fits a picture best.

use std::path::Path;

use anyhow::{Context, bail};
use clap::ValueEnum;
use idefics::{
    dialogue::Form,
    generate::{ScoreOptions, Scored, score_continuations},
};
use serde_json::json;

use crate::{
    images::{self, Job, Record, RecordArgs},
    model::{Loaded, ModelArgs},
    prompts::image_source,
    templates::Task,
};

/// Rank labels by how likely the model finds them for a picture
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  idefics classify -m HuggingFaceM4/idefics-9b animal.jpg --labels cat,dog,'polar bear'"
)]
pub(crate) struct Args {
    /// Image files, addresses, or directories of image files
    #[arg(required = true, value_name = "IMAGE|DIR")]
    images: Vec<String>,

    /// The labels, separated by commas, or a file with one label a line
    #[arg(long, value_name = "A,B,..|FILE")]
    labels: String,

    /// What probabilities are made from: the whole log-probability of a label, or its mean over tokens, which
    /// does not favour short labels
    #[arg(long, value_enum, default_value = "sum")]
    score: Score,

    #[command(flatten)]
    records: RecordArgs,

    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Score {
    Sum,
    Mean,
}

/// A label with its place in the ranking.
#[derive(Debug, PartialEq)]
struct Ranked<'a> {
    label: &'a str,
    probability: f64,
    logprob: f64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let labels = read_labels(&args.labels)?;
    let images = images::expand(&args.images)?;
    let loaded = args.model.load()?;
    let form = Form::of(&loaded.processor);
    let is_alone = images.len() == 1;
    let fields = &["image", "label", "probability", "labels"];
    let job = Job { fields, question: None, labels: &labels };
    images::run(&args.records, &job, &images, |batch| {
        let classify = |image: &String| {
            let scored = score_labels(&loaded, form, &labels, image)?;
            Ok(record(image, &rank(&labels, &scored, args.score), is_alone))
        };
        Ok(batch.iter().map(classify).collect())
    })
}

fn read_labels(argument: &str) -> anyhow::Result<Vec<String>> {
    let text;
    let parts: Vec<&str> = if Path::new(argument).is_file() {
        text = std::fs::read_to_string(argument).with_context(|| format!("cannot read {argument}"))?;
        text.lines().collect()
    } else {
        argument.split(',').collect()
    };
    let labels: Vec<String> =
        parts.into_iter().map(str::trim).filter(|label| !label.is_empty()).map(str::to_owned).collect();
    if labels.len() < 2 {
        bail!("--labels: expected at least 2 labels, got {}", labels.len());
    }
    let mut seen = std::collections::HashSet::new();
    if let Some(twice) = labels.iter().find(|label| !seen.insert(label.as_str())) {
        bail!("--labels: {twice:?} is there twice");
    }
    Ok(labels)
}

fn score_labels(loaded: &Loaded, form: Form, labels: &[String], image: &str) -> anyhow::Result<Vec<Scored>> {
    let prompt = Task::Classify { labels }.prompt(form, image_source(image));
    let texts: Vec<String> = labels.iter().map(|label| format!(" {label}")).collect();
    let joined = loaded.processor.continuations(&prompt, &texts, &loaded.options)?;
    Ok(score_continuations(&*loaded.model, &joined.inputs, &joined.token_ids, &ScoreOptions::default())?)
}

/// The labels, most likely first, with a softmax of their scores.
fn rank<'a>(labels: &'a [String], scored: &[Scored], score: Score) -> Vec<Ranked<'a>> {
    let scores: Vec<f64> =
        scored.iter().map(|scored| if score == Score::Sum { scored.sum() } else { scored.mean() }).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    let mut ranked: Vec<_> = labels
        .iter()
        .zip(scored)
        .zip(&scores)
        .map(|((label, scored), score)| Ranked {
            label,
            probability: (score - max).exp() / total,
            logprob: scored.sum(),
        })
        .collect();
    ranked.sort_by(|a, b| b.probability.total_cmp(&a.probability));
    ranked
}

fn record(image: &str, ranked: &[Ranked<'_>], is_alone: bool) -> Record {
    let best = &ranked[0];
    let line = |label: &Ranked<'_>| format!("{}\t{:.4}", label.label, label.probability);
    // A single picture has room for the whole ranking.
    let text = if is_alone { ranked.iter().map(line).collect::<Vec<_>>().join("\n") } else { line(best) };
    let label = |label: &Ranked<'_>| json!({"label": label.label, "probability": label.probability, "logprob": label.logprob});
    let fields = vec![
        ("image", json!(image)),
        ("label", json!(best.label)),
        ("probability", json!(best.probability)),
        ("labels", ranked.iter().map(label).collect()),
    ];
    Record { fields, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_come_from_a_list_or_a_file() {
        assert_eq!(read_labels("cat, polar bear,dog").unwrap(), ["cat", "polar bear", "dog"]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "cat, black\n\n dog \n").unwrap();
        assert_eq!(read_labels(&file.path().display().to_string()).unwrap(), ["cat, black", "dog"]);
        for bad in ["cat", "", "a,b,a"] {
            assert!(read_labels(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn probabilities_are_a_softmax_of_the_scores() {
        let labels = ["long".to_owned(), "short".to_owned()];
        let scored = |logprobs: &[f64]| Scored {
            token_ids: vec![0; logprobs.len()],
            logprobs: logprobs.to_vec(),
            top: Vec::new(),
        };
        let scored = [scored(&[-1.0, -1.0]), scored(&[-1.5])];
        let by_sum = rank(&labels, &scored, Score::Sum);
        assert_eq!(by_sum[0].label, "short");
        assert!((by_sum[0].probability - 1.0 / (1.0 + (-0.5f64).exp())).abs() < 1e-12);
        let by_mean = rank(&labels, &scored, Score::Mean);
        assert_eq!((by_mean[0].label, by_mean[0].logprob), ("long", -2.0));
        assert!((by_mean.iter().map(|label| label.probability).sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
