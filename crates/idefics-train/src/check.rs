//! Looking through the data before a run: what is broken, how long samples are, which one is the longest.

use rayon::prelude::*;

use crate::data::{Address, Encoder, Mixture, SampleError};

/// What was found.
#[derive(Debug, Clone, Default)]
pub struct DataReport {
    /// Samples that were looked at.
    pub checked: u64,
    /// All samples that are trained on.
    pub samples: u64,
    /// Sequences of those that were looked at.
    pub sequences: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Their targets.
    pub targets: u64,
    /// Their pictures.
    pub images: u64,
    /// The first of those that cannot be used.
    pub broken: Vec<SampleError>,
    /// How many cannot be used.
    pub num_broken: u64,
    /// The sample whose longest sequence has most tokens and pictures, and how many these are.
    pub longest: Option<(Address, usize, usize)>,
}

/// Broken samples that are named.
const NAMED: usize = 20;
/// Tokens that a picture is worth when sequences are compared.
const TOKENS_OF_IMAGE: usize = 256;

/// One sample that was looked at.
struct Seen {
    address: Address,
    /// For each sequence: tokens, targets, pictures.
    outcome: Result<Vec<(usize, usize, usize)>, SampleError>,
}

impl DataReport {
    /// Reads and tokenizes up to `limit` of the first samples of a run. Pictures are found, but not decoded.
    pub fn new(mixture: &Mixture, encoder: &Encoder, limit: u64) -> Self {
        let samples = mixture.num_samples();
        let mut ahead = mixture.clone();
        let addresses: Vec<Address> = (0..samples.min(limit)).map(|_| ahead.advance()).collect();
        let seen: Vec<Seen> = addresses
            .into_par_iter()
            .map(|address| {
                let source = mixture.source(address);
                let read = || {
                    let sample = source.read(address.index)?;
                    encoder
                        .tokenize(&sample)
                        .map_err(|reason| SampleError { place: source.place(address.index), reason })
                };
                let outcome = read().map(|sequences| {
                    let size = |tokens: &crate::data::Tokens| {
                        (tokens.token_ids.len(), tokens.num_targets(), tokens.images.len())
                    };
                    sequences.iter().map(size).collect()
                });
                Seen { address, outcome }
            })
            .collect();
        let mut report = Self { samples, ..Self::default() };
        for seen in seen {
            report.add(seen);
        }
        report
    }

    fn add(&mut self, seen: Seen) {
        self.checked += 1;
        match seen.outcome {
            Err(error) => {
                self.num_broken += 1;
                if self.broken.len() < NAMED {
                    self.broken.push(error);
                }
            }
            Ok(sequences) => {
                for (tokens, targets, images) in sequences {
                    self.sequences += 1;
                    self.tokens += tokens as u64;
                    self.targets += targets as u64;
                    self.images += images as u64;
                    let size = |tokens, images| tokens + TOKENS_OF_IMAGE * images;
                    let is_longer =
                        self.longest.is_none_or(|(_, most, n)| size(tokens, images) > size(most, n));
                    if is_longer {
                        self.longest = Some((seen.address, tokens, images));
                    }
                }
            }
        }
    }

    /// Steps that so many samples will give, about.
    pub fn steps_for(&self, samples: f64, batch: &crate::packing::BatchConfig) -> u64 {
        if self.checked == 0 {
            return 0;
        }
        let share = samples / self.checked as f64;
        let by = |count: u64, limit: usize| share * count as f64 / limit as f64;
        let passes = by(self.tokens, batch.tokens)
            .max(by(self.images, batch.images))
            .max(batch.sequences.map_or(0.0, |limit| by(self.sequences, limit)));
        ((passes / batch.accumulation as f64).ceil() as u64).max(1)
    }
}
