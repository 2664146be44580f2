//! When a sequence ends: end tokens, lengths, time, stop strings.
//!
//! Source: transformers `generation/stopping_criteria.py`. As there, a stop string may begin inside earlier
//! tokens, those of the prompt included, and end inside the last one; the token that stops is kept.

use std::time::{Duration, Instant};

use super::{GenerationConfig, config::Lengths, stream::Decode};

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// This end token was chosen.
    EndToken(u32),
    /// The stop string of this index is in the text.
    StopString(usize),
    /// The longest length was reached.
    Length,
    /// `max_time` is over.
    Time,
    /// The caller asked to stop.
    Cancelled,
}

impl FinishReason {
    /// `stop`, `length`, `time` or `cancelled`, as results print it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EndToken(_) | Self::StopString(_) => "stop",
            Self::Length => "length",
            Self::Time => "time",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The rules that need no text.
#[derive(Debug, Clone)]
pub(crate) struct StopRules {
    eos: Vec<u32>,
    max_length: usize,
    max_time: Option<Duration>,
    deadline: Option<Instant>,
}

impl StopRules {
    pub(crate) fn new(config: &GenerationConfig, lengths: Lengths) -> Self {
        let max_time = config.max_time.map(Duration::from_secs_f64);
        Self { eos: config.eos_token_ids.clone(), max_length: lengths.max, max_time, deadline: None }
    }

    /// The time runs from now on.
    pub(crate) fn start(&mut self, now: Instant) {
        self.deadline = self.max_time.and_then(|time| now.checked_add(time));
    }

    /// Whether a sequence that now has `length` tokens, `last` at its end, is done.
    pub(crate) fn check(&self, length: usize, last: u32) -> Option<FinishReason> {
        if self.eos.contains(&last) {
            Some(FinishReason::EndToken(last))
        } else if length >= self.max_length {
            Some(FinishReason::Length)
        } else if self.deadline.is_some_and(|deadline| Instant::now() > deadline) {
            Some(FinishReason::Time)
        } else {
            None
        }
    }
}

/// Texts that end a sequence.
#[derive(Debug, Clone, Default)]
pub(crate) struct StopStrings(Vec<String>);

/// A stop string in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StopMatch {
    /// Which one.
    pub(crate) index: usize,
    /// Where it starts, in bytes.
    pub(crate) start: usize,
}

impl StopStrings {
    pub(crate) fn new(strings: &[String]) -> Self {
        Self(strings.to_vec())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of the longest.
    pub(crate) fn max_len(&self) -> usize {
        self.0.iter().map(String::len).max().unwrap_or(0)
    }

    /// The stop string that starts first among those that end behind byte `from`.
    pub(crate) fn find(&self, text: &str, from: usize) -> Option<StopMatch> {
        let matches = self.0.iter().enumerate().filter_map(|(index, stop)| {
            let window = text.floor_char_boundary(from.saturating_sub(stop.len() - 1));
            let found = text[window..].match_indices(stop.as_str()).map(|(at, _)| window + at);
            found.into_iter().find(|start| start + stop.len() > from).map(|start| StopMatch { index, start })
        });
        matches.min_by_key(|found| found.start)
    }

    /// Bytes at the end of `text` that may be the start of a stop string.
    pub(crate) fn possible_start(&self, text: &str) -> usize {
        let suffix = |stop: &String| {
            let lengths = (1..stop.len()).rev().filter(|&length| stop.is_char_boundary(length));
            lengths.into_iter().find(|&length| text.ends_with(&stop[..length]))
        };
        self.0.iter().filter_map(suffix).max().unwrap_or(0)
    }

    /// Whether the last token of `token_ids` completes a stop string. For beams, whose sequences branch; a single
    /// sequence uses its text stream.
    pub(crate) fn completed_by_last(&self, decoder: &dyn Decode, token_ids: &[u32]) -> Option<usize> {
        if self.is_empty() {
            return None;
        }
        // A token may have no text of its own, such as a byte of a character; hence some more than one a byte.
        let window = &token_ids[token_ids.len().saturating_sub(self.max_len() + 8)..];
        let text = decoder.decode(window, false);
        let before = decoder.decode(&window[..window.len().saturating_sub(1)], false);
        let common = text.bytes().zip(before.bytes()).take_while(|(a, b)| a == b).count();
        self.find(&text, common).map(|found| found.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::stub::ByteTokenizer;

    fn stops(strings: &[&str]) -> StopStrings {
        StopStrings(strings.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn stop_strings_are_found_where_they_overlap_the_new_text() {
        // (strings, text, from) -> (index, start)
        /// Stop strings, text, length of its last token, and where a stop string then stands.
        type Row = (&'static [&'static str], &'static str, usize, Option<(usize, usize)>);
        let rows: [Row; 7] = [
            (&["User:"], "ok\nUser: x", 3, Some((0, 3))),
            (&["User:"], "User: old", 5, None),
            (&["b", "ab"], "xab", 2, Some((1, 1))),
            (&["é!"], "é!é!", 3, Some((0, 3))),
            (&["aa"], "aaa", 2, Some((0, 1))),
            (&["\u{20ac}"], "a\u{20ac}", 1, Some((0, 1))),
            (&["x"], "abc", 0, None),
        ];
        for (strings, text, from, expected) in rows {
            let found = stops(strings).find(text, from).map(|found| (found.index, found.start));
            assert_eq!(found, expected, "{strings:?} in {text:?} from {from}");
        }
    }

    #[test]
    fn possible_starts_are_measured() {
        for (strings, text, expected) in [
            (&["\nUser:"][..], "ok\nUs", 3),
            (&["\nUser:"], "ok\nUser:", 0),
            (&["abc", "bcd"], "xabc", 2),
            (&["éa"], "xé", 2),
            (&["éa"], "x", 0),
        ] {
            assert_eq!(stops(strings).possible_start(text), expected, "{strings:?} at the end of {text:?}");
        }
    }

    #[test]
    fn last_token_must_take_part_in_the_stop_string() {
        let decoder = ByteTokenizer;
        let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        assert_eq!(stops(&["lo"]).completed_by_last(&decoder, &ids("hello")), Some(0));
        assert_eq!(stops(&["ll"]).completed_by_last(&decoder, &ids("hello")), None);
        assert_eq!(stops(&["é"]).completed_by_last(&decoder, &ids("café")), Some(0));
    }

    #[test]
    fn rules_in_order_of_precedence() {
        let config =
            GenerationConfig { eos_token_ids: vec![2, 5], max_time: Some(1e-9), ..Default::default() };
        let lengths = Lengths { prompt: 1, min: 0, max: 10 };
        let start = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        let mut rules = StopRules::new(&config, lengths);
        rules.start(start);
        assert_eq!(rules.check(10, 5), Some(FinishReason::EndToken(5)));
        assert_eq!(rules.check(10, 6), Some(FinishReason::Length));
        assert_eq!(rules.check(9, 6), Some(FinishReason::Time));
        let mut patient = StopRules::new(&GenerationConfig { max_time: None, ..config }, lengths);
        patient.start(start);
        assert_eq!(patient.check(9, 6), None);
    }
}
