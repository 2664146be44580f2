//! Looking through the data before a run: what is broken, how long samples are, which one is the longest.

use rayon::prelude::*;

use crate::{
    data::{Address, Encoder, Mixture, SampleError},
    packing::BatchConfig,
};

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
    /// Tokens and pictures of the sequences of each sample that was looked at, in the order of a run.
    sizes: Vec<Vec<(usize, usize)>>,
}

/// Broken samples that are named.
const NAMED: usize = 20;
/// Samples over which steps are counted; of a longer run they are a part.
const COUNTED: u64 = 1 << 22;
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
                self.sizes.push(Vec::new());
                if self.broken.len() < NAMED {
                    self.broken.push(error);
                }
            }
            Ok(sequences) => {
                self.sizes.push(sequences.iter().map(|&(tokens, _, images)| (tokens, images)).collect());
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

    /// Steps that so many samples will give, about: those of the samples that were looked at, one after the other
    /// as often as it takes. Orders of later epochs fill batches a little otherwise.
    pub fn steps_for(&self, samples: f64, batch: &BatchConfig) -> u64 {
        let counted = (samples.ceil() as u64).min(COUNTED);
        let met = self.sizes.iter().cycle().take(counted as usize);
        let batches = batch.num_batches(met.flatten().copied());
        let share = samples / counted.max(1) as f64;
        ((share * batches as f64 / batch.accumulation as f64).ceil() as u64).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(sizes: &[(usize, usize)]) -> DataReport {
        DataReport { sizes: sizes.iter().map(|&size| vec![size]).collect(), ..DataReport::default() }
    }

    /// No sequence is cut, so that two of 60 tokens do not share 100; and what is left of one epoch is filled up by
    /// the next.
    #[test]
    fn steps_are_what_the_packer_will_make() {
        let batch = BatchConfig { tokens: 100, images: 2, ..BatchConfig::default() };
        assert_eq!(report(&[(60, 0)]).steps_for(50.0, &batch), 50);
        assert_eq!(report(&[(10, 2), (10, 1)]).steps_for(50.0, &batch), 50);
        assert_eq!(report(&[(50, 0); 3]).steps_for(6.0, &batch), 3);
        let accumulation = BatchConfig { accumulation: 4, ..batch };
        assert_eq!(report(&[(60, 0)]).steps_for(50.0, &accumulation), 13);
        let whole = COUNTED as f64 * 10.0;
        assert_eq!(report(&[(60, 0)]).steps_for(whole, &batch), COUNTED * 10);
        // Broken samples give no sequence.
        let broken = DataReport { sizes: vec![vec![(60, 0)], Vec::new()], ..DataReport::default() };
        assert_eq!(broken.steps_for(50.0, &batch), 25);
    }
}
