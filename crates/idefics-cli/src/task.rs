//! Answers to one task about many pictures.

use anyhow::Context;
use idefics::{SequenceInputs, dialogue::Form, generate::Request};

use crate::{
    cancel,
    images::{self, Job, Record, RecordArgs},
    model::Loaded,
    options::GenerationArgs,
    prompts::image_source,
    templates::Task,
};

/// The text of an answer and why it ended.
pub(crate) struct TaskAnswer {
    pub(crate) text: String,
    pub(crate) finish_reason: &'static str,
}

/// Writes a record for each picture.
pub(crate) fn answer_images(
    records: &RecordArgs,
    loaded: &Loaded,
    generation: &GenerationArgs,
    task: &Task<'_>,
    job: &Job<'_>,
    images: &[String],
    record: impl Fn(&str, &TaskAnswer) -> Record,
) -> anyhow::Result<()> {
    let form = Form::of(&loaded.processor);
    let special = loaded.processor.special_tokens();
    let base = task.generation(form, loaded.model.default_generation(Some(special))?);
    let config = generation.apply_beside_stops(base, &loaded.processor)?;
    let engine = loaded.engine()?;
    images::run(records, job, images, |batch| {
        let inputs: Vec<anyhow::Result<SequenceInputs>> = batch
            .iter()
            .map(|image| {
                let inputs = task_inputs(loaded, task, form, image)?;
                Request::new(&inputs, &config).check(&*loaded.model, 0)?;
                Ok(inputs)
            })
            .collect();
        let sound = inputs.iter().flatten().map(|inputs| (inputs.clone(), config.clone()));
        let quiet = |_: &_| std::ops::ControlFlow::Continue(());
        let mut generated = engine.answer_each(sound, cancel::flag(), quiet).into_iter();
        let results = batch.iter().zip(inputs).map(|(image, inputs)| {
            inputs?;
            let answers = generated.next().context("every sound prompt is answered")??;
            let best = answers.sequences.into_iter().next().context("every prompt has an answer")?;
            let text = best.text.unwrap_or_default().trim().to_owned();
            Ok(record(image, &TaskAnswer { text, finish_reason: best.finish_reason.as_str() }))
        });
        Ok(results.collect())
    })
}

/// The inputs of a task about one picture.
pub(crate) fn task_inputs(
    loaded: &Loaded,
    task: &Task<'_>,
    form: Form,
    image: &str,
) -> anyhow::Result<SequenceInputs> {
    let prompt = task.prompt(form, image_source(image));
    let inputs = loaded.processor.process(&[prompt], &loaded.options)?;
    inputs.into_iter().next().context("a prompt has inputs")
}
