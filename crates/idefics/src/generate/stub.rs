//! A model whose logits are a hash of everything it has read, and a tokenizer of bytes: what the policies of
//! generation are tested on. `reference/idefics_fixtures/stub.py` has the same model for transformers.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Decode, LogitsOf, Row, StepModel};
use crate::processor::PixelValues;

/// Written by instruct models at the end of a turn; the only special token of the stub tokenizer.
pub(crate) const END_OF_UTTERANCE: u32 = 256;

/// Logits from the last token and, three times weaker, from the whole history with the picture each token saw.
pub(crate) struct StubModel {
    pub(crate) vocab_size: usize,
    pub(crate) max_positions: usize,
    /// The rows of each step: tokens fed and logits asked for.
    pub(crate) steps: Mutex<Vec<Vec<(usize, LogitsOf)>>>,
    /// The pictures that were read, by their first values.
    pub(crate) pictures: Mutex<Vec<f32>>,
}

/// What was read: tokens and the pictures they saw.
#[derive(Debug, Clone, Default)]
pub(crate) struct StubCache {
    history: Vec<(u32, Option<u32>)>,
    images: Vec<u32>,
}

/// What the stub refuses to read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StubError {
    #[error("a step needs at least one token in each row")]
    EmptyRow,
    #[error("the stub fails at token {BAD_TOKEN}")]
    BadToken,
    #[error("the stub cannot see negative pictures")]
    BadPicture,
}

/// The stub fails where a sequence has this token, behind the tokens before it.
pub(crate) const BAD_TOKEN: u32 = 666;

/// The stub panics at this one.
pub(crate) const PANIC_TOKEN: u32 = 667;

impl StubModel {
    pub(crate) fn new(vocab_size: usize) -> Self {
        Self { vocab_size, max_positions: 64, steps: Mutex::default(), pictures: Mutex::default() }
    }

    pub(crate) fn steps(&self) -> MutexGuard<'_, Vec<Vec<(usize, LogitsOf)>>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pictures(&self) -> MutexGuard<'_, Vec<f32>> {
        self.pictures.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Stands for the content of the picture.
    type Image = u32;
    type Cache = StubCache;
    type Error = StubError;

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_positions(&self) -> usize {
        self.max_positions
    }

    fn encode_images(&self, images: &[&PixelValues]) -> Result<Vec<u32>, StubError> {
        let encode = |image: &&PixelValues| match image.data[0] {
            value if value < 0.0 => Err(StubError::BadPicture),
            value => Ok(value.to_bits()),
        };
        let encoded = images.iter().map(encode).collect::<Result<_, _>>()?;
        self.pictures().extend(images.iter().map(|image| image.data[0]));
        Ok(encoded)
    }

    fn new_cache(&self, images: Vec<u32>) -> StubCache {
        StubCache { history: Vec::new(), images }
    }

    fn truncate(&self, cache: &mut StubCache, tokens: usize) {
        cache.history.truncate(tokens);
    }

    fn set_images(&self, cache: &mut StubCache, images: Vec<u32>) {
        cache.images = images;
    }

    fn cache_bytes(&self, tokens: usize) -> usize {
        tokens
    }

    fn image_bytes(&self, _image: &PixelValues) -> usize {
        10
    }

    fn weight_bytes(&self) -> usize {
        0
    }

    fn step(&self, rows: &mut [Row<'_, StubCache>]) -> Result<Vec<Vec<f32>>, StubError> {
        self.steps().push(rows.iter().map(|row| (row.token_ids.len(), row.logits)).collect());
        let read = |row: &mut Row<'_, StubCache>| {
            if row.token_ids.is_empty() {
                return Err(StubError::EmptyRow);
            }
            let mut logits = Vec::new();
            for (index, (&token, &image)) in row.token_ids.iter().zip(row.image_index).enumerate() {
                match token {
                    BAD_TOKEN => return Err(StubError::BadToken),
                    PANIC_TOKEN => panic!("the stub panics at token {PANIC_TOKEN}"),
                    _ => {}
                }
                // Without pictures their place stands for them, as in the reference's stub.
                let seen = image.map(|image| row.cache.images.get(image as usize).copied().unwrap_or(image));
                row.cache.history.push((token, seen));
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
