//! Who takes part in the next step, and with how many tokens.
//!
//! First every sequence that waits for one token, so that long prompts never stall running answers. Then
//! prompts: half of the room for them is dealt in equal shares, so that a short prompt never waits for long ones
//! in front of it; the rest goes to prompts in the order they came, so that long ones end one after another and
//! not all at the same late time. Since rows of a step share nothing, results do not depend on these choices.
//!
//! The bound: beside `k - 1` other prompts a prompt of `p` tokens is read after at most
//! `ceil(p / max(1, floor(room / 2k)))` steps, as long as `k <= room`; see [`Scheduler::steps_to_read`].

/// Limits of one step and of what is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduler {
    /// Tokens of one step, over all rows; bounds the memory of activations.
    pub max_step_tokens: usize,
    /// Tokens of prompts in a step that also writes answers; bounds the pause between two tokens of an answer.
    pub prompt_tokens_beside_answers: usize,
    /// Pictures that are read in one turn while no request has anything else to do; beside others it is one.
    pub max_step_images: usize,
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
    /// For batches: as much as possible in each step.
    fn default() -> Self {
        Self {
            max_step_tokens: 2048,
            prompt_tokens_beside_answers: 2048,
            max_step_images: 4,
            max_sequences: 64,
        }
    }
}

impl Scheduler {
    /// For people who wait: prompts are read in small portions while answers are written. From some tens of tokens
    /// on a step is bound by arithmetic, so that larger portions gain little.
    pub fn interactive() -> Self {
        Self { max_step_tokens: 128, prompt_tokens_beside_answers: 64, max_step_images: 1, max_sequences: 64 }
    }

    /// Most steps until a prompt of `tokens` tokens is read beside `others` more prompts, whatever their length,
    /// while answers are written; holds while there are no more prompts than tokens for them.
    pub fn steps_to_read(&self, tokens: usize, others: usize) -> usize {
        tokens.div_ceil(share(self.prompt_tokens_beside_answers.min(self.max_step_tokens), others + 1))
    }

    /// Tokens for each row of the next step, 0 for those that wait. At least one row gets some if any wants some,
    /// and at least one prompt if there is any.
    pub(crate) fn plan(&self, demands: &[Demand]) -> Vec<usize> {
        let mut grants = vec![0; demands.len()];
        let (prompts, answers): (Vec<usize>, Vec<usize>) = (0..demands.len())
            .filter(|&row| demands[row].pending > 0)
            .partition(|&row| demands[row].pending > 1);
        let n_answers = answers.len().min(self.max_step_tokens.max(1));
        for &row in answers.iter().take(n_answers) {
            grants[row] = 1;
        }
        let room = self.max_step_tokens.saturating_sub(n_answers).max(1);
        let mut room =
            if answers.is_empty() { room } else { room.min(self.prompt_tokens_beside_answers.max(1)) };
        for limit in [share(room, prompts.len()), usize::MAX] {
            for &row in &prompts {
                let Demand { pending, chunk } = demands[row];
                let more = pending.min(chunk).min(limit).saturating_sub(grants[row]).min(room);
                grants[row] += more;
                room -= more;
            }
        }
        grants
    }
}

/// What each of `prompts` prompts gets for certain of a step's `room`.
fn share(room: usize, prompts: usize) -> usize {
    (room / 2 / prompts.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demands(rows: &[(usize, usize)]) -> Vec<Demand> {
        rows.iter().map(|&(pending, chunk)| Demand { pending, chunk }).collect()
    }

    #[test]
    fn running_answers_come_first_then_prompts_in_order() {
        // (tokens a step, of prompts beside answers, [(pending, chunk)]) -> grants
        let rows = [
            (10, 10, vec![(1, 8), (1, 8)], vec![1, 1]),
            (10, 10, vec![(20, 8), (1, 8), (20, 8)], vec![7, 1, 2]),
            (10, 10, vec![(3, 8), (0, 8), (1, 8)], vec![3, 0, 1]),
            (10, 4, vec![(20, 8), (1, 8), (20, 8)], vec![3, 1, 1]),
            (10, 4, vec![(20, 8), (20, 8)], vec![8, 2]),
            // A short prompt behind long ones gets its share.
            (12, 12, vec![(50, 50), (50, 50), (2, 50)], vec![8, 2, 2]),
            (2, 2, vec![(1, 8), (1, 8), (1, 8)], vec![1, 1, 0]),
            // Answers alone fill the step, and yet a prompt moves.
            (2, 2, vec![(9, 8), (1, 8), (1, 8)], vec![1, 1, 1]),
            (0, 0, vec![(5, 8)], vec![1]),
        ];
        for (max_step_tokens, prompt_tokens_beside_answers, rows, expected) in rows {
            let scheduler =
                Scheduler { max_step_tokens, prompt_tokens_beside_answers, ..Scheduler::default() };
            assert_eq!(scheduler.plan(&demands(&rows)), expected, "{scheduler:?} {rows:?}");
        }
    }

    #[test]
    fn a_short_prompt_is_read_within_the_stated_steps() {
        for (room, tokens, others) in [(64, 40, 1), (64, 40, 20), (64, 7, 63), (16, 100, 3), (8, 3, 7)] {
            let scheduler = Scheduler { prompt_tokens_beside_answers: room, ..Scheduler::interactive() };
            // Endless prompts in front, a running answer beside.
            let mut pending = vec![1_000_000; others];
            pending.extend([tokens, 1]);
            let mut steps = 0;
            while pending[others] > 0 {
                let rows: Vec<_> = pending.iter().map(|&pending| (pending, 512)).collect();
                let grants = scheduler.plan(&demands(&rows));
                assert_eq!(grants[others + 1], 1, "the answer is never stalled");
                let of_prompts = grants.iter().zip(&pending).filter(|(_, pending)| **pending > 1);
                assert!(of_prompts.map(|(grant, _)| grant).sum::<usize>() <= room);
                pending[..=others].iter_mut().zip(grants).for_each(|(pending, grant)| *pending -= grant);
                steps += 1;
            }
            let bound = scheduler.steps_to_read(tokens, others);
            assert!(steps <= bound, "{tokens} tokens beside {others}: {steps} steps, bound {bound}");
        }
    }
}
