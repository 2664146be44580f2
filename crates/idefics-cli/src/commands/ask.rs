//! `idefics ask`: a question about pictures.

use anyhow::bail;
use serde_json::json;

use crate::{
    images::{self, Job, Record, RecordArgs},
    model::ModelArgs,
    options::GenerationArgs,
    task::{TaskAnswer, answer_images},
    templates::Task,
};

/// Ask a question about a picture, or the same about many
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  idefics ask -m HuggingFaceM4/idefics-9b-instruct street.jpg 'How many cars are there?'"
)]
pub(crate) struct Args {
    /// Image files, addresses, or directories of image files; then the question
    #[arg(required = true, num_args = 2.., value_name = "IMAGE|DIR.. QUESTION")]
    items: Vec<String>,

    #[command(flatten)]
    records: RecordArgs,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    generation: GenerationArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let Some((question, images)) = args.items.split_last().filter(|(_, images)| !images.is_empty()) else {
        bail!("give a picture and a question");
    };
    if question.trim().is_empty() {
        bail!("the question is empty");
    }
    let images = images::expand(images)?;
    args.generation.refuse_more_than_text()?;
    let loaded = args.model.load()?;
    let record = |image: &str, answer: &TaskAnswer| Record {
        fields: vec![
            ("image", json!(image)),
            ("question", json!(question)),
            ("answer", json!(answer.text)),
            ("finish_reason", json!(answer.finish_reason)),
        ],
        text: answer.text.clone(),
    };
    let fields = &["image", "question", "answer", "finish_reason"];
    let job = Job { fields, question: Some(question), labels: &[] };
    let task = Task::Answer { question };
    answer_images(&args.records, &loaded, &args.generation, &task, &job, &images, record)
}
