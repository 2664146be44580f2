//! Who takes part in the next step, and with how many tokens.
//!
//! First every sequence that waits for one token, so that long prompts never stall running answers; then
//! prompts, in the order they came, a chunk each, while the step has room. Since rows of a step share nothing,
//! results do not depend on these choices.

/// Limits of one step and of what is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduler {
    /// Tokens of one step, over all rows; bounds the memory of activations.
    pub max_step_tokens: usize,
    /// Sequences alive at a time, beams and return sequences counted; bounds the memory of caches.
    pub max_sequences: usize,
}

/// What one row has left to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) pending: usize,
    /// Most tokens that it takes at once.
    pub(crate) chunk: usize,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self { max_step_tokens: 2048, max_sequences: 64 }
    }
}

impl Scheduler {
    /// Whether a request that will have `new` sequences may start beside `alive` ones. One alone always may.
    pub(crate) fn admits(&self, alive: usize, new: usize) -> bool {
        alive == 0 || alive + new <= self.max_sequences
    }

    /// Tokens for each row of the next step, 0 for those that wait. At least one row gets some if any wants some.
    pub(crate) fn plan(&self, demands: &[Demand]) -> Vec<usize> {
        let mut room = self.max_step_tokens.max(1);
        let mut grants = vec![0; demands.len()];
        for is_prompt in [false, true] {
            let rows = demands.iter().enumerate().filter(|(_, demand)| (demand.pending > 1) == is_prompt);
            for (row, demand) in rows {
                grants[row] = demand.pending.min(demand.chunk).min(room);
                room -= grants[row];
            }
        }
        grants
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_answers_come_first_then_prompts_in_order() {
        // (tokens a step, [(pending, chunk)]) -> grants
        let rows = [
            (10, vec![(1, 8), (1, 8)], vec![1, 1]),
            (10, vec![(20, 8), (1, 8), (20, 8)], vec![8, 1, 1]),
            (10, vec![(3, 8), (0, 8), (1, 8)], vec![3, 0, 1]),
            (2, vec![(1, 8), (1, 8), (1, 8)], vec![1, 1, 0]),
            (0, vec![(5, 8)], vec![1]),
        ];
        for (max_step_tokens, demands, expected) in rows {
            let scheduler = Scheduler { max_step_tokens, ..Default::default() };
            let demands: Vec<_> =
                demands.into_iter().map(|(pending, chunk)| Demand { pending, chunk }).collect();
            assert_eq!(scheduler.plan(&demands), expected, "{demands:?}");
        }
    }

    #[test]
    fn one_request_is_always_admitted() {
        let scheduler = Scheduler { max_sequences: 4, ..Default::default() };
        for (alive, new, expected) in [(0, 9, true), (1, 3, true), (2, 3, false), (4, 1, false)] {
            assert_eq!(scheduler.admits(alive, new), expected, "{new} beside {alive}");
        }
    }
}
