//! One answer by greedy search or sampling: chooses its tokens and knows when it is done.

use super::{
    Completion, FinishReason, GenerateError, GenerationConfig, LogitsProcessors, TokenLogprob,
    request::OwnedRule,
    sampler::{self, LogNormalizer, SequenceRng},
    stopping::StopRules,
    stream::{Decode, TextStream},
};

/// What all answers to one prompt share.
pub(crate) struct Rules<'a> {
    pub(crate) processors: LogitsProcessors,
    pub(crate) custom: Option<OwnedRule<'a>>,
    pub(crate) stop: StopRules,
    pub(crate) logprobs: Option<usize>,
}

/// An answer in the making.
pub(crate) struct Sequence<'a> {
    /// Index among the answers to the prompt.
    pub(crate) index: usize,
    /// The lane that holds its tokens, while it runs.
    pub(crate) lane: usize,
    pub(crate) finish_reason: Option<FinishReason>,
    /// Draws its tokens; without, the best are taken.
    rng: Option<SequenceRng>,
    token_ids: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    text: Option<TextStream<'a>>,
}

/// A chosen token and the text that is certain by it.
pub(crate) struct Chosen {
    pub(crate) token_id: u32,
    pub(crate) logprob: Option<TokenLogprob>,
    pub(crate) text: String,
}

impl Rules<'_> {
    /// What to report of `token_id`, from the model's own logits.
    pub(crate) fn logprob(&self, logits: &[f32], token_id: u32) -> Option<TokenLogprob> {
        let top = sampler::top_logprobs(logits, self.logprobs?);
        let logprob = LogNormalizer::new(logits).logprob(logits[token_id as usize]) as f32;
        Some(TokenLogprob { token_id, logprob, top })
    }
}

impl<'a> Sequence<'a> {
    pub(crate) fn new(
        index: usize,
        rng: Option<SequenceRng>,
        decoder: Option<&'a dyn Decode>,
        config: &GenerationConfig,
        prompt: &[u32],
    ) -> Self {
        Self {
            index,
            lane: 0,
            finish_reason: None,
            rng,
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            text: decoder.map(|decoder| TextStream::new(decoder, config, prompt)),
        }
    }

    /// Chooses the token behind `history` from the model's `logits`, `[vocab]`.
    pub(crate) fn choose(
        &mut self,
        rules: &Rules<'_>,
        history: &[u32],
        logits: &[f32],
    ) -> Result<Chosen, GenerateError> {
        let mut scores = logits.to_vec();
        rules.processors.process(history, &mut scores, rules.custom.as_deref())?;
        let choice = match &mut self.rng {
            None => sampler::argmax(&scores),
            Some(rng) => rng.draw(&scores),
        };
        let token_id = choice.ok_or(GenerateError::NoCandidate { length: history.len() })? as u32;
        let logprob = rules.logprob(logits, token_id);
        self.logprobs.extend(logprob.clone());
        self.token_ids.push(token_id);
        let new = self.text.as_mut().map(|text| text.push(token_id));
        let by_text = new.as_ref().and_then(|new| new.stop).map(FinishReason::StopString);
        let by_rule = rules.stop.check(history.len() + 1, token_id);
        let mut chosen = Chosen { token_id, logprob, text: new.map(|new| new.text).unwrap_or_default() };
        // The text says more than a limit; and where the spelling of an end token is a stop string, trimming has
        // already happened by it.
        if let Some(reason) = by_text.or(by_rule) {
            chosen.text.push_str(&self.finish(reason));
        }
        Ok(chosen)
    }

    /// Ends the answer and returns the text that was held back.
    pub(crate) fn finish(&mut self, reason: FinishReason) -> String {
        self.finish_reason = Some(reason);
        self.text.as_mut().map(|text| text.finish(reason)).unwrap_or_default()
    }

    pub(crate) fn into_completion(self) -> Completion {
        Completion {
            token_ids: self.token_ids,
            text: self.text.map(TextStream::into_text),
            finish_reason: self.finish_reason.expect("only finished sequences become completions"),
            logprobs: self.logprobs,
            score: None,
        }
    }
}
