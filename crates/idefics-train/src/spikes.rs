//! Accidents of training: losses and gradients that are no numbers, and losses that jump.

use serde::{Deserialize, Serialize};

use crate::config::SpikeConfig;

/// Share of the newest loss in the running mean.
const SHARE: f64 = 0.05;

/// Running mean and variance of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct SpikeState {
    /// Losses that were taken in.
    steps: u64,
    mean: f64,
    variance: f64,
    /// Accidents in a row.
    pub in_a_row: u64,
}

/// What is wrong with a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Spike {
    /// The loss or the gradient is no number.
    NotFinite,
    /// The loss is far above the running mean.
    Jump {
        /// The running mean.
        mean: f64,
    },
}

impl SpikeState {
    /// Whether a step is an accident; one that is not is taken into the mean.
    pub fn judge(&mut self, config: &SpikeConfig, loss: f64, gradient_norm: f64) -> Option<Spike> {
        let spike = if !(loss.is_finite() && gradient_norm.is_finite()) {
            Some(Spike::NotFinite)
        } else if self.is_jump(config, loss) {
            Some(Spike::Jump { mean: self.mean })
        } else {
            None
        };
        if spike.is_some() {
            self.in_a_row += 1;
        } else {
            self.in_a_row = 0;
            self.take_in(loss);
        }
        spike
    }

    fn is_jump(&self, config: &SpikeConfig, loss: f64) -> bool {
        config.factor > 0.0
            && self.steps >= config.warmup_steps
            && loss > config.factor * self.mean
            && loss > self.mean + config.sigmas * self.variance.sqrt()
    }

    fn take_in(&mut self, loss: f64) {
        if self.steps == 0 {
            self.mean = loss;
        }
        let distance = loss - self.mean;
        self.mean += SHARE * distance;
        self.variance = (1.0 - SHARE) * (self.variance + SHARE * distance * distance);
        self.steps += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_and_nonsense_are_seen() {
        let config = SpikeConfig { warmup_steps: 10, ..SpikeConfig::default() };
        let mut state = SpikeState::default();
        assert_eq!(state.judge(&config, 9.0, 1.0), None);
        for step in 0..40 {
            let loss = 2.0 + 0.1 * f64::from(step % 3);
            assert_eq!(state.judge(&config, loss, 1.0), None, "step {step}");
        }
        let before = state;
        assert!(matches!(state.judge(&config, 60.0, 1.0), Some(Spike::Jump { mean }) if mean < 4.0));
        assert_eq!(state.judge(&config, f64::NAN, 1.0), Some(Spike::NotFinite));
        assert_eq!(state.judge(&config, 2.0, f64::INFINITY), Some(Spike::NotFinite));
        assert_eq!(state.in_a_row, 3);
        assert_eq!(SpikeState { in_a_row: 0, ..state }, before, "accidents leave the mean alone");
        assert_eq!(state.judge(&config, 2.3, 1.0), None);
        assert_eq!(state.in_a_row, 0);
        let off = SpikeConfig { factor: 0.0, ..config };
        assert_eq!(state.judge(&off, 1e9, 1.0), None);
    }
}
