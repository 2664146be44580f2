//! The endless row of sequences that a run reads, and the batches that are made of it.

use std::collections::VecDeque;

use idefics::model::TrainingSequence;

use crate::{
    data::{DataError, Loader, MixturePosition, SampleError},
    packing::{BatchConfig, Packer, Placed, Position},
};

/// Broken samples that are allowed however few were read.
const ALWAYS_ALLOWED: u64 = 10;

/// Batches, as long as there are samples.
pub struct BatchStream {
    loader: Loader,
    packer: Packer,
    /// Sequences of a sample that was read.
    ready: VecDeque<Placed>,
    /// Behind the last sample that was read.
    next: MixturePosition,
    /// Sequences to pass over when a run is taken up in the middle of a sample.
    pass_over: usize,
    /// Samples after which the data ends.
    limit: Option<u64>,
    counts: Counts,
    max_broken: f64,
    /// Broken samples that nobody asked about yet.
    broken: Vec<SampleError>,
}

/// What was read in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counts {
    read: u64,
    broken: u64,
}

impl BatchStream {
    /// Batches of a loader that stands at its beginning; they end after `limit` samples.
    pub fn new(loader: Loader, batch: BatchConfig, limit: Option<u64>, max_broken: f64) -> Self {
        Self {
            next: loader.position().clone(),
            loader,
            packer: Packer::new(batch),
            ready: VecDeque::new(),
            pass_over: 0,
            limit,
            counts: Counts::default(),
            max_broken,
            broken: Vec::new(),
        }
    }

    /// The next batch; empty at the end.
    pub fn next_batch(&mut self) -> Result<Vec<TrainingSequence>, DataError> {
        let Self { packer, loader, ready, next, pass_over, limit, counts, max_broken, broken } = self;
        let batch = packer.next_batch(|| -> Result<_, DataError> {
            loop {
                if let Some(placed) = ready.pop_front() {
                    return Ok(Some(placed));
                }
                if limit.is_some_and(|limit| next.used.iter().sum::<u64>() >= limit) {
                    return Ok(None);
                }
                let loaded = loader.advance();
                *next = loaded.after;
                counts.read += 1;
                match loaded.sequences {
                    Ok(sequences) => {
                        let placed = sequences.into_iter().enumerate().map(|(index, sequence)| Placed {
                            sequence,
                            position: Position { mixture: loaded.before.clone(), sequences_taken: index },
                        });
                        ready.extend(placed.skip(std::mem::take(pass_over)));
                    }
                    Err(error) => {
                        *pass_over = 0;
                        counts.broken += 1;
                        broken.push(error.clone());
                        let allowed = (counts.read as f64 * *max_broken).max(ALWAYS_ALLOWED as f64);
                        if counts.broken as f64 > allowed {
                            let (broken, read, limit) = (counts.broken, counts.read, *max_broken);
                            return Err(DataError::TooManyBroken { broken, read, limit, last: error });
                        }
                    }
                }
            }
        })?;
        Ok(batch.into_iter().map(|placed| placed.sequence).collect())
    }

    /// What the next batch begins with.
    pub fn position(&self) -> Position {
        let waiting =
            self.packer.carried_position().or_else(|| self.ready.front().map(|placed| &placed.position));
        waiting.cloned().unwrap_or_else(|| Position { mixture: self.next.clone(), sequences_taken: 0 })
    }

    /// Goes to a place of an earlier run.
    pub fn seek(&mut self, position: &Position) -> Result<(), DataError> {
        self.loader.seek(position.mixture.clone())?;
        self.next = position.mixture.clone();
        self.pass_over = position.sequences_taken;
        self.packer.clear();
        self.ready.clear();
        Ok(())
    }

    /// Broken samples since this was asked last.
    pub fn take_broken(&mut self) -> Vec<SampleError> {
        std::mem::take(&mut self.broken)
    }
}
