//! Answers of the model, with their text as it comes.
//!
//! The engine keeps what it has read: a second question about the same picture reads only what is new.

use std::{
    io,
    ops::ControlFlow,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use idefics::{
    Idefics, SequenceInputs,
    generate::{
        Engine, EngineEvent, EngineOptions, FinishReason, Generated, GenerationConfig, Submission, Ticket,
    },
};

use crate::{cancel, model::Loaded};

/// Time between two looks at whether Ctrl-C was pressed.
const GLANCE: Duration = Duration::from_millis(50);

/// The model behind a conversation.
pub(super) struct Talker {
    engine: Engine<Idefics>,
}

/// What the model said.
pub(super) struct Answer {
    /// Without the space in front.
    pub(super) text: String,
    /// Why it ended; `None` if it was stopped before it had its turn.
    pub(super) finish_reason: Option<FinishReason>,
    pub(super) prompt_tokens: usize,
    /// Those of the prompt that were read for an earlier answer.
    pub(super) cached_tokens: usize,
    pub(super) tokens: usize,
    /// Seconds until the first token, and from it to the last.
    pub(super) seconds: (f64, f64),
}

impl Talker {
    /// Starts the engine; what is left of `loaded` is its processor and the options.
    pub(super) fn start(loaded: Loaded) -> anyhow::Result<(Self, super::session::Reader)> {
        let Loaded { model, processor, options, .. } = loaded;
        let decoder = Arc::new(processor.clone());
        let engine =
            Engine::start(model, decoder, EngineOptions::default()).context("cannot start the engine")?;
        Ok((Self { engine }, super::session::Reader { processor, options }))
    }

    /// Most tokens of prompt and answer.
    pub(super) fn positions(&self) -> usize {
        use idefics::generate::StepModel;
        self.engine.model().max_positions()
    }

    /// Answers one prompt. Ctrl-C ends the answer where it is; so does an error of `on_text`.
    pub(super) fn answer(
        &self,
        inputs: SequenceInputs,
        config: &GenerationConfig,
        mut on_text: impl FnMut(&str) -> io::Result<()>,
    ) -> anyhow::Result<Answer> {
        cancel::reset();
        let prompt_tokens = inputs.token_ids.len();
        let (sender, events) = mpsc::channel();
        let listener = move |event| match sender.send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        let ticket = self.engine.submit(Submission::new(inputs, config.clone(), listener))?;
        let mut is_start = true;
        while let Some(event) = next(&events, &ticket) {
            match event {
                EngineEvent::Started => {}
                EngineEvent::Token(event) => {
                    // The first piece begins with a space, which belongs to the form of the dialogue.
                    let text = if is_start { event.text.trim_start() } else { &event.text };
                    is_start &= text.is_empty();
                    on_text(text)?;
                }
                EngineEvent::Finished(generated) => return from_generated(generated),
                EngineEvent::Failed(error) => return Err(error.into()),
            }
        }
        if !cancel::is_requested() {
            bail!("the engine ended");
        }
        Ok(Answer {
            text: String::new(),
            finish_reason: None,
            prompt_tokens,
            cached_tokens: 0,
            tokens: 0,
            seconds: (0.0, 0.0),
        })
    }
}

/// The next event; `None` when there will be no more. Cancels the request on Ctrl-C.
fn next(events: &Receiver<EngineEvent>, ticket: &Ticket) -> Option<EngineEvent> {
    loop {
        match events.recv_timeout(GLANCE) {
            Ok(event) => return Some(event),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) if cancel::is_requested() => ticket.cancel(),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

fn from_generated(generated: Generated) -> anyhow::Result<Answer> {
    let Generated { sequences, usage, timings, .. } = generated;
    let Some(completion) = sequences.into_iter().next() else { bail!("the options rule out every answer") };
    Ok(Answer {
        text: completion.text.unwrap_or_default().trim().to_owned(),
        finish_reason: Some(completion.finish_reason),
        prompt_tokens: usage.prompt_tokens,
        cached_tokens: usage.cached_tokens,
        tokens: completion.token_ids.len(),
        seconds: (timings.prefill.as_secs_f64(), timings.decode.as_secs_f64()),
    })
}

#[cfg(test)]
mod tests {
    use idefics::{
        LoadOptions, Processor, Prompt, Segment,
        dialogue::{DIALOGUE_END_OF_UTTERANCE, Form, Role, Turn, dialogue},
        processor::{ImageSource, ProcessOptions},
    };
    use idefics_testing::fixture;

    use super::*;

    #[test]
    fn a_second_question_reads_only_what_is_new() {
        let loaded = Loaded {
            name: "tiny".to_owned(),
            model: Arc::new(Idefics::from_pretrained(fixture("tiny"), &LoadOptions::default()).unwrap()),
            processor: Processor::from_pretrained(fixture("tiny")).unwrap(),
            options: ProcessOptions {
                add_end_of_utterance: DIALOGUE_END_OF_UTTERANCE,
                ..ProcessOptions::default()
            },
        };
        let (talker, reader) = Talker::start(loaded).unwrap();
        let config = GenerationConfig { max_new_tokens: Some(4), ..Default::default() };
        let ask = |prompt: Prompt| {
            let inputs = reader.process(prompt).unwrap();
            talker.answer(inputs, &config, |_| Ok(())).unwrap()
        };
        let picture = Segment::Image(ImageSource::Path(fixture("processor/444.jpg")));
        let mut turns =
            vec![Turn { role: Role::User, content: vec![picture, Segment::text("what is on the picture?")] }];
        let first = ask(dialogue(Form::Instruct, &turns));
        assert_eq!(first.cached_tokens, 0);
        turns.push(Turn::text(Role::Assistant, first.text));
        turns.push(Turn::text(Role::User, "and now?"));
        let second = ask(dialogue(Form::Instruct, &turns));
        assert!(
            second.cached_tokens + 1 >= first.prompt_tokens,
            "{} of {} tokens of the first prompt",
            second.cached_tokens,
            first.prompt_tokens
        );
        let stats = talker.engine.stats();
        assert_eq!((stats.images_encoded, stats.images_reused), (1, 1));
    }

    #[test]
    fn prompts_that_cannot_be_answered_are_refused() {
        let loaded = Loaded {
            name: "tiny".to_owned(),
            model: Arc::new(Idefics::from_pretrained(fixture("tiny"), &LoadOptions::default()).unwrap()),
            processor: Processor::from_pretrained(fixture("tiny")).unwrap(),
            options: ProcessOptions::default(),
        };
        let (talker, _) = Talker::start(loaded).unwrap();
        let too_long = vec![5; talker.positions() + 1];
        let inputs =
            SequenceInputs { image_index: vec![None; too_long.len()], token_ids: too_long, images: vec![] };
        assert!(talker.answer(inputs, &GenerationConfig::default(), |_| Ok(())).is_err());
    }
}
