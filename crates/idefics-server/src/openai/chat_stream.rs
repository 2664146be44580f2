//! A chat answer as it is written.
//!
//! The role comes once, before anything else of a choice; `finish_reason` once, after everything; then the usage
//! if it was asked for, then `[DONE]`. An error is an event with `error`, after which nothing follows.

use std::{collections::VecDeque, sync::Arc};

use axum::response::{Response, sse::Event as SseEvent};
use futures_util::stream;
use idefics::generate::{Event, FinishReason, Generated};

use super::{
    chat::{Head, Start, usage},
    data, error_event, fingerprint, finish_reason, logprobs,
    types::{ChatChunk, ChunkChoice, Delta, Usage},
};
use crate::{
    error::Dialect,
    service::{self, Answer, Next, Service},
    state::App,
};

pub(super) fn respond(
    app: &App,
    service: Arc<Service>,
    answer: Answer,
    head: Head,
    answers: usize,
    start: Start,
    include_usage: Option<()>,
) -> Response {
    let choices = (0..answers).map(|_| Choice::default()).collect();
    let mut chunks = Chunks {
        service,
        answer,
        head,
        start,
        choices,
        include_usage,
        ready: VecDeque::new(),
        is_over: false,
    };
    chunks.begin();
    let events = stream::unfold(chunks, |mut chunks| async {
        let event = chunks.next().await?;
        Some((event, chunks))
    });
    super::stream(app, Dialect::OpenAi, events)
}

/// What was sent of one choice.
#[derive(Default)]
struct Choice {
    has_text: bool,
}

struct Chunks {
    service: Arc<Service>,
    answer: Answer,
    head: Head,
    start: Start,
    choices: Vec<Choice>,
    include_usage: Option<()>,
    ready: VecDeque<SseEvent>,
    is_over: bool,
}

impl Chunks {
    async fn next(&mut self) -> Option<SseEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            match self.answer.next().await {
                Ok(Next::Event(event)) => self.event(&event),
                Ok(Next::Finished(generated)) => self.end(&generated),
                Err(error) => {
                    self.ready.push_back(error_event(&error, Dialect::OpenAi));
                    self.is_over = true;
                }
            }
        }
    }

    fn begin(&mut self) {
        for index in 0..self.choices.len() {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
            self.push(ChunkChoice { index, delta, logprobs: None, finish_reason: None });
        }
    }

    fn event(&mut self, event: &Event) {
        if event.finish_reason == Some(FinishReason::Cancelled) {
            // Whoever reads this has not cancelled.
            self.ready.push_back(error_event(&service::shut_down(), Dialect::OpenAi));
            self.is_over = true;
            return;
        }
        // Greedy search gives one answer, which is every answer.
        let is_every = !self.is_sampled() && event.sequence == 0;
        for index in 0..self.choices.len() {
            if is_every || index == event.sequence {
                self.event_of(index, event);
            }
        }
    }

    fn event_of(&mut self, index: usize, event: &Event) {
        let tokenizer = self.service.processor().tokenizer().clone();
        let logprobs = event.logprob.as_ref().map(|it| logprobs::chat(&tokenizer, std::slice::from_ref(it)));
        let choice = &mut self.choices[index];
        let text = if choice.has_text { event.text.as_str() } else { self.start.text_of(&event.text) };
        choice.has_text |= !text.is_empty();
        if !text.is_empty() || logprobs.is_some() {
            let delta = Delta { role: None, content: Some(text.to_owned()) };
            self.push(ChunkChoice { index, delta, logprobs, finish_reason: None });
        }
        if let Some(reason) = event.finish_reason {
            let finish_reason = Some(finish_reason(reason));
            self.push(ChunkChoice { index, delta: Delta::default(), logprobs: None, finish_reason });
        }
    }

    fn end(&mut self, generated: &Generated) {
        if self.include_usage.is_some() {
            let usage = usage(self.answer.prompt, generated);
            self.push_chunk(Vec::new(), Some(usage));
        }
        self.ready.push_back(SseEvent::default().data("[DONE]"));
        self.is_over = true;
    }

    fn is_sampled(&self) -> bool {
        self.answer.is_sampled
    }

    fn push(&mut self, choice: ChunkChoice) {
        self.push_chunk(vec![choice], None);
    }

    fn push_chunk(&mut self, choices: Vec<ChunkChoice>, usage: Option<Usage>) {
        let chunk = ChatChunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            system_fingerprint: fingerprint(),
            choices,
            usage,
        };
        self.ready.push_back(data(&chunk));
    }
}
