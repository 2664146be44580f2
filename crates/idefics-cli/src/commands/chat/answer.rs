//! One answer of the model, with its text as it comes.

use std::{io, ops::ControlFlow};

use idefics::{
    SequenceInputs,
    generate::{FinishReason, Generated, GenerationConfig, Request, Scheduler, generate_requests},
};

use crate::{cancel, model::Loaded};

/// What the model said.
pub(super) struct Answer {
    /// Without the space in front.
    pub(super) text: String,
    pub(super) finish_reason: FinishReason,
    pub(super) prompt_tokens: usize,
    pub(super) tokens: usize,
    pub(super) seconds: Seconds,
}

/// How long an answer took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seconds {
    pub(super) prefill: f64,
    pub(super) decode: f64,
}

/// Answers one prompt. Ctrl-C ends the answer where it is; so does an error of `on_text`.
pub(super) fn answer(
    loaded: &Loaded,
    inputs: &SequenceInputs,
    config: &GenerationConfig,
    mut on_text: impl FnMut(&str) -> io::Result<()>,
) -> anyhow::Result<Answer> {
    cancel::reset();
    let request = Request { cancel: Some(cancel::flag()), ..Request::new(inputs, config) };
    let mut is_start = true;
    let mut broken = None;
    let generated = generate_requests(
        &loaded.model,
        Some(&loaded.processor),
        &[request],
        Scheduler::default(),
        |event| {
            // The first piece of an answer begins with a space, which belongs to the form of the dialogue.
            let text = if is_start { event.text.trim_start() } else { &event.text };
            is_start &= text.is_empty();
            match on_text(text) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    broken = Some(error);
                    ControlFlow::Break(())
                }
            }
        },
    )?;
    match broken {
        Some(error) => Err(error.into()),
        None => from_generated(generated),
    }
}

fn from_generated(generated: Vec<Generated>) -> anyhow::Result<Answer> {
    let generated = generated.into_iter().next();
    let Some((completion, usage, timings)) =
        generated.and_then(|it| Some((it.sequences.into_iter().next()?, it.usage, it.timings)))
    else {
        anyhow::bail!("the options rule out every answer");
    };
    Ok(Answer {
        text: completion.text.unwrap_or_default().trim().to_owned(),
        finish_reason: completion.finish_reason,
        prompt_tokens: usage.prompt_tokens,
        tokens: completion.token_ids.len(),
        seconds: Seconds { prefill: timings.prefill.as_secs_f64(), decode: timings.decode.as_secs_f64() },
    })
}
