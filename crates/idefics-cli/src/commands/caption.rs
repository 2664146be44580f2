//! `idefics caption`: a line about each picture.

use serde_json::json;

use crate::{
    images::{self, Job, Record, RecordArgs},
    model::ModelArgs,
    options::GenerationArgs,
    task::{TaskAnswer, answer_images},
    templates::Task,
};

/// Describe pictures
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  idefics caption -m HuggingFaceM4/idefics-9b-instruct photos/ --output captions.csv"
)]
pub(crate) struct Args {
    /// Image files, addresses, or directories of image files
    #[arg(required = true, value_name = "IMAGE|DIR")]
    images: Vec<String>,

    #[command(flatten)]
    records: RecordArgs,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    generation: GenerationArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let images = images::expand(&args.images)?;
    args.generation.refuse_more_than_text()?;
    let loaded = args.model.load()?;
    let record = |image: &str, answer: &TaskAnswer| Record {
        fields: vec![
            ("image", json!(image)),
            ("caption", json!(answer.text)),
            ("finish_reason", json!(answer.finish_reason)),
        ],
        text: answer.text.clone(),
    };
    let job = Job { fields: &["image", "caption", "finish_reason"], question: None, labels: &[] };
    answer_images(&args.records, &loaded, &args.generation, &Task::Caption, &job, &images, record)
}
