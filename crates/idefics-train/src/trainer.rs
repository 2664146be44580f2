//! The loop: batches to gradients to steps, with evaluation, samples and checkpoints on the way.
//!
//! The mean of the loss is over all targets of a step, however many passes it takes; so accumulation changes no
//! number but the last bits. A step whose loss jumps or is no number moves nothing: its data is skipped. Several
//! of them in a row take the run back to its last checkpoint, while the data goes on.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use idefics::{
    ComputeType, ModelFiles, Prompt, Segment,
    adapter::{Adapter, LoraConfig},
    checkpoint::{Checkpoint, DType, Weights, expected_tensors},
    config::IdeficsConfig,
    generate::{GenerationConfig, generate},
    model::{KeptImages, TrainingSequence},
    ops::{Compute, Context, Isa, LossSum},
    processor::{AddEndOfUtterance, ImageSource, ProcessOptions, Processor},
    quantize::quantize_weights,
};

use crate::{
    TrainError,
    adapter::{LoraLayer, new_layers},
    check::DataReport,
    config::{LoraOptions, PromptPart, TrainConfig},
    data::{Address, DataError, Encoder, Loader, Mixture, SampleError, Share, SourceConfig, load},
    error::io_error,
    freeze::Preset,
    learner::{Gradients, Learner, StepRules},
    memory::{Prediction, Workload},
    metrics::{self, EvaluationRecord, Metrics, Record, SkipRecord, StepRecord},
    parameters::Parameters,
    plot::write_curves,
    schedule::Schedule,
    spikes::Spike,
    state::{self, Best, DataIdentity, Product, RunState},
    stream::BatchStream,
    tensorboard::EventFile,
};

/// Rollbacks without a new checkpoint after which a run gives up.
const MAX_ROLLBACKS: u64 = 3;
const METRICS_FILE: &str = "metrics.jsonl";
/// What a run writes of its configuration.
const CONFIG_FILE: &str = "config.toml";
const SAMPLES_FILE: &str = "samples.jsonl";
const EVENTS_FOLDER: &str = "tensorboard";
/// The picture of a run's curves.
pub const CURVES_FILE: &str = "curves.png";
const BROKEN_FILE: &str = "broken.jsonl";
/// Where the result of a run lies in its output directory.
pub const MODEL_FOLDER: &str = "model";
/// Where it lies if it is an adapter.
pub const ADAPTER_FOLDER: &str = "adapter";

/// What happens in a run, for whoever shows it.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step was made.
    Step(&'a StepRecord),
    /// The data of a step was skipped.
    Skipped(&'a SkipRecord),
    /// The run went back to a step.
    RolledBack {
        /// That step.
        step: u64,
    },
    /// An evaluation.
    Evaluated(&'a EvaluationRecord),
    /// An answer of the model.
    Sampled {
        /// Number of the prompt.
        prompt: usize,
        /// What it says.
        text: &'a str,
    },
    /// A sample that cannot be used.
    Broken(&'a SampleError),
    /// A checkpoint was written.
    Saved(&'a Path),
    /// The picture of the curves could not be written, which costs nothing else.
    NotDrawn(&'a TrainError),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Why.
    pub end: End,
    /// Steps that were made, in this and earlier processes.
    pub step: u64,
    /// All steps of the run.
    pub total_steps: u64,
    /// The last evaluation.
    pub evaluation: Option<EvaluationRecord>,
    /// The lowest one; the checkpoint of its step is kept.
    pub best: Option<Best>,
    /// Where the result lies, if the run is finished.
    pub model: Option<PathBuf>,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All steps were made, or all samples were seen.
    Finished,
    /// Evaluations did not get better any more.
    StoppedEarly,
    /// Somebody asked for it; the run can be resumed.
    Interrupted,
}

/// A run that is ready.
pub struct Trainer {
    config: TrainConfig,
    /// The model that the run began with, without its weights.
    source: Checkpoint,
    lora: Option<Lora>,
    processor: Processor,
    learner: Learner,
    schedule: Schedule,
    stream: BatchStream,
    state: RunState,
    /// While it runs.
    log: Option<Log>,
    evaluation: EvaluationSet,
    prompts: Vec<idefics::SequenceInputs>,
    report: DataReport,
    memory: Prediction,
    longest: Vec<TrainingSequence>,
    rollbacks: u64,
    /// The file with the whole configuration, once it is there.
    written_config: Option<PathBuf>,
    /// What the newest checkpoint says.
    saved: Option<RunState>,
    /// Whether the weights are not those of `state`.
    is_going_back: bool,
}

/// What a run writes about itself.
struct Log {
    metrics: Metrics,
    events: EventFile,
}

impl Log {
    /// Begins, or goes on behind the steps that were made.
    fn open(output: &Path, state: &RunState) -> Result<Self, TrainError> {
        std::fs::create_dir_all(output).map_err(io_error("create", output))?;
        let metrics = Metrics::open(&output.join(METRICS_FILE), state.step, state.skipped_steps)?;
        Ok(Self { metrics, events: EventFile::create(&output.join(EVENTS_FOLDER), state.step)? })
    }
}

/// Whether a run begins or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// It begins; its output directory may not hold another one.
    Fresh,
    /// It goes on from its newest checkpoint.
    Resume,
}

impl Trainer {
    /// Opens model and data and checks both. `files` are those of the model that the configuration names.
    pub fn new(config: TrainConfig, files: impl Into<ModelFiles>, start: Start) -> Result<Self, TrainError> {
        let files = files.into();
        state::recover(&config.output)?;
        let checkpoints = state::list(&config.output);
        check_output(&config.output, start, &checkpoints)?;
        let processor = Processor::from_pretrained(&files)?;
        let mut source = Checkpoint::open(files)?;
        check_fit(&config, &source, &processor)?;
        let mixture = mixture(&config.data, config.evaluation.held_out, config.seed)?;
        let encoder = Encoder::new(processor.clone(), config.sequence, config.augment, config.seed);
        let report = DataReport::new(&mixture, &encoder, config.loading.check);
        check_broken(&report, config.loading.max_broken)?;
        let evaluation = EvaluationSet::load(&config, &mixture, &encoder)?;
        let prompts = prompts(&config, &processor)?;

        let ctx = context(&config, &source.weights);
        let weights = std::mem::take(&mut source.weights);
        let lora =
            config.lora.as_ref().map(|lora| Lora::new(lora, &source.config, config.seed)).transpose()?;
        let longest = longest(&config, &mixture, &encoder, &report);
        let memory = predict(&config, &source, &weights, lora.as_ref(), &longest)?;
        memory.check()?;
        let mut parameters = make_parameters(&config, &source, weights, lora.as_ref())?;
        let limit = config.run.epochs.map(|epochs| (epochs * mixture.num_samples() as f64).ceil());
        let total_steps =
            config.run.steps.unwrap_or_else(|| report.steps_for(limit.unwrap_or_default(), &config.batch));
        let data = DataIdentity {
            seed: config.seed,
            held_out: config.evaluation.held_out,
            samples: mixture.source_sizes(),
        };
        let loader = Loader::new(mixture, encoder, config.loading.threads, config.loading.ahead)?;
        let limit = limit.map(|limit| limit as u64);
        let mut stream = BatchStream::new(loader, config.batch, limit, config.loading.max_broken);
        let state = match (start, checkpoints.last()) {
            (Start::Resume, Some((_, path))) => {
                let mut state = state::restore(path, &mut parameters)?;
                check_data(path, &state.data, &data)?;
                stream.seek(&state.position)?;
                state.total_steps = total_steps;
                state
            }
            _ => RunState::new(total_steps, data, stream.position()),
        };
        // A run that goes on has its checkpoint.
        let saved = (state.step > 0).then(|| state.clone());
        let optimizer = &config.optimizer;
        let rules = StepRules {
            adamw: optimizer.adamw(),
            clip_norm: optimizer.clip_norm,
            z_loss: optimizer.z_loss as f32,
            tape: config.run.tape.into(),
        };
        let schedule = Schedule {
            shape: optimizer.schedule,
            peak: optimizer.learning_rate,
            end: optimizer.end_learning_rate,
            warmup_steps: optimizer.warmup_steps,
            total_steps,
        };
        Ok(Self {
            learner: Learner {
                parameters,
                config: source.config.clone(),
                ctx,
                rules,
                kept_images: KeptImages::new(config.loading.kept_image_bytes()),
            },
            config,
            source,
            lora,
            processor,
            schedule,
            stream,
            state,
            log: None,
            evaluation,
            prompts,
            report,
            memory,
            longest,
            rollbacks: 0,
            written_config: None,
            saved,
            is_going_back: false,
        })
    }

    /// What was found in the data.
    pub fn data_report(&self) -> &DataReport {
        &self.report
    }

    /// The memory that the run will need.
    pub fn memory(&self) -> &Prediction {
        &self.memory
    }

    /// The weights.
    pub fn parameters(&self) -> &Parameters {
        &self.learner.parameters
    }

    /// The configuration of the run.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// A file with that configuration, once the run has begun; none where another file has its name.
    pub fn written_config(&self) -> Option<&Path> {
        self.written_config.as_deref()
    }

    /// Where the run is.
    pub fn state(&self) -> &RunState {
        &self.state
    }

    /// Sequences of an evaluation.
    pub fn num_evaluation_sequences(&self) -> usize {
        self.evaluation.sequences.len()
    }

    /// Samples of evaluations that cannot be used.
    pub fn broken_evaluation_samples(&self) -> &[SampleError] {
        &self.evaluation.broken
    }

    /// Runs the largest batch forward and backward, and forgets it: what memory does not hold ends here, and not
    /// after some hours.
    pub fn try_longest(&mut self) -> Result<(), TrainError> {
        let batch = std::mem::take(&mut self.longest);
        if !batch.is_empty() {
            self.learner.gradients(&[batch], 0)?;
            self.learner.parameters.zero_gradients();
        }
        Ok(())
    }

    /// Trains until the end, or until `stop` is set. A run that fails is saved first, where its weights are sound.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Summary, TrainError> {
        self.log = Some(Log::open(&self.config.output, &self.state)?);
        let written = self.config.output.join(CONFIG_FILE);
        self.written_config = self.config.write(&written)?.then_some(written);
        let result = self.train(stop, on_event);
        if result.is_err() && self.is_unsaved() && !self.is_going_back {
            // The first failure is the one to be told.
            let _ = self.save(on_event);
        }
        result
    }

    fn train(
        &mut self,
        stop: &AtomicBool,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Summary, TrainError> {
        let mut evaluation = None;
        let end = self.steps(stop, &mut evaluation, on_event)?;
        let step = self.state.step;
        if end != End::Interrupted && !self.evaluation.sequences.is_empty() {
            let is_new = evaluation.as_ref().is_none_or(|last: &EvaluationRecord| last.step != step);
            if is_new {
                evaluation = Some(self.evaluate(on_event)?);
            }
        }
        if self.is_unsaved() {
            self.save(on_event)?;
        }
        let model = if end == End::Interrupted { None } else { Some(self.save_result()?) };
        if let Err(error) = self.draw() {
            on_event(Event::NotDrawn(&error));
        }
        let total_steps = self.state.total_steps;
        Ok(Summary { end, step, total_steps, evaluation, best: self.state.best, model })
    }

    /// Steps with all that comes between them, until there is a reason to end.
    fn steps(
        &mut self,
        stop: &AtomicBool,
        evaluation: &mut Option<EvaluationRecord>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<End, TrainError> {
        loop {
            if self.state.step >= self.state.total_steps && self.config.run.steps.is_some() {
                return Ok(End::Finished);
            }
            if stop.load(Ordering::Relaxed) {
                return Ok(End::Interrupted);
            }
            let begun = Instant::now();
            let batches = self.next_batches(on_event)?;
            if batches.is_empty() {
                return Ok(End::Finished);
            }
            let waited = begun.elapsed().as_secs_f64();
            if !self.step(&batches, begun, waited, on_event)? {
                self.after_accident(on_event)?;
                continue;
            }
            let step = self.state.step;
            if step.is_multiple_of(self.config.evaluation.every) && !self.evaluation.sequences.is_empty() {
                *evaluation = Some(self.evaluate(on_event)?);
                if self.is_best() && self.config.checkpoints.every < self.state.total_steps {
                    self.save(on_event)?;
                }
                let patience = self.config.evaluation.patience;
                if patience > 0 && self.state.evaluations_since_best >= patience {
                    return Ok(End::StoppedEarly);
                }
            }
            if step.is_multiple_of(self.config.samples.every) {
                self.sample(on_event)?;
            }
            if step.is_multiple_of(self.config.checkpoints.every) && self.is_unsaved() {
                self.save(on_event)?;
            }
        }
    }

    /// Whether there is more than the newest checkpoint has.
    fn is_unsaved(&self) -> bool {
        self.state.step > 0 && self.saved.as_ref() != Some(&self.state)
    }

    /// Whether no evaluation was better than that of this step.
    fn is_best(&self) -> bool {
        self.state.best.is_some_and(|best| best.step == self.state.step)
    }

    fn draw(&self) -> Result<(), TrainError> {
        let records = metrics::read(&self.config.output.join(METRICS_FILE))?;
        write_curves(&self.config.output.join(CURVES_FILE), &records)
    }

    /// The passes of one step; fewer at the end of the data.
    fn next_batches(
        &mut self,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Vec<Vec<TrainingSequence>>, TrainError> {
        let mut batches = Vec::new();
        for _ in 0..self.config.batch.accumulation {
            let batch = self.stream.next_batch();
            for broken in self.stream.take_broken() {
                self.state.broken_samples += 1;
                append_line(
                    &self.config.output.join(BROKEN_FILE),
                    &serde_json::json!({"step": self.state.step, "sample": broken.place, "reason": broken.reason}),
                )?;
                on_event(Event::Broken(&broken));
            }
            let batch = batch?;
            if batch.is_empty() {
                break;
            }
            batches.push(batch);
        }
        Ok(batches)
    }

    /// One step; false if it was an accident, and nothing moved.
    fn step(
        &mut self,
        batches: &[Vec<TrainingSequence>],
        begun: Instant,
        data_seconds: f64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<bool, TrainError> {
        let step = self.state.step + 1;
        let gradients = self.learner.gradients(batches, step)?;
        let Gradients { loss, norm: gradient_norm } = gradients;
        let targets = loss.n_targets.max(1);
        let spike = self.state.spikes.judge(&self.config.spikes, loss.mean(), gradient_norm);
        // The data is used up either way.
        self.state.position = self.stream.position();
        if let Some(spike) = spike {
            let reason = match spike {
                Spike::NotFinite => format!("loss {:.4}, gradient norm {gradient_norm:.4}", loss.mean()),
                Spike::Jump { mean } => format!("loss {:.4} after a mean of {mean:.4}", loss.mean()),
            };
            let record = SkipRecord { step, reason };
            self.state.skipped_steps += 1;
            on_event(Event::Skipped(&record));
            self.record(&Record::Skip(record))?;
            return Ok(false);
        }
        let learning_rate = self.schedule.rate(self.state.step);
        self.learner.apply(&gradients, learning_rate, step);
        let count = |of: fn(&TrainingSequence) -> usize| -> u64 {
            batches.iter().flatten().map(|sequence| of(sequence) as u64).sum()
        };
        let record = StepRecord {
            step,
            loss: loss.mean(),
            z: loss.z / targets as f64,
            accuracy: loss.n_correct as f64 / targets as f64,
            gradient_norm,
            learning_rate,
            tokens: count(|sequence| sequence.token_ids.len()),
            targets: targets as u64,
            images: count(|sequence| sequence.images.len()),
            seconds: begun.elapsed().as_secs_f64(),
            data_seconds,
        };
        self.state.step = step;
        self.state.tokens += record.tokens;
        self.state.images += record.images;
        on_event(Event::Step(&record));
        self.record(&Record::Step(record))?;
        Ok(true)
    }

    /// Goes back to the last checkpoint if there were too many accidents in a row.
    fn after_accident(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        if self.state.spikes.in_a_row < self.config.spikes.patience.max(1) {
            return Ok(());
        }
        self.is_going_back = true;
        self.rollbacks += 1;
        if self.rollbacks > MAX_ROLLBACKS {
            return Err(TrainError::Diverged { rollbacks: MAX_ROLLBACKS, step: self.state.step });
        }
        let position = self.state.position.clone();
        let mut state = if let Some((_, path)) = state::list(&self.config.output).last() {
            state::restore(path, &mut self.learner.parameters)?
        } else {
            // Before the first checkpoint the last good weights are those of the beginning.
            let weights = Checkpoint::open(&self.source.origin)?.weights;
            self.learner.parameters =
                make_parameters(&self.config, &self.source, weights, self.lora.as_ref())?;
            RunState::new(self.state.total_steps, self.state.data.clone(), position.clone())
        };
        // The data goes on; the weights and what is known of them are the old ones.
        state.position = position;
        state.total_steps = self.state.total_steps;
        state.skipped_steps = self.state.skipped_steps;
        state.broken_samples = self.state.broken_samples;
        state.spikes.in_a_row = 0;
        self.state = state;
        self.is_going_back = false;
        self.log = Some(Log::open(&self.config.output, &self.state)?);
        on_event(Event::RolledBack { step: self.state.step });
        Ok(())
    }

    fn evaluate(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<EvaluationRecord, TrainError> {
        let begun = Instant::now();
        let loss = self.evaluation_loss()?;
        let record = EvaluationRecord {
            step: self.state.step,
            loss: loss.mean(),
            accuracy: loss.n_correct as f64 / loss.n_targets.max(1) as f64,
            targets: loss.n_targets as u64,
            seconds: begun.elapsed().as_secs_f64(),
        };
        let bound =
            self.state.best.map_or(f64::INFINITY, |best| best.loss - self.config.evaluation.min_delta);
        if record.loss < bound {
            self.state.best = Some(Best { step: record.step, loss: record.loss });
            self.state.evaluations_since_best = 0;
        } else {
            self.state.evaluations_since_best += 1;
        }
        on_event(Event::Evaluated(&record));
        self.record(&Record::Evaluation(record))?;
        Ok(record)
    }

    /// The loss of the weights as they are on the evaluation data.
    pub fn evaluation_loss(&mut self) -> Result<LossSum, TrainError> {
        let model = self.learner.model()?;
        let mut loss = LossSum::default();
        let (tokens, images) = (self.config.batch.tokens, self.config.batch.images);
        let mut rest = self.evaluation.sequences.as_slice();
        while !rest.is_empty() {
            let mut sums = (0, 0);
            let fits = rest.iter().take_while(|sequence| {
                sums = (sums.0 + sequence.token_ids.len(), sums.1 + sequence.images.len());
                sums.0 <= tokens && sums.1 <= images
            });
            let (batch, others) = rest.split_at(fits.count().max(1));
            loss.add(&model.evaluate_loss_with(batch, &mut self.learner.kept_images)?);
            rest = others;
        }
        Ok(loss)
    }

    fn sample(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        if self.prompts.is_empty() {
            return Ok(());
        }
        let special = self.processor.special_tokens();
        let config = &self.source.config;
        let mut generation = GenerationConfig::from_checkpoint(config, &self.source.generation_config)?;
        generation.image_token_ids = vec![special.image.id, special.fake_token_around_image.id];
        let end = special.end_of_utterance.as_ref().map(|token| token.id);
        generation.eos_token_ids.extend(end.filter(|id| !generation.eos_token_ids.contains(id)));
        generation.max_new_tokens = Some(self.config.samples.max_new_tokens);
        let model = self.learner.model()?;
        let answers = generate(&model, Some(&self.processor), &self.prompts, &generation, |_| {
            std::ops::ControlFlow::Continue(())
        })?;
        for (prompt, answer) in answers.iter().enumerate() {
            let text =
                answer.sequences.first().and_then(|sequence| sequence.text.as_deref()).unwrap_or_default();
            let line = serde_json::json!({"step": self.state.step, "prompt": prompt, "text": text});
            append_line(&self.config.output.join(SAMPLES_FILE), &line)?;
            on_event(Event::Sampled { prompt, text });
        }
        Ok(())
    }

    fn save(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<(), TrainError> {
        let path = state::save(&self.config.output, self.product(), &self.learner.parameters, &self.state)?;
        let best = self.state.best.map(|best| best.step);
        state::prune(&self.config.output, self.config.checkpoints.keep, best)?;
        self.rollbacks = 0;
        self.saved = Some(self.state.clone());
        on_event(Event::Saved(&path));
        Ok(())
    }

    fn record(&mut self, record: &Record) -> Result<(), TrainError> {
        let Some(log) = &mut self.log else { return Ok(()) };
        log.metrics.write(record)?;
        log.events.record(record)
    }

    fn save_result(&self) -> Result<PathBuf, TrainError> {
        let folder = if self.lora.is_some() { ADAPTER_FOLDER } else { MODEL_FOLDER };
        let path = self.config.output.join(folder);
        state::save_result(&path, self.product(), &self.learner.parameters)?;
        Ok(path)
    }

    fn product(&self) -> Product<'_> {
        match &self.lora {
            Some(lora) => Product::Adapter { lora: &lora.config, base_model: &self.config.model },
            None => Product::Model(&self.source),
        }
    }
}

fn check_output(output: &Path, start: Start, found: &[(u64, PathBuf)]) -> Result<(), TrainError> {
    let reason = match start {
        Start::Resume if found.is_empty() => "there is no checkpoint to resume from",
        Start::Fresh if !found.is_empty() => {
            "there is a run already: resume it, or name another output directory"
        }
        _ => return Ok(()),
    };
    Err(TrainError::Output { path: output.to_owned(), reason: reason.to_owned() })
}

/// Refuses to take up a place in other data than it was in.
fn check_data(path: &Path, before: &DataIdentity, now: &DataIdentity) -> Result<(), TrainError> {
    if before == now {
        return Ok(());
    }
    let reason = format!("the data has changed since: it was {before:?}, and is {now:?}");
    Err(TrainError::State { path: path.to_owned(), reason })
}

fn check_fit(config: &TrainConfig, source: &Checkpoint, processor: &Processor) -> Result<(), TrainError> {
    let model = source.config.vocab_size + source.config.additional_vocab_size;
    let tokenizer = processor.tokenizer().id_bound() as usize;
    if tokenizer > model {
        return Err(TrainError::Vocabulary { tokenizer, model });
    }
    let (length, positions) = (config.sequence.length, source.config.max_position_embeddings);
    if length > positions {
        return Err(TrainError::Positions { length, positions });
    }
    Ok(())
}

fn check_broken(report: &DataReport, max_broken: f64) -> Result<(), TrainError> {
    let allowed = (report.checked as f64 * max_broken).max(10.0);
    let all_broken = report.num_broken == report.checked;
    match report.broken.first() {
        Some(last) if all_broken || report.num_broken as f64 > allowed => {
            let (broken, read) = (report.num_broken, report.checked);
            Err(DataError::TooManyBroken { broken, read, limit: max_broken, last: last.clone() }.into())
        }
        _ => Ok(()),
    }
}

fn mixture(sources: &[SourceConfig], held_out: f64, seed: u64) -> Result<Mixture, DataError> {
    // Paths begin where the command runs.
    let base = Path::new("");
    let share = |config: &SourceConfig| {
        Ok(Share { source: config.open(base)?, weight: config.weight, shuffle: config.shuffle })
    };
    Mixture::new(sources.iter().map(share).collect::<Result<_, DataError>>()?, held_out, seed)
}

/// The data of all evaluations, read once.
struct EvaluationSet {
    sequences: Vec<TrainingSequence>,
    /// Samples that cannot be used.
    broken: Vec<SampleError>,
}

impl EvaluationSet {
    fn load(config: &TrainConfig, training: &Mixture, encoder: &Encoder) -> Result<Self, TrainError> {
        let encoder = encoder.without_augmentation();
        let most = config.evaluation.max_samples;
        let held_out = training.held_out();
        // Evenly from all sources when there are more than are wanted.
        let stride = held_out.len().div_ceil(most.max(1)).max(1);
        let mut set = Self { sequences: Vec::new(), broken: Vec::new() };
        set.read(training, &encoder, &held_out.iter().copied().step_by(stride).collect::<Vec<_>>());
        if !config.evaluation.data.is_empty() {
            let mut mixture = mixture(&config.evaluation.data, 0.0, config.seed)?;
            let count = mixture.num_samples().min(most as u64);
            let addresses: Vec<Address> = (0..count).map(|_| mixture.advance()).collect();
            set.read(&mixture, &encoder, &addresses);
        }
        match set.broken.last() {
            Some(last) if set.sequences.is_empty() => {
                Err(TrainError::NoEvaluation { read: set.broken.len(), last: last.clone() })
            }
            _ => Ok(set),
        }
    }

    fn read(&mut self, mixture: &Mixture, encoder: &Encoder, addresses: &[Address]) {
        for &address in addresses {
            match load(encoder, &**mixture.source(address), address) {
                Ok(sequences) => self.sequences.extend(sequences),
                Err(error) => self.broken.push(error),
            }
        }
    }
}

/// The largest batch that the run can meet, as far as its samples were looked at: the longest sequence, as often
/// as a batch holds it.
fn longest(
    config: &TrainConfig,
    mixture: &Mixture,
    encoder: &Encoder,
    report: &DataReport,
) -> Vec<TrainingSequence> {
    let Some((address, tokens, images)) = report.longest else { return Vec::new() };
    let Ok(sequences) = load(encoder, &**mixture.source(address), address) else { return Vec::new() };
    let size = |sequence: &TrainingSequence| (sequence.token_ids.len(), sequence.images.len());
    let Some(sequence) = sequences.into_iter().find(|sequence| size(sequence) == (tokens, images)) else {
        return Vec::new();
    };
    let mut copies = config.batch.tokens / tokens.max(1);
    if let Some(limit) = config.batch.images.checked_div(images) {
        copies = copies.min(limit);
    }
    let copies = copies.min(config.batch.sequences.unwrap_or(usize::MAX)).max(1);
    // The model computes a picture once however often it is shown: each copy gets pictures of its own.
    let copy = |_| TrainingSequence {
        images: sequence.images.iter().map(|image| Arc::new((**image).clone())).collect(),
        ..sequence.clone()
    };
    (0..copies).map(copy).collect()
}

fn prompts(config: &TrainConfig, processor: &Processor) -> Result<Vec<idefics::SequenceInputs>, TrainError> {
    let segment = |part: &PromptPart| match part {
        PromptPart::Text(text) => Segment::text(text),
        PromptPart::Image(path) => Segment::Image(ImageSource::Path(path.clone())),
    };
    let prompts: Vec<Prompt> =
        config.samples.prompts.iter().map(|parts| parts.iter().map(segment).collect()).collect();
    let options =
        ProcessOptions { add_end_of_utterance: AddEndOfUtterance::Never, ..ProcessOptions::default() };
    Ok(processor.process(&prompts, &options)?)
}

fn context(config: &TrainConfig, weights: &Weights) -> Context {
    let bytes = |is: fn(DType) -> bool| -> usize {
        weights.iter().filter(|(_, weight)| is(weight.dtype())).map(|(_, weight)| weight.len()).sum()
    };
    let is_bf16 = match config.run.compute.into() {
        ComputeType::F32 => false,
        ComputeType::Bf16 | ComputeType::Int8 => true,
        ComputeType::Auto => bytes(|dtype| dtype == DType::Bf16) > bytes(|dtype| dtype != DType::Bf16),
    };
    let compute = if is_bf16 { Compute::Bf16 } else { Compute::F32 };
    Context { isa: Isa::best(), compute }
}

fn predict(
    config: &TrainConfig,
    source: &Checkpoint,
    weights: &Weights,
    lora: Option<&Lora>,
    longest: &[TrainingSequence],
) -> Result<Prediction, TrainError> {
    let rules = config.trainable.rules(&source.config, default_preset(lora))?;
    Ok(Prediction::new(&Workload {
        config,
        model: &source.config,
        weights,
        is_trained: &|name| rules.is_trained(name),
        lora: lora.map_or(&[], |lora| &lora.layers),
        tokens: longest.iter().map(|sequence| sequence.token_ids.len()).sum(),
        images: longest.iter().map(|sequence| sequence.images.len()).sum(),
        compute: context(config, weights).compute,
    }))
}

/// What is trained where the configuration says nothing.
fn default_preset(lora: Option<&Lora>) -> Preset {
    if lora.is_some() { Preset::Nothing } else { Preset::Full }
}

/// The weights of a run before its first step.
fn make_parameters(
    config: &TrainConfig,
    source: &Checkpoint,
    mut weights: Weights,
    lora: Option<&Lora>,
) -> Result<Parameters, TrainError> {
    let rules = config.trainable.rules(&source.config, default_preset(lora))?;
    let tensors = expected_tensors(&source.config);
    let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    if let Some((field, parts)) = config.trainable.unused_pattern(&names) {
        return Err(TrainError::UnusedPattern { field, parts: parts.clone() });
    }
    let is_tied = source.config.tie_word_embeddings;
    if let Some(options) = &config.quantize {
        quantize_weights(&mut weights, &options.recipe())?;
    }
    let mut parameters =
        Parameters::new(weights, is_tied, config.run.precision, |name| rules.is_trained(name))?;
    if let Some(lora) = lora {
        parameters = parameters.with_lora(&lora.layers, lora.config.lora_dropout as f32);
    }
    if parameters.num_trained() == 0 {
        return Err(TrainError::NothingTrained);
    }
    // Factors are called after the adapter's file, so their layers are asked.
    let layers = lora.into_iter().flat_map(|lora| &lora.layers).map(|layer| layer.module.as_str());
    let trained = parameters.trained().map(|(name, _)| name).chain(layers);
    let of_tower = trained.map(str::to_owned).find(|name| name.starts_with("model.vision_model."));
    if let (Some(trained), true) = (of_tower, config.loading.image_cache_gb > 0.0) {
        return Err(TrainError::TrainedTower { trained });
    }
    for rate in &config.trainable.rates {
        if !parameters.trained().any(|(name, _)| rate.fits(name)) {
            return Err(TrainError::UnusedRate { parts: rate.parts.clone() });
        }
    }
    let parameters = parameters.with_rates(|name| config.trainable.rate_factor(name));
    Ok(parameters.with_moments(config.optimizer.moments))
}

/// Factors that a run begins with.
struct Lora {
    config: LoraConfig,
    layers: Vec<LoraLayer>,
}

impl Lora {
    fn new(options: &LoraOptions, model: &IdeficsConfig, seed: u64) -> Result<Self, TrainError> {
        let Some(start) = &options.start else {
            let config = options.to_peft();
            let layers = new_layers(model, &config, seed)?;
            return Ok(Self { config, layers });
        };
        let adapter = Adapter::open(start, model)?;
        if let Some(name) = adapter.replaced.keys().next() {
            return Err(TrainError::ReplacedStart { path: start.clone(), name: name.clone() });
        }
        let layer = |(module, factors)| LoraLayer { module, factors };
        let layers = adapter.factors.into_iter().map(layer).collect();
        Ok(Self { config: LoraConfig { lora_dropout: options.dropout, ..adapter.config }, layers })
    }
}

fn append_line(path: &Path, value: &serde_json::Value) -> Result<(), TrainError> {
    use std::io::Write;
    let mut file =
        std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(io_error("write", path))?;
    writeln!(file, "{value}").map_err(io_error("write", path))
}
