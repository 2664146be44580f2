//! Comparison of float tensors, and the one table of tolerances.

/// How far a value may lie from the expected one: `absolute + relative · |expected|`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Allowed at every magnitude.
    pub absolute: f32,
    /// Allowed in proportion to the expected value.
    pub relative: f32,
}

impl Tolerance {
    fn allows(self, got: f32, expected: f32) -> bool {
        // Equality first: it is the only way for two infinities to agree. NaN agrees with NaN, so that a
        // fixture can hold it on purpose.
        got == expected
            || (got.is_nan() && expected.is_nan())
            || (got - expected).abs() <= self.absolute + self.relative * expected.abs()
    }
}

/// Tolerances by what is compared. Each has its reason; a test that needs a wider one adds a row here.
pub mod tolerance {
    use super::Tolerance;

    /// Integers kept as floats, copies, lookups: nothing may differ.
    pub const EXACT: Tolerance = Tolerance { absolute: 0.0, relative: 0.0 };

    /// The golden values of the specification are printed with six significant digits: half a unit of the
    /// last digit is at most 5e-6 of the value, and f32 sums in another order add about 1e-6.
    pub const PRINTED: Tolerance = Tolerance { absolute: 2e-6, relative: 7e-6 };

    /// One f32 operation or block (norm, linear, attention): sums of up to some thousand terms of order one in
    /// another order than the reference's.
    pub const BLOCK: Tolerance = Tolerance { absolute: 2e-6, relative: 1e-5 };

    /// Intermediate activations of the tiny models in f32. Rounding differences of single blocks add up over
    /// the vision tower, the perceiver and the layers; the reference itself differs by up to 5.3e-6 between its
    /// two attention implementations and by 3.4e-6 from its run in f64.
    pub const ACTIVATION: Tolerance = Tolerance { absolute: 2e-5, relative: 1e-5 };

    /// Logits and log-probabilities of the tiny models in f32, after everything that [`ACTIVATION`] covers; the
    /// reference differs by up to 4.8e-6 from its run in f64.
    pub const LOGITS: Tolerance = Tolerance { absolute: 2e-5, relative: 1e-5 };

    /// Logits computed in bf16 against the f32 reference on the tiny models: 8 bits of mantissa are 0.4 % per
    /// rounding, and every block rounds its outputs; the reference's own largest distance is 0.122. Only catches
    /// gross errors: the real measure of bf16 is the comparison of mean distances in
    /// `reference/compare_scores.py`.
    pub const BF16_LOGITS: Tolerance = Tolerance { absolute: 0.2, relative: 0.05 };

    /// Processed scores of logits processors and warpers: one softmax or logarithm in f32 on 30 values.
    pub const SCORES: Tolerance = Tolerance { absolute: 2e-6, relative: 2e-6 };

    /// Sums of log-probabilities over a generation: up to 16 terms, each within [`LOGITS`].
    pub const SEQUENCE_SCORE: Tolerance = Tolerance { absolute: 2e-4, relative: 2e-5 };
}

/// Panics unless every value of `got` lies within `tolerance` of `expected`.
///
/// The message gives the largest difference and the index where the tolerance is exceeded the most.
///
/// # Panics
/// When a length or a value differs.
#[track_caller]
pub fn assert_close(name: &str, got: &[f32], expected: &[f32], tolerance: Tolerance) {
    assert_eq!(got.len(), expected.len(), "{name}: number of values (got, expected)");
    let outside: Vec<usize> =
        (0..got.len()).filter(|&index| !tolerance.allows(got[index], expected[index])).collect();
    // A NaN difference ranks above every number: `total_cmp` puts it last.
    let excess = |&index: &usize| {
        let difference = (got[index] - expected[index]).abs();
        difference - tolerance.relative * expected[index].abs()
    };
    let Some(worst) = outside.iter().copied().max_by(|a, b| excess(a).abs().total_cmp(&excess(b).abs()))
    else {
        return;
    };
    let largest = (0..got.len()).map(|index| (got[index] - expected[index]).abs()).fold(0.0, f32::max);
    panic!(
        "{name}: {} of {} values outside {tolerance:?}; largest difference {largest:e}; \
         worst at [{worst}]: got {}, expected {}",
        outside.len(),
        got.len(),
        got[worst],
        expected[worst],
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOSE: Tolerance = Tolerance { absolute: 0.1, relative: 0.0 };

    fn fails(got: &[f32], expected: &[f32]) -> Option<String> {
        let (got, expected) = (got.to_vec(), expected.to_vec());
        let panic = std::panic::catch_unwind(|| assert_close("x", &got, &expected, LOOSE)).err()?;
        Some(*panic.downcast::<String>().expect("assert_close panics with a formatted message"))
    }

    #[test]
    fn close_values_pass() {
        assert_eq!(fails(&[1.0, f32::NEG_INFINITY, f32::NAN], &[1.05, f32::NEG_INFINITY, f32::NAN]), None);
    }

    #[test]
    fn relative_part_scales_with_the_expected_value() {
        assert_close("x", &[1001.0], &[1000.0], Tolerance { absolute: 0.0, relative: 2e-3 });
    }

    #[test]
    fn failures_name_the_worst_index() {
        for (got, expected, needle) in [
            (&[0.0, 1.0, 3.0][..], &[0.0, 1.2, 1.0][..], "2 of 3 values"),
            (&[0.0, 1.0, 3.0], &[0.0, 1.2, 1.0], "worst at [2]"),
            (&[f32::NAN, 9.0], &[0.0, 0.0], "worst at [0]"),
            (&[f32::INFINITY], &[f32::NEG_INFINITY], "worst at [0]"),
            (&[1.0], &[f32::NAN], "worst at [0]"),
            (&[1.0], &[1.0, 2.0], "number of values"),
        ] {
            let message =
                fails(got, expected).unwrap_or_else(|| panic!("{got:?} against {expected:?} passed"));
            assert!(message.contains(needle), "{message}: no {needle:?}");
        }
    }
}
