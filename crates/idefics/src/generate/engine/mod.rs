//! A long-lived engine: requests come at any time from any thread, join and leave the running batch at every
//! step, and hear of their tokens as they come.
//!
//! One thread of its own owns all that runs; std threads and locks, no executor. What a request may wait for is
//! bounded:
//!
//! - **Its start**: there is a place when earlier requests leave one in memory and among the sequences; requests
//!   that fit may overtake one that does not, but only [`Memory::overtakes`] times.
//! - **Its pictures**: one is read in a turn ([`Scheduler::max_step_images`] where nobody else has work), each time
//!   for the request that had fewest. `m` pictures beside `k - 1` other requests are read after at most `k * m`
//!   turns.
//! - **Its first token**: [`Scheduler::steps_to_read`] steps later, whatever the length of other prompts.
//! - **Its next token**: the next step, unless memory has run out and it came last.
//! - **Its cancellation**: the present picture or step.

mod list;
mod worker;

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{JoinHandle, ThreadId},
    time::Duration,
};

use super::{
    Decode, Event, GenerateError, Generated, GenerationConfig, Memory, Request, Scheduler, Stats, StepModel,
    request::width, stats::Counters,
};
use crate::SequenceInputs;

pub use list::AnswerError;

/// Answers requests until it is shut down or dropped, which ends what runs.
pub struct Engine<M> {
    model: Arc<M>,
    shared: Arc<Shared>,
    memory: Memory,
    max_waiting: usize,
    worker: Mutex<Option<JoinHandle<()>>>,
}

/// How an engine works.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Limits of a step and of what runs together.
    pub scheduler: Scheduler,
    /// Bytes of caches; [`Memory::available`] if nothing is said.
    pub memory: Option<Memory>,
    /// Most requests that wait to start; more are refused.
    pub max_waiting: usize,
    /// Where the arithmetic happens; the global pool of `rayon` if nothing is said. The engine's thread runs inside
    /// it, so one that is shared has a thread less for others.
    pub pool: Option<Arc<rayon::ThreadPool>>,
}

/// A prompt, how to answer it, and who listens.
pub struct Submission {
    /// Tokens and pictures.
    pub inputs: SequenceInputs,
    /// How to answer.
    pub config: GenerationConfig,
    /// A rule of the caller's own.
    pub custom: Option<SharedProcessor>,
    /// Hears of all that happens to the request, on the engine's thread.
    pub on_event: Listener,
}

/// A listener must return at once: all requests wait for it. Hand events to a channel without blocking, and
/// `Break` where nobody reads them any more: it cancels the request, and nothing more is told.
pub type Listener = Box<dyn FnMut(EngineEvent) -> ControlFlow<()> + Send>;

/// A rule of a caller's own that the engine's thread applies; gets all tokens and the scores of the next one.
pub type SharedProcessor = Arc<dyn Fn(&[u32], &mut [f32]) + Send + Sync>;

/// What happens to a request: one `Started`, any number of `Token`, and one of the others at the end. One that is
/// cancelled before its start has no `Started`.
#[derive(Debug)]
pub enum EngineEvent {
    /// It has its place; its pictures are read next.
    Started,
    /// A token, or the end of an answer. The request in it is always 0.
    Token(Event),
    /// All answers are done, or were cancelled.
    Finished(Generated),
    /// It ended without an answer. What it wrote by then was told.
    Failed(GenerateError),
}

/// Holds a request: dropping it cancels the request, whatever stage it is in.
#[derive(Debug)]
#[must_use = "dropping the ticket cancels the request"]
pub struct Ticket {
    cancel: Arc<AtomicBool>,
    cancels_on_drop: bool,
}

/// What becomes of requests when an engine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// They are answered, waiting ones included.
    Finish,
    /// They end where they are.
    Now,
}

/// Why a request was not taken. Nothing was told to its listener.
#[derive(Debug, thiserror::Error)]
pub enum Rejected {
    /// Too many wait already.
    #[error("{waiting} requests wait already, and no more than {limit} may")]
    QueueFull {
        /// Requests that wait.
        waiting: usize,
        /// The limit.
        limit: usize,
        /// When a place is likely to be free, as the queue moves now.
        retry_after: Duration,
    },
    /// The prompt leaves no room for an answer.
    #[error(transparent)]
    TooLong(GenerateError),
    /// The request alone needs more memory than there is for all.
    #[error(
        "the request may need {needed} bytes of cache, and the limit is {limit}; shorten prompt or answer, or ask for fewer answers"
    )]
    NeverFits {
        /// Bytes at its full length.
        needed: usize,
        /// Bytes for all requests.
        limit: usize,
    },
    /// The prompt and its pictures do not fit together, or the options make no sense.
    #[error(transparent)]
    Invalid(GenerateError),
    /// The engine takes no more requests.
    #[error("the engine is shutting down")]
    ShuttingDown,
}

/// What the engine's thread shares with everybody else.
struct Shared {
    inbox: Mutex<Inbox>,
    /// Something is in the inbox.
    wake: Condvar,
    /// The thread has ended.
    stopped: Condvar,
    /// The thread that listeners are told on: the engine's own, or one of its pool.
    teller: OnceLock<ThreadId>,
    counters: Arc<Counters>,
}

struct Inbox {
    new: Vec<Accepted>,
    state: State,
}

/// A request on its way to the engine's thread.
struct Accepted {
    submission: Submission,
    lengths: super::Lengths,
    cancel: Arc<AtomicBool>,
}

/// In the order they are passed through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Open,
    /// No new requests; the thread ends when all are answered.
    Finishing,
    /// The thread cancels all and ends.
    Stopping,
    Stopped,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { scheduler: Scheduler::interactive(), memory: None, max_waiting: 256, pool: None }
    }
}

impl Submission {
    /// A plain submission.
    pub fn new(
        inputs: SequenceInputs,
        config: GenerationConfig,
        on_event: impl FnMut(EngineEvent) -> ControlFlow<()> + Send + 'static,
    ) -> Self {
        Self { inputs, config, custom: None, on_event: Box::new(on_event) }
    }
}

impl<M: StepModel + Send + Sync + 'static> Engine<M> {
    /// Starts an engine. `decoder` is a [`Processor`](crate::processor::Processor) or its tokenizer. Fails where the
    /// system has no thread to give.
    pub fn start(
        model: Arc<M>,
        decoder: Arc<dyn Decode + Send + Sync>,
        options: EngineOptions,
    ) -> std::io::Result<Self> {
        let EngineOptions { scheduler, memory, max_waiting, pool } = options;
        let memory = memory.unwrap_or_else(|| Memory::available(&*model));
        let shared = Arc::new(Shared {
            inbox: Mutex::new(Inbox { new: Vec::new(), state: State::Open }),
            wake: Condvar::new(),
            stopped: Condvar::new(),
            teller: OnceLock::new(),
            counters: Arc::default(),
        });
        let worker = {
            let (model, shared) = (Arc::clone(&model), Arc::clone(&shared));
            let run = move || worker::run(&*model, &*decoder, scheduler, memory, &shared);
            let builder = std::thread::Builder::new().name("idefics-engine".to_owned());
            builder.spawn(move || match pool {
                Some(pool) => pool.install(run),
                None => run(),
            })?
        };
        Ok(Self { model, shared, memory, max_waiting, worker: Mutex::new(Some(worker)) })
    }

    /// Takes a request, or says why not. Never waits for the model.
    pub fn submit(&self, submission: Submission) -> Result<Ticket, Rejected> {
        let result = self.try_submit(submission);
        match &result {
            Ok(_) => self.shared.wake.notify_one(),
            Err(_) => self.shared.counters.rejected(),
        }
        result
    }

    fn try_submit(&self, submission: Submission) -> Result<Ticket, Rejected> {
        let lengths = self.check(&submission.inputs, &submission.config)?;
        let cancel = Arc::new(AtomicBool::new(false));
        let ticket = Ticket { cancel: Arc::clone(&cancel), cancels_on_drop: true };
        let mut inbox = self.shared.inbox();
        if inbox.state > State::Open {
            return Err(Rejected::ShuttingDown);
        }
        // Read while the inbox is locked, so that no two take the last place.
        let waiting = self.shared.counters.queued();
        if waiting >= self.max_waiting {
            let retry_after = self.shared.counters.until_next_start();
            return Err(Rejected::QueueFull { waiting, limit: self.max_waiting, retry_after });
        }
        self.shared.counters.accepted();
        inbox.new.push(Accepted { submission, lengths, cancel });
        Ok(ticket)
    }

    /// Refuses what could never be answered.
    fn check(&self, inputs: &SequenceInputs, config: &GenerationConfig) -> Result<super::Lengths, Rejected> {
        let lengths = Request::new(inputs, config).check(&*self.model, 0).map_err(|error| match error {
            GenerateError::PromptTooLong { .. } | GenerateError::NoRoom { .. } => Rejected::TooLong(error),
            other => Rejected::Invalid(other),
        })?;
        let images = inputs.images.len();
        if let Some(&index) = inputs.image_index.iter().flatten().find(|&&index| index as usize >= images) {
            return Err(Rejected::Invalid(GenerateError::UnknownImage { request: 0, index, images }));
        }
        let needed = self.bytes_needed(inputs, config, lengths.max - 1);
        if needed > self.memory.bytes {
            return Err(Rejected::NeverFits { needed, limit: self.memory.bytes });
        }
        Ok(lengths)
    }

    /// The longest answer that these inputs leave room for, in positions of the model and in memory; 0 if there is
    /// none. What to ask for when a client names no length.
    pub fn longest_answer(&self, inputs: &SequenceInputs, config: &GenerationConfig) -> usize {
        let prompt = inputs.token_ids.len();
        let fits =
            |answer: &usize| self.bytes_needed(inputs, config, prompt + answer - 1) <= self.memory.bytes;
        let positions = self.model.max_positions().saturating_sub(prompt);
        // Bytes grow with tokens, so the answers that fit come first.
        let (mut fitting, mut beyond) = (0, positions + 1);
        while beyond - fitting > 1 {
            let middle = fitting.midpoint(beyond);
            if fits(&middle) { fitting = middle } else { beyond = middle }
        }
        fitting
    }

    /// Bytes of the request with sequences of `tokens` tokens.
    fn bytes_needed(&self, inputs: &SequenceInputs, config: &GenerationConfig, tokens: usize) -> usize {
        let mut images: Vec<_> = inputs.images.iter().collect();
        images.sort_by_key(|image| image.content_hash());
        images.dedup_by_key(|image| image.content_hash());
        let images = images.iter().map(|image| self.model.image_bytes(image)).sum::<usize>();
        self.model.cache_bytes(tokens).saturating_mul(width(config)).saturating_add(images)
    }
}

impl<M> Engine<M> {
    /// The model.
    pub fn model(&self) -> &Arc<M> {
        &self.model
    }

    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        self.shared.counters.snapshot(self.memory.bytes)
    }

    /// Whether it takes requests.
    pub fn is_open(&self) -> bool {
        self.shared.inbox().state == State::Open
    }

    /// Takes no more requests and waits until it has ended those it has. May be called again, from any thread, to
    /// end at once what a first call would finish. A listener that calls it does not wait: it is what would be waited
    /// for.
    pub fn shutdown(&self, drain: Drain) {
        let wanted = match drain {
            Drain::Finish => State::Finishing,
            Drain::Now => State::Stopping,
        };
        {
            let mut inbox = self.shared.inbox();
            inbox.state = inbox.state.max(wanted);
            self.shared.wake.notify_one();
            // A listener may hold the last handle to the engine, too, and drop it.
            if self.shared.teller.get() == Some(&std::thread::current().id()) {
                return;
            }
            while inbox.state < State::Stopped {
                inbox = self.shared.stopped.wait(inbox).unwrap_or_else(PoisonError::into_inner);
            }
        }
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker {
            // A panic of the thread was told to the listeners.
            drop(worker.join());
        }
    }
}

impl<M> Drop for Engine<M> {
    fn drop(&mut self) {
        self.shutdown(Drain::Now);
    }
}

impl Ticket {
    /// Cancels the request. Its listener still hears of what was written by then.
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Lets the request run without anybody holding it.
    pub fn detach(mut self) {
        self.cancels_on_drop = false;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.cancels_on_drop {
            self.cancel();
        }
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // Nothing that holds the lock can leave it half changed.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
