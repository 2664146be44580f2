//! Reading ahead: samples are read, tokenized and their pictures decoded on threads of their own, and come out in
//! the order of the mixture.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
};

use idefics::model::TrainingSequence;

use super::{Address, DataError, Encoder, Mixture, MixturePosition, SampleError};

/// A sample that was read, or why it could not be.
pub struct Loaded {
    /// Which sample it is.
    pub address: Address,
    /// Where the mixture was before it.
    pub before: MixturePosition,
    /// Where the mixture was after it.
    pub after: MixturePosition,
    /// Its sequences.
    pub sequences: Result<Vec<TrainingSequence>, SampleError>,
}

/// Hands out the samples of a mixture.
pub struct Loader {
    /// As far ahead as was asked for.
    mixture: Mixture,
    encoder: Arc<Encoder>,
    pool: rayon::ThreadPool,
    sender: mpsc::Sender<(u64, Loaded)>,
    receiver: mpsc::Receiver<(u64, Loaded)>,
    /// Samples that came before their turn.
    early: BTreeMap<u64, Loaded>,
    asked: u64,
    given: u64,
    ahead: u64,
}

impl Loader {
    /// Begins to read at the mixture's place, with `threads` of its own and up to `ahead` samples in advance.
    pub fn new(mixture: Mixture, encoder: Encoder, threads: usize, ahead: usize) -> Result<Self, DataError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("data-{index}"))
            .build()
            .map_err(|error| DataError::Threads { reason: error.to_string() })?;
        let (sender, receiver) = mpsc::channel();
        Ok(Self {
            mixture,
            encoder: Arc::new(encoder),
            pool,
            sender,
            receiver,
            early: BTreeMap::new(),
            asked: 0,
            given: 0,
            ahead: ahead.max(1) as u64,
        })
    }

    /// The next sample.
    pub fn advance(&mut self) -> Loaded {
        while self.asked < self.given + self.ahead {
            self.ask();
        }
        let turn = self.given;
        self.given += 1;
        loop {
            if let Some(loaded) = self.early.remove(&turn) {
                return loaded;
            }
            let Ok((number, loaded)) = self.receiver.recv() else {
                unreachable!("this loader holds a sender itself, so the channel stays open")
            };
            self.early.insert(number, loaded);
        }
    }

    /// As far as was read ahead; before the first sample, where the next one is.
    pub fn position(&self) -> &MixturePosition {
        self.mixture.position()
    }

    /// Goes to another place; what was read ahead is forgotten.
    pub fn seek(&mut self, position: MixturePosition) -> Result<(), DataError> {
        self.mixture.seek(position)?;
        // Answers that are still to come go to the old channel.
        (self.sender, self.receiver) = mpsc::channel();
        self.early.clear();
        (self.asked, self.given) = (0, 0);
        Ok(())
    }

    fn ask(&mut self) {
        let before = self.mixture.position().clone();
        let address = self.mixture.advance();
        let after = self.mixture.position().clone();
        let source = Arc::clone(self.mixture.source(address));
        let (encoder, sender, number) = (Arc::clone(&self.encoder), self.sender.clone(), self.asked);
        self.asked += 1;
        self.pool.spawn(move || {
            let sequences = load(&encoder, &*source, address);
            // Nobody listens any more when the run has ended or gone elsewhere.
            let _ = sender.send((number, Loaded { address, before, after, sequences }));
        });
    }
}

/// Reads one sample.
pub fn load(
    encoder: &Encoder,
    source: &dyn super::Source,
    address: Address,
) -> Result<Vec<TrainingSequence>, SampleError> {
    let broken = |reason| SampleError { place: source.place(address.index), reason };
    let work = || {
        let sample = source.read(address.index)?;
        let tokens = encoder.tokenize(&sample).map_err(broken)?;
        let key = [address.source as u64, address.epoch, address.index];
        encoder.load(&sample, tokens, &key).map_err(broken)
    };
    // Strangers' files go through others' decoders; a run of days does not end for one of them.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(broken("reading it panicked".to_owned())))
}

#[cfg(test)]
mod tests {
    use idefics::Processor;
    use idefics_testing::fixture;

    use super::*;
    use crate::data::{Piece, Sample, SequenceConfig, Share, Source};

    /// Texts of different lengths, every fifth of them broken.
    struct Texts;

    impl Source for Texts {
        fn num_samples(&self) -> u64 {
            40
        }

        fn read(&self, index: u64) -> Result<Sample, SampleError> {
            if index.is_multiple_of(5) {
                return Err(SampleError { place: self.place(index), reason: "broken".to_owned() });
            }
            assert!(index != 7, "a source that panics");
            let text = "word ".repeat(index as usize * 3) + &index.to_string();
            Ok(Sample { pieces: vec![Piece::answer(text)], ..Sample::default() })
        }

        fn place(&self, index: u64) -> String {
            format!("text {index}")
        }
    }

    fn loader(threads: usize, ahead: usize) -> Loader {
        let share = Share { source: Arc::new(Texts), weight: None, shuffle: true };
        let mixture = Mixture::new(vec![share], 0.0, 4).unwrap();
        let processor = Processor::from_pretrained(fixture("tiny")).unwrap();
        let config = SequenceConfig { length: 4000, ..SequenceConfig::default() };
        Loader::new(mixture, Encoder::new(processor, config, None, 0), threads, ahead).unwrap()
    }

    fn take(loader: &mut Loader, count: usize) -> Vec<(Address, Result<Vec<u32>, String>)> {
        (0..count)
            .map(|_| loader.advance())
            .map(|loaded| {
                let ids = loaded.sequences.map(|sequences| sequences[0].token_ids.clone());
                (loaded.address, ids.map_err(|error| error.to_string()))
            })
            .collect()
    }

    #[test]
    fn the_order_is_the_mixture_s_on_any_number_of_threads() {
        let expected = take(&mut loader(1, 1), 60);
        assert_eq!(take(&mut loader(3, 16), 60), expected);
        assert_eq!(expected[..40].iter().filter(|(_, ids)| ids.is_err()).count(), 8 + 1);
        assert!(expected.iter().any(|(_, ids)| ids == &Err("text 7: reading it panicked".to_owned())));
    }

    #[test]
    fn reading_goes_on_elsewhere() {
        let mut whole = loader(2, 8);
        take(&mut whole, 10);
        let before = whole.advance().before;
        let expected = take(&mut whole, 5);
        take(&mut whole, 20);
        whole.seek(before).unwrap();
        whole.advance();
        assert_eq!(take(&mut whole, 5), expected);
    }
}
