//! Runs a list of prompts to its end, on the caller's thread.

use std::{collections::VecDeque, ops::ControlFlow, sync::Arc};

use super::{
    Decode, EngineEvent, Event, GenerateError, Generated, GenerationConfig, Memory, Request, Scheduler,
    Stats, StepModel,
    batch::{Batch, Outcome},
    stats::Counters,
};
use crate::SequenceInputs;

/// A running generation; an iterator over its events. A request that fails has an error in their place, and the
/// others go on.
pub struct Generation<'a, M: StepModel> {
    batch: Batch<'a, M>,
    counters: Arc<Counters>,
    done: Vec<Option<Result<Generated, GenerateError>>>,
    events: VecDeque<Result<Event, usize>>,
}

impl<'a, M: StepModel> Generation<'a, M> {
    /// Checks all requests and starts none yet. A decoder is needed for text and for stop strings.
    pub fn new(
        model: &'a M,
        decoder: Option<&'a dyn Decode>,
        requests: &[Request<'a>],
        scheduler: Scheduler,
    ) -> Result<Self, GenerateError> {
        let counters = Arc::new(Counters::default());
        // Nothing comes later that could use what is kept.
        let memory = Memory { kept_image_bytes: 0, kept_prefix_bytes: 0, ..Memory::available(model) };
        let mut batch = Batch::new(model, decoder, scheduler, memory, Arc::clone(&counters));
        let mut jobs = Vec::with_capacity(requests.len());
        for (index, request) in requests.iter().enumerate() {
            let lengths = request.check(model, index)?;
            if decoder.is_none() && !request.config.stop_strings.is_empty() {
                return Err(GenerateError::StopStringsNeedText);
            }
            jobs.push(request.into_job(index, lengths));
        }
        for job in jobs {
            batch.submit(job.index as u64, job);
        }
        Ok(Self { batch, counters, done: requests.iter().map(|_| None).collect(), events: VecDeque::new() })
    }

    /// Runs to the end and returns what became of each request; the events that nobody has taken yet are dropped.
    pub fn outcomes(mut self) -> Vec<Result<Generated, GenerateError>> {
        while self.turn() {
            self.events.clear();
        }
        self.into_outcomes()
    }

    /// The same, where an error of one is an error of all.
    pub fn finish(self) -> Result<Vec<Generated>, GenerateError> {
        self.outcomes().into_iter().collect()
    }

    /// Ends all answers where they are; prompts that had no turn yet have empty answers.
    pub fn cancel(mut self) -> Vec<Result<Generated, GenerateError>> {
        let mut out = Vec::new();
        self.batch.cancel_all(&mut out);
        self.record(out);
        self.into_outcomes()
    }

    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        self.counters.snapshot(usize::MAX)
    }

    /// One turn. False when all is done.
    fn turn(&mut self) -> bool {
        let mut out = Vec::new();
        self.batch.turn(&mut out);
        self.record(out);
        !self.batch.is_idle()
    }

    fn record(&mut self, out: Vec<Outcome>) {
        for (id, event) in out {
            let request = id as usize;
            match event {
                EngineEvent::Started => {}
                EngineEvent::Token(event) => self.events.push_back(Ok(event)),
                EngineEvent::Finished(generated) => self.done[request] = Some(Ok(generated)),
                EngineEvent::Failed(error) => {
                    self.done[request] = Some(Err(error));
                    self.events.push_back(Err(request));
                }
            }
        }
    }

    fn into_outcomes(self) -> Vec<Result<Generated, GenerateError>> {
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
            if self.batch.is_idle() {
                return None;
            }
            self.turn();
        }
        let event = self.events.pop_front()?;
        Some(event.map_err(|request| {
            // The reader has the error itself; who asks for the outcomes gets its words.
            let told =
                self.done[request].as_ref().and_then(|done| done.as_ref().err()).map(ToString::to_string);
            let told = GenerateError::Told { request, message: told.unwrap_or_default() };
            match self.done[request].replace(Err(told)) {
                Some(Err(error)) => error,
                _ => unreachable!("only a request that failed has an error among its events"),
            }
        }))
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
    on_event: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Vec<Generated>, GenerateError> {
    answer_each(model, decoder, requests, scheduler, on_event)?.into_iter().collect()
}

/// The same, where a prompt that fails leaves the others alone: the outer error is a request that was refused
/// before anything ran, an inner one says what became of its prompt.
pub fn answer_each<M: StepModel>(
    model: &M,
    decoder: Option<&dyn Decode>,
    requests: &[Request<'_>],
    scheduler: Scheduler,
    mut on_event: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Vec<Result<Generated, GenerateError>>, GenerateError> {
    let mut generation = Generation::new(model, decoder, requests, scheduler)?;
    loop {
        while let Some(event) = generation.events.pop_front() {
            // Failures are among the outcomes.
            if event.is_ok_and(|event| on_event(&event).is_break()) {
                return Ok(generation.cancel());
            }
        }
        if generation.batch.is_idle() {
            return Ok(generation.into_outcomes());
        }
        generation.turn();
    }
}

#[cfg(test)]
#[path = "generation_tests.rs"]
mod tests;
