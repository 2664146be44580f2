//! Random numbers that follow from a seed, a name and an index alone, so that a tensor's values do not depend on
//! which other tensors there are, on the order of work or on the number of threads.
//!
//! A counter goes twice through the finaliser of splitmix64 (Steele et al., 2014), keyed by a hash of the name.

use rayon::prelude::*;

/// Values that a thread makes at a time; even, as normal values come in pairs.
const CHUNK: usize = 1 << 14;
const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// The stream of one name.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of `name` under `seed`.
    pub fn new(seed: u64, name: &str) -> Self {
        // FNV-1a, 64 bits.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { key: mix(hash ^ mix(seed)) }
    }

    /// `n` values of the normal distribution with mean 0.
    pub fn normal(self, n: usize, std: f64) -> Vec<f32> {
        fill(n, |index, pair| {
            // Box and Muller, 1958.
            let radius = std * (-2.0 * libm::log(self.unit(2 * index))).sqrt();
            let (sine, cosine) = libm::sincos(std::f64::consts::TAU * self.unit(2 * index + 1));
            pair[0] = (radius * cosine) as f32;
            if let [_, second] = pair {
                *second = (radius * sine) as f32;
            }
        })
    }

    /// `n` values between `-bound` and `bound`.
    pub fn uniform(self, n: usize, bound: f64) -> Vec<f32> {
        fill(n, |index, pair| {
            for (offset, value) in pair.iter_mut().enumerate() {
                *value = (bound * (2.0 * self.unit(2 * index + offset as u64) - 1.0)) as f32;
            }
        })
    }

    /// Number `index` of the stream, above 0 and at most 1.
    fn unit(self, index: u64) -> f64 {
        let bits = mix(self.key ^ mix(index)) >> 11;
        (bits + 1) as f64 / (1_u64 << 53) as f64
    }
}

/// `pair` is called for each two values, or for the last one, with the number of the pair.
fn fill(n: usize, pair: impl Fn(u64, &mut [f32]) + Sync) -> Vec<f32> {
    let mut values = vec![0.0; n];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        for (index, values) in values.chunks_mut(2).enumerate() {
            pair((chunk * CHUNK / 2 + index) as u64, values);
        }
    });
    values
}

/// The finaliser of splitmix64 after one step of its counter.
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(GOLDEN_GAMMA);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean, variance and fourth moment, within five standard errors.
    #[test]
    fn moments_are_the_distributions() {
        let n = 200_000_usize;
        for (name, values, variance, fourth) in [
            ("normal", Stream::new(1, "a").normal(n, 0.5), 0.25, 3.0 * 0.0625),
            ("uniform", Stream::new(1, "a").uniform(n, 2.0), 4.0 / 3.0, 16.0 / 5.0),
        ] {
            let moment =
                |power| values.iter().map(|value| f64::from(*value).powi(power)).sum::<f64>() / n as f64;
            let errors = 5.0 / (n as f64).sqrt();
            assert!(moment(1).abs() < errors * f64::sqrt(variance), "{name}: mean {}", moment(1));
            assert!((moment(2) - variance).abs() < errors * 1.5 * variance, "{name}: {}", moment(2));
            assert!((moment(4) - fourth).abs() < errors * 3.5 * fourth, "{name}: {}", moment(4));
        }
    }

    #[test]
    fn values_depend_on_seed_name_and_index_alone() {
        let long = Stream::new(7, "x").normal(3 * CHUNK + 1, 1.0);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(pool.install(|| Stream::new(7, "x").normal(long.len(), 1.0)), long);
        assert_eq!(Stream::new(7, "x").normal(CHUNK + 3, 1.0), long[..CHUNK + 3]);
        assert_ne!(Stream::new(8, "x").normal(4, 1.0), long[..4]);
        assert_ne!(Stream::new(7, "y").normal(4, 1.0), long[..4]);
    }
}
