//! A list of requests to an engine, for callers who wait for all of them.

use std::{
    collections::VecDeque,
    ops::ControlFlow,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError, Sender},
    },
    time::Duration,
};

use super::{Engine, EngineEvent, Rejected, State, Submission, Ticket};
use crate::{
    SequenceInputs,
    generate::{Event, GenerateError, Generated, GenerationConfig, StepModel},
};

/// How often the caller's flag is looked at while nothing happens.
const POLL: Duration = Duration::from_millis(20);

/// Why one of a list of requests has no answer.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// It was not taken.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// It failed.
    #[error(transparent)]
    Failed(#[from] GenerateError),
}

/// One that is not answered yet.
type Pending = (usize, SequenceInputs, GenerationConfig);

impl<M: StepModel + Send + Sync + 'static> Engine<M> {
    /// Answers a list of requests and waits for all of them, for the queue too where it is full. What becomes of
    /// one leaves the others alone. `on_event` sees each token as it comes, under the index of its request; where it
    /// breaks, or `cancel` is set, all answers end at once and what is there is returned.
    pub fn answer_each(
        &self,
        requests: impl IntoIterator<Item = (SequenceInputs, GenerationConfig)>,
        cancel: &AtomicBool,
        mut on_event: impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Vec<Result<Generated, AnswerError>> {
        let requests = requests.into_iter().enumerate();
        let mut waiting: VecDeque<Pending> =
            requests.map(|(index, (inputs, config))| (index, inputs, config)).collect();
        let mut done: Vec<Option<Result<Generated, AnswerError>>> = waiting.iter().map(|_| None).collect();
        let mut open = done.len();
        let mut tickets: Vec<Ticket> = Vec::new();
        let (sender, events) = mpsc::channel();
        let mut is_cancelled = false;
        while open > 0 {
            is_cancelled |= cancel.load(Ordering::Relaxed);
            while let Some(pending) = waiting.pop_front() {
                match self.submit_one(&pending, &sender) {
                    Ok(ticket) => tickets.push(ticket),
                    Err(Rejected::QueueFull { .. }) => {
                        waiting.push_front(pending);
                        break;
                    }
                    Err(error) => {
                        done[pending.0] = Some(Err(error.into()));
                        open -= 1;
                    }
                }
            }
            if is_cancelled {
                tickets.iter().for_each(Ticket::cancel);
            }
            match events.recv_timeout(POLL) {
                Ok((request, EngineEvent::Token(event))) => {
                    is_cancelled |= on_event(&Event { request, ..event }).is_break();
                }
                Ok((request, EngineEvent::Finished(generated))) => {
                    done[request] = Some(Ok(generated));
                    open -= 1;
                }
                Ok((request, EngineEvent::Failed(error))) => {
                    done[request] = Some(Err(error.into()));
                    open -= 1;
                }
                Err(RecvTimeoutError::Timeout) if self.shared.inbox().state == State::Stopped => break,
                Ok((_, EngineEvent::Started)) | Err(_) => {}
            }
        }
        done.into_iter().map(|done| done.unwrap_or(Err(Rejected::ShuttingDown.into()))).collect()
    }

    fn submit_one(
        &self,
        (index, inputs, config): &Pending,
        sender: &Sender<(usize, EngineEvent)>,
    ) -> Result<Ticket, Rejected> {
        let (index, sender) = (*index, sender.clone());
        // Tokens and options are small, and pictures are shared.
        self.submit(Submission::new(inputs.clone(), config.clone(), move |event| {
            match sender.send((index, event)) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        }))
    }
}
