//! From a prompt to its answer: pictures and words processed off the async threads, then the engine's events.

use std::{
    ops::ControlFlow,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use idefics::{
    Processor, Prompt, Segment, SequenceInputs,
    dialogue::Form,
    generate::{
        EngineEvent, Event, FinishReason, GenerateError, Generated, GenerationConfig, SharedProcessor,
        Submission, Ticket,
    },
    processor::AddEndOfUtterance,
};
use tokio::sync::mpsc;

use crate::{
    backend::Backend,
    body::Upload,
    error::{ApiError, Kind},
    grammar::{AnswerForm, Grammar, Vocabulary},
    media::{self, Wanted},
    metrics::{Pace, Stopwatch},
    state::{App, Place},
    together::Together,
};

/// A model that is ready, for [`Server::run`](crate::Server::run).
pub struct Loaded {
    /// The engine.
    pub backend: Arc<dyn Backend>,
    /// Prompts to inputs.
    pub processor: Processor,
    /// The options that the checkpoint proposes, with the special tokens of the processor.
    pub generation: GenerationConfig,
    /// What clients are told.
    pub card: ModelCard,
}

/// What clients are told of a model.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// Its name.
    pub id: String,
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// How its weights are stored, such as `bf16` or `nf4`.
    pub dtype: String,
}

/// A model and how to talk to it.
pub(crate) struct Service {
    loaded: Loaded,
    pub(crate) form: Form,
    /// Most bytes that one token stands for.
    pub(crate) longest_token: usize,
    /// Made when the first answer of a given form is asked for.
    vocabulary: OnceLock<Result<Vocabulary, String>>,
}

/// What the model is asked.
pub(crate) struct Ask {
    pub(crate) words: Words,
    pub(crate) config: GenerationConfig,
    pub(crate) length: Length,
    /// The form that answers must have, and the field that asks for it.
    pub(crate) answer_form: Option<(AnswerForm, &'static str)>,
    /// Only so many last tokens of the prompt count.
    pub(crate) truncate: Option<usize>,
    pub(crate) hears: Hears,
    /// What the request takes while it is read.
    pub(crate) upload: Option<Upload>,
    pub(crate) place: Arc<Place>,
}

/// Where an answer's longest length comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Length {
    /// The request names it: what does not fit in memory is refused.
    Asked,
    /// The server proposes it: what does not fit in memory is shortened.
    Proposed,
}

/// What of an answer its request has to hear from the engine. Each event wakes a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hears {
    /// Each token as it comes, several together where they come quickly.
    Tokens,
    /// The end, which has all of them.
    End,
}

impl Hears {
    /// Of a request that wants its answer as it is written, or whole.
    pub(crate) fn of(stream: Option<bool>) -> Self {
        if stream.unwrap_or(false) { Self::Tokens } else { Self::End }
    }

    fn wants(self, event: &EngineEvent) -> bool {
        match event {
            EngineEvent::Started => false,
            EngineEvent::Token(_) => self == Self::Tokens,
            EngineEvent::Finished(_) | EngineEvent::Failed(_) => true,
        }
    }
}

impl Length {
    /// Of a field that may name it.
    pub(crate) fn of(asked: Option<f64>) -> Self {
        if asked.is_some() { Self::Asked } else { Self::Proposed }
    }
}

/// A prompt in either form.
pub(crate) enum Words {
    Segments(Prompt, AddEndOfUtterance),
    Ids(Vec<u32>),
}

/// An answer on its way. Dropping it cancels.
pub(crate) struct Answer {
    pub(crate) prompt: PromptFacts,
    /// Whether its sequences differ; greedy search gives one, however many were asked for.
    pub(crate) is_sampled: bool,
    progress: mpsc::UnboundedReceiver<Vec<EngineEvent>>,
    /// Those that came together and were not looked at yet.
    heard: std::vec::IntoIter<EngineEvent>,
    stopwatch: Stopwatch,
    _ticket: Ticket,
    _place: Arc<Place>,
}

/// What is known of a prompt before it is read.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PromptFacts {
    /// Tokens that stand for pictures.
    pub(crate) image_tokens: usize,
}

/// What an answer gives next.
pub(crate) enum Next {
    Event(Event),
    Finished(Generated),
}

impl Service {
    pub(crate) fn new(loaded: Loaded) -> Self {
        let tokenizer = loaded.processor.tokenizer();
        let bytes = |id| tokenizer.token_bytes(id).len();
        let longest_token = (0..tokenizer.id_bound()).map(bytes).max().unwrap_or(0);
        let form = Form::of(&loaded.processor);
        Self { form, longest_token, loaded, vocabulary: OnceLock::new() }
    }

    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        &self.loaded.backend
    }

    pub(crate) fn processor(&self) -> &Processor {
        &self.loaded.processor
    }

    pub(crate) fn card(&self) -> &ModelCard {
        &self.loaded.card
    }

    /// The options to start from.
    pub(crate) fn generation(&self) -> &GenerationConfig {
        &self.loaded.generation
    }

    /// Refuses the name of another model. Clients that know of one model only send a word of theirs, or nothing.
    pub(crate) fn check_name(&self, name: Option<&str>) -> Result<(), ApiError> {
        let card = self.card();
        match name {
            // `tgi` and `dummy` are what `huggingface_hub` sends to an address, old and new.
            None | Some("" | "default" | "tgi" | "dummy" | "idefics") => Ok(()),
            Some(name) if name == card.id || card.aliases.iter().any(|alias| alias == name) => Ok(()),
            Some(_) => Err(ApiError {
                param: Some("model".to_owned()),
                ..ApiError::new(
                    Kind::NotFound,
                    format!("there is no such model here; this server has `{}`", card.id),
                )
                .code("model_not_found")
            }),
        }
    }

    /// Whether a forward pass works: the shortest answer there is.
    pub(crate) async fn check_health(&self) -> Result<(), ApiError> {
        let bos = self.processor().special_tokens().bos.id;
        let inputs = SequenceInputs { token_ids: vec![bos], image_index: vec![None], images: Vec::new() };
        let config = GenerationConfig {
            max_new_tokens: Some(1),
            do_sample: false,
            num_return_sequences: 1,
            ..self.generation().clone()
        };
        let (ticket, mut progress) = self.submit(inputs, config, None, Hears::End, None)?;
        for event in progress.recv().await.into_iter().flatten() {
            match event {
                EngineEvent::Finished(_) => return Ok(()),
                EngineEvent::Failed(error) => return Err(model_failed(error)),
                EngineEvent::Started | EngineEvent::Token(_) => {}
            }
        }
        drop(ticket);
        Err(engine_gone())
    }

    /// Understands the form that answers must have. Takes a while: not for async threads.
    fn compile(&self, form: &AnswerForm, param: &'static str) -> Result<Grammar, ApiError> {
        let vocabulary = self.vocabulary.get_or_init(|| {
            let processor = self.processor();
            Vocabulary::new(processor.tokenizer(), processor.special_tokens(), self.backend().vocab_size())
        });
        match vocabulary {
            Ok(vocabulary) => vocabulary.compile(form, param),
            Err(problem) => {
                tracing::error!(problem, "the vocabulary allows no forms of answers");
                Err(ApiError::unsupported(param, "a form of answers, with this model,"))
            }
        }
    }

    /// Hands inputs to the engine.
    fn submit(
        &self,
        inputs: SequenceInputs,
        config: GenerationConfig,
        custom: Option<SharedProcessor>,
        hears: Hears,
        mut pace: Option<Pace>,
    ) -> Result<(Ticket, mpsc::UnboundedReceiver<Vec<EngineEvent>>), ApiError> {
        // Unbounded so that the engine never waits for a slow reader; an answer's length bounds it.
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut together = Together::default();
        let on_event = move |event| {
            if let Some(pace) = &mut pace {
                pace.note(&event);
            }
            if !hears.wants(&event) {
                return ControlFlow::Continue(());
            }
            let events = together.add(event, Instant::now());
            if events.is_none_or(|events| sender.send(events).is_ok()) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        };
        let submission = Submission { custom, ..Submission::new(inputs, config, on_event) };
        let ticket = self.backend().submit(submission)?;
        Ok((ticket, receiver))
    }
}

/// Processes a prompt and starts its answer. Dropped meanwhile, nothing is left behind.
pub(crate) async fn ask(app: &Arc<App>, ask: Ask) -> Result<Answer, ApiError> {
    let stopwatch = Stopwatch::start(app.clone(), ask.place.figures.clone());
    let is_sampled = ask.config.do_sample;
    let result = start(app, ask, &stopwatch).await;
    match result {
        Ok((prompt, ticket, progress, place)) => {
            let heard = Vec::new().into_iter();
            Ok(Answer { prompt, is_sampled, progress, heard, stopwatch, _ticket: ticket, _place: place })
        }
        Err(error) => {
            // Refused, not cancelled.
            stopwatch.refused();
            Err(error)
        }
    }
}

type Started = (PromptFacts, Ticket, mpsc::UnboundedReceiver<Vec<EngineEvent>>, Arc<Place>);

async fn start(app: &Arc<App>, ask: Ask, stopwatch: &Stopwatch) -> Result<Started, ApiError> {
    let service = app.service()?.clone();
    let Ask { words, mut config, length, answer_form, truncate, hears, upload, place } = ask;
    let limit = app.options.limits.answer_timeout.as_secs_f64();
    config.max_time = Some(config.max_time.map_or(limit, |asked| asked.min(limit)));
    let grammar = match answer_form {
        None => None,
        Some((form, param)) => {
            let service = service.clone();
            Some(media::aside(app, move || service.compile(&form, param)).await?)
        }
    };
    let inputs = match words {
        Words::Ids(ids) => inputs_of_ids(ids, service.backend().vocab_size())?,
        Words::Segments(prompt, end_of_utterance) => {
            // A prompt that cannot fit is refused before its pictures are decoded.
            let wanted = Wanted { prompt, end_of_utterance, max_tokens: service.backend().max_positions() };
            media::process(app, &service, if truncate.is_some() { wanted.unbounded() } else { wanted })
                .await?
        }
    };
    // Read, decoded and processed: what came over the network is not needed any more.
    drop(upload);
    let inputs = match truncate {
        Some(keep) => keep_last(inputs, keep),
        None => inputs,
    };
    let special = service.processor().special_tokens();
    let is_image = |id: &&u32| **id == special.image.id || **id == special.fake_token_around_image.id;
    let prompt = PromptFacts { image_tokens: inputs.token_ids.iter().filter(is_image).count() };
    let custom = grammar.map(|grammar| grammar.rule(inputs.token_ids.len(), config.num_return_sequences));
    if length == Length::Proposed {
        let longest = service.backend().longest_answer(&inputs, &config);
        shorten(&mut config, longest);
    }
    let (ticket, progress) = service.submit(inputs, config, custom, hears, Some(stopwatch.pace()))?;
    Ok((prompt, ticket, progress, place))
}

impl Answer {
    /// What is heard next: a token or the end. Not to be called after the end.
    pub(crate) async fn next(&mut self) -> Result<Next, ApiError> {
        loop {
            let Some(event) = self.heard.next() else {
                let Some(events) = self.progress.recv().await else {
                    self.stopwatch.failed();
                    return Err(engine_gone());
                };
                self.heard = events.into_iter();
                continue;
            };
            match event {
                EngineEvent::Started => {}
                EngineEvent::Token(event) => return Ok(Next::Event(event)),
                EngineEvent::Finished(generated) => {
                    self.stopwatch.finished(&generated.usage);
                    return Ok(Next::Finished(generated));
                }
                EngineEvent::Failed(error) => {
                    self.stopwatch.failed();
                    return Err(model_failed(error));
                }
            }
        }
    }

    /// All of it.
    pub(crate) async fn finish(mut self) -> Result<Generated, ApiError> {
        loop {
            if let Next::Finished(generated) = self.next().await? {
                let is_cut = |reason| matches!(reason, FinishReason::Cancelled);
                if generated.sequences.iter().any(|sequence| is_cut(sequence.finish_reason)) {
                    // Nobody here cancels an answer that is still waited for.
                    return Err(shut_down());
                }
                return Ok(generated);
            }
        }
    }
}

/// The error of an answer that was cut off by the end of the server.
pub(crate) fn shut_down() -> ApiError {
    ApiError::new(Kind::Unavailable, "the server was shut down before the answer was complete")
        .code("shutting_down")
        .retry_after(Duration::from_secs(5))
}

fn model_failed(error: GenerateError) -> ApiError {
    match &error {
        // The words of a panic may be those of a request. Where it was is in the log already.
        GenerateError::Panicked { .. } => tracing::error!("the model failed: it panicked"),
        // Numbers of tokens and tensors, no words of a prompt.
        error => tracing::error!(error = error as &dyn std::error::Error, "the model failed"),
    }
    error.into()
}

fn engine_gone() -> ApiError {
    tracing::error!("the engine dropped a request");
    ApiError::new(Kind::Internal, "the model failed to answer")
}

/// Bounds a proposed length by what there is room for. Where there is none, the engine says so.
fn shorten(config: &mut GenerationConfig, longest: usize) {
    let shortest = config.min_new_tokens.unwrap_or(0).max(1);
    if longest >= shortest {
        config.max_new_tokens = config.max_new_tokens.map(|proposed| proposed.min(longest));
    }
}

/// A prompt without its pictures.
pub(crate) fn words_of(prompt: &[Segment]) -> String {
    let words = prompt.iter().filter_map(|segment| match segment {
        Segment::Text(words) => Some(words.as_str()),
        Segment::Image(_) => None,
    });
    words.collect()
}

fn inputs_of_ids(token_ids: Vec<u32>, vocab_size: usize) -> Result<SequenceInputs, ApiError> {
    if let Some(id) = token_ids.iter().find(|id| **id as usize >= vocab_size) {
        return Err(ApiError::field(
            "prompt",
            format_args!("token {id}, but the vocabulary has {vocab_size}"),
        ));
    }
    Ok(SequenceInputs { image_index: vec![None; token_ids.len()], token_ids, images: Vec::new() })
}

/// The first element and all from `from` on.
fn cut<T: Copy>(all: &[T], from: usize) -> Vec<T> {
    std::iter::once(all[0]).chain(all[from..].iter().copied()).collect()
}

/// The first token, which begins every prompt, and as many of the last ones as `keep` leaves.
fn keep_last(inputs: SequenceInputs, keep: usize) -> SequenceInputs {
    let count = inputs.token_ids.len();
    if count <= keep || keep == 0 {
        return inputs;
    }
    let from = count - (keep - 1);
    SequenceInputs {
        token_ids: cut(&inputs.token_ids, from),
        image_index: cut(&inputs.image_index, from),
        images: inputs.images,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncation_keeps_the_first_and_the_last_tokens() {
        let inputs = SequenceInputs {
            token_ids: vec![1, 10, 11, 12, 13],
            image_index: vec![None, None, Some(0), Some(0), Some(1)],
            images: Vec::new(),
        };
        for (keep, expected) in
            [(9, vec![1, 10, 11, 12, 13]), (5, vec![1, 10, 11, 12, 13]), (3, vec![1, 12, 13]), (1, vec![1])]
        {
            let cut = keep_last(inputs.clone(), keep);
            assert_eq!(cut.token_ids, expected, "keep {keep}");
            assert_eq!(cut.image_index.len(), expected.len());
        }
        assert_eq!(keep_last(inputs, 2).image_index, [None, Some(1)]);
    }
}
