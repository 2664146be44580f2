//! Tokens that come faster than anybody reads, sent together.
//!
//! Each sending wakes a thread here and one of the client's, on processors that the model computes on. A model that
//! takes longer for a token than [`PAUSE`] has each of them sent at once.

use std::time::{Duration, Instant};

use idefics::generate::EngineEvent;

/// After tokens were sent, others wait for as long, and then for the one that comes next.
const PAUSE: Duration = Duration::from_millis(10);

/// The events of an answer that were not sent yet.
#[derive(Default)]
pub(crate) struct Together {
    waiting: Vec<EngineEvent>,
    sent: Option<Instant>,
}

impl Together {
    /// What is to be sent now that `event` has come: nothing yet, or all that waited. The first token waits for no
    /// other, and none waits when the answer is complete.
    pub(crate) fn add(&mut self, event: EngineEvent, now: Instant) -> Option<Vec<EngineEvent>> {
        let is_more_to_come = matches!(event, EngineEvent::Token(_));
        self.waiting.push(event);
        if is_more_to_come && self.sent.is_some_and(|sent| now.saturating_duration_since(sent) < PAUSE) {
            return None;
        }
        self.sent = Some(now);
        Some(std::mem::take(&mut self.waiting))
    }
}

#[cfg(test)]
mod tests {
    use idefics::generate::{Event, GenerateError};

    use super::*;

    #[test]
    fn quick_tokens_wait_for_each_other_and_slow_ones_for_none() {
        let start = Instant::now();
        let mut together = Together::default();
        let mut sent = |milliseconds: u64, event: EngineEvent| {
            together.add(event, start + Duration::from_millis(milliseconds)).map(|events| events.len())
        };
        let event = Event {
            request: 0,
            sequence: 0,
            token_id: Some(1),
            logprob: None,
            text: String::new(),
            finish_reason: None,
        };
        let token = || EngineEvent::Token(event.clone());
        assert_eq!(sent(0, token()), Some(1), "the first one");
        assert_eq!([4, 8].map(|at| sent(at, token())), [None, None]);
        assert_eq!(sent(12, token()), Some(3));
        assert_eq!(sent(23, token()), Some(1), "slow enough");
        assert_eq!(sent(24, token()), None);
        let panicked = EngineEvent::Failed(GenerateError::Panicked { message: String::new() });
        assert_eq!(sent(25, panicked), Some(2), "the end waits for nothing");
    }
}
