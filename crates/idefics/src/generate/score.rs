//! How likely a model finds a given text: teacher-forced log-probabilities, and labels ranked by them.
//!
//! Log-probabilities are those of the unprocessed logits, with the softmax in f64.

use super::{
    GenerateError, LogitsOf, Scheduler, StepModel,
    lane::Lane,
    logits_processor::is_nonsense,
    sampler::{LogNormalizer, top_logprobs},
    scheduler::Demand,
};
use crate::SequenceInputs;

/// A text to score.
#[derive(Debug, Clone)]
pub struct ScoreRequest {
    /// The prompt.
    pub inputs: SequenceInputs,
    /// What is scored behind it; without, the prompt itself is scored from its second token.
    pub continuation: Option<Vec<u32>>,
}

/// What to report, and how much to do at once.
#[derive(Debug, Clone, Copy)]
pub struct ScoreOptions {
    /// Report so many best tokens at each place.
    pub top: usize,
    /// Tokens of a text that are read in one step; their logits are in memory together.
    pub chunk: usize,
    /// Limits of a step.
    pub scheduler: Scheduler,
}

/// The log-probabilities of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The continuation, or the whole prompt.
    pub token_ids: Vec<u32>,
    /// One for each token of a continuation; for a prompt one less, as its first token has none.
    pub logprobs: Vec<f64>,
    /// The best tokens at each place with their log-probabilities, where they were asked for.
    pub top: Vec<Vec<(u32, f32)>>,
}

impl Default for ScoreOptions {
    fn default() -> Self {
        Self {
            top: 0,
            chunk: 128,
            scheduler: Scheduler { max_step_tokens: 512, max_sequences: 16, ..Scheduler::default() },
        }
    }
}

impl Scored {
    fn nothing_yet(token_ids: Vec<u32>) -> Self {
        Self { token_ids, logprobs: Vec::new(), top: Vec::new() }
    }

    /// Log-probability of the whole text.
    pub fn sum(&self) -> f64 {
        self.logprobs.iter().sum()
    }

    /// Log-probability a token; 0 for no tokens.
    pub fn mean(&self) -> f64 {
        self.sum() / self.logprobs.len().max(1) as f64
    }

    /// `exp` of the negative mean.
    pub fn perplexity(&self) -> f64 {
        (-self.mean()).exp()
    }
}

/// Scores texts, several in a step.
pub fn score<M: StepModel>(
    model: &M,
    requests: &[ScoreRequest],
    options: &ScoreOptions,
) -> Result<Vec<Scored>, GenerateError> {
    for (index, request) in requests.iter().enumerate() {
        request.check(model, index)?;
    }
    let mut scored = Vec::with_capacity(requests.len());
    // What is alive together shares its steps; the next texts follow when all of them are done.
    for batch in requests.chunks(options.scheduler.max_sequences.max(1)) {
        let mut tasks = Vec::with_capacity(batch.len());
        for request in batch {
            let cache = model.start(&request.inputs).map_err(GenerateError::model)?;
            tasks.push(Task::new(Lane::new(cache, &request.inputs), request));
        }
        run(model, &mut tasks, options)?;
        scored.extend(tasks.into_iter().map(|task| task.scored));
    }
    Ok(scored)
}

/// Scores several continuations of one prompt, which is read once.
pub fn score_continuations<M: StepModel>(
    model: &M,
    inputs: &SequenceInputs,
    continuations: &[Vec<u32>],
    options: &ScoreOptions,
) -> Result<Vec<Scored>, GenerateError> {
    let prompt = ScoreRequest { inputs: inputs.clone(), continuation: None };
    for (index, continuation) in continuations.iter().enumerate() {
        let request = ScoreRequest { continuation: Some(continuation.clone()), ..prompt.clone() };
        request.check(model, index)?;
    }
    // All but the last token of the prompt, which each continuation feeds to get its first logits.
    let mut shared = inputs.clone();
    let (last_token, last_image) = (shared.token_ids.pop(), shared.image_index.pop());
    let (Some(last_token), Some(last_image)) = (last_token, last_image) else {
        return Err(GenerateError::EmptyPrompt { request: 0 });
    };
    let cache = model.start(inputs).map_err(GenerateError::model)?;
    let mut prefix = Lane::new(cache, &shared);
    while prefix.pending() > 0 {
        let count = prefix.pending().min(options.chunk.max(1));
        model.step(&mut [prefix.feed(count, LogitsOf::Nothing)]).map_err(GenerateError::model)?;
    }
    prefix.push_seeing(last_token, last_image);
    let mut scored = Vec::with_capacity(continuations.len());
    for batch in continuations.chunks(options.scheduler.max_sequences.max(1)) {
        let task = |continuation: &Vec<u32>| Task::continuing(prefix.clone(), continuation.clone());
        let mut tasks: Vec<_> = batch.iter().map(task).collect();
        run(model, &mut tasks, options)?;
        scored.extend(tasks.into_iter().map(|task| task.scored));
    }
    Ok(scored)
}

impl ScoreRequest {
    /// Refuses what `model` cannot score. `index` is the text's in messages.
    pub fn check(&self, model: &impl StepModel, index: usize) -> Result<(), GenerateError> {
        let (token_ids, image_index) = (self.inputs.token_ids.len(), self.inputs.image_index.len());
        if token_ids == 0 {
            return Err(GenerateError::EmptyPrompt { request: index });
        }
        if token_ids != image_index {
            return Err(GenerateError::ImageIndexLength { request: index, token_ids, image_index });
        }
        let problem = match &self.continuation {
            Some(continuation) if continuation.is_empty() => {
                Some("the continuation has no tokens".to_owned())
            }
            None if token_ids < 2 => Some("a text needs two tokens to be scored by itself, got 1".to_owned()),
            _ => None,
        };
        let length = token_ids + self.continuation.as_ref().map_or(0, Vec::len);
        let max = model.max_positions();
        let problem = problem.or_else(|| {
            (length > max).then(|| format!("it has {length} tokens, but the model has {max} positions"))
        });
        if let Some(problem) = problem {
            return Err(GenerateError::Score { request: index, problem });
        }
        let vocab_size = model.vocab_size();
        let scored = self.continuation.as_ref().unwrap_or(&self.inputs.token_ids);
        match scored.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&token_id) => Err(GenerateError::UnknownToken { option: "token_ids", token_id, vocab_size }),
            None => Ok(()),
        }
    }
}

/// A text half read.
struct Task<C> {
    lane: Lane<C>,
    /// Place of the first token whose logits count: they score the token behind it.
    first: usize,
    scored: Scored,
}

impl<C: Clone> Task<C> {
    fn new(lane: Lane<C>, request: &ScoreRequest) -> Self {
        if let Some(continuation) = &request.continuation {
            return Self::continuing(lane, continuation.clone());
        }
        Self { lane, first: 0, scored: Scored::nothing_yet(request.inputs.token_ids.clone()) }
    }

    fn continuing(mut lane: Lane<C>, continuation: Vec<u32>) -> Self {
        let first = lane.token_ids().len() - 1;
        for &id in &continuation {
            lane.push(id);
        }
        Self { lane, first, scored: Scored::nothing_yet(continuation) }
    }

    /// What to read next and whether its logits count. The last token is never read: nothing follows it.
    fn demand(&self, chunk: usize) -> (Demand, LogitsOf) {
        let (fed, end) = (self.lane.fed(), self.lane.token_ids().len() - 1);
        let (stop, logits) =
            if fed < self.first { (self.first, LogitsOf::Nothing) } else { (end, LogitsOf::All) };
        (Demand { pending: stop - fed, chunk: chunk.max(1) }, logits)
    }

    /// Takes the logits `[count, vocab]` of the `count` tokens read last.
    fn receive(&mut self, logits: &[f32], vocab_size: usize, top: usize) {
        let count = logits.len() / vocab_size;
        let start = self.lane.fed() - count;
        for (row, logits) in logits.chunks_exact(vocab_size).enumerate() {
            let target = self.lane.token_ids()[start + row + 1];
            let logprob = LogNormalizer::new(logits).logprob(logits[target as usize]);
            self.scored.logprobs.push(logprob);
            if top > 0 {
                self.scored.top.push(top_logprobs(logits, top));
            }
        }
    }
}

fn run<M: StepModel>(
    model: &M,
    tasks: &mut [Task<M::Cache>],
    options: &ScoreOptions,
) -> Result<(), GenerateError> {
    let vocab_size = model.vocab_size();
    loop {
        let (demands, logits_of): (Vec<_>, Vec<_>) =
            tasks.iter().map(|task| task.demand(options.chunk)).unzip();
        let grants = options.scheduler.plan(&demands);
        let mut rows = Vec::new();
        let mut readers = Vec::new();
        for (index, task) in tasks.iter_mut().enumerate().filter(|(index, _)| grants[*index] > 0) {
            rows.push(task.lane.feed(grants[index], logits_of[index]));
            let is_read = logits_of[index] == LogitsOf::All;
            readers.push((index, if is_read { grants[index] * vocab_size } else { 0 }));
        }
        if rows.is_empty() {
            return Ok(());
        }
        let outputs = model.step(&mut rows).map_err(GenerateError::model)?;
        for ((index, expected), logits) in readers.into_iter().zip(&outputs) {
            if logits.len() != expected {
                return Err(GenerateError::LogitsShape { expected, got: logits.len() });
            }
            if let Some(token_id) = logits.iter().position(|&logit| is_nonsense(logit)) {
                return Err(GenerateError::NotFinite { token_id: token_id % vocab_size });
            }
            tasks[index].receive(logits, vocab_size, options.top);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::stub::StubModel;

    fn inputs() -> SequenceInputs {
        SequenceInputs {
            token_ids: vec![1, 9, 4, 2, 11],
            image_index: vec![None, None, Some(0), Some(0), Some(1)],
            images: Vec::new(),
        }
    }

    /// The sum of the definition, one whole history at a time.
    fn expected(model: &StubModel, history: &[(u32, Option<u32>)], from: usize) -> Vec<f64> {
        let score = |at: usize| {
            let logits = model.logits(&history[..at]);
            let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            f64::from(logits[history[at].0 as usize]) - sum.ln()
        };
        (from..history.len()).map(score).collect()
    }

    fn assert_close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        assert!(
            got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9),
            "expected {expected:?}, got {got:?}"
        );
    }

    #[test]
    fn prompts_and_continuations_are_scored_in_any_chunks() {
        let model = StubModel::new(24);
        let prompt: Vec<_> = inputs().token_ids.into_iter().zip(inputs().image_index).collect();
        let continuation = vec![3, 7, 3];
        let whole: Vec<_> =
            prompt.iter().copied().chain(continuation.iter().map(|&id| (id, Some(1)))).collect();
        let requests = [
            ScoreRequest { inputs: inputs(), continuation: None },
            ScoreRequest { inputs: inputs(), continuation: Some(continuation.clone()) },
            ScoreRequest { inputs: inputs(), continuation: Some(vec![3]) },
        ];
        for (chunk, max_step_tokens, max_sequences) in [(128, 512, 16), (1, 512, 16), (2, 3, 2), (3, 1, 1)] {
            let scheduler = Scheduler { max_step_tokens, max_sequences, ..Scheduler::default() };
            let scored = score(&model, &requests, &ScoreOptions { top: 1, chunk, scheduler }).unwrap();
            assert_close(&scored[0].logprobs, &expected(&model, &prompt, 1));
            assert_eq!(scored[0].token_ids, inputs().token_ids);
            assert_close(&scored[1].logprobs, &expected(&model, &whole, 5));
            assert_eq!(scored[1].token_ids, continuation);
            assert_close(&scored[2].logprobs, &expected(&model, &whole[..6], 5));
            assert_eq!(scored[1].top.len(), 3);
        }
    }

    #[test]
    fn continuations_share_their_prompt() {
        let continuations = [vec![3, 7], vec![5], vec![3, 8, 8, 2]];
        let requests = continuations
            .clone()
            .map(|continuation| ScoreRequest { inputs: inputs(), continuation: Some(continuation) });
        let model = StubModel::new(24);
        let separate = score(&model, &requests, &ScoreOptions::default()).unwrap();
        let sharing = StubModel::new(24);
        let shared =
            score_continuations(&sharing, &inputs(), &continuations, &ScoreOptions::default()).unwrap();
        assert_eq!(shared, separate);
        let fed = |model: &StubModel| model.steps().iter().flatten().map(|(count, _)| count).sum::<usize>();
        assert!(fed(&sharing) < fed(&model), "the prompt is read once");
        let one_token = SequenceInputs { token_ids: vec![1], image_index: vec![None], images: Vec::new() };
        assert_eq!(
            score_continuations(&model, &one_token, &continuations, &ScoreOptions::default()).unwrap().len(),
            3
        );
    }

    #[test]
    fn sums_and_perplexity() {
        let scored = Scored { token_ids: vec![1, 2], logprobs: vec![-1.0, -3.0], top: Vec::new() };
        assert_eq!((scored.sum(), scored.mean()), (-4.0, -2.0));
        assert!((scored.perplexity() - 2.0f64.exp()).abs() < 1e-12);
    }

    #[test]
    fn texts_that_cannot_be_scored_are_refused() {
        let model = StubModel { max_positions: 7, ..StubModel::new(24) };
        let refusal = |inputs: SequenceInputs, continuation: Option<Vec<u32>>| {
            let request = ScoreRequest { inputs, continuation };
            score(&model, &[request], &ScoreOptions::default()).unwrap_err().to_string()
        };
        assert!(refusal(inputs(), Some(vec![])).contains("no tokens"));
        assert!(refusal(inputs(), Some(vec![1; 3])).contains("8 tokens, but the model has 7 positions"));
        assert!(refusal(inputs(), Some(vec![24])).contains("token 24"));
        assert!(refusal(SequenceInputs::default(), None).contains("no tokens"));
    }
}
