//! Ten steps of a small model against transformers and `torch.optim.AdamW`.

use std::sync::Arc;

use idefics::{
    checkpoint::Checkpoint,
    model::{Tape, TrainingSequence},
    ops::{Compute, Context, Isa},
    processor::PixelValues,
};
use idefics_testing::{fixture, fixture_json, golden_fill};
use idefics_train::{
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
    let rules = trainable.rules(&checkpoint.config).unwrap();
    let parameters =
        Parameters::new(checkpoint.weights, false, Precision::F32, |name| rules.is_trained(name)).unwrap();
    Learner {
        parameters,
        config: checkpoint.config,
        ctx: Context { isa: Isa::best(), compute: Compute::F32 },
        rules: StepRules { adamw: AdamW::default(), clip_norm: 1.0, z_loss: 0.0, tape },
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
        let expected = final_norms[name].as_f64().unwrap();
        assert!((norm - expected).abs() < 2e-4 * expected.max(1.0), "{run}, {name}: {norm}, not {expected}");
    }
    // Whatever was not trained is what it was, to the bit.
    let original = Checkpoint::open(fixture("tiny")).unwrap();
    let mut frozen = 0;
    for (name, weight) in learner.parameters.frozen().iter() {
        assert_eq!(weight.bytes(), original.weights.get(name).unwrap().bytes(), "{run}: {name} moved");
        frozen += 1;
    }
    assert_eq!(frozen + final_norms.len(), original.weights.len());
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
    let trainable =
        Trainable { preset: Preset::FrozenBackbones, freeze_lm_head: Some(false), ..Trainable::default() };
    check("backbones", learner(&trainable, Tape::Recompute), 1);
}
