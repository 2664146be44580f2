//! All answers to one prompt: its sequences or its beams, with the lanes that feed them.

use std::time::Instant;

use super::{
    Completion, Event, FinishReason, GenerateError, Generated, GenerationConfig, LogitsProcessors, Timings,
    TokenLogprob, Usage,
    beam::BeamSearch,
    lane::{Lane, branch},
    request::{Job, width},
    sampler::{self, SequenceRng},
    scheduler::Demand,
    sequence::{Rules, Sequence},
    stopping::{StopRules, StopStrings},
    stream::{Decode, TextStream},
};
use crate::SequenceInputs;

pub(crate) struct Group<'a, C> {
    job: Job<'a>,
    decoder: Option<&'a dyn Decode>,
    lanes: Vec<Lane<C>>,
    /// Logits of the lanes that have read all their tokens, `[vocab]` each.
    logits: Vec<Option<Vec<f32>>>,
    /// Without a cache, what every step starts from.
    blank: Option<C>,
    /// The first lane that ended: a later prompt may begin with the same tokens.
    retired: Option<Lane<C>>,
    rules: Rules<'a>,
    search: Search<'a>,
    seed: Option<u64>,
    queued: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    reuse: Reuse,
}

/// What a prompt did not have to compute, since somebody had before.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Reuse {
    pub(crate) tokens: usize,
    pub(crate) images: usize,
}

enum Search<'a> {
    /// Greedy search and sampling.
    Independent(Vec<Sequence<'a>>),
    Beam(Box<Beams>),
}

struct Beams {
    search: BeamSearch,
    rng: Option<SequenceRng>,
    stops: StopStrings,
}

impl<'a, C: Clone> Group<'a, C> {
    pub(crate) fn new(mut job: Job<'a>, decoder: Option<&'a dyn Decode>) -> Self {
        let (config, prompt) = (&*job.config, job.inputs.token_ids.as_slice());
        let seed = config.do_sample.then(|| config.seed.unwrap_or_else(sampler::fresh_seed));
        let rng = |sequence| seed.map(|seed| SequenceRng::new(seed, sequence));
        let search = if config.num_beams > 1 {
            let stops = StopStrings::new(&config.stop_strings);
            let search = BeamSearch::new(config, job.lengths);
            Search::Beam(Box::new(Beams { search, rng: rng(0), stops }))
        } else {
            let sequence = |index| Sequence::new(index, rng(index), decoder, config, prompt);
            Search::Independent((0..config.num_return_sequences).map(sequence).collect())
        };
        let rules = Rules {
            processors: LogitsProcessors::new(config, job.lengths, prompt),
            custom: job.custom.take(),
            stop: StopRules::new(config, job.lengths),
            logprobs: config.logprobs,
        };
        Self {
            decoder,
            lanes: vec![Lane::unloaded(&job.inputs)],
            logits: vec![None],
            blank: None,
            retired: None,
            rules,
            search,
            seed,
            queued: Instant::now(),
            started: None,
            first_token: None,
            reuse: Reuse::default(),
            job,
        }
    }

    /// Starts the clock, at the first call. True if this was it.
    pub(crate) fn start(&mut self, reuse: Reuse) -> bool {
        if self.started.is_some() {
            return false;
        }
        let now = Instant::now();
        self.started = Some(now);
        self.rules.stop.start(now);
        self.reuse = reuse;
        true
    }

    pub(crate) fn is_started(&self) -> bool {
        self.started.is_some()
    }

    pub(crate) fn inputs(&self) -> &SequenceInputs {
        &self.job.inputs
    }

    pub(crate) fn config(&self) -> &GenerationConfig {
        &self.job.config
    }

    /// Gives every lane a cache that holds its first `fed` tokens.
    pub(crate) fn load(&mut self, cache: C, fed: usize) {
        debug_assert!(self.config().use_cache || fed == 0, "without a cache nothing was read before");
        if !self.config().use_cache {
            self.blank = Some(cache.clone());
        }
        if let Some((last, others)) = self.lanes.split_last_mut() {
            for lane in others {
                lane.load(cache.clone(), fed);
            }
            last.load(cache, fed);
        }
    }

    /// Frees all memory that can be computed again. No token is lost.
    pub(crate) fn unload(&mut self) {
        self.blank = None;
        for lane in &mut self.lanes {
            lane.unload();
        }
        self.logits.fill(None);
    }

    pub(crate) fn is_loaded(&self) -> bool {
        self.lanes.iter().all(Lane::is_loaded)
    }

    /// What each lane has left to read; nothing before it has a cache.
    pub(crate) fn demands(&self) -> impl Iterator<Item = Demand> + '_ {
        let chunk = self.config().prefill_chunk;
        let pending = |lane: &Lane<C>| if lane.is_loaded() { lane.pending() } else { 0 };
        self.lanes.iter().map(move |lane| Demand { pending: pending(lane), chunk })
    }

    pub(crate) fn lanes(&self) -> &[Lane<C>] {
        &self.lanes
    }

    pub(crate) fn lanes_mut(&mut self) -> &mut [Lane<C>] {
        &mut self.lanes
    }

    /// Sequences that it has or may yet have at a time.
    pub(crate) fn width(&self) -> usize {
        match &self.search {
            Search::Independent(sequences) => {
                sequences.iter().filter(|sequence| sequence.finish_reason.is_none()).count()
            }
            Search::Beam(_) => width(self.config()),
        }
    }

    /// Tokens of its longest sequence, those included that the next steps will read.
    pub(crate) fn len(&self) -> usize {
        self.lanes.iter().map(|lane| lane.token_ids().len()).max().unwrap_or(0)
    }

    /// Tokens of a sequence of full length; the last one is never read.
    pub(crate) fn full_len(&self) -> usize {
        self.job.lengths.max.saturating_sub(1).max(self.job.lengths.prompt)
    }

    /// Keeps the logits behind the last token of a lane.
    pub(crate) fn receive(&mut self, lane: usize, logits: Vec<f32>) {
        self.logits[lane] = Some(logits);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.job.cancel.is_set()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.lanes.is_empty()
    }

    /// A lane that ended, with what it remembers.
    pub(crate) fn take_retired(&mut self) -> Option<Lane<C>> {
        self.retired.take()
    }

    /// Chooses the next tokens, once all lanes have their logits.
    pub(crate) fn advance(&mut self, events: &mut Vec<Event>) -> Result<(), GenerateError> {
        if self.is_done() || self.logits.iter().any(Option::is_none) {
            return Ok(());
        }
        let logits: Vec<Vec<f32>> = self.logits.drain(..).flatten().collect();
        self.first_token.get_or_insert_with(Instant::now);
        let next = match &mut self.search {
            Search::Independent(sequences) => {
                advance_sequences(self.job.index, sequences, &self.rules, &self.lanes, &logits, events)?
            }
            Search::Beam(beams) => advance_beams(beams, self.decoder, &self.rules, &self.lanes, &logits)?,
        };
        let is_kept = self.job.config.use_cache;
        self.lanes = branch(std::mem::take(&mut self.lanes), &next, |lane| {
            if is_kept && self.retired.is_none() {
                self.retired = Some(lane);
            }
        });
        if let Some(blank) = &self.blank {
            for lane in &mut self.lanes {
                lane.load(blank.clone(), 0);
            }
        }
        self.logits = vec![None; self.lanes.len()];
        Ok(())
    }

    /// Ends all that still runs.
    pub(crate) fn cancel(&mut self, events: &mut Vec<Event>) {
        if let Search::Independent(sequences) = &mut self.search {
            for sequence in sequences.iter_mut().filter(|sequence| sequence.finish_reason.is_none()) {
                let text = sequence.finish(FinishReason::Cancelled);
                events.push(Event {
                    request: self.job.index,
                    sequence: sequence.index,
                    token_id: None,
                    logprob: None,
                    text,
                    finish_reason: sequence.finish_reason,
                });
            }
        }
        let mut lanes = self.lanes.drain(..);
        if self.job.config.use_cache && self.retired.is_none() {
            self.retired = lanes.next();
        }
        drop(lanes);
        self.logits.clear();
    }

    /// The answers of a group that is done. Beams have their events only now.
    pub(crate) fn into_generated(self, events: &mut Vec<Event>) -> Generated {
        let Job { index, ref config, ref inputs, .. } = self.job;
        let sequences: Vec<Completion> = match self.search {
            Search::Independent(sequences) => sequences.into_iter().map(Sequence::into_completion).collect(),
            Search::Beam(beams) => {
                let best = beams.search.into_best(config.num_return_sequences, FinishReason::Cancelled);
                let complete = |beam: super::beam::FinishedBeam| Completion {
                    text: self.decoder.map(|decoder| {
                        let mut text = TextStream::new(decoder, config, &inputs.token_ids);
                        for &id in &beam.hypothesis.token_ids {
                            text.push(id);
                        }
                        text.finish(beam.reason);
                        text.into_text()
                    }),
                    token_ids: beam.hypothesis.token_ids,
                    finish_reason: beam.reason,
                    logprobs: beam.hypothesis.logprobs,
                    score: Some(beam.score),
                };
                let completions: Vec<Completion> = best.into_iter().map(complete).collect();
                events.extend(completions.iter().enumerate().map(|(sequence, completion)| Event {
                    request: index,
                    sequence,
                    token_id: None,
                    logprob: None,
                    text: completion.text.clone().unwrap_or_default(),
                    finish_reason: Some(completion.finish_reason),
                }));
                completions
            }
        };
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Generated {
            usage: Usage {
                prompt_tokens: inputs.token_ids.len(),
                cached_tokens: self.reuse.tokens,
                images: inputs.images.len(),
                cached_images: self.reuse.images,
                generated_tokens: sequences.iter().map(|sequence| sequence.token_ids.len()).sum(),
            },
            timings: Timings {
                queued: started - self.queued,
                prefill: first_token - started,
                decode: now - first_token,
            },
            seed: self.seed,
            sequences,
        }
    }
}

/// Lets each running sequence choose; returns the lanes of those that run on.
fn advance_sequences<C: Clone>(
    request: usize,
    sequences: &mut [Sequence<'_>],
    rules: &Rules<'_>,
    lanes: &[Lane<C>],
    logits: &[Vec<f32>],
    events: &mut Vec<Event>,
) -> Result<Vec<(usize, u32)>, GenerateError> {
    let mut next = Vec::with_capacity(sequences.len());
    for sequence in sequences.iter_mut().filter(|sequence| sequence.finish_reason.is_none()) {
        let lane = sequence.lane;
        let chosen = sequence.choose(rules, lanes[lane].token_ids(), &logits[lane])?;
        if sequence.finish_reason.is_none() {
            sequence.lane = next.len();
            next.push((lane, chosen.token_id));
        }
        events.push(Event {
            request,
            sequence: sequence.index,
            token_id: Some(chosen.token_id),
            logprob: chosen.logprob,
            text: chosen.text,
            finish_reason: sequence.finish_reason,
        });
    }
    Ok(next)
}

/// One step of a beam search. Processors work on log-probabilities here, as in the reference.
fn advance_beams<C: Clone>(
    beams: &mut Beams,
    decoder: Option<&dyn Decode>,
    rules: &Rules<'_>,
    lanes: &[Lane<C>],
    logits: &[Vec<f32>],
) -> Result<Vec<(usize, u32)>, GenerateError> {
    let mut log_probs = logits.to_vec();
    for (lane, scores) in lanes.iter().zip(&mut log_probs) {
        sampler::log_softmax(scores);
        rules.processors.process(lane.token_ids(), scores, rules.custom.as_deref())?;
    }
    if log_probs.iter().flatten().all(|&score| score == f32::NEG_INFINITY) {
        return Err(GenerateError::NoCandidate { length: lanes[0].token_ids().len() });
    }
    let stop = |beam: usize, token_id: u32| {
        let history = lanes[beam].token_ids();
        let by_text = decoder.filter(|_| !beams.stops.is_empty()).and_then(|decoder| {
            let token_ids: Vec<u32> = history.iter().copied().chain([token_id]).collect();
            beams.stops.completed_by_last(decoder, &token_ids)
        });
        by_text.map(FinishReason::StopString).or_else(|| rules.stop.check(history.len() + 1, token_id))
    };
    let logprob =
        |beam: usize, token_id: u32| -> Option<TokenLogprob> { rules.logprob(&logits[beam], token_id) };
    Ok(beams.search.advance(&log_probs, beams.rng.as_mut(), stop, logprob))
}
