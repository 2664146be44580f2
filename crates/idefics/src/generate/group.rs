//! All answers to one prompt: its sequences or its beams, with the lanes that feed them.

use std::time::Instant;

use super::{
    Completion, Event, FinishReason, GenerateError, Generated, LogitsProcessors, Request, Timings,
    TokenLogprob, Usage,
    beam::BeamSearch,
    config::Lengths,
    lane::{Lane, branch},
    sampler::{self, SequenceRng},
    scheduler::Demand,
    sequence::{Rules, Sequence},
    stopping::{StopRules, StopStrings},
    stream::{Decode, TextStream},
};

pub(crate) struct Group<'a, C> {
    /// Index of the request.
    pub(crate) index: usize,
    request: Request<'a>,
    decoder: Option<&'a dyn Decode>,
    lanes: Vec<Lane<C>>,
    /// Logits of the lanes that have read all their tokens, `[vocab]` each.
    logits: Vec<Option<Vec<f32>>>,
    /// Without a cache, what every step starts from.
    blank: Option<C>,
    rules: Rules<'a>,
    search: Search<'a>,
    seed: Option<u64>,
    started: Instant,
    first_token: Option<Instant>,
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
    /// `cache` is what the model returned for the pictures of the prompt.
    pub(crate) fn new(
        index: usize,
        request: Request<'a>,
        decoder: Option<&'a dyn Decode>,
        lengths: Lengths,
        cache: C,
    ) -> Self {
        let (config, prompt) = (request.config, request.inputs.token_ids.as_slice());
        let started = Instant::now();
        let seed = config.do_sample.then(|| config.seed.unwrap_or_else(sampler::fresh_seed));
        let rng = |sequence| seed.map(|seed| SequenceRng::new(seed, sequence));
        let search = if config.num_beams > 1 {
            let stops = StopStrings::new(&config.stop_strings);
            Search::Beam(Box::new(Beams { search: BeamSearch::new(config, lengths), rng: rng(0), stops }))
        } else {
            let sequence = |index| Sequence::new(index, rng(index), decoder, config, prompt);
            Search::Independent((0..config.num_return_sequences).map(sequence).collect())
        };
        Self {
            index,
            decoder,
            blank: (!config.use_cache).then(|| cache.clone()),
            lanes: vec![Lane::new(cache, request.inputs)],
            logits: vec![None],
            rules: Rules {
                processors: LogitsProcessors::new(config, lengths, prompt),
                custom: request.custom,
                stop: StopRules::new(config, lengths, started),
                logprobs: config.logprobs,
            },
            search,
            seed,
            started,
            first_token: None,
            request,
        }
    }

    /// What each lane has left to read.
    pub(crate) fn demands(&self) -> impl Iterator<Item = Demand> + '_ {
        let chunk = self.request.config.prefill_chunk;
        self.lanes.iter().map(move |lane| Demand { pending: lane.pending(), chunk })
    }

    pub(crate) fn lanes_mut(&mut self) -> impl Iterator<Item = &mut Lane<C>> {
        self.lanes.iter_mut()
    }

    pub(crate) fn lane_count(&self) -> usize {
        self.lanes.len()
    }

    /// Keeps the logits behind the last token of a lane.
    pub(crate) fn receive(&mut self, lane: usize, logits: Vec<f32>) {
        self.logits[lane] = Some(logits);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.request.cancel.is_some_and(|flag| flag.load(std::sync::atomic::Ordering::Relaxed))
    }

    pub(crate) fn is_done(&self) -> bool {
        self.lanes.is_empty()
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
                advance_sequences(self.index, sequences, &self.rules, &self.lanes, &logits, events)?
            }
            Search::Beam(beams) => advance_beams(beams, self.decoder, &self.rules, &self.lanes, &logits)?,
        };
        self.lanes = branch(std::mem::take(&mut self.lanes), &next);
        if let Some(blank) = &self.blank {
            for lane in &mut self.lanes {
                lane.rewind(blank.clone());
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
                    request: self.index,
                    sequence: sequence.index,
                    token_id: None,
                    logprob: None,
                    text,
                    finish_reason: sequence.finish_reason,
                });
            }
        }
        self.lanes.clear();
        self.logits.clear();
    }

    /// The answers of a group that is done. Beams have their events only now.
    pub(crate) fn into_generated(self, events: &mut Vec<Event>) -> Generated {
        let (config, inputs) = (self.request.config, self.request.inputs);
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
                    request: self.index,
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
        let first_token = self.first_token.unwrap_or(now);
        Generated {
            usage: Usage {
                prompt_tokens: inputs.token_ids.len(),
                images: inputs.images.len(),
                generated_tokens: sequences.iter().map(|sequence| sequence.token_ids.len()).sum(),
            },
            timings: Timings { prefill: first_token - self.started, decode: now - first_token },
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
        rules.processors.process(lane.token_ids(), scores, rules.custom)?;
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
