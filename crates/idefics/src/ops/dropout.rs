//! Dropout whose choice depends on a seed and a place alone, so that a layer that runs again chooses the same.

use super::{Result, Tensor, record, tensor};

/// Zeroes each element with probability `share` and divides the others by `1 - share`. The elements that are
/// zeroed depend on `seed` and on their place.
pub(super) fn dropout(x: &Tensor, share: f32, seed: u64) -> Result<Tensor> {
    let dropout = Dropout { share, seed };
    let y = tensor(dropout.apply(&x.elements()?), x.dims())?;
    Ok(record(&[x], y, false, move |dy, slopes| {
        slopes.add(0, dropout.apply(&dy));
        Ok(())
    }))
}

struct Dropout {
    share: f32,
    seed: u64,
}

impl Dropout {
    fn apply(&self, values: &[f32]) -> Vec<f32> {
        let kept = 1.0 / (1.0 - self.share);
        let limit = (f64::from(self.share) * 2f64.powi(32)) as u64;
        values
            .iter()
            .enumerate()
            .map(|(at, value)| if mix(self.seed ^ mix(at as u64)) >> 32 < limit { 0.0 } else { value * kept })
            .collect()
    }
}

/// The finaliser of `SplitMix64` (Steele, Lea, Flood, 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_dropped_and_the_mean_stays() {
        let x = tensor(vec![1.0; 100_000], &[100_000]).unwrap();
        let y = super::super::to_vec(&dropout(&x, 0.25, 7).unwrap()).unwrap();
        let zeros = y.iter().filter(|v| **v == 0.0).count();
        assert!((24_000..26_000).contains(&zeros), "{zeros}");
        assert!(y.iter().all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6));
        let again = super::super::to_vec(&dropout(&x, 0.25, 7).unwrap()).unwrap();
        assert_eq!(y, again);
        assert_ne!(y, super::super::to_vec(&dropout(&x, 0.25, 8).unwrap()).unwrap());
    }
}
