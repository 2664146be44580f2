//! Beam search over one prompt: which hypotheses run on, which are finished, when to stop.
//!
//! Source: transformers 5.23 `GenerationMixin._beam_search` (the vectorised form of 4.50 and later). Prompts are
//! searched independently. Scores are sums of processed log-probabilities in f32. Surprising: a finished
//! hypothesis counts only if it ranks among the first `num_beams` candidates of its step; and the length that
//! divides its score leaves the prompt out but counts the end token.

use super::{
    FinishReason, GenerationConfig, TokenLogprob,
    config::{EarlyStopping, Lengths},
    sampler::{SequenceRng, best},
};

/// The state of a search. `running` is in step with the lanes of the model.
#[derive(Debug)]
pub(crate) struct BeamSearch {
    num_beams: usize,
    /// Candidates of a step: enough that `num_beams` run on even if all end tokens are among them.
    candidates: usize,
    length_penalty: f64,
    early_stopping: EarlyStopping,
    lengths: Lengths,
    running: Vec<Hypothesis>,
    /// Best first.
    finished: Vec<FinishedBeam>,
}

/// An answer in the making.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hypothesis {
    pub(crate) token_ids: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    /// Sum of log-probabilities.
    score: f32,
}

#[derive(Debug, Clone)]
pub(crate) struct FinishedBeam {
    pub(crate) hypothesis: Hypothesis,
    /// Divided by a power of the length.
    pub(crate) score: f32,
    pub(crate) reason: FinishReason,
}

/// A running beam continued by a token.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    beam: usize,
    token_id: u32,
    score: f32,
    reason: Option<FinishReason>,
}

impl BeamSearch {
    pub(crate) fn new(config: &GenerationConfig, lengths: Lengths) -> Self {
        Self {
            num_beams: config.num_beams,
            candidates: (1 + config.eos_token_ids.len()).max(2) * config.num_beams,
            length_penalty: config.length_penalty,
            early_stopping: config.early_stopping,
            lengths,
            // The reference starts all beams from the prompt and all but the first at -1e9, to the same effect.
            running: vec![Hypothesis::default()],
            finished: Vec::new(),
        }
    }

    /// Takes the processed log-probabilities of each running beam, `[beams][vocab]`, and returns the beams that
    /// run on, each as the beam it continues and its new token; none when the search is over. Draws candidates
    /// where there is an `rng`. `stop` says whether a beam ends with a token, `logprob` what to report of it.
    pub(crate) fn advance(
        &mut self,
        log_probs: &[Vec<f32>],
        rng: Option<&mut SequenceRng>,
        stop: impl Fn(usize, u32) -> Option<FinishReason>,
        logprob: impl Fn(usize, u32) -> Option<TokenLogprob>,
    ) -> Vec<(usize, u32)> {
        let mut candidates = self.candidates(log_probs, rng);
        for candidate in &mut candidates {
            candidate.reason = stop(candidate.beam, candidate.token_id);
        }
        let extend = |candidate: &Candidate| {
            let mut hypothesis = self.running[candidate.beam].clone();
            hypothesis.token_ids.push(candidate.token_id);
            hypothesis.logprobs.extend(logprob(candidate.beam, candidate.token_id));
            hypothesis.score = candidate.score;
            hypothesis
        };
        let generated = self.running.first().map_or(0, |beam| beam.token_ids.len()) + 1;

        let mut unfinished: Vec<Candidate> =
            candidates.iter().copied().filter(|c| c.reason.is_none()).collect();
        // Drawn candidates are in the order of the draws; the others are sorted already.
        unfinished.sort_by(|a, b| b.score.total_cmp(&a.score));
        unfinished.truncate(self.num_beams);
        let running: Vec<Hypothesis> = unfinished.iter().map(extend).collect();

        let divisor = length_divisor(generated, self.length_penalty);
        let newly_finished = candidates.iter().take(self.num_beams).filter_map(|candidate| {
            let reason = candidate.reason?;
            Some(FinishedBeam { hypothesis: extend(candidate), score: candidate.score / divisor, reason })
        });
        let newly_finished: Vec<_> = newly_finished.collect();
        self.finished.extend(newly_finished);
        // Stable: of equal scores the earlier hypothesis stays.
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(self.num_beams);

        self.running = running;
        if self.is_over(generated) {
            return Vec::new();
        }
        unfinished.iter().map(|candidate| (candidate.beam, candidate.token_id)).collect()
    }

    /// The best `count` finished hypotheses; where the search was cut short, running ones after them.
    pub(crate) fn into_best(self, count: usize, reason_of_running: FinishReason) -> Vec<FinishedBeam> {
        let mut best = self.finished;
        if best.len() < count && reason_of_running == FinishReason::Cancelled {
            best.extend(self.running.into_iter().map(|hypothesis| {
                let divisor = length_divisor(hypothesis.token_ids.len().max(1), self.length_penalty);
                FinishedBeam { score: hypothesis.score / divisor, hypothesis, reason: reason_of_running }
            }));
        }
        best.truncate(count);
        best
    }

    /// The best continuations over all beams, or drawn ones. Ruled-out tokens are never candidates, so there may
    /// be fewer than asked for.
    fn candidates(&self, log_probs: &[Vec<f32>], rng: Option<&mut SequenceRng>) -> Vec<Candidate> {
        let vocab_size = log_probs.first().map_or(1, Vec::len).max(1);
        // [beams · vocab]
        let accumulated: Vec<f32> = log_probs
            .iter()
            .zip(&self.running)
            .flat_map(|(row, beam)| row.iter().map(|log_prob| log_prob + beam.score))
            .collect();
        let chosen = match rng {
            Some(rng) => {
                let mut chosen = rng.draw_without_replacement(&accumulated, self.candidates);
                // Beams far behind have no weight to be drawn by, but the search needs its candidates.
                if chosen.len() < self.candidates {
                    let rest = best(&accumulated, self.candidates);
                    let rest: Vec<_> = rest.into_iter().filter(|index| !chosen.contains(index)).collect();
                    chosen.extend(rest);
                    chosen.truncate(self.candidates);
                }
                chosen
            }
            None => best(&accumulated, self.candidates),
        };
        let candidate = |index: usize| Candidate {
            beam: index / vocab_size,
            token_id: (index % vocab_size) as u32,
            score: accumulated[index],
            reason: None,
        };
        chosen.into_iter().map(candidate).collect()
    }

    fn is_over(&self, generated: usize) -> bool {
        // Every candidate ended.
        let Some(best_running) = self.running.first() else { return true };
        if self.finished.len() < self.num_beams {
            return false;
        }
        if self.early_stopping == EarlyStopping::Immediate {
            return true;
        }
        // With a positive penalty on length a beam looks best at its longest.
        let length = if self.early_stopping == EarlyStopping::Never && self.length_penalty > 0.0 {
            self.lengths.max - self.lengths.prompt
        } else {
            generated
        };
        let best_possible = best_running.score / length_divisor(length, self.length_penalty);
        self.finished.last().is_some_and(|worst| best_possible <= worst.score)
    }
}

/// `length ^ penalty`, in f64 as in the reference, where it is a number of Python.
fn length_divisor(length: usize, penalty: f64) -> f32 {
    (length as f64).powf(penalty) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const EOS: u32 = 0;

    fn search(num_beams: usize, early_stopping: EarlyStopping) -> BeamSearch {
        let config =
            GenerationConfig { num_beams, early_stopping, eos_token_ids: vec![EOS], ..Default::default() };
        BeamSearch::new(&config, Lengths { prompt: 1, min: 0, max: 10 })
    }

    fn stop(_: usize, token_id: u32) -> Option<FinishReason> {
        (token_id == EOS).then_some(FinishReason::EndToken(EOS))
    }

    #[test]
    fn finished_candidates_behind_the_first_beams_do_not_count() {
        // The end token ranks third of four candidates, so with two beams it is dropped.
        let mut beams = search(2, EarlyStopping::Heuristic);
        let next = beams.advance(&[vec![-3.0, -1.0, -2.0, -4.0]], None, stop, |_, _| None);
        assert_eq!(next, [(0, 1), (0, 2)]);
        assert!(beams.finished.is_empty());
    }

    #[test]
    fn search_ends_when_nothing_better_can_come() {
        let mut beams = search(1, EarlyStopping::Heuristic);
        let next = beams.advance(&[vec![-1.0, -1.5, -9.0]], None, stop, |_, _| None);
        assert_eq!(next, [], "the running beam, at -1.5, is behind the finished one, at -1");
        let mut beams = search(1, EarlyStopping::Never);
        let next = beams.advance(&[vec![-1.0, -1.5, -9.0]], None, stop, |_, _| None);
        assert_eq!(next, [(0, 1)], "over nine tokens -1.5 could become -0.17");
    }

    #[test]
    fn a_search_cut_short_gives_what_it_has() {
        let mut beams = search(2, EarlyStopping::Heuristic);
        beams.advance(&[vec![-1.0, -1.5, -2.0]], None, stop, |_, _| None);
        let best = beams.into_best(2, FinishReason::Cancelled);
        let tokens: Vec<_> =
            best.iter().map(|beam| (beam.hypothesis.token_ids.clone(), beam.reason)).collect();
        assert_eq!(tokens, [(vec![0], FinishReason::EndToken(0)), (vec![1], FinishReason::Cancelled)]);
    }

    #[test]
    fn drawn_candidates_are_completed_where_weights_vanish() {
        let mut beams = search(2, EarlyStopping::Heuristic);
        let mut rng = SequenceRng::new(0, 0);
        let only_two = vec![f32::NEG_INFINITY, 0.0, -1e6, f32::NEG_INFINITY];
        let next = beams.advance(&[only_two], Some(&mut rng), stop, |_, _| None);
        assert_eq!(next, [(0, 1), (0, 2)]);
    }
}
