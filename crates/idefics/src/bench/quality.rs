//! What packed weights and rounded products cost: how far the distributions over the next token move.

use serde::Serialize;

use super::measure::pictures;
use crate::{
    generate::{LogNormalizer, LogitsOf, Row, StepModel},
    model::{Model, ModelError},
};

/// English of several kinds, for distributions that are worth comparing. Written for this purpose.
pub const TEXT: &str = "The picture shows a harbour at dusk. Two fishing boats lie at the quay, and a woman in a yellow \
coat is coiling a rope. Behind her, the windows of the warehouse still catch the last of the sun. Question: how many \
boats are there? Answer: two. To bake the bread, mix 500 g of flour with 320 ml of water, a little salt and yeast; let \
it rise for an hour, then put it into a hot oven. In 1905 Einstein published four papers, one of which explained the \
photoelectric effect. fn main() { println!(\"{}\", 6 * 7); } User: describe this image in one sentence. Assistant: A \
brown dog with one white ear sleeps on a green sofa beside a sleeping cat.";

/// Log-probabilities of every next token of a text: `[T, V]`.
pub struct Distributions {
    values: Vec<f64>,
    vocab_size: usize,
}

/// How far one way to compute is from another.
#[derive(Debug, Clone, Serialize)]
pub struct Quality {
    /// How weights are stored.
    pub weights: String,
    /// What products are computed in.
    pub compute: String,
    /// `KL(exact ‖ this)`, the mean over the text, in nats.
    pub mean_kl: f64,
    /// The largest of any token.
    pub max_kl: f64,
    /// The mean `KL(the same weights in f32 ‖ this)`: what the rounding of products costs alone.
    pub rounding_kl: f64,
    /// Share of tokens whose likeliest successor is the same.
    pub same_top: f64,
}

/// The distributions of `model` behind each token of a text, all of which look at one picture.
pub fn distributions(model: &Model, token_ids: &[u32]) -> Result<Distributions, ModelError> {
    let picture = pictures(model.config(), 1);
    let mut cache = model.new_cache(model.encode_images(&[&picture[0]])?);
    let image_index = vec![Some(0); token_ids.len()];
    let row = Row { cache: &mut cache, token_ids, image_index: &image_index, logits: LogitsOf::All };
    let logits = model.step(&mut [row])?.concat();
    let vocab_size = model.vocab_size();
    let values = logits.chunks_exact(vocab_size).flat_map(log_softmax).collect();
    Ok(Distributions { values, vocab_size })
}

fn log_softmax(logits: &[f32]) -> impl Iterator<Item = f64> {
    let normalizer = LogNormalizer::new(logits);
    logits.iter().map(move |logit| normalizer.logprob(*logit))
}

impl Distributions {
    /// How far `other` is from these; `unrounded` are those of its weights in `f32`.
    ///
    /// # Panics
    /// If they are of another text or vocabulary.
    pub fn compare(&self, other: &Self, unrounded: &Self, weights: &str, compute: &str) -> Quality {
        let kl = self.divergences(other);
        let same = self.rows().zip(other.rows()).filter(|(exact, other)| top(exact) == top(other)).count();
        Quality {
            weights: weights.to_owned(),
            compute: compute.to_owned(),
            mean_kl: mean(&kl),
            max_kl: kl.iter().copied().fold(0.0, f64::max),
            rounding_kl: mean(&unrounded.divergences(other)),
            same_top: same as f64 / kl.len() as f64,
        }
    }

    fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.vocab_size)
    }

    /// `KL(these ‖ other)` of every token.
    fn divergences(&self, other: &Self) -> Vec<f64> {
        assert_eq!((self.values.len(), self.vocab_size), (other.values.len(), other.vocab_size));
        let of = |(p, q): (&[f64], &[f64])| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum();
        self.rows().zip(other.rows()).map(of).collect()
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn top(row: &[f64]) -> Option<usize> {
    row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rows: &[[f32; 3]]) -> Distributions {
        Distributions {
            values: rows.iter().flat_map(|row| log_softmax(row).collect::<Vec<_>>()).collect(),
            vocab_size: 3,
        }
    }

    #[test]
    fn the_divergence_is_that_of_the_formula() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2.
        let ln = |p: f32| p.ln();
        let p = of(&[[ln(0.5), ln(0.25), ln(0.25)], [1.0, 2.0, 3.0]]);
        let q = of(&[[ln(0.25) + 7.0, ln(0.5) + 7.0, ln(0.25) + 7.0], [1.0, 2.0, 3.0]]);
        let quality = p.compare(&q, &q, "nf4", "bf16");
        let kl = 0.25 * std::f64::consts::LN_2;
        assert!(
            (quality.max_kl - kl).abs() < 1e-6 && (quality.mean_kl - kl / 2.0).abs() < 1e-6,
            "{quality:?}"
        );
        assert_eq!((quality.same_top, quality.rounding_kl), (0.5, 0.0));
    }

    #[test]
    fn a_distribution_is_at_no_distance_from_itself() {
        let p = of(&[[0.0, -50.0, 3.0], [1e3, 0.0, -1e3]]);
        let quality = p.compare(&p, &p, "", "");
        assert_eq!((quality.mean_kl, quality.max_kl, quality.same_top), (0.0, 0.0, 1.0));
    }
}
