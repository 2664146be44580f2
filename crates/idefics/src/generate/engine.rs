//! Runs many prompts at once: admit, plan, step, choose, until all are answered.
//!
//! All sequences that are alive share a step; each gets exactly the tokens it would get alone, since rows of a
//! step share nothing, draws are keyed by seed and answer, and rules see one sequence.

use std::{collections::VecDeque, ops::ControlFlow, sync::atomic::AtomicBool, time::Duration};

use super::{
    CustomProcessor, Decode, FinishReason, GenerateError, GenerationConfig, LogitsOf, Scheduler, StepModel,
    TokenLogprob, config::Lengths, group::Group,
};
use crate::SequenceInputs;

/// One prompt and how to answer it.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Tokens and pictures.
    pub inputs: &'a SequenceInputs,
    /// How to answer.
    pub config: &'a GenerationConfig,
    /// A rule of the caller's own.
    pub custom: Option<CustomProcessor<'a>>,
    /// When set to true, the answer ends before its next token.
    pub cancel: Option<&'a AtomicBool>,
}

/// Something that happened: a token, or the end of an answer. A beam search has events only at its end, one for
/// each answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Index of the prompt.
    pub request: usize,
    /// Index among the answers to the prompt.
    pub sequence: usize,
    /// The new token.
    pub token_id: Option<u32>,
    /// Its log-probability, where it was asked for.
    pub logprob: Option<TokenLogprob>,
    /// Text that is certain by now; the texts of an answer joined are the answer.
    pub text: String,
    /// Set in the last event of an answer.
    pub finish_reason: Option<FinishReason>,
}

/// The answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// As many as `num_return_sequences`; best first in a beam search, which gives fewer where the options rule
    /// out so much that there are fewer.
    pub sequences: Vec<Completion>,
    /// What was counted.
    pub usage: Usage,
    /// How long it took.
    pub timings: Timings,
    /// The seed of the draws, where there were any.
    pub seed: Option<u64>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Generated tokens, the end token included.
    pub token_ids: Vec<u32>,
    /// The text behind the prompt, where there is a decoder.
    pub text: Option<String>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Log-probabilities of the tokens, where they were asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// The score of a beam: summed log-probability divided by a power of the length.
    pub score: Option<f32>,
}

/// Counts of one prompt and its answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Pictures of the prompt.
    pub images: usize,
    /// Tokens of all answers.
    pub generated_tokens: usize,
}

/// Wall time of one prompt. In a batch the time of shared steps counts for each prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// From the pictures to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// A running generation; an iterator over its events.
pub struct Generation<'a, M: StepModel> {
    model: &'a M,
    decoder: Option<&'a dyn Decode>,
    scheduler: Scheduler,
    waiting: VecDeque<(usize, Request<'a>, Lengths)>,
    running: Vec<Group<'a, M::Cache>>,
    done: Vec<Option<Generated>>,
    events: VecDeque<Event>,
}

impl<'a> Request<'a> {
    /// A plain request.
    pub fn new(inputs: &'a SequenceInputs, config: &'a GenerationConfig) -> Self {
        Self { inputs, config, custom: None, cancel: None }
    }

    /// Refuses what `model` cannot answer. `index` is the prompt's in messages.
    pub fn check(&self, model: &impl StepModel, index: usize) -> Result<Lengths, GenerateError> {
        self.config.validate()?;
        self.config.validate_vocabulary(model.vocab_size())?;
        let (token_ids, image_index) = (self.inputs.token_ids.len(), self.inputs.image_index.len());
        if token_ids != image_index {
            return Err(GenerateError::ImageIndexLength { request: index, token_ids, image_index });
        }
        self.config.lengths(index, token_ids, model.max_positions())
    }

    /// Sequences it needs at a time.
    fn width(&self) -> usize {
        self.config.num_beams.max(self.config.num_return_sequences)
    }
}

impl<'a, M: StepModel> Generation<'a, M> {
    /// Checks all requests and starts none yet. A decoder is needed for text and for stop strings.
    pub fn new(
        model: &'a M,
        decoder: Option<&'a dyn Decode>,
        requests: &[Request<'a>],
        scheduler: Scheduler,
    ) -> Result<Self, GenerateError> {
        let mut waiting = VecDeque::with_capacity(requests.len());
        for (index, request) in requests.iter().enumerate() {
            let lengths = request.check(model, index)?;
            if decoder.is_none() && !request.config.stop_strings.is_empty() {
                return Err(GenerateError::StopStringsNeedText);
            }
            waiting.push_back((index, *request, lengths));
        }
        let done = requests.iter().map(|_| None).collect();
        Ok(Self { model, decoder, scheduler, waiting, running: Vec::new(), done, events: VecDeque::new() })
    }

    /// Runs to the end; the events that nobody has taken yet are dropped.
    pub fn finish(mut self) -> Result<Vec<Generated>, GenerateError> {
        while self.step()? {
            self.events.clear();
        }
        Ok(self.into_results())
    }

    /// Ends all answers where they are; prompts that had no turn yet have empty answers.
    pub fn cancel(mut self) -> Result<Vec<Generated>, GenerateError> {
        self.admit(|_| true)?;
        let mut events = Vec::new();
        for group in &mut self.running {
            group.cancel(&mut events);
        }
        self.settle(&mut events);
        Ok(self.into_results())
    }

    /// One step of the model. False when all is done.
    fn step(&mut self) -> Result<bool, GenerateError> {
        let scheduler = self.scheduler;
        let mut events = Vec::new();
        let mut alive: usize = self.running.iter().map(Group::lane_count).sum();
        self.admit(|request| {
            let is_admitted = scheduler.admits(alive, request.width());
            alive += if is_admitted { request.width() } else { 0 };
            is_admitted
        })?;
        for group in self.running.iter_mut().filter(|group| group.is_cancelled()) {
            group.cancel(&mut events);
        }
        self.feed()?;
        for group in &mut self.running {
            group.advance(&mut events)?;
        }
        self.settle(&mut events);
        Ok(!self.running.is_empty() || !self.waiting.is_empty())
    }

    /// Starts requests in their order while `is_admitted` says so.
    fn admit(&mut self, mut is_admitted: impl FnMut(&Request<'a>) -> bool) -> Result<(), GenerateError> {
        while let Some((_, request, _)) = self.waiting.front()
            && is_admitted(request)
            && let Some((index, request, lengths)) = self.waiting.pop_front()
        {
            let cache = self.model.start(request.inputs).map_err(GenerateError::model)?;
            self.running.push(Group::new(index, request, self.decoder, lengths, cache));
        }
        Ok(())
    }

    /// Lets the model read the tokens that the scheduler grants.
    fn feed(&mut self) -> Result<(), GenerateError> {
        let demands: Vec<_> = self.running.iter().flat_map(Group::demands).collect();
        let grants = self.scheduler.plan(&demands);
        let targets: Vec<(usize, usize)> = self
            .running
            .iter()
            .enumerate()
            .flat_map(|(group, running)| (0..running.lane_count()).map(move |lane| (group, lane)))
            .collect();
        let mut rows = Vec::new();
        let mut readers = Vec::new();
        let lanes = self.running.iter_mut().flat_map(Group::lanes_mut);
        for ((lane, target), &count) in lanes.zip(targets).zip(&grants).filter(|(_, count)| **count > 0) {
            let logits = if count == lane.pending() { LogitsOf::Last } else { LogitsOf::Nothing };
            rows.push(lane.feed(count, logits));
            readers.push((target, logits));
        }
        if rows.is_empty() {
            return Ok(());
        }
        let outputs = self.model.step(&mut rows).map_err(GenerateError::model)?;
        if outputs.len() != readers.len() {
            return Err(GenerateError::LogitsShape { expected: readers.len(), got: outputs.len() });
        }
        for (((group, lane), logits_of), logits) in readers.into_iter().zip(outputs) {
            let expected = if logits_of == LogitsOf::Last { self.model.vocab_size() } else { 0 };
            if logits.len() != expected {
                return Err(GenerateError::LogitsShape { expected, got: logits.len() });
            }
            if logits_of == LogitsOf::Last {
                self.running[group].receive(lane, logits);
            }
        }
        Ok(())
    }

    /// Moves finished groups out of the way and their events to the reader.
    fn settle(&mut self, events: &mut Vec<Event>) {
        for group in self.running.extract_if(.., |group| group.is_done()) {
            let index = group.index;
            self.done[index] = Some(group.into_generated(events));
        }
        self.events.extend(events.drain(..));
    }

    fn into_results(self) -> Vec<Generated> {
        self.done
            .into_iter()
            .map(|done| done.expect("a generation ends when all requests are done"))
            .collect()
    }
}

impl<M: StepModel> Iterator for Generation<'_, M> {
    type Item = Result<Event, GenerateError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.events.is_empty() {
            if self.running.is_empty() && self.waiting.is_empty() {
                return None;
            }
            if let Err(error) = self.step() {
                // What is left cannot be trusted to go on.
                self.running.clear();
                self.waiting.clear();
                return Some(Err(error));
            }
        }
        self.events.pop_front().map(Ok)
    }
}

/// Answers all prompts with one configuration. `on_event` sees each token as it comes; where it breaks, all
/// answers end at once and what is there is returned.
pub fn generate<M: StepModel>(
    model: &M,
    decoder: Option<&dyn Decode>,
    inputs: &[SequenceInputs],
    config: &GenerationConfig,
    on_event: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Vec<Generated>, GenerateError> {
    let requests: Vec<_> = inputs.iter().map(|inputs| Request::new(inputs, config)).collect();
    generate_requests(model, decoder, &requests, Scheduler::default(), on_event)
}

/// The same, each prompt with its own configuration.
pub fn generate_requests<M: StepModel>(
    model: &M,
    decoder: Option<&dyn Decode>,
    requests: &[Request<'_>],
    scheduler: Scheduler,
    mut on_event: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Vec<Generated>, GenerateError> {
    let mut generation = Generation::new(model, decoder, requests, scheduler)?;
    while let Some(event) = generation.next() {
        if on_event(&event?).is_break() {
            return generation.cancel();
        }
    }
    generation.finish()
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
