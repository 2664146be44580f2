//! Ten steps of a small model against transformers and `torch.optim.AdamW`.

use std::sync::Arc;

use idefics::{
    adapter::Adapter,
    checkpoint::Checkpoint,
    config::IdeficsConfig,
    model::{KeptImages, Tape, TrainingSequence},
    ops::{Compute, Context, Isa},
    processor::PixelValues,
};
use idefics_testing::{fixture, fixture_json, golden_fill};
use idefics_train::{
    adapter::LoraLayer,
    freeze::{Preset, Trainable},
    learner::{Learner, StepRules},
    optim::AdamW,
    parameters::{Parameters, Precision},
};
use serde_json::Value;

fn list<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The sequences of the fixture; anything below 0 is none.
fn sequences(steps: &Value) -> Vec<TrainingSequence> {
    let some = |id: &i64| u32::try_from(*id).ok();
    let sequence = |value: &Value| TrainingSequence {
        token_ids: list(&value["input_ids"]),
        image_index: list::<i64>(&value["image_index"]).iter().map(some).collect(),
        targets: list::<i64>(&value["targets"]).iter().map(some).collect(),
        images: list::<String>(&value["pictures"])
            .iter()
            .map(|name| Arc::new(PixelValues::new(golden_fill(name, &[3, 32, 32]), 32, 32)))
            .collect(),
    };
    steps["sequences"].as_array().unwrap().iter().map(sequence).collect()
}

fn learner(trainable: &Trainable, tape: Tape) -> Learner {
    let checkpoint = Checkpoint::open(fixture("tiny")).unwrap();
    let rules = trainable.rules(&checkpoint.config, Preset::Full).unwrap();
    let parameters =
        Parameters::new(checkpoint.weights, false, Precision::F32, |name| rules.is_trained(name)).unwrap();
    learner_of(parameters, checkpoint.config, tape)
}

fn learner_of(parameters: Parameters, config: IdeficsConfig, tape: Tape) -> Learner {
    Learner {
        parameters,
        config,
        ctx: Context { isa: Isa::best(), compute: Compute::F32 },
        rules: StepRules { adamw: AdamW::default(), clip_norm: 1.0, z_loss: 0.0, tape },
        kept_images: KeptImages::new(0),
    }
}

/// Runs the fixture's steps; `passes` cuts each batch.
fn check(run: &str, mut learner: Learner, passes: usize) {
    let steps = fixture_json("training/steps.json");
    let sequences = sequences(&steps);
    let expected = &steps["runs"][run];
    let losses: Vec<f64> = list(&expected["losses"]);
    let norms: Vec<f64> = list(&expected["grad_norms"]);
    let rate = expected["learning_rate"].as_f64().unwrap();
    let batches: Vec<Vec<usize>> = list(&steps["batches"]);
    assert_eq!(losses.len(), 10);
    for (index, batch) in batches.iter().enumerate() {
        let batch: Vec<TrainingSequence> = batch.iter().map(|&at| sequences[at].clone()).collect();
        let size = batch.len().div_ceil(passes);
        let batches: Vec<Vec<TrainingSequence>> = batch.chunks(size).map(<[_]>::to_vec).collect();
        let step = index as u64 + 1;
        let gradients = learner.gradients(&batches, step).unwrap();
        let (loss, norm) = (gradients.loss.mean(), gradients.norm);
        assert!((loss - losses[index]).abs() < 1e-4, "{run}, step {step}: {loss}, not {}", losses[index]);
        let distance = (norm / norms[index] - 1.0).abs();
        assert!(distance < 1e-3, "{run}, step {step}: norm {norm}, not {}", norms[index]);
        learner.apply(&gradients, rate, step);
    }
    let final_norms = expected["final_norms"].as_object().unwrap();
    assert_eq!(learner.parameters.trained().count(), final_norms.len(), "{run}: trained weights");
    for (name, parameter) in learner.parameters.trained() {
        // A softmax does not change when all keys move alike, so these have no gradient but rounding, of which
        // Adam makes whole steps.
        if name.ends_with("k_layer_norm.bias") || name.ends_with("k_proj.bias") {
            continue;
        }
        let norm = parameter.values().iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        // PEFT names the adapter in the middle.
        let factor = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.");
        let expected = final_norms[&factor].as_f64().unwrap();
        assert!((norm - expected).abs() < 2e-4 * expected.max(1.0), "{run}, {name}: {norm}, not {expected}");
    }
    // Whatever was not trained is what it was, to the bit.
    let original = Checkpoint::open(fixture("tiny")).unwrap();
    let mut frozen = 0;
    for (name, weight) in learner.parameters.frozen().iter() {
        assert_eq!(weight.bytes(), original.weights.get(name).unwrap().bytes(), "{run}: {name} moved");
        frozen += 1;
    }
    let whole = final_norms.keys().filter(|name| !name.contains("lora_")).count();
    assert_eq!(frozen + whole, original.weights.len());
}

#[test]
fn full_training() {
    check("full", learner(&Trainable::default(), Tape::Recompute), 1);
    check("full", learner(&Trainable::default(), Tape::Keep), 1);
}

#[test]
fn accumulated_passes_are_one_batch() {
    check("full", learner(&Trainable::default(), Tape::Recompute), 2);
}

#[test]
fn frozen_backbones() {
    let trainable = Trainable {
        preset: Some(Preset::FrozenBackbones),
        freeze_lm_head: Some(false),
        ..Trainable::default()
    };
    check("backbones", learner(&trainable, Tape::Recompute), 1);
}

#[test]
fn lora() {
    let checkpoint = Checkpoint::open(fixture("tiny")).unwrap();
    let start = Adapter::open(fixture("training/lora-start"), &checkpoint.config).unwrap();
    let layers: Vec<LoraLayer> =
        start.factors.into_iter().map(|(module, factors)| LoraLayer { module, factors }).collect();
    let parameters = Parameters::new(checkpoint.weights, false, Precision::F32, |_| false)
        .unwrap()
        .with_lora(&layers, 0.0);
    check("lora", learner_of(parameters, checkpoint.config, Tape::Recompute), 1);
}

/// A sequence gives the same loss and the same gradient beside others as alone.
#[test]
fn packed_sequences_are_as_alone() {
    let sequences = sequences(&fixture_json("training/steps.json"));
    let gradients = |passes: &[Vec<TrainingSequence>]| {
        let mut learner = learner(&Trainable::default(), Tape::Recompute);
        let loss = learner.gradients(passes, 1).unwrap().loss;
        let values = learner
            .parameters
            .trained()
            .map(|(name, parameter)| (name.to_owned(), parameter.gradient().lock().clone()));
        (loss, values.collect::<Vec<_>>())
    };
    let alone: Vec<Vec<TrainingSequence>> = sequences.iter().map(|one| vec![one.clone()]).collect();
    let (packed_loss, packed) = gradients(&[sequences]);
    let (alone_loss, alone) = gradients(&alone);
    assert!((packed_loss.mean() - alone_loss.mean()).abs() < 1e-9, "{packed_loss:?} {alone_loss:?}");
    assert_eq!(packed_loss.n_correct, alone_loss.n_correct);
    for ((name, packed), (_, alone)) in packed.iter().zip(&alone) {
        let norm = |values: &mut dyn Iterator<Item = f32>| {
            values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
        };
        let distance = norm(&mut packed.iter().zip(alone).map(|(a, b)| a - b));
        let size = norm(&mut alone.iter().copied());
        // The absolute part is for gradients that are nothing but rounding.
        assert!(distance <= 1e-5 * size + 1e-7, "{name}: {distance} of {size}");
        assert!(size > 0.0, "{name} has no gradient");
    }
}
