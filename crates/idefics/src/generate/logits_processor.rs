//! Rules that change the scores of the next token before it is chosen.
//!
//! Source: transformers `generation/logits_process.py`; the order is that of
//! `GenerationMixin._get_logits_processor`, and results depend on it. All of them take the whole history of the
//! row, prompt included. Surprising: in a beam search the scores are log-probabilities, never positive, so a
//! repetition penalty there always multiplies.

use super::{GenerateError, GenerationConfig, config::Lengths, warper::Warper};

/// A caller's own rule: the tokens so far, then the scores to change. Runs after all built-in rules and before
/// the warpers of sampling.
pub type CustomProcessor<'a> = &'a (dyn Fn(&[u32], &mut [f32]) + Sync);

/// The rules of one sequence, in order.
#[derive(Debug, Clone)]
pub struct LogitsProcessors {
    rules: Vec<Rule>,
    warpers: Vec<Warper>,
    renormalize: bool,
    replaces_nan: bool,
}

#[derive(Debug, Clone)]
enum Rule {
    SequenceBias(Vec<(Vec<u32>, f32)>),
    Repetition {
        penalty: f32,
    },
    /// Favours or avoids what the prompt has.
    PromptRepetition {
        penalty: f32,
        prompt: Vec<u32>,
    },
    /// Against tokens of the answer, which starts behind the prompt.
    Frequency {
        start: usize,
        frequency: f32,
        presence: f32,
    },
    NoRepeatNgram {
        size: usize,
    },
    NoRepeatPromptNgram {
        size: usize,
        prompt: Vec<u32>,
    },
    MinLength {
        min: usize,
        eos: Vec<u32>,
    },
    ForcedBos(u32),
    ForcedEos {
        max_length: usize,
        eos: Vec<u32>,
    },
    RemoveInvalid,
    ExponentialDecay {
        start: usize,
        factor: f64,
        eos: Vec<u32>,
    },
    Suppress(Vec<u32>),
    BeginSuppress {
        begin: usize,
        ids: Vec<u32>,
    },
}

impl LogitsProcessors {
    /// The rules that `config` asks for, for one prompt.
    pub fn new(config: &GenerationConfig, lengths: Lengths, prompt: &[u32]) -> Self {
        let eos = &config.eos_token_ids;
        let mut rules = Vec::new();
        if !config.sequence_bias.is_empty() {
            rules.push(Rule::SequenceBias(last_of_equal(
                config.sequence_bias.iter().map(|(sequence, bias)| (sequence.clone(), *bias as f32)),
            )));
        }
        if config.encoder_repetition_penalty != 1.0 {
            let penalty = (1.0 / config.encoder_repetition_penalty) as f32;
            rules.push(Rule::PromptRepetition { penalty, prompt: distinct(prompt) });
        }
        if config.repetition_penalty != 1.0 {
            rules.push(Rule::Repetition { penalty: config.repetition_penalty as f32 });
        }
        if config.frequency_penalty != 0.0 || config.presence_penalty != 0.0 {
            rules.push(Rule::Frequency {
                start: lengths.prompt,
                frequency: config.frequency_penalty as f32,
                presence: config.presence_penalty as f32,
            });
        }
        if config.no_repeat_ngram_size > 0 {
            rules.push(Rule::NoRepeatNgram { size: config.no_repeat_ngram_size });
        }
        if config.encoder_no_repeat_ngram_size > 0 {
            let size = config.encoder_no_repeat_ngram_size;
            rules.push(Rule::NoRepeatPromptNgram { size, prompt: prompt.to_vec() });
        }
        let bad_words = bad_words(config);
        if !bad_words.is_empty() {
            rules.push(Rule::SequenceBias(bad_words));
        }
        if lengths.min > 0 && !eos.is_empty() {
            rules.push(Rule::MinLength { min: lengths.min, eos: eos.clone() });
        }
        rules.extend(config.forced_bos_token_id.map(Rule::ForcedBos));
        if !config.forced_eos_token_id.is_empty() {
            let eos = config.forced_eos_token_id.clone();
            rules.push(Rule::ForcedEos { max_length: lengths.max, eos });
        }
        if config.remove_invalid_values {
            rules.push(Rule::RemoveInvalid);
        }
        if let Some((start, factor)) = config.exponential_decay_length_penalty {
            rules.push(Rule::ExponentialDecay { start: start + lengths.prompt, factor, eos: eos.clone() });
        }
        if !config.suppress_tokens.is_empty() {
            rules.push(Rule::Suppress(config.suppress_tokens.clone()));
        }
        if !config.begin_suppress_tokens.is_empty() {
            // Where the first token is forced, the second is the first that is chosen.
            let is_forced = lengths.prompt <= 1 && config.forced_bos_token_id.is_some();
            let begin = lengths.prompt + usize::from(is_forced);
            rules.push(Rule::BeginSuppress { begin, ids: config.begin_suppress_tokens.clone() });
        }
        Self {
            rules,
            warpers: Warper::for_config(config),
            renormalize: config.renormalize_logits,
            replaces_nan: config.remove_invalid_values,
        }
    }

    /// Applies all rules to the scores of the next token, `[vocab]`.
    pub fn process(
        &self,
        history: &[u32],
        scores: &mut [f32],
        custom: Option<CustomProcessor<'_>>,
    ) -> Result<(), GenerateError> {
        if !self.replaces_nan
            && let Some(token_id) = scores.iter().position(|&score| is_nonsense(score))
        {
            return Err(GenerateError::NotFinite { token_id });
        }
        for rule in &self.rules {
            rule.apply(history, scores);
        }
        if let Some(custom) = custom {
            custom(history, scores);
        }
        for warper in &self.warpers {
            warper.apply(scores);
        }
        if self.renormalize {
            super::sampler::log_softmax(scores);
        }
        Ok(())
    }
}

/// Whether no sound model gives such a score. Minus infinity is one: a model may rule a token out.
pub(crate) fn is_nonsense(score: f32) -> bool {
    score.is_nan() || score == f32::INFINITY
}

impl Rule {
    fn apply(&self, history: &[u32], scores: &mut [f32]) {
        match self {
            Self::SequenceBias(biases) => {
                // Collected before it is added, as the reference does: biases of one token sum up.
                for (sequence, bias) in biases {
                    if let Some((&last, start)) = sequence.split_last()
                        && history.ends_with(start)
                    {
                        scores[last as usize] += bias;
                    }
                }
            }
            Self::Repetition { penalty } => penalize(scores, &distinct(history), *penalty),
            Self::PromptRepetition { penalty, prompt } => penalize(scores, prompt, *penalty),
            // `mu[j] - c[j] * frequency - (c[j] > 0) * presence`, as the documentation of OpenAI's API has it.
            Self::Frequency { start, frequency, presence } => {
                let answer = history.get(*start..).unwrap_or_default();
                for &id in answer {
                    scores[id as usize] -= frequency;
                }
                for id in distinct(answer) {
                    scores[id as usize] -= presence;
                }
            }
            Self::NoRepeatNgram { size } => {
                if history.len() >= *size {
                    ban_completions(scores, history, history, *size);
                }
            }
            Self::NoRepeatPromptNgram { size, prompt } => ban_completions(scores, history, prompt, *size),
            Self::MinLength { min, eos } => {
                if history.len() < *min {
                    ban(scores, eos);
                }
            }
            Self::ForcedBos(id) => {
                if history.len() == 1 {
                    force(scores, &[*id]);
                }
            }
            Self::ForcedEos { max_length, eos } => {
                if history.len() + 1 == *max_length {
                    force(scores, eos);
                }
            }
            Self::RemoveInvalid => {
                for score in scores {
                    *score = if score.is_nan() { 0.0 } else { score.clamp(f32::MIN, f32::MAX) };
                }
            }
            Self::ExponentialDecay { start, factor, eos } => {
                if history.len() > *start {
                    let gain = (factor.powi((history.len() - start) as i32) - 1.0) as f32;
                    for &id in eos {
                        let score = &mut scores[id as usize];
                        // A banned end token stays banned.
                        if score.is_finite() {
                            *score += score.abs() * gain;
                        }
                    }
                }
            }
            Self::Suppress(ids) => ban(scores, ids),
            Self::BeginSuppress { begin, ids } => {
                if history.len() == *begin {
                    ban(scores, ids);
                }
            }
        }
    }
}

/// Banned token sequences as infinite biases. Surprising: an entry that is exactly one end token is dropped, so
/// that generation can end.
fn bad_words(config: &GenerationConfig) -> Vec<(Vec<u32>, f32)> {
    let image_tokens: &[u32] = if config.allow_image_tokens { &[] } else { &config.image_token_ids };
    let is_end = |words: &Vec<u32>| matches!(words[..], [id] if config.eos_token_ids.contains(&id));
    let listed = config.bad_words_ids.iter().filter(|words| !is_end(words)).cloned();
    let all = listed.chain(image_tokens.iter().map(|&id| vec![id]));
    last_of_equal(all.map(|words| (words, f32::NEG_INFINITY)))
}

/// One bias for each token sequence; the reference keeps them in a dictionary, where the last one counts.
fn last_of_equal(biases: impl Iterator<Item = (Vec<u32>, f32)>) -> Vec<(Vec<u32>, f32)> {
    let unique: std::collections::BTreeMap<_, _> = biases.collect();
    unique.into_iter().collect()
}

fn distinct(ids: &[u32]) -> Vec<u32> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Moves the scores of `ids` down by `penalty`, on either side of zero.
fn penalize(scores: &mut [f32], ids: &[u32], penalty: f32) {
    for &id in ids {
        // A prompt may hold ids beyond the head; they cannot be chosen.
        if let Some(score) = scores.get_mut(id as usize) {
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
    }
}

/// Bans each token that followed, in `text`, the last `size - 1` tokens of `history`.
fn ban_completions(scores: &mut [f32], history: &[u32], text: &[u32], size: usize) {
    if history.len() + 1 < size {
        return;
    }
    let prefix = &history[history.len() + 1 - size..];
    for window in text.windows(size) {
        if let Some((&last, start)) = window.split_last()
            && start == prefix
        {
            ban(scores, &[last]);
        }
    }
}

fn ban(scores: &mut [f32], ids: &[u32]) {
    for &id in ids {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
}

fn force(scores: &mut [f32], ids: &[u32]) {
    scores.fill(f32::NEG_INFINITY);
    for &id in ids {
        scores[id as usize] = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// One row of the reference's table: options, history, scores, and what its classes make of them.
    #[derive(Deserialize)]
    struct Case {
        name: String,
        config: serde_json::Value,
        prompt_length: usize,
        max_length: usize,
        history: Vec<u32>,
        /// `null` is minus infinity, which JSON cannot write; so for `expected`.
        scores: Vec<Option<f32>>,
        expected: Vec<Option<f32>>,
    }

    fn scores(values: &[Option<f32>]) -> Vec<f32> {
        values.iter().map(|value| value.unwrap_or(f32::NEG_INFINITY)).collect()
    }

    #[test]
    fn processors_agree_with_the_reference() {
        let table = include_str!("../../../../fixtures/generation/processors.json");
        let cases: Vec<Case> = serde_json::from_str(table).unwrap();
        assert!(cases.len() > 40, "the table is there");
        let mut failures = Vec::new();
        for case in &cases {
            let config = GenerationConfig::from_json(&case.config.to_string()).unwrap();
            config.validate().unwrap();
            let min = config.min_new_tokens.map_or(config.min_length, |new| case.prompt_length + new);
            let lengths = Lengths { prompt: case.prompt_length, min, max: case.max_length };
            let prompt = &case.history[..case.prompt_length];
            let mut got = scores(&case.scores);
            LogitsProcessors::new(&config, lengths, prompt).process(&case.history, &mut got, None).unwrap();
            let expected = scores(&case.expected);
            let close = |(got, expected): (&f32, &f32)| {
                got == expected || (got - expected).abs() <= 2e-6 * expected.abs().max(1.0)
            };
            if !got.iter().zip(&expected).all(close) {
                failures.push(format!("{}: expected {expected:?}, got {got:?}", case.name));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn frequency_and_presence_count_the_answer_alone() {
        // (frequency, presence) -> scores of tokens that the answer has 0, 1, 2 and 0 times.
        for (frequency, presence, expected) in [
            (0.5, 0.0, [1.0, 0.5, 0.0, 1.0]),
            (0.0, 0.25, [1.0, 0.75, 0.75, 1.0]),
            (0.5, 0.25, [1.0, 0.25, -0.25, 1.0]),
            (-1.0, 0.0, [1.0, 2.0, 3.0, 1.0]),
        ] {
            let config = GenerationConfig {
                frequency_penalty: frequency,
                presence_penalty: presence,
                ..GenerationConfig::default()
            };
            let lengths = Lengths { prompt: 2, min: 0, max: 9 };
            let mut scores = [1.0; 4];
            let rules = LogitsProcessors::new(&config, lengths, &[0, 3]);
            rules.process(&[0, 3, 2, 1, 2], &mut scores, None).unwrap();
            assert_eq!(scores, expected, "frequency {frequency}, presence {presence}");
        }
    }

    /// `warpers.json`: four rows of scores, and what each class makes of them.
    #[derive(Deserialize)]
    struct Table {
        eos_token_id: Vec<u32>,
        prompt_length: usize,
        tokens: Vec<Vec<u32>>,
        scores: Vec<Vec<f32>>,
        entries: Vec<Entry>,
    }

    #[derive(Deserialize)]
    struct Entry {
        option: String,
        value: serde_json::Value,
        min_tokens_to_keep: Option<usize>,
        begin_index: Option<usize>,
        max_length: Option<usize>,
        /// Infinities are strings.
        scores: Vec<Vec<serde_json::Value>>,
    }

    #[test]
    fn each_class_of_the_reference_agrees() {
        let table = include_str!("../../../../fixtures/warpers.json");
        let table: Table = serde_json::from_str(table).unwrap();
        assert!(table.entries.len() > 50, "the table is there");
        let mut failures = Vec::new();
        for entry in &table.entries {
            let changes = serde_json::json!({ entry.option.as_str(): entry.value });
            // Warpers run only when sampling, and top-k has a default there.
            let base = GenerationConfig { do_sample: true, top_k: 0, ..Default::default() };
            let mut config = base.with_json(changes).unwrap();
            match entry.min_tokens_to_keep {
                Some(2) => config.num_beams = 2,
                _ => config.eos_token_ids.clone_from(&table.eos_token_id),
            }
            let min = config.min_new_tokens.map_or(config.min_length, |new| table.prompt_length + new);
            let prompt_length = entry.begin_index.unwrap_or(table.prompt_length);
            let lengths = Lengths { prompt: prompt_length, min, max: entry.max_length.unwrap_or(100) };
            for (row, expected) in entry.scores.iter().enumerate() {
                let mut history = table.tokens[row].as_slice();
                if entry.option == "repetition_penalty" {
                    // The reference passes over padding, which does not exist here.
                    history = &history[history.iter().position(|&id| id == 1).unwrap()..];
                }
                let mut got = table.scores[row].clone();
                let prompt = &table.tokens[row][..table.prompt_length];
                LogitsProcessors::new(&config, lengths, prompt).process(history, &mut got, None).unwrap();
                let expected: Vec<f32> = expected
                    .iter()
                    .map(|value| value.as_f64().map_or(f32::NEG_INFINITY, |number| number as f32))
                    .collect();
                let close = |(got, expected): (&f32, &f32)| {
                    got == expected || (got - expected).abs() <= 2e-6 * expected.abs().max(1.0)
                };
                if !got.iter().zip(&expected).all(close) {
                    failures.push(format!(
                        "{} {} row {row}: expected {expected:?}, got {got:?}",
                        entry.option, entry.value
                    ));
                }
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn nan_and_infinity_are_errors_unless_they_are_replaced() {
        let lengths = Lengths { prompt: 1, min: 0, max: 10 };
        let mut values = [1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let strict = LogitsProcessors::new(&GenerationConfig::default(), lengths, &[1]);
        let error = strict.process(&[1], &mut values, None).unwrap_err();
        assert!(matches!(error, GenerateError::NotFinite { token_id: 1 }), "{error}");
        let error = strict.process(&[1], &mut values[2..], None).unwrap_err();
        assert!(matches!(error, GenerateError::NotFinite { token_id: 0 }), "{error}");
        strict.process(&[1], &mut values[3..], None).unwrap();
        let config = GenerationConfig { remove_invalid_values: true, ..Default::default() };
        LogitsProcessors::new(&config, lengths, &[1]).process(&[1], &mut values, None).unwrap();
        assert_eq!(values, [1.0, 0.0, f32::MAX, f32::MIN]);
    }

    #[test]
    fn image_tokens_are_banned_unless_allowed() {
        let lengths = Lengths { prompt: 1, min: 0, max: 10 };
        for (allow_image_tokens, expected) in [(false, f32::NEG_INFINITY), (true, 2.0)] {
            let config =
                GenerationConfig { image_token_ids: vec![2], allow_image_tokens, ..Default::default() };
            let mut values = [0.0, 1.0, 2.0];
            LogitsProcessors::new(&config, lengths, &[1]).process(&[1], &mut values, None).unwrap();
            assert_eq!(values[2], expected, "allowed: {allow_image_tokens}");
        }
    }

    #[test]
    fn custom_rule_sees_the_history_and_runs_before_the_warpers() {
        let config = GenerationConfig { do_sample: true, top_k: 1, ..Default::default() };
        let lengths = Lengths { prompt: 2, min: 0, max: 10 };
        let processors = LogitsProcessors::new(&config, lengths, &[0, 1]);
        let only_successor = |history: &[u32], scores: &mut [f32]| {
            let next = *history.last().unwrap() as usize + 1;
            scores
                .iter_mut()
                .enumerate()
                .filter(|(id, _)| *id != next)
                .for_each(|(_, s)| *s = f32::NEG_INFINITY);
        };
        let mut values = [5.0, 4.0, 3.0];
        processors.process(&[0, 1], &mut values, Some(&only_successor)).unwrap();
        assert_eq!(values, [f32::NEG_INFINITY, f32::NEG_INFINITY, 3.0]);
    }
}
