//! The engine's thread.

use std::{
    borrow::Cow,
    collections::HashMap,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError, atomic::AtomicBool, atomic::Ordering},
};

use super::{Accepted, EngineEvent, Listener, Shared, State, Submission};
use crate::generate::{
    Decode, GenerateError, Memory, Scheduler, StepModel,
    batch::{Batch, Outcome, panic_message},
    request::{CancelFlag, Job, OwnedRule},
};

/// Those who listen, by the ids of their requests.
type Listeners = HashMap<u64, (Listener, Arc<AtomicBool>)>;

/// Runs until it is told to end.
pub(super) fn run<M: StepModel>(
    model: &M,
    decoder: &(dyn Decode + Send + Sync),
    scheduler: Scheduler,
    memory: Memory,
    shared: &Shared,
) {
    shared.teller.get_or_init(|| std::thread::current().id());
    let _last = SayStopped(shared);
    let new_batch = || Batch::new(model, Some(decoder), scheduler, memory, Arc::clone(&shared.counters));
    let mut batch = new_batch();
    let mut listeners = Listeners::new();
    let mut next_id = 0;
    let mut out: Vec<Outcome> = Vec::new();
    while let Some((new, state)) = next_mail(shared, batch.is_idle()) {
        for accepted in new {
            let (job, listener) = unpack(accepted);
            listeners.insert(next_id, listener);
            batch.submit(next_id, job);
            next_id += 1;
        }
        // What the model does wrong is one request's failure. A panic elsewhere, in a rule of a caller's, leaves
        // the batch in no state to go on with, but the engine in one to start another.
        let turn = catch_unwind(AssertUnwindSafe(|| match state {
            State::Stopping | State::Stopped => batch.cancel_all(&mut out),
            State::Open | State::Finishing => batch.turn(&mut out),
        }));
        for (id, event) in out.drain(..) {
            tell(&mut listeners, id, event);
        }
        if let Err(panic) = turn {
            let message = panic_message(&*panic);
            for id in std::mem::replace(&mut batch, new_batch()).give_up() {
                shared.counters.failed();
                let error = GenerateError::Panicked { message: message.clone() };
                tell(&mut listeners, id, EngineEvent::Failed(error));
            }
        }
    }
}

/// Waits for something to do. None when there will be nothing more.
fn next_mail(shared: &Shared, is_idle: bool) -> Option<(Vec<Accepted>, State)> {
    let mut inbox = shared.inbox();
    while is_idle && inbox.new.is_empty() {
        if inbox.state > State::Open {
            return None;
        }
        inbox = shared.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner);
    }
    Some((std::mem::take(&mut inbox.new), inbox.state))
}

fn unpack(accepted: Accepted) -> (Job<'static>, (Listener, Arc<AtomicBool>)) {
    let Accepted { submission: Submission { inputs, config, custom, on_event }, lengths, cancel } = accepted;
    let job = Job {
        index: 0,
        inputs: Cow::Owned(inputs),
        config: Cow::Owned(config),
        custom: custom.map(|rule| -> OwnedRule<'static> { Box::new(move |ids, scores| rule(ids, scores)) }),
        cancel: CancelFlag::Shared(Arc::clone(&cancel)),
        lengths,
    };
    (job, (on_event, cancel))
}

/// Tells a listener, and takes it away when it wants no more or there is no more.
fn tell(listeners: &mut Listeners, id: u64, event: EngineEvent) {
    let is_last = matches!(event, EngineEvent::Finished(_) | EngineEvent::Failed(_));
    let Some((listener, cancel)) = listeners.get_mut(&id) else { return };
    // A listener that panics listens no more; the others do.
    let answer = catch_unwind(AssertUnwindSafe(|| listener(event))).unwrap_or(ControlFlow::Break(()));
    if answer.is_break() {
        cancel.store(true, Ordering::Relaxed);
    }
    if answer.is_break() || is_last {
        listeners.remove(&id);
    }
}

/// Tells those who wait for the end, however it comes.
struct SayStopped<'a>(&'a Shared);

impl Drop for SayStopped<'_> {
    fn drop(&mut self) {
        let mut inbox = self.0.inbox();
        inbox.state = State::Stopped;
        let left = std::mem::take(&mut inbox.new);
        drop(inbox);
        self.0.stopped.notify_all();
        // Unlocked, as one of their listeners may hold the engine.
        drop(left);
    }
}
