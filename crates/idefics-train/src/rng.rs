//! Draws that follow from their key alone, so that a run can be taken up at any place.
//!
//! Nothing here has a state that moves on: who wants a number says which one (seed, epoch, sample, …).

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// One number for several: splitmix64's finaliser, chained.
pub(crate) fn mix(words: &[u64]) -> u64 {
    words.iter().fold(0x9e37_79b9_7f4a_7c15, |state, &word| {
        let mut z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// A generator for one purpose.
pub(crate) fn generator(words: &[u64]) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(mix(words))
}

/// A random order of `0..len` that takes no memory: a Feistel network, walked until it lands inside.
#[derive(Debug, Clone)]
pub(crate) struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; 6],
}

impl Permutation {
    pub(crate) fn new(len: u64, seed: u64) -> Self {
        // Both halves have the same width, so at most four times as many places as needed.
        let bits = (u64::BITS - len.saturating_sub(1).leading_zeros()).max(2);
        let keys = std::array::from_fn(|round| mix(&[seed, round as u64]));
        Self { len, half_bits: bits.div_ceil(2), keys }
    }

    /// What stands at `index`, which must be below the length.
    pub(crate) fn at(&self, index: u64) -> u64 {
        assert!(index < self.len, "place {index} of {}", self.len);
        let mask = (1_u64 << self.half_bits) - 1;
        let mut place = index;
        loop {
            let (mut left, mut right) = (place >> self.half_bits, place & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(&[right, key]) & mask));
            }
            place = (left << self.half_bits) | right;
            if place < self.len {
                return place;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_meets_everything_once() {
        for len in [1, 2, 3, 7, 64, 1000, 4097] {
            let order = |seed| -> Vec<u64> {
                let permutation = Permutation::new(len, seed);
                (0..len).map(|index| permutation.at(index)).collect()
            };
            let mut sorted = order(5);
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..len), "{len}");
            assert_eq!(order(5), order(5));
            if len > 7 {
                assert_ne!(order(5), order(6), "{len}");
            }
        }
    }

    /// No place keeps its neighbours: a sequence that is read in order is not almost in order afterwards.
    #[test]
    fn neighbours_part() {
        let permutation = Permutation::new(10_000, 1);
        let near = (1..10_000).filter(|&i| permutation.at(i).abs_diff(permutation.at(i - 1)) < 100).count();
        assert!(near < 400, "{near}");
    }
}
