//! A model whose logits are a hash of everything it has read, and a tokenizer of bytes: what the policies of
//! generation are tested on. `reference/idefics_fixtures/stub.py` has the same model for transformers.

use std::cell::RefCell;

use super::{Decode, LogitsOf, Row, StepModel};
use crate::SequenceInputs;

/// Written by instruct models at the end of a turn; the only special token of the stub tokenizer.
pub(crate) const END_OF_UTTERANCE: u32 = 256;

/// Logits from the last token and, three times weaker, from the whole history with the picture each token saw.
pub(crate) struct StubModel {
    pub(crate) vocab_size: usize,
    pub(crate) max_positions: usize,
    /// The rows of each step: tokens fed and logits asked for.
    pub(crate) steps: RefCell<Vec<Vec<(usize, LogitsOf)>>>,
}

/// What was read: tokens and the pictures they saw.
#[derive(Debug, Clone, Default)]
pub(crate) struct StubCache {
    history: Vec<(u32, Option<u32>)>,
}

#[derive(Debug, thiserror::Error)]
#[error("a step needs at least one token in each row")]
pub(crate) struct EmptyRow;

impl StubModel {
    pub(crate) fn new(vocab_size: usize) -> Self {
        Self { vocab_size, max_positions: 64, steps: RefCell::default() }
    }

    /// Logits `[vocab]` after `history`.
    pub(crate) fn logits(&self, history: &[(u32, Option<u32>)]) -> Vec<f32> {
        let (last, _) = *history.last().expect("the stub has read at least one token");
        let of_history = history.iter().fold(0x1def_1c50, |hash, &(token, image)| {
            splitmix(hash ^ (u64::from(token) << 8 | image.map_or(0, |image| u64::from(image) + 1)))
        });
        let of_last = splitmix(u64::from(last) + 1);
        (0..self.vocab_size as u64)
            .map(|id| (3.0 * uniform(of_last.wrapping_add(id)) + uniform(of_history.wrapping_add(id))) as f32)
            .collect()
    }
}

/// In [-1, 1), with 24 bits.
fn uniform(seed: u64) -> f64 {
    (splitmix(seed) >> 40) as f64 / f64::from(1u32 << 23) - 1.0
}

fn splitmix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl StepModel for StubModel {
    type Cache = StubCache;
    type Error = EmptyRow;

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_positions(&self) -> usize {
        self.max_positions
    }

    fn start(&self, _inputs: &SequenceInputs) -> Result<StubCache, EmptyRow> {
        Ok(StubCache::default())
    }

    fn step(&self, rows: &mut [Row<'_, StubCache>]) -> Result<Vec<Vec<f32>>, EmptyRow> {
        self.steps.borrow_mut().push(rows.iter().map(|row| (row.token_ids.len(), row.logits)).collect());
        let read = |row: &mut Row<'_, StubCache>| {
            if row.token_ids.is_empty() {
                return Err(EmptyRow);
            }
            let mut logits = Vec::new();
            for (index, (&token, &image)) in row.token_ids.iter().zip(row.image_index).enumerate() {
                row.cache.history.push((token, image));
                let is_last = index + 1 == row.token_ids.len();
                if row.logits == LogitsOf::All || (row.logits == LogitsOf::Last && is_last) {
                    logits.extend(self.logits(&row.cache.history));
                }
            }
            Ok(logits)
        };
        rows.iter_mut().map(read).collect()
    }
}

/// One token a byte, and one special token. Decodes as LLaMA's tokenizer does: a run of bytes that is no valid
/// text becomes one replacement character a byte, and one leading space is dropped.
pub(crate) struct ByteTokenizer;

impl Decode for ByteTokenizer {
    fn decode(&self, token_ids: &[u32], skip_special: bool) -> String {
        let mut text = String::new();
        for run in token_ids.chunk_by(|a, b| (*a < 256) == (*b < 256)) {
            if run[0] < 256 {
                let bytes: Vec<u8> = run.iter().map(|&id| id as u8).collect();
                text.push_str(&decode_bytes(&bytes));
            } else if !skip_special {
                text.push_str(&"<end_of_utterance>".repeat(run.len()));
            }
        }
        text.strip_prefix(' ').map(str::to_owned).unwrap_or(text)
    }
}

/// Runs of non-ASCII bytes stand or fall together, as in `ByteFallback` of the tokenizers library.
fn decode_bytes(bytes: &[u8]) -> String {
    let runs = bytes.chunk_by(|a, b| a.is_ascii() == b.is_ascii());
    let decode = |run: &[u8]| match std::str::from_utf8(run) {
        Ok(text) => text.to_owned(),
        Err(_) => "\u{fffd}".repeat(run.len()),
    };
    runs.map(decode).collect()
}
