//! Which sample comes next: several sources in proportion, each shuffled anew in every epoch.
//!
//! Nothing is drawn: the source that is furthest behind its share comes next, and orders are permutations keyed
//! by seed, source and epoch. So a few counters are the whole state, and any place can be taken up again.

use std::{collections::BTreeSet, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{DataError, Source};
use crate::rng::{Permutation, mix};

/// Tells the split from the shuffles.
const SPLIT: u64 = 0x5711;

/// Where a run is in its data.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MixturePosition {
    /// For each source, samples it has given, held-out ones passed over included.
    pub given: Vec<u64>,
    /// For each source, samples it has given without them.
    pub used: Vec<u64>,
}

/// One sample of a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Number of the source.
    pub source: usize,
    /// Number of the sample in it.
    pub index: u64,
    /// How often the source was gone through before.
    pub epoch: u64,
}

/// Sources with their shares.
#[derive(Clone)]
pub struct Mixture {
    sources: Vec<Entry>,
    position: MixturePosition,
    seed: u64,
}

#[derive(Clone)]
struct Entry {
    source: Arc<dyn Source>,
    weight: f64,
    shuffle: bool,
    held_out: Arc<BTreeSet<u64>>,
    order: Option<Order>,
}

/// How a source joins a mixture.
pub struct Share {
    /// The samples.
    pub source: Arc<dyn Source>,
    /// Its share; the number of samples if nothing is said.
    pub weight: Option<f64>,
    /// Whether its samples are shuffled.
    pub shuffle: bool,
}

impl Mixture {
    /// A mixture of which a share of each source, `held_out`, is kept for evaluation; at least one sample, unless
    /// the share is 0.
    pub fn new(shares: Vec<Share>, held_out: f64, seed: u64) -> Result<Self, DataError> {
        let mut sources = Vec::new();
        for (number, share) in shares.into_iter().enumerate() {
            let n = share.source.num_samples();
            let held_out = hold_out(n, held_out, mix(&[seed, number as u64, SPLIT]));
            let left = n - held_out.len() as u64;
            if left == 0 {
                return Err(DataError::NothingLeft { samples: n });
            }
            let weight = share.weight.unwrap_or(left as f64);
            if !(weight > 0.0 && weight.is_finite()) {
                return Err(DataError::Weight { weight });
            }
            let held_out = Arc::new(held_out);
            let shuffle = share.shuffle;
            sources.push(Entry { source: share.source, weight, shuffle, held_out, order: None });
        }
        let total: f64 = sources.iter().map(|entry| entry.weight).sum();
        for entry in &mut sources {
            entry.weight /= total;
        }
        let position = MixturePosition { given: vec![0; sources.len()], used: vec![0; sources.len()] };
        Ok(Self { sources, position, seed })
    }

    /// Samples of all sources that are not held out.
    pub fn num_samples(&self) -> u64 {
        self.sources.iter().map(Entry::num_used).sum()
    }

    /// Samples of each source, held-out ones included.
    pub fn source_sizes(&self) -> Vec<u64> {
        self.sources.iter().map(|entry| entry.source.num_samples()).collect()
    }

    /// Samples that were given so far.
    pub fn num_given(&self) -> u64 {
        self.position.used.iter().sum()
    }

    /// The held-out samples, source by source.
    pub fn held_out(&self) -> Vec<Address> {
        let of = |(source, entry): (usize, &Entry)| -> Vec<Address> {
            entry.held_out.iter().map(|&index| Address { source, index, epoch: 0 }).collect()
        };
        self.sources.iter().enumerate().flat_map(of).collect()
    }

    /// Where the run is.
    pub fn position(&self) -> &MixturePosition {
        &self.position
    }

    /// Goes to a place of an earlier run over the same sources.
    pub fn seek(&mut self, position: MixturePosition) -> Result<(), DataError> {
        let (expected, got) = (self.sources.len(), position.given.len());
        if got != expected || position.used.len() != expected {
            return Err(DataError::OtherSources { expected, got });
        }
        self.position = position;
        for entry in &mut self.sources {
            entry.order = None;
        }
        Ok(())
    }

    /// The source of an address.
    pub fn source(&self, address: Address) -> &Arc<dyn Source> {
        &self.sources[address.source].source
    }

    /// The next sample. There is always one.
    pub fn advance(&mut self) -> Address {
        let source = self.furthest_behind();
        let entry = &mut self.sources[source];
        let n = entry.source.num_samples();
        loop {
            let given = self.position.given[source];
            let (epoch, place) = (given / n, given % n);
            let seed = mix(&[self.seed, source as u64, epoch]);
            let order = match &mut entry.order {
                Some(order) if order.epoch == epoch => order,
                order => {
                    order.insert(Order::new(entry.source.blocks(), epoch, entry.shuffle.then_some(seed)))
                }
            };
            let index = order.at(place);
            self.position.given[source] += 1;
            if !entry.held_out.contains(&index) {
                self.position.used[source] += 1;
                return Address { source, index, epoch };
            }
        }
    }

    fn furthest_behind(&self) -> usize {
        let next = (self.num_given() + 1) as f64;
        let lag = |source: usize| self.sources[source].weight * next - self.position.used[source] as f64;
        let mut best = 0;
        for source in 1..self.sources.len() {
            if lag(source) > lag(best) {
                best = source;
            }
        }
        best
    }
}

impl Entry {
    fn num_used(&self) -> u64 {
        self.source.num_samples() - self.held_out.len() as u64
    }
}

/// Numbers of held-out samples: the first of a shuffled order that never changes.
fn hold_out(n: u64, share: f64, seed: u64) -> BTreeSet<u64> {
    if share <= 0.0 || n == 0 {
        return BTreeSet::new();
    }
    let count = ((n as f64 * share).round() as u64).clamp(1, n);
    let order = Permutation::new(n, seed);
    (0..count).map(|place| order.at(place)).collect()
}

/// The order of a source in one epoch: its blocks shuffled, and the samples of each.
#[derive(Clone)]
struct Order {
    epoch: u64,
    seed: Option<u64>,
    /// First sample and number of samples of each block, in the order of the epoch.
    blocks: Vec<(u64, u64)>,
    /// For each block, the place behind its last sample.
    ends: Vec<u64>,
    /// The order in the block that was asked for last.
    inner: Option<(usize, Permutation)>,
}

impl Order {
    fn new(lengths: Vec<u64>, epoch: u64, seed: Option<u64>) -> Self {
        let mut first = 0;
        let blocks: Vec<(u64, u64)> = lengths
            .into_iter()
            .map(|length| {
                let block = (first, length);
                first += length;
                block
            })
            .filter(|(_, length)| *length > 0)
            .collect();
        let blocks: Vec<_> = match seed {
            None => blocks,
            Some(seed) => {
                let order = Permutation::new(blocks.len() as u64, seed);
                (0..blocks.len() as u64).map(|place| blocks[order.at(place) as usize]).collect()
            }
        };
        let mut end = 0;
        let ends = blocks
            .iter()
            .map(|(_, length)| {
                end += length;
                end
            })
            .collect();
        Self { epoch, seed, blocks, ends, inner: None }
    }

    fn at(&mut self, place: u64) -> u64 {
        let block = self.ends.partition_point(|&end| end <= place);
        let (first, length) = self.blocks[block];
        let inside = place - (self.ends[block] - length);
        let Some(seed) = self.seed else { return first + inside };
        if self.inner.as_ref().is_none_or(|(kept, _)| *kept != block) {
            self.inner = Some((block, Permutation::new(length, mix(&[seed, first]))));
        }
        let (_, order) = self.inner.as_ref().expect("it was just made");
        first + order.at(inside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Sample, SampleError};

    struct Numbers(Vec<u64>);

    impl Source for Numbers {
        fn num_samples(&self) -> u64 {
            self.0.iter().sum()
        }

        fn blocks(&self) -> Vec<u64> {
            self.0.clone()
        }

        fn read(&self, _: u64) -> Result<Sample, SampleError> {
            Ok(Sample::default())
        }

        fn place(&self, index: u64) -> String {
            index.to_string()
        }
    }

    fn mixture(sources: &[(&[u64], Option<f64>)], held_out: f64, seed: u64) -> Mixture {
        let share = |(blocks, weight): &(&[u64], Option<f64>)| Share {
            source: Arc::new(Numbers(blocks.to_vec())) as _,
            weight: *weight,
            shuffle: true,
        };
        Mixture::new(sources.iter().map(share).collect(), held_out, seed).unwrap()
    }

    fn take(mixture: &mut Mixture, count: u64) -> Vec<Address> {
        (0..count).map(|_| mixture.advance()).collect()
    }

    #[test]
    fn an_epoch_meets_every_sample_once() {
        let mut mixture = mixture(&[(&[40, 0, 60], None), (&[33], None)], 0.1, 1);
        assert_eq!(mixture.num_samples(), 90 + 30);
        let held_out = mixture.held_out();
        assert_eq!(held_out.len(), 10 + 3);
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let order = take(&mut mixture, 120);
            assert!(order.iter().all(|address| address.epoch == epoch));
            let mut met: Vec<(usize, u64)> = order.iter().map(|a| (a.source, a.index)).collect();
            met.extend(held_out.iter().map(|a| (a.source, a.index)));
            met.sort_unstable();
            let expected: Vec<_> = (0..100).map(|i| (0, i)).chain((0..33).map(|i| (1, i))).collect();
            assert_eq!(met, expected);
            orders.push(order.into_iter().map(|a| (a.source, a.index)).collect::<Vec<_>>());
        }
        assert_ne!(orders[0], orders[1], "each epoch has an order of its own");
    }

    #[test]
    fn blocks_are_read_one_after_the_other() {
        let mut mixture = mixture(&[(&[10, 10, 10], None)], 0.0, 3);
        let blocks: Vec<u64> = take(&mut mixture, 30).iter().map(|a| a.index / 10).collect();
        let mut runs = blocks.clone();
        runs.dedup();
        assert_eq!(runs.len(), 3, "{blocks:?}");
    }

    #[test]
    fn weights_are_kept_at_every_place() {
        let mut mixture = mixture(&[(&[10], Some(3.0)), (&[1000], Some(1.0))], 0.0, 1);
        let mut first = 0;
        for count in 1..400 {
            first += u64::from(mixture.advance().source == 0);
            assert!((first as f64 - 0.75 * count as f64).abs() <= 1.0, "{first} of {count}");
        }
    }

    #[test]
    fn any_place_is_taken_up_again() {
        let sources: [(&[u64], Option<f64>); 2] = [(&[7, 9], Some(1.0)), (&[50], Some(2.0))];
        let mut whole = mixture(&sources, 0.2, 9);
        let mut rest = mixture(&sources, 0.2, 9);
        take(&mut whole, 77);
        rest.seek(whole.position().clone()).unwrap();
        assert_eq!(take(&mut whole, 100), take(&mut rest, 100));
        assert_ne!(take(&mut mixture(&sources, 0.2, 8), 50), take(&mut mixture(&sources, 0.2, 9), 50));
        let mut other = mixture(&[(&[5], None)], 0.0, 9);
        assert!(other.seek(whole.position().clone()).is_err());
    }

    #[test]
    fn something_must_be_left() {
        let share = Share { source: Arc::new(Numbers(vec![1])), weight: None, shuffle: true };
        assert!(matches!(Mixture::new(vec![share], 0.5, 0), Err(DataError::NothingLeft { samples: 1 })));
    }
}
