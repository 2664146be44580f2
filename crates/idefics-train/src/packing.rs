//! Sequences into batches.
//!
//! A batch is a list of sequences that the model reads laid end to end, each for itself: there is no padding, and
//! no sequence sees another, so packing changes no number. What a batch is bounded by is memory (tokens and
//! pictures) or taste (sequences).

use idefics::model::TrainingSequence;
use serde::{Deserialize, Serialize};

use crate::data::MixturePosition;

/// Bounds of one pass through the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Most tokens.
    pub tokens: usize,
    /// Most pictures.
    pub images: usize,
    /// Most sequences, if they are bounded.
    pub sequences: Option<usize>,
    /// Passes whose gradients are added up before the weights move.
    pub accumulation: usize,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { tokens: 2048, images: 16, sequences: None, accumulation: 1 }
    }
}

impl BatchConfig {
    /// Batches that sequences of these tokens and pictures fill, in this order.
    pub fn num_batches(&self, sizes: impl IntoIterator<Item = (usize, usize)>) -> u64 {
        let (mut batches, mut filling) = (0, Filling::default());
        for (tokens, images) in sizes {
            if filling.is_full(self) || !filling.add(self, tokens, images) {
                batches += 1;
                filling = Filling::default();
                filling.add(self, tokens, images);
            }
        }
        batches + u64::from(filling.sequences > 0)
    }
}

/// How full a batch is.
#[derive(Debug, Clone, Copy, Default)]
struct Filling {
    sequences: usize,
    tokens: usize,
    images: usize,
}

impl Filling {
    /// Whether no sequence is taken any more, however short.
    fn is_full(&self, config: &BatchConfig) -> bool {
        config.sequences.is_some_and(|most| self.sequences >= most.max(1))
    }

    /// Takes a sequence if there is room, or nothing else yet.
    fn add(&mut self, config: &BatchConfig, tokens: usize, images: usize) -> bool {
        let (tokens, images) = (self.tokens + tokens, self.images + images);
        let fits = tokens <= config.tokens && images <= config.images;
        let is_taken = fits || self.sequences == 0;
        if is_taken {
            *self = Self { sequences: self.sequences + 1, tokens, images };
        }
        is_taken
    }
}

/// Where a run is: the sample that gives the next sequence, and how many of its sequences are used.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Before the sample.
    pub mixture: MixturePosition,
    /// Sequences of it that were taken.
    pub sequences_taken: usize,
}

/// A sequence, and where it was found.
#[derive(Debug, Clone)]
pub struct Placed {
    /// What is learned from.
    pub sequence: TrainingSequence,
    /// The place before it.
    pub position: Position,
}

/// Fills batches in the order in which sequences come.
#[derive(Debug)]
pub struct Packer {
    config: BatchConfig,
    /// A sequence that did not fit any more.
    carried: Option<Placed>,
}

impl Packer {
    /// A packer that holds nothing yet.
    pub fn new(config: BatchConfig) -> Self {
        Self { config, carried: None }
    }

    /// The next batch; empty when no sequence is left. A sequence that is larger than a batch is one by itself.
    pub fn next_batch<E>(
        &mut self,
        mut next: impl FnMut() -> Result<Option<Placed>, E>,
    ) -> Result<Vec<Placed>, E> {
        let (mut batch, mut filling) = (Vec::new(), Filling::default());
        while !filling.is_full(&self.config) {
            let Some(placed) = self.carried.take().map_or_else(&mut next, |placed| Ok(Some(placed)))? else {
                break;
            };
            let TrainingSequence { token_ids, images, .. } = &placed.sequence;
            if !filling.add(&self.config, token_ids.len(), images.len()) {
                self.carried = Some(placed);
                break;
            }
            batch.push(placed);
        }
        Ok(batch)
    }

    /// Forgets the sequence that was carried over, for a run that goes elsewhere.
    pub fn clear(&mut self) {
        self.carried = None;
    }

    /// The place of the sequence that was carried over: what the next batch begins with.
    pub fn carried_position(&self) -> Option<&Position> {
        self.carried.as_ref().map(|placed| &placed.position)
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, sync::Arc};

    use idefics::processor::PixelValues;

    use super::*;

    /// Sequences as (tokens, pictures); batches as the lengths of their sequences.
    fn check(config: BatchConfig, sequences: &[(usize, usize)], expected: &[&[usize]]) {
        let picture = Arc::new(PixelValues::new(vec![0.0; 3], 1, 1));
        let mut left = sequences.iter().enumerate().map(|(index, &(tokens, images))| Placed {
            sequence: TrainingSequence {
                token_ids: vec![0; tokens],
                images: vec![Arc::clone(&picture); images],
                ..TrainingSequence::default()
            },
            position: Position { sequences_taken: index, ..Position::default() },
        });
        let mut packer = Packer::new(config);
        let mut got = Vec::new();
        loop {
            let batch = packer.next_batch(|| Ok::<_, Infallible>(left.next())).unwrap();
            if batch.is_empty() {
                break;
            }
            let first = batch[0].position.sequences_taken;
            assert!(batch.iter().zip(first..).all(|(placed, at)| placed.position.sequences_taken == at));
            got.push(batch.iter().map(|placed| placed.sequence.token_ids.len()).collect::<Vec<_>>());
        }
        assert_eq!(got, expected);
        assert_eq!(config.num_batches(sequences.iter().copied()), expected.len() as u64, "{sequences:?}");
    }

    #[test]
    fn batches_fill_in_order() {
        let config = BatchConfig { tokens: 10, images: 2, ..BatchConfig::default() };
        check(config, &[(4, 0), (6, 0), (1, 0), (9, 0), (2, 0)], &[&[4, 6], &[1, 9], &[2]]);
        check(config, &[(1, 1), (2, 1), (3, 1), (4, 0)], &[&[1, 2], &[3, 4]]);
        check(config, &[(3, 0), (20, 0), (3, 0)], &[&[3], &[20], &[3]]);
        let config = BatchConfig { sequences: Some(2), ..config };
        check(config, &[(1, 0), (1, 0), (1, 0)], &[&[1, 1], &[1]]);
        check(config, &[], &[]);
    }
}
