//! Warpers: cut the tail of the distribution before a token is drawn. Used only when sampling.
//!
//! Source: transformers `generation/logits_process.py`, the `…LogitsWarper` classes, in the order of
//! `GenerationMixin._get_logits_processor`: temperature, top-h, top-k, top-p, min-p, typical, epsilon, eta.
//! A removed token gets a score of minus infinity, so each warper looks only at what is left.

use super::{GenerationConfig, sampler::best};

/// Candidates that top-h looks at.
const TOP_H_CANDIDATES: usize = 100;

/// One rule with its parameters. `min_keep` is the number of best tokens that no rule may remove.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Warper {
    Temperature(f32),
    TopH { top_h: f32 },
    TopK { top_k: usize },
    TopP { top_p: f64, min_keep: usize },
    MinP { min_p: f32, min_keep: usize },
    Typical { mass: f32, min_keep: usize },
    Epsilon { epsilon: f32, min_keep: usize },
    Eta { epsilon: f32, min_keep: usize },
}

impl Warper {
    /// The warpers that `config` asks for; none without sampling.
    pub(crate) fn for_config(config: &GenerationConfig) -> Vec<Self> {
        let mut warpers = Vec::new();
        if !config.do_sample {
            return warpers;
        }
        // A beam needs one token that continues it beside all that end it.
        let min_keep = match (config.num_beams, config.eos_token_ids.len()) {
            (1, _) => 1,
            (_, 0) => 2,
            (_, ends) => ends + 1,
        };
        if config.temperature != 1.0 {
            warpers.push(Self::Temperature(config.temperature as f32));
        }
        warpers.extend(config.top_h.map(|top_h| Self::TopH { top_h: top_h as f32 }));
        if config.top_k != 0 {
            warpers.push(Self::TopK { top_k: config.top_k.max(min_keep) });
        }
        if config.top_p < 1.0 {
            warpers.push(Self::TopP { top_p: config.top_p, min_keep });
        }
        warpers.extend(config.min_p.map(|min_p| Self::MinP { min_p: min_p as f32, min_keep }));
        if config.typical_p < 1.0 {
            warpers.push(Self::Typical { mass: config.typical_p as f32, min_keep });
        }
        if config.epsilon_cutoff > 0.0 {
            warpers.push(Self::Epsilon { epsilon: config.epsilon_cutoff as f32, min_keep });
        }
        if config.eta_cutoff > 0.0 {
            warpers.push(Self::Eta { epsilon: config.eta_cutoff as f32, min_keep });
        }
        warpers
    }

    pub(crate) fn apply(&self, scores: &mut [f32]) {
        match *self {
            Self::Temperature(temperature) => {
                for score in scores {
                    *score /= temperature;
                }
            }
            Self::TopH { top_h } => warp_top_h(scores, top_h),
            Self::TopK { top_k } => {
                // Ties with the k-th stay.
                let threshold = kth_largest(scores, top_k);
                remove(scores, |score, _| score < threshold);
            }
            Self::TopP { top_p, min_keep } => warp_top_p(scores, top_p, min_keep),
            Self::MinP { min_p, min_keep } => {
                let probabilities = probabilities(scores);
                let threshold = min_p * probabilities.iter().fold(0.0, |a: f32, &b| a.max(b));
                let kept = best(scores, min_keep);
                remove(scores, |_, id| probabilities[id] < threshold && !kept.contains(&id));
            }
            Self::Typical { mass, min_keep } => warp_typical(scores, mass, min_keep),
            Self::Epsilon { epsilon, min_keep } => cut_below(scores, epsilon, min_keep),
            Self::Eta { epsilon, min_keep } => {
                let entropy = entropy(&probabilities(scores));
                cut_below(scores, epsilon.min(epsilon.sqrt() * (-entropy).exp()), min_keep);
            }
        }
    }
}

/// Keeps, in order of probability, the candidates whose summed entropy stays within a share of the whole.
fn warp_top_h(scores: &mut [f32], top_h: f32) {
    let order = best(scores, TOP_H_CANDIDATES);
    let candidates: Vec<f32> = order.iter().map(|&id| scores[id]).collect();
    let probabilities = probabilities(&candidates);
    let limit = entropy(&probabilities) * top_h;
    let mut sum = 0.0f64;
    let within = probabilities.iter().take_while(|&&p| {
        // A probability of zero has no defined term in the reference and ends the row.
        sum += f64::from(-p * p.ln());
        p > 0.0 && sum as f32 <= limit
    });
    let kept = within.count().max(1);
    let kept = &order[..kept.min(order.len())];
    remove(scores, |_, id| !kept.contains(&id));
}

/// Removes the least likely tokens whose probabilities sum up to `1 - top_p` at most.
fn warp_top_p(scores: &mut [f32], top_p: f64, min_keep: usize) {
    let mut order = alive(scores);
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let probabilities = probabilities(scores);
    let threshold = (1.0 - top_p) as f32;
    let mut sum = 0.0f64;
    let removable = order.len().saturating_sub(min_keep);
    for &id in &order[..removable] {
        sum += f64::from(probabilities[id]);
        if sum as f32 > threshold {
            break;
        }
        scores[id] = f32::NEG_INFINITY;
    }
}

/// Keeps the tokens whose information is closest to the entropy, up to a mass (Meister et al. 2022).
fn warp_typical(scores: &mut [f32], mass: f32, min_keep: usize) {
    let probabilities = probabilities(scores);
    let entropy = entropy(&probabilities);
    let mut normalized = scores.to_vec();
    super::sampler::log_softmax(&mut normalized);
    let shifted = |id: usize| (-normalized[id] - entropy).abs();
    let mut order = alive(scores);
    order.sort_by(|&a, &b| shifted(a).total_cmp(&shifted(b)));
    let mut sum = 0.0f64;
    let below = order.iter().take_while(|&&id| {
        sum += f64::from(probabilities[id]);
        (sum as f32) < mass
    });
    let last = below.count().min(order.len().saturating_sub(1));
    let Some(&last) = order.get(last) else { return };
    let threshold = shifted(last);
    for &id in order.iter().skip(min_keep) {
        if shifted(id) > threshold {
            scores[id] = f32::NEG_INFINITY;
        }
    }
}

fn cut_below(scores: &mut [f32], threshold: f32, min_keep: usize) {
    let probabilities = probabilities(scores);
    let kept = kth_largest(scores, min_keep);
    remove(scores, |score, id| probabilities[id] < threshold && score < kept);
}

fn remove(scores: &mut [f32], is_removed: impl Fn(f32, usize) -> bool) {
    for (id, score) in scores.iter_mut().enumerate() {
        if is_removed(*score, id) {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// Tokens that no rule has removed yet.
fn alive(scores: &[f32]) -> Vec<usize> {
    (0..scores.len()).filter(|&id| scores[id] > f32::NEG_INFINITY).collect()
}

fn kth_largest(scores: &[f32], k: usize) -> f32 {
    let mut sorted = scores.to_vec();
    let k = k.clamp(1, sorted.len().max(1));
    if sorted.is_empty() {
        return f32::NEG_INFINITY;
    }
    *sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

fn probabilities(scores: &[f32]) -> Vec<f32> {
    let max = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    if max == f32::NEG_INFINITY {
        return vec![0.0; scores.len()];
    }
    let mut probabilities: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = probabilities.iter().map(|&p| f64::from(p)).sum();
    for p in &mut probabilities {
        *p = (f64::from(*p) / sum) as f32;
    }
    probabilities
}

/// In nats; removed tokens add nothing.
fn entropy(probabilities: &[f32]) -> f32 {
    let terms = probabilities.iter().filter(|&&p| p > 0.0).map(|&p| f64::from(-p * p.ln()));
    terms.sum::<f64>() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_min_keep_follow_the_reference() {
        let all = GenerationConfig {
            do_sample: true,
            temperature: 0.5,
            top_h: Some(0.4),
            top_p: 0.9,
            min_p: Some(0.1),
            typical_p: 0.8,
            epsilon_cutoff: 0.01,
            eta_cutoff: 0.02,
            ..Default::default()
        };
        let kinds: Vec<_> = Warper::for_config(&all)
            .iter()
            .map(|warper| format!("{warper:?}").split([' ', '(']).next().unwrap_or_default().to_owned())
            .collect();
        assert_eq!(kinds, ["Temperature", "TopH", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta"]);
        let top_p = |num_beams, eos_token_ids: &[u32]| {
            let eos_token_ids = eos_token_ids.to_vec();
            let config = GenerationConfig {
                do_sample: true,
                top_k: 0,
                top_p: 0.5,
                num_beams,
                eos_token_ids,
                ..Default::default()
            };
            Warper::for_config(&config)
        };
        for (num_beams, eos, min_keep) in [(1, &[2, 3][..], 1), (3, &[], 2), (3, &[2], 2), (3, &[2, 3], 3)] {
            assert_eq!(top_p(num_beams, eos), [Warper::TopP { top_p: 0.5, min_keep }]);
        }
        assert!(Warper::for_config(&GenerationConfig { do_sample: false, ..all }).is_empty());
    }

    #[test]
    fn at_least_one_token_survives_the_strictest_rules() {
        for warper in [
            Warper::TopH { top_h: 1e-9 },
            Warper::TopK { top_k: 1 },
            Warper::TopP { top_p: 0.0, min_keep: 1 },
            Warper::MinP { min_p: 1.0, min_keep: 1 },
            Warper::Typical { mass: 1e-9, min_keep: 1 },
            Warper::Epsilon { epsilon: 0.999, min_keep: 1 },
            Warper::Eta { epsilon: 0.999, min_keep: 1 },
        ] {
            let mut scores = [0.5, 3.0, -1.0, f32::NEG_INFINITY, 0.25];
            warper.apply(&mut scores);
            let alive = alive(&scores);
            assert_eq!(alive.len(), 1, "{warper:?}: {scores:?}");
            // Nothing left at all is no reason to panic.
            let mut nothing = [f32::NEG_INFINITY; 3];
            warper.apply(&mut nothing);
            assert_eq!(nothing, [f32::NEG_INFINITY; 3], "{warper:?}");
        }
    }
}
