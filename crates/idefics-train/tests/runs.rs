//! Whole runs on a small model and real pictures: stopped, killed, resumed, spoiled.

#![allow(clippy::result_large_err)] // An error ends the test.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use idefics::checkpoint::Checkpoint;
use idefics_testing::fixture;
use idefics_train::{
    TrainError,
    config::TrainConfig,
    data::{Format, SourceConfig},
    metrics::{self, Record, StepRecord},
    state,
    trainer::{End, Event, Start, Summary, Trainer},
};

/// A run over sixty samples of six pictures, with crops, dropout of nothing, and windows of one document.
struct Run {
    dir: tempfile::TempDir,
    overrides: Vec<String>,
}

impl Run {
    fn new(overrides: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let names = ["444.jpg", "422.jpg", "420.jpg", "rgb.png", "grey.png", "lossy.webp"];
        let line = |index: usize| {
            let name = names[index % 6];
            let answer = format!(" a {} number {}", name.split('.').next().unwrap(), index % 6);
            serde_json::json!({"prompt": [{"image": name}, {"text": "What is it?"}], "continuation": answer})
        };
        let mut lines: Vec<String> = (0..60).map(|index| line(index).to_string()).collect();
        let long = "one two three four five six seven eight ".repeat(8);
        lines.push(serde_json::json!({"text": long}).to_string());
        fs::write(dir.path().join("data.jsonl"), lines.join("\n")).unwrap();
        Self { dir, overrides: overrides.iter().map(|&text| text.to_owned()).collect() }
    }

    fn config(&self, output: &str) -> TrainConfig {
        let text = format!(
            "model = '{model}'\noutput = '{output}'\n\
             [run]\nsteps = 12\n[optimizer]\nlearning_rate = 2e-3\nwarmup_steps = 3\nschedule = 'cosine'\n\
             [augment]\n[sequence]\nlength = 40\nmax_images = 2\n[batch]\ntokens = 90\nimages = 4\n\
             accumulation = 2\n[evaluation]\nheld_out = 0.2\nevery = 4\n[checkpoints]\nevery = 5\n\
             [[data]]\nformat = 'jsonl'\npath = '{data}'\nimage_root = '{images}'\n",
            model = fixture("tiny").display(),
            output = self.output(output).display(),
            data = self.dir.path().join("data.jsonl").display(),
            images = fixture("processor").display(),
        );
        TrainConfig::parse("test", &text, &self.overrides).unwrap()
    }

    fn output(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn trainer(&self, output: &str, start: Start) -> Result<Trainer, TrainError> {
        Trainer::new(self.config(output), fixture("tiny"), start)
    }

    fn finish(&self, output: &str, start: Start) -> Summary {
        self.trainer(output, start).unwrap().run(&AtomicBool::new(false), &mut |_| {}).unwrap()
    }

    /// Trains until so many steps are made.
    fn stop_after(&self, output: &str, start: Start, steps: u64) -> Summary {
        let stop = AtomicBool::new(false);
        let mut trainer = self.trainer(output, start).unwrap();
        trainer
            .run(&stop, &mut |event| {
                if let Event::Step(record) = event
                    && record.step == steps
                {
                    stop.store(true, Ordering::Relaxed);
                }
            })
            .unwrap()
    }

    /// Steps whose checkpoints are there.
    fn saved(&self, output: &str) -> Vec<u64> {
        state::list(&self.output(output)).into_iter().map(|(step, _)| step).collect()
    }

    /// What a run did in each step, without what a clock says.
    fn steps(&self, output: &str) -> Vec<StepRecord> {
        let records = metrics::read(&self.output(output).join("metrics.jsonl")).unwrap();
        let step = |record| match record {
            Record::Step(record) => Some(StepRecord { seconds: 0.0, data_seconds: 0.0, ..record }),
            _ => None,
        };
        records.into_iter().filter_map(step).collect()
    }
}

fn weights(path: &Path) -> Vec<u8> {
    fs::read(path.join("model.safetensors")).unwrap()
}

/// Precisions, tapes and moments under which a run has to be the same however it is cut.
const VARIANTS: [&[&str]; 3] =
    [&[], &["run.precision=bf16", "run.tape=keep", "loading.threads=1"], &["optimizer.moments=8bit"]];

#[test]
fn a_run_that_was_stopped_anywhere_goes_on_bit_for_bit() {
    for overrides in VARIANTS {
        let run = Run::new(overrides);
        let summary = run.finish("whole", Start::Fresh);
        assert_eq!((summary.end, summary.step), (End::Finished, 12));
        let whole = run.steps("whole");
        assert!(whole[11].loss < 0.7 * whole[0].loss, "{whole:?}");
        for stop in [1, 5, 8] {
            let name = format!("stopped-{stop}");
            let stopped = run.stop_after(&name, Start::Fresh, stop);
            assert_eq!((stopped.end, stopped.step, stopped.model), (End::Interrupted, stop, None));
            let resumed = run.finish(&name, Start::Resume);
            assert_eq!(resumed.evaluation.unwrap().loss, summary.evaluation.unwrap().loss);
            assert_eq!(run.steps(&name), whole, "stopped after {stop}");
            assert_eq!(
                weights(&run.output(&name).join("model")),
                weights(&run.output("whole").join("model"))
            );
        }
    }
}

/// A kill leaves what was written until then: checkpoints, half of the next one, lines of steps that nobody will
/// remember.
#[test]
fn a_run_that_was_killed_goes_on_from_its_last_checkpoint() {
    let run = Run::new(&[]);
    run.finish("whole", Start::Fresh);
    run.stop_after("killed", Start::Fresh, 9);
    let output = run.output("killed");
    // As if the kill came while the checkpoint of step 9 was being written.
    fs::rename(output.join("checkpoint-00000009"), output.join(".checkpoint-00000009.partial")).unwrap();
    fs::remove_file(output.join(".checkpoint-00000009.partial/training/state.json")).unwrap();
    // Or in the middle of removing an old one.
    fs::create_dir(output.join(".checkpoint-00000001.removed")).unwrap();
    assert_eq!(state::list(&output).len(), 1);
    Checkpoint::open(&state::list(&output)[0].1).unwrap();
    run.finish("killed", Start::Resume);
    assert_eq!(run.steps("killed"), run.steps("whole"));
    assert_eq!(weights(&output.join("model")), weights(&run.output("whole").join("model")));
    let entries: Vec<String> = fs::read_dir(&output)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("checkpoint"))
        .collect();
    assert_eq!(entries.len(), 2, "the newest two are kept: {entries:?}");
}

/// A checkpoint and a result that are written again stay until their successors are whole.
#[test]
fn what_is_written_again_is_there_until_then() {
    let run = Run::new(&[]);
    run.stop_after("run", Start::Fresh, 3);
    let path = run.output("run").join("checkpoint-00000003");
    let before = weights(&path);
    // The files that the new one should get are not there: the disk fails, in other words.
    let mut source = Checkpoint::open(fixture("tiny")).unwrap();
    source.origin = run.output("nowhere").into();
    let trainer = run.trainer("run", Start::Resume).unwrap();
    let (product, parameters) = (state::Product::Model(&source), trainer.parameters());
    state::save(&run.output("run"), product, parameters, trainer.state()).unwrap_err();
    assert!(weights(&path) == before);
    state::save_result(&path, product, parameters).unwrap_err();
    assert!(weights(&path) == before);
    source.origin = fixture("tiny").into();
    let product = state::Product::Model(&source);
    state::save(&run.output("run"), product, parameters, trainer.state()).unwrap();
    assert!(weights(&path) == before);
    // A kill when the old one had given its name away, and the new one had not taken it.
    fs::rename(&path, run.output("run").join(".checkpoint-00000003.replaced")).unwrap();
    run.trainer("run", Start::Resume).unwrap();
    assert!(weights(&path) == before);
}

#[test]
fn a_run_that_goes_on_and_is_stopped_at_once_writes_nothing() {
    let run = Run::new(&[]);
    run.stop_after("run", Start::Fresh, 3);
    let mut saved = 0;
    let count = &mut |event: Event<'_>| saved += u64::from(matches!(event, Event::Saved(_)));
    run.trainer("run", Start::Resume).unwrap().run(&AtomicBool::new(true), count).unwrap();
    assert_eq!(saved, 0);
}

/// A picture of curves that cannot be written costs nothing; what the run cannot go on without saves it first.
#[test]
fn failures_of_the_disk_cost_no_steps() {
    let run = Run::new(&["samples.every=3", "samples.prompts=[[{text='What is it?'}]]"]);
    fs::create_dir_all(run.output("drawn").join("curves.png")).unwrap();
    let mut failures = 0;
    let count = &mut |event: Event<'_>| failures += u64::from(matches!(event, Event::NotDrawn(_)));
    let summary = run.trainer("drawn", Start::Fresh).unwrap().run(&AtomicBool::new(false), count).unwrap();
    assert_eq!((summary.end, summary.step, failures), (End::Finished, 12, 1));
    assert!(summary.model.unwrap().join("model.safetensors").is_file());
    fs::create_dir_all(run.output("sampled").join("samples.jsonl")).unwrap();
    let mut trainer = run.trainer("sampled", Start::Fresh).unwrap();
    let error = trainer.run(&AtomicBool::new(false), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("samples.jsonl"), "{error}");
    assert_eq!(run.saved("sampled"), [3]);
}

/// The best evaluation falls between two checkpoints, and is kept all the same.
#[test]
fn the_best_weights_are_kept() {
    let run = Run::new(&["checkpoints.every=11", "checkpoints.keep=1"]);
    let summary = run.stop_after("run", Start::Fresh, 9);
    assert_eq!(summary.best.unwrap().step, 8);
    assert_eq!(run.saved("run"), [8, 9]);
    // Whoever wants no checkpoints on the way gets none.
    let run = Run { overrides: vec!["checkpoints.every=1000".to_owned()], ..run };
    run.stop_after("none", Start::Fresh, 9);
    assert_eq!(run.saved("none"), [9]);
}

#[test]
fn checks_alone_write_nothing() {
    let run = Run::new(&[]);
    run.stop_after("run", Start::Fresh, 3);
    let lines = run.steps("run").len();
    run.trainer("run", Start::Resume).unwrap().try_longest().unwrap();
    assert_eq!(run.steps("run").len(), lines);
    run.trainer("other", Start::Fresh).unwrap().try_longest().unwrap();
    assert!(!run.output("other").exists());
}

#[test]
fn threads_and_reading_ahead_change_nothing() {
    let run = Run::new(&[]);
    let on = |threads: usize, name: &str| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run.finish(name, Start::Fresh));
        weights(&run.output(name).join("model"))
    };
    assert!(on(1, "one") == on(3, "three"));
    let hasty = Run::new(&["loading.ahead=1", "loading.threads=1"]);
    hasty.finish("hasty", Start::Fresh);
    assert_eq!(hasty.steps("hasty"), run.steps("one"));
    let other = Run::new(&["seed=1"]);
    other.finish("other", Start::Fresh);
    assert_ne!(other.steps("other"), run.steps("one"));
}

#[test]
fn outputs_are_not_mixed_up() {
    let run = Run::new(&[]);
    let error = run.trainer("new", Start::Resume).err().unwrap().to_string();
    assert!(error.contains("no checkpoint to resume from"), "{error}");
    run.stop_after("old", Start::Fresh, 2);
    let error = run.trainer("old", Start::Fresh).err().unwrap().to_string();
    assert!(error.contains("there is a run already"), "{error}");
    let other = Run { dir: run.dir, overrides: vec!["trainable.preset=frozen-backbones".to_owned()] };
    let error = other.trainer("old", Start::Resume).err().unwrap().to_string();
    assert!(error.contains("it trains other weights"), "{error}");
    let coded = Run { overrides: vec!["optimizer.moments=8bit".to_owned()], ..other };
    let error = coded.trainer("old", Start::Resume).err().unwrap().to_string();
    assert!(error.contains("its moments are f32: `optimizer.moments` must be the same"), "{error}");
    let other = Run { overrides: vec!["seed=3".to_owned()], ..coded };
    let error = other.trainer("old", Start::Resume).err().unwrap().to_string();
    assert!(error.contains("the data has changed since"), "{error}");
}

#[test]
fn a_run_that_diverges_goes_back_and_then_gives_up() {
    let run = Run::new(&["run.steps=40", "spikes.warmup_steps=4", "spikes.factor=1.2", "spikes.sigmas=2.0"]);
    // Steps far too long from the sixth on: the loss explodes, checkpoints are restored, and it explodes again.
    let wild = ["optimizer.learning_rate=50.0", "optimizer.clip_norm=0.0", "optimizer.warmup_steps=0"];
    run.stop_after("run", Start::Fresh, 6);
    let wild =
        Run { overrides: run.overrides.iter().cloned().chain(wild.map(str::to_owned)).collect(), ..run };
    let (mut skipped, mut back) = (0, Vec::new());
    let mut trainer = wild.trainer("run", Start::Resume).unwrap();
    let error = trainer
        .run(&AtomicBool::new(false), &mut |event| match event {
            Event::Skipped(_) => skipped += 1,
            Event::RolledBack { step } => back.push(step),
            _ => {}
        })
        .err()
        .unwrap();
    assert!(matches!(error, TrainError::Diverged { .. }), "{error}");
    assert_eq!(back, [6, 6, 6]);
    assert!(skipped >= 9, "{skipped}");
    let records = metrics::read(&wild.output("run").join("metrics.jsonl")).unwrap();
    let skips = records.iter().filter(|record| matches!(record, Record::Skip(_))).count();
    assert_eq!(skips, skipped, "what was skipped stays on record when the run goes back");
    Checkpoint::open(&state::list(&wild.output("run")).last().unwrap().1).unwrap();
}

#[test]
fn epochs_see_each_sample_so_often_and_early_stopping_stops() {
    let run = Run::new(&["run.epochs=2", "evaluation.held_out=0.0"]);
    let mut run = run;
    run.overrides.push("spikes.factor=0.0".to_owned());
    let dir = run.config_with_epochs();
    let mut trainer = dir;
    let mut sequences_tokens = 0;
    let summary = trainer
        .run(&AtomicBool::new(false), &mut |event| {
            if let Event::Step(record) = event {
                sequences_tokens += record.tokens;
            }
        })
        .unwrap();
    assert_eq!(summary.end, End::Finished);
    assert_eq!(sequences_tokens, 2 * trainer.data_report().tokens);
    // The schedule ends where the data does; orders of later epochs fill batches a little otherwise.
    assert!(summary.total_steps.abs_diff(summary.step) <= 1, "{summary:?}");
    let early = Run::new(&[
        "run.steps=500",
        "evaluation.every=2",
        "evaluation.patience=2",
        "optimizer.learning_rate=0.0",
        "evaluation.min_delta=0.5",
    ]);
    let summary = early.finish("early", Start::Fresh);
    assert_eq!((summary.end, summary.step), (End::StoppedEarly, 6));
}

impl Run {
    /// The same run bounded by epochs: a configuration has either bound.
    fn config_with_epochs(&self) -> Trainer {
        let mut overrides = self.overrides.clone();
        overrides.retain(|text| !text.starts_with("run.epochs"));
        let plain = Run { dir: tempfile::tempdir().unwrap(), overrides };
        let mut config = plain.config("x");
        config.output = self.output("epochs");
        config.data = self.data();
        (config.run.steps, config.run.epochs) = (None, Some(2.0));
        Trainer::new(config, fixture("tiny"), Start::Fresh).unwrap()
    }

    fn data(&self) -> Vec<SourceConfig> {
        let mut source = SourceConfig::new(Format::Jsonl, self.dir.path().join("data.jsonl"));
        source.image_root = Some(fixture("processor"));
        vec![source]
    }
}

#[test]
fn broken_samples_are_named_and_too_many_stop_the_run() {
    let run = Run::new(&[]);
    let path = run.dir.path().join("data.jsonl");
    let broken = r#"{"prompt": [{"image": "../training/steps.json"}], "continuation": " not a picture"}"#;
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}\n{broken}\n{broken}")).unwrap();
    run.finish("few", Start::Fresh);
    let named = fs::read_to_string(run.output("few").join("broken.jsonl")).unwrap();
    assert!(named.contains("line 62") || named.contains("line 63"), "{named}");
    fs::write(&path, format!("{text}\n{}", [broken; 20].join("\n"))).unwrap();
    let mut trainer = run.trainer("many", Start::Fresh).unwrap();
    let error = trainer.run(&AtomicBool::new(false), &mut |_| {}).err().unwrap().to_string();
    assert!(error.contains("samples are broken"), "{error}");
    let (last, _) = state::list(&run.output("many")).pop().unwrap();
    assert_eq!(last, trainer.state().step, "what was learned until then is saved");
    fs::write(&path, format!("{text}\n{}", ["nonsense"; 100].join("\n"))).unwrap();
    let error = run.trainer("more", Start::Fresh).err().unwrap().to_string();
    assert!(error.contains("are broken"), "seen before the run begins: {error}");
}

/// What cannot be evaluated is counted; where nothing is left of an evaluation, the run does not begin.
#[test]
fn broken_samples_of_an_evaluation_are_named() {
    let run = Run::new(&["evaluation.held_out=0.0"]);
    let path = run.dir.path().join("evaluation.jsonl");
    let broken = r#"{"prompt": [{"image": "missing.jpg"}], "continuation": " nothing"}"#;
    let trainer = |text: &str| {
        fs::write(&path, text).unwrap();
        let mut config = run.config("x");
        config.evaluation.data = vec![SourceConfig::new(Format::Jsonl, &path)];
        Trainer::new(config, fixture("tiny"), Start::Fresh)
    };
    let some = trainer(&format!("{broken}\n{{\"text\": \"some words\"}}")).unwrap();
    assert_eq!(some.num_evaluation_sequences(), 1);
    let [error] = some.broken_evaluation_samples() else { panic!() };
    assert!(error.place.ends_with("evaluation.jsonl, line 1"), "{error}");
    let error = trainer(broken).err().unwrap().to_string();
    assert!(
        error.starts_with("evaluation: none of the 1 samples can be used") && error.contains("missing.jpg"),
        "{error}"
    );
}

/// QLoRA: the packed layers stay, the factors move, a run that was stopped goes on, and the adapter is what the
/// model with its factors was.
#[test]
fn adapters_are_trained_beside_packed_layers() {
    let run = Run::new(&[
        "lora.r=4",
        "lora.dropout=0.1",
        "lora.targets=['q_proj','v_proj','down_proj']",
        "quantize.format=nf4",
        "optimizer.learning_rate=2e-2",
    ]);
    let whole = run.finish("whole", Start::Fresh);
    let steps = run.steps("whole");
    assert!(steps[11].loss < 0.9 * steps[0].loss, "{steps:?}");
    run.stop_after("stopped", Start::Fresh, 7);
    let resumed = run.finish("stopped", Start::Resume);
    assert_eq!(run.steps("stopped"), steps);
    assert_eq!(resumed.evaluation.unwrap().loss, whole.evaluation.unwrap().loss);
    let adapter = |name: &str| fs::read(run.output(name).join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter("whole"), adapter("stopped"));

    // The finished adapter as the beginning of another run has the loss that this one ended with.
    let start = format!("lora.start='{}'", run.output("whole").join("adapter").display());
    let overrides = run.overrides.iter().cloned().chain([start]).collect();
    let next = Run { overrides, ..run };
    let mut trainer = next.trainer("next", Start::Fresh).unwrap();
    assert_eq!(trainer.evaluation_loss().unwrap().mean(), whole.evaluation.unwrap().loss);
    let packed = trainer.parameters().frozen().iter_packed().count();
    assert!(packed > 0);
    assert!(trainer.parameters().trained().all(|(name, _)| name.contains("lora_")));
}

#[test]
fn packed_layers_cannot_be_trained_themselves() {
    let run = Run::new(&["quantize.format=nf4"]);
    let error = run.trainer("x", Start::Fresh).err().unwrap().to_string();
    assert!(error.contains("is packed as nf4 and cannot be trained"), "{error}");
    let run = Run::new(&["trainable.preset=nothing"]);
    assert!(matches!(run.trainer("x", Start::Fresh), Err(TrainError::NothingTrained)));
}

#[test]
fn names_and_layers_that_a_run_does_not_have_are_refused() {
    let run = Run::new(&["trainable.unfreeze=[['model.layers', 'qproj']]"]);
    let error = run.trainer("x", Start::Fresh).err().unwrap().to_string();
    let expected =
        "trainable.unfreeze: no weight of the model has all of [\"model.layers\", \"qproj\"] in its name";
    assert_eq!(error, expected);
    // Factors in the tower change what it makes of a picture in every step.
    let config = |run: &Run| TrainConfig { augment: None, ..run.config("x") };
    let run = Run::new(&["lora.r=4"]);
    let mut cached = config(&run);
    cached.loading.image_cache_gb = 0.1;
    let error = Trainer::new(cached.clone(), fixture("tiny"), Start::Fresh).err().unwrap();
    assert!(
        matches!(&error, TrainError::TrainedTower { trained } if trained.contains("vision_model")),
        "{error}"
    );
    let tower = idefics::adapter::Targets::Pattern(r"model\.vision_model\..*".to_owned());
    cached.lora.as_mut().unwrap().exclude = Some(tower);
    Trainer::new(cached, fixture("tiny"), Start::Fresh).unwrap();
}
