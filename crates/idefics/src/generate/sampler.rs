//! The choice of a token: the best, or one drawn by its probability.
//!
//! Draws come from the `ChaCha8` generator with one stream for each returned sequence, keyed by the seed and the index of the
//! sequence among the answers to its prompt. So an answer does not depend on what else is in the batch, nor on
//! threads. They are not the reference's draws, whose generator belongs to torch; the distribution is.

use std::hash::{BuildHasher, Hasher};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// The model's opinion of a chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The chosen token.
    pub token_id: u32,
    /// Its log-probability by the model, before any processor or temperature.
    pub logprob: f32,
    /// The best tokens and their log-probabilities, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// The source of randomness of one sequence.
#[derive(Debug, Clone)]
pub struct SequenceRng(ChaCha8Rng);

impl SequenceRng {
    /// The stream of the answer `sequence` under `seed`.
    pub fn new(seed: u64, sequence: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(sequence as u64);
        Self(rng)
    }

    /// Uniform in [0, 1), with 53 random bits.
    fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Draws an index with probability proportional to `exp(scores)`; `None` if all are minus infinity.
    pub fn draw(&mut self, scores: &[f32]) -> Option<usize> {
        draw_weighted(&weights(scores)?, self.uniform())
    }

    /// Draws `count` different indices, in the order of the draws; fewer if fewer have any weight.
    pub fn draw_without_replacement(&mut self, scores: &[f32], count: usize) -> Vec<usize> {
        let Some(mut weights) = weights(scores) else { return Vec::new() };
        let mut drawn = Vec::with_capacity(count);
        while drawn.len() < count
            && let Some(index) = draw_weighted(&weights, self.uniform())
        {
            weights[index] = 0.0;
            drawn.push(index);
        }
        drawn
    }
}

/// A seed for those who set none.
pub(crate) fn fresh_seed() -> u64 {
    // The standard library keys each hasher state from the system's entropy.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// The best token, of equals the first; `None` if all are minus infinity.
pub fn argmax(scores: &[f32]) -> Option<usize> {
    let mut best = None;
    let mut best_score = f32::NEG_INFINITY;
    for (id, &score) in scores.iter().enumerate() {
        if score > best_score {
            (best, best_score) = (Some(id), score);
        }
    }
    best
}

/// Turns scores into log-probabilities, with the sum in f64.
pub fn log_softmax(scores: &mut [f32]) {
    let normalizer = LogNormalizer::new(scores);
    for score in scores {
        *score = normalizer.logprob(*score) as f32;
    }
}

/// What turns a score into a log-probability: `score - max - ln Σ exp(score - max)`, in f64.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogNormalizer {
    max: f64,
    ln_sum: f64,
}

impl LogNormalizer {
    pub(crate) fn new(scores: &[f32]) -> Self {
        let max = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        if max == f32::NEG_INFINITY {
            // Nothing has any probability, and stays so.
            return Self { max: 0.0, ln_sum: 0.0 };
        }
        let max = f64::from(max);
        let sum: f64 = scores.iter().map(|&score| (f64::from(score) - max).exp()).sum();
        Self { max, ln_sum: sum.ln() }
    }

    pub(crate) fn logprob(&self, score: f32) -> f64 {
        f64::from(score) - self.max - self.ln_sum
    }
}

/// The `n` best tokens of unprocessed logits with their log-probabilities.
pub(crate) fn top_logprobs(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    if n == 0 {
        return Vec::new();
    }
    let normalizer = LogNormalizer::new(logits);
    best(logits, n).into_iter().map(|id| (id as u32, normalizer.logprob(logits[id]) as f32)).collect()
}

/// Where the `count` best scores are that no rule has ruled out, best first; of equals the first.
pub(crate) fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).filter(|&id| scores[id] > f32::NEG_INFINITY).collect();
    let descending = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, descending);
        order.truncate(count);
    }
    order.sort_unstable_by(descending);
    order
}

/// `exp(scores - max)`, in f64.
fn weights(scores: &[f32]) -> Option<Vec<f64>> {
    let max = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let max = f64::from(max);
    (max > f64::NEG_INFINITY).then(|| scores.iter().map(|&score| (f64::from(score) - max).exp()).collect())
}

/// The index at which the running sum passes `uniform` times the whole. Never an index without weight.
fn draw_weighted(weights: &[f64], uniform: f64) -> Option<usize> {
    let target = uniform * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let mut last = None;
    for (index, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            sum += weight;
            last = Some(index);
            if sum > target {
                return last;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: f32 = f32::NEG_INFINITY;

    #[test]
    fn argmax_takes_the_first_of_equals() {
        for (scores, expected) in [
            (&[1.0, 3.0, 3.0][..], Some(1)),
            (&[NONE, -5.0], Some(1)),
            (&[NONE, NONE], None),
            (&[f32::MIN, NONE], Some(0)),
            (&[], None),
        ] {
            assert_eq!(argmax(scores), expected, "{scores:?}");
        }
    }

    #[test]
    fn log_softmax_of_known_values() {
        let mut scores = [0.0, (3.0f32).ln(), NONE];
        log_softmax(&mut scores);
        assert!((scores[0] - 0.25f32.ln()).abs() < 1e-6 && (scores[1] - 0.75f32.ln()).abs() < 1e-6);
        assert_eq!(scores[2], NONE);
        let mut large = [1e30, 1e30];
        log_softmax(&mut large);
        assert!((large[0] - 0.5f32.ln()).abs() < 1e-6, "no overflow");
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let probabilities = [0.5f64, 0.0, 0.3, 0.2];
        let scores: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
        let mut rng = SequenceRng::new(7, 0);
        let draws = 20_000;
        let mut counts = [0; 4];
        for _ in 0..draws {
            counts[rng.draw(&scores).unwrap()] += 1;
        }
        for (count, p) in counts.iter().zip(probabilities) {
            // Five standard deviations of a binomial count.
            let deviation = 5.0 * (p * (1.0 - p) * f64::from(draws)).sqrt();
            assert!((f64::from(*count) - p * f64::from(draws)).abs() <= deviation, "{counts:?}");
        }
        assert_eq!(rng.draw(&[NONE, NONE]), None);
    }

    #[test]
    fn draws_without_replacement_are_different_and_weighted() {
        let scores = [0.0f32, NONE, 1.0, 2.0];
        let mut rng = SequenceRng::new(1, 0);
        let mut first = [0; 4];
        for _ in 0..5000 {
            let mut drawn = rng.draw_without_replacement(&scores, 4);
            first[drawn[0]] += 1;
            drawn.sort_unstable();
            assert_eq!(drawn, [0, 2, 3], "the one without weight is never drawn");
        }
        assert!(first[3] > first[2] && first[2] > first[0] && first[1] == 0, "{first:?}");
    }

    #[test]
    fn streams_are_reproducible_and_differ() {
        let scores = vec![0.0f32; 1000];
        let draws = |seed, sequence| {
            let mut rng = SequenceRng::new(seed, sequence);
            (0..20).map(|_| rng.draw(&scores)).collect::<Vec<_>>()
        };
        assert_eq!(draws(1, 0), draws(1, 0));
        assert_ne!(draws(1, 0), draws(1, 1));
        assert_ne!(draws(1, 0), draws(2, 0));
    }

    #[test]
    fn top_logprobs_are_sorted_and_normalised() {
        let logits = [0.0, 2.0, 1.0];
        let top = top_logprobs(&logits, 2);
        assert_eq!(top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!((top[0].1 - top[1].1 - 1.0).abs() < 1e-6);
        assert_eq!(top_logprobs(&logits, 10).len(), 3);
        assert!(top_logprobs(&logits, 0).is_empty());
    }
}
