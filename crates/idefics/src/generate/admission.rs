//! Who may start, and who has to make room: memory and places, counted before they are taken.
//!
//! A request is counted with its prompt and a share of its longest answer, since few answers are as long as they
//! may be. What grows beyond is taken from what is only kept for later, and then from the request that came last
//! ([`Admission::victim`]): its caches go, its tokens stay, and it reads them again when there is room. The oldest
//! request always runs on, so all end.

/// Limits on what is alive, and how far they may be promised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Admission {
    /// Bytes of keys, values and pictures.
    pub(crate) bytes: usize,
    /// Sequences.
    pub(crate) sequences: usize,
    /// Share of an answer's longest length that is counted in advance, 0 to 1.
    pub(crate) answer_share: f64,
    /// How often later requests may start before one that does not fit yet.
    pub(crate) overtakes: u32,
}

/// What something takes or may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) sequences: usize,
    pub(crate) bytes: usize,
}

impl Admission {
    /// Whether `new` may start beside what is `alive`. One alone always may.
    pub(crate) fn admits(&self, alive: Load, new: Load) -> bool {
        alive.sequences == 0
            || (alive.sequences + new.sequences <= self.sequences
                && alive.bytes.saturating_add(new.bytes) <= self.bytes)
    }

    /// The first of the waiting requests that may start: the first of all, or one behind it as long as it
    /// overtakes nobody too often. `waiting` has each one's load and how often it was overtaken.
    pub(crate) fn choose(
        &self,
        alive: Load,
        waiting: impl IntoIterator<Item = (Load, u32)>,
    ) -> Option<usize> {
        for (index, (load, overtaken)) in waiting.into_iter().enumerate() {
            if self.admits(alive, load) {
                return Some(index);
            }
            if overtaken >= self.overtakes {
                return None;
            }
        }
        None
    }

    /// Tokens to count for a sequence that has `len` tokens, started with `prompt` and may reach `full`.
    pub(crate) fn expected_len(&self, prompt: usize, len: usize, full: usize) -> usize {
        let answer = full.saturating_sub(prompt) as f64 * self.answer_share.clamp(0.0, 1.0);
        len.max(prompt + answer.ceil() as usize).min(full.max(len))
    }

    /// Which of the running requests makes room: the one that came last, as it has lost least. None while one
    /// alone is left. `arrivals` are in any order, later ones larger.
    pub(crate) fn victim(&self, taken: usize, arrivals: impl ExactSizeIterator<Item = u64>) -> Option<usize> {
        if taken <= self.bytes || arrivals.len() < 2 {
            return None;
        }
        arrivals.enumerate().max_by_key(|&(_, arrival)| arrival).map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(overtakes: u32) -> Admission {
        Admission { bytes: 100, sequences: 4, answer_share: 0.5, overtakes }
    }

    fn load(sequences: usize, bytes: usize) -> Load {
        Load { sequences, bytes }
    }

    #[test]
    fn places_and_bytes_are_limits_except_for_one_alone() {
        for (alive, new, expected) in [
            (load(0, 0), load(9, 900), true),
            (load(1, 0), load(3, 100), true),
            (load(2, 0), load(3, 0), false),
            (load(1, 60), load(1, 40), true),
            (load(1, 60), load(1, 41), false),
            (load(1, 60), load(1, usize::MAX), false),
        ] {
            assert_eq!(admission(0).admits(alive, new), expected, "{new:?} beside {alive:?}");
        }
    }

    #[test]
    fn small_requests_overtake_a_large_one_only_so_often() {
        let alive = load(1, 50);
        for (waiting, expected) in [
            (vec![(load(1, 60), 0), (load(1, 50), 0)], Some(1)),
            (vec![(load(1, 60), 2), (load(1, 50), 0)], Some(1)),
            (vec![(load(1, 60), 3), (load(1, 50), 0)], None),
            (vec![(load(1, 50), 3), (load(1, 50), 0)], Some(0)),
            (vec![(load(1, 60), 0), (load(1, 60), 3), (load(1, 1), 0)], None),
            (vec![], None),
        ] {
            assert_eq!(admission(3).choose(alive, waiting.iter().copied()), expected, "{waiting:?}");
        }
    }

    #[test]
    fn a_share_of_the_answer_is_counted_in_advance() {
        for (prompt, len, full, expected) in
            [(10, 10, 30, 20), (10, 25, 30, 25), (10, 10, 11, 11), (10, 10, 10, 10), (10, 31, 30, 31)]
        {
            assert_eq!(admission(0).expected_len(prompt, len, full), expected, "{prompt} {len} {full}");
        }
    }

    #[test]
    fn the_last_to_come_makes_room() {
        for (taken, arrivals, expected) in [
            (100, vec![3, 9, 5], None),
            (101, vec![3, 9, 5], Some(1)),
            (101, vec![3], None),
            (101, vec![], None),
        ] {
            assert_eq!(
                admission(0).victim(taken, arrivals.iter().copied()),
                expected,
                "{taken} {arrivals:?}"
            );
        }
    }
}
