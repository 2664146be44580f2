//! How the learning rate changes: warm-up, then constant, linear or cosine.
//!
//! Reference: transformers `optimization.py`, `get_*_schedule_with_warmup`; the end that is not zero is that of
//! the model card of IDEFICS ("LR start → end").

use serde::{Deserialize, Serialize};

/// The shape of the curve behind the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// The peak, always.
    #[default]
    Constant,
    /// A straight line to the end.
    Linear,
    /// Half a cosine to the end.
    Cosine,
}

/// A learning rate for each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The curve behind the warm-up.
    pub shape: Shape,
    /// The highest rate.
    pub peak: f64,
    /// The rate after the last step.
    pub end: f64,
    /// Steps in which the rate rises from 0 to the peak.
    pub warmup_steps: u64,
    /// All steps, warm-up included.
    pub total_steps: u64,
}

impl Schedule {
    /// The rate of step `step`, the first being 0. Steps behind the last have its end.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / span as f64).min(1.0);
        let left = match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => 1.0 - progress,
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.end + (self.peak - self.end) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Factors from transformers 5.23 with 4 steps of warm-up and 12 in all, at peak 1.
    #[test]
    fn rates_are_the_reference_s() {
        let schedule = |shape| Schedule { shape, peak: 1.0, end: 0.0, warmup_steps: 4, total_steps: 12 };
        let check = |shape, step, expected: f64| {
            let rate = schedule(shape).rate(step);
            assert!((rate - expected).abs() < 1e-12, "{shape:?} step {step}: {rate}, expected {expected}");
        };
        for shape in [Shape::Constant, Shape::Linear, Shape::Cosine] {
            check(shape, 0, 0.0);
            check(shape, 3, 0.75);
            check(shape, 4, 1.0);
        }
        check(Shape::Constant, 11, 1.0);
        check(Shape::Linear, 6, 0.75);
        check(Shape::Linear, 11, 0.125);
        check(Shape::Linear, 99, 0.0);
        check(Shape::Cosine, 6, 0.853_553_390_593_273_7);
        check(Shape::Cosine, 8, 0.5);
        check(Shape::Cosine, 12, 0.0);
    }

    #[test]
    fn the_end_may_be_above_zero_and_the_warm_up_missing() {
        let schedule =
            Schedule { shape: Shape::Linear, peak: 1e-5, end: 6e-6, warmup_steps: 0, total_steps: 10 };
        assert!((schedule.rate(0) - 1e-5).abs() < 1e-18);
        assert!((schedule.rate(5) - 8e-6).abs() < 1e-18);
        assert!((schedule.rate(10) - 6e-6).abs() < 1e-18);
    }
}
