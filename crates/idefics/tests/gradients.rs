//! Gradients of every parameter against the reference's (torch autograd, f32), for both golden models.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use idefics::{
    checkpoint::{Checkpoint, LinearWeight, Weight, Weights},
    model::{KeptImages, LossOptions, Model, Tape, TrainingSequence, WeightSource},
    ops::{Compute, Context, Gradient, Isa, LossSum, LowRank},
    processor::PixelValues,
};
use idefics_testing::{Golden, Tensors, write_golden_checkpoint};

/// The weights of a checkpoint, all of them or those of some names with a place for their gradients.
struct Trained<'a> {
    weights: &'a Weights,
    gradients: BTreeMap<String, Gradient>,
    low_rank: BTreeMap<String, LowRank>,
}

impl WeightSource for Trained<'_> {
    fn weight(&self, name: &str) -> Option<Weight> {
        self.weights.get(name).cloned()
    }
    fn linear_weight(&self, name: &str) -> Option<LinearWeight> {
        self.weights.get_linear(name)
    }
    fn gradient(&self, name: &str) -> Option<Gradient> {
        self.gradients.get(name).cloned()
    }
    fn low_rank(&self, name: &str) -> Vec<LowRank> {
        self.low_rank.get(name).cloned().into_iter().collect()
    }
}

struct Setup {
    checkpoint: Checkpoint,
    expected: Tensors,
    _dir: tempfile::TempDir,
}

fn setup(golden: Golden) -> Setup {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_golden_checkpoint(dir.path(), golden);
    let checkpoint = Checkpoint::open(dir.path()).expect("a sound checkpoint");
    let letter = if golden == Golden::A { "A" } else { "B" };
    let expected = Tensors::fixture(&format!("training/gradients-{letter}.safetensors"));
    Setup { checkpoint, expected, _dir: dir }
}

impl Setup {
    fn rows(&self, form: &str) -> Vec<TrainingSequence> {
        (0..2)
            .map(|row| {
                let ids = |name: &str| self.expected.i64(&format!("rows.{row}.{name}")).1.to_vec();
                let (shape, pixels) = self.expected.f32(&format!("rows.{row}.pixel_values"));
                let of_picture = pixels.len() / shape[0];
                TrainingSequence {
                    token_ids: ids("input_ids").into_iter().map(|id| id as u32).collect(),
                    image_index: ids("image_index").into_iter().map(|i| u32::try_from(i).ok()).collect(),
                    images: pixels
                        .chunks(of_picture)
                        .map(|data| Arc::new(PixelValues::new(data.to_vec(), shape[2], shape[3])))
                        .collect(),
                    targets: ids(&format!("targets.{form}"))
                        .into_iter()
                        .map(|id| u32::try_from(id).ok())
                        .collect(),
                }
            })
            .collect()
    }

    /// All parameters that have a gradient in the reference.
    fn names(&self) -> BTreeSet<String> {
        self.expected
            .names()
            .filter_map(|name| name.strip_prefix("masked.grad."))
            .map(str::to_owned)
            .collect()
    }

    fn n_targets(&self, form: &str) -> i64 {
        self.expected.i64(&format!("{form}.n_targets")).1[0]
    }

    fn trained(&self, names: impl IntoIterator<Item = String>) -> Trained<'_> {
        let weights = &self.checkpoint.weights;
        let gradients = names
            .into_iter()
            .map(|name| {
                let weight = weights.get(&name).unwrap_or_else(|| panic!("no weight {name}"));
                let gradient = Gradient::new(weight.len());
                (name, gradient)
            })
            .collect();
        Trained { weights, gradients, low_rank: BTreeMap::new() }
    }

    fn model(&self, source: &Trained<'_>, isa: Isa) -> Model {
        let ctx = Context { isa, compute: Compute::F32 };
        Model::new(self.checkpoint.config.clone(), source, ctx).expect("a model")
    }
}

fn options(n_targets: i64, z_loss: f32, tape: Tape) -> LossOptions {
    LossOptions { z_loss, gradient_scale: 1.0 / n_targets as f32, tape }
}

fn values(source: &Trained<'_>) -> BTreeMap<String, Vec<f32>> {
    source.gradients.iter().map(|(name, gradient)| (name.clone(), gradient.lock().clone())).collect()
}

/// `|got - expected| / |expected|` in the 2-norm, and 0 where both are below 1e-6: the bias of the keys' norm has a
/// gradient that is zero but for rounding, since softmax does not see what all keys share.
fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let wide = |values: &[f32]| norm(&mut values.iter().map(|v| f64::from(*v)));
    if wide(got).max(wide(expected)) < 1e-6 {
        return 0.0;
    }
    norm(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b))) / wide(expected)
}

#[test]
fn every_parameter_has_the_gradient_of_the_reference() {
    for golden in [Golden::A, Golden::B] {
        let setup = setup(golden);
        for isa in Isa::available() {
            for (form, z_loss) in [("masked", 0.0), ("ignored", 0.0), ("z", 1e-3)] {
                let source = setup.trained(setup.names());
                let model = setup.model(&source, isa);
                let options = options(setup.n_targets(form), z_loss, Tape::Recompute);
                let loss = model.accumulate_gradients(&setup.rows(form), &options).expect("a loss");
                let n = loss.n_targets as f64;
                let total = (loss.cross_entropy + f64::from(z_loss) * loss.z) / n;
                let expected = f64::from(setup.expected.f32(&format!("{form}.loss")).1[0]);
                assert!((total - expected).abs() < 2e-6 * expected, "{golden:?} {form}: {total} {expected}");
                for (name, got) in values(&source) {
                    let (_, expected) = setup.expected.f32(&format!("{form}.grad.{name}"));
                    let error = relative_error(&got, expected);
                    assert!(error < 1e-4, "{golden:?} {form} {} {name}: {error:e}", isa.tier());
                }
            }
        }
    }
}

#[test]
fn a_kept_tape_and_a_second_run_give_the_same_bits() {
    for golden in [Golden::A, Golden::B] {
        let setup = setup(golden);
        let run = |tape| {
            let source = setup.trained(setup.names());
            let model = setup.model(&source, Isa::best());
            let loss =
                model.accumulate_gradients(&setup.rows("z"), &options(10, 1e-3, tape)).expect("a loss");
            (loss, values(&source))
        };
        let (recomputed, kept) = (run(Tape::Recompute), run(Tape::Keep));
        assert_eq!(recomputed, kept, "{golden:?}");
        assert_eq!(recomputed, run(Tape::Recompute), "{golden:?}: a second time");
    }
}

#[test]
fn sequences_packed_together_give_what_they_give_alone() {
    for golden in [Golden::A, Golden::B] {
        let setup = setup(golden);
        let rows = setup.rows("masked");
        let run = |batches: &[&[TrainingSequence]]| -> (LossSum, BTreeMap<String, Vec<f32>>) {
            let source = setup.trained(setup.names());
            let model = setup.model(&source, Isa::best());
            let mut sum = LossSum::default();
            for batch in batches {
                let options = options(setup.n_targets("masked"), 0.0, Tape::Recompute);
                sum.add(&model.accumulate_gradients(batch, &options).expect("a loss"));
                assert_eq!(model.evaluate_loss(batch).expect("a loss").n_targets, {
                    batch.iter().flat_map(|row| &row.targets).flatten().count()
                });
            }
            (sum, values(&source))
        };
        let (packed, alone) = (run(&[&rows]), run(&[&rows[..1], &rows[1..]]));
        assert_eq!(packed.0.n_targets, alone.0.n_targets);
        assert!((packed.0.cross_entropy - alone.0.cross_entropy).abs() < 1e-5);
        for (name, gradient) in &packed.1 {
            let error = relative_error(gradient, &alone.1[name]);
            assert!(error < 1e-5, "{golden:?} {name}: {error:e}");
        }
        let source = setup.trained([]);
        let evaluated = setup.model(&source, Isa::best()).evaluate_loss(&rows).expect("a loss");
        assert!((evaluated.cross_entropy - packed.0.cross_entropy).abs() < 1e-5, "{golden:?}");
    }
}

#[test]
fn a_part_trained_alone_gets_the_same_gradient() {
    // Whatever is frozen, the pass reaches down to what is not.
    let setup = setup(Golden::A);
    let all = setup.trained(setup.names());
    let rows = setup.rows("masked");
    let options = options(setup.n_targets("masked"), 0.0, Tape::Recompute);
    setup.model(&all, Isa::best()).accumulate_gradients(&rows, &options).expect("a loss");
    let all = values(&all);
    for part in [
        "vision_model.embeddings",
        "vision_model.pre_layrnorm",
        "vision_model.encoder.layers.1",
        "perceiver_resampler.latents",
        "perceiver_resampler.blocks",
        "gated_cross_attn_layers",
        "embed_tokens",
        "model.layers",
        "lm_head",
    ] {
        let names: Vec<_> = setup.names().into_iter().filter(|name| name.contains(part)).collect();
        assert!(!names.is_empty(), "{part}");
        let source = setup.trained(names);
        setup.model(&source, Isa::best()).accumulate_gradients(&rows, &options).expect("a loss");
        for (name, gradient) in values(&source) {
            assert_eq!(gradient, all[&name], "{part}: {name}");
        }
    }
}

#[test]
fn pictures_that_a_frozen_tower_has_read_give_the_same_bits() {
    for golden in [Golden::A, Golden::B] {
        let setup = setup(golden);
        let rows = setup.rows("masked");
        let options = options(setup.n_targets("masked"), 0.0, Tape::Keep);
        for frozen in [&["vision_model"][..], &["vision_model", "perceiver"]] {
            let is_frozen = |name: &str| frozen.iter().any(|part| name.contains(part));
            let names = || setup.names().into_iter().filter(|name| !is_frozen(name));
            let alone = setup.trained(names());
            let loss =
                setup.model(&alone, Isa::best()).accumulate_gradients(&rows, &options).expect("a loss");
            let mut kept = KeptImages::new(1 << 20);
            // One row first, so that the other's pictures are read beside kept ones; then all of them are kept.
            for batch in [&rows[..1], &rows, &rows] {
                let before = kept.num_bytes();
                let source = setup.trained(names());
                let again = setup
                    .model(&source, Isa::best())
                    .accumulate_gradients_with(batch, &options, &mut kept)
                    .expect("a loss");
                if batch.len() == rows.len() {
                    assert_eq!(again, loss, "{golden:?} {frozen:?}");
                    assert_eq!(values(&source), values(&alone), "{golden:?} {frozen:?}");
                }
                assert!(kept.num_bytes() >= before.max(1));
            }
            let model = setup.model(&alone, Isa::best());
            let evaluated = model.evaluate_loss(&rows).expect("a loss");
            assert_eq!(model.evaluate_loss_with(&rows, &mut kept).expect("a loss"), evaluated);
        }
    }
}

#[test]
fn low_rank_factors_get_the_gradient_of_their_product() {
    // With y += s·B·A·x the gradient of B is s·dW·Aᵀ and of A s·Bᵀ·dW, dW being the whole weight's.
    let setup = setup(Golden::A);
    let weight = "model.layers.0.self_attn.q_proj.weight";
    let layer = weight.strip_suffix(".weight").expect("a weight");
    let (n, k) = {
        let shape = setup.checkpoint.weights.get(weight).expect("the weight").shape();
        (shape[0], shape[1])
    };
    let rank = 2;
    let fill = |count: usize, step: usize| -> Vec<f32> {
        (0..count).map(|i| ((i * step % 17) as f32 - 8.0) / 100.0).collect()
    };
    let (a, b) = (fill(rank * k, 5), fill(n * rank, 7));
    let (da, db) = (Gradient::new(rank * k), Gradient::new(n * rank));
    let scale = 0.5;
    let mut source = setup.trained([weight.to_owned()]);
    source.low_rank.insert(
        layer.to_owned(),
        LowRank {
            a: Weight::from_f32(a.clone(), [rank, k]),
            b: Weight::from_f32(b.clone(), [n, rank]),
            scale,
            dropout: 0.0,
            dropout_seed: 0,
            a_gradient: Some(da.clone()),
            b_gradient: Some(db.clone()),
        },
    );
    let rows = setup.rows("masked");
    let options = options(setup.n_targets("masked"), 0.0, Tape::Recompute);
    setup.model(&source, Isa::best()).accumulate_gradients(&rows, &options).expect("a loss");
    let dw = source.gradients[weight].lock().clone();
    let expected_b: Vec<f32> = (0..n * rank)
        .map(|i| scale * (0..k).map(|c| dw[i / rank * k + c] * a[i % rank * k + c]).sum::<f32>())
        .collect();
    let expected_a: Vec<f32> = (0..rank * k)
        .map(|i| scale * (0..n).map(|r| b[r * rank + i / k] * dw[r * k + i % k]).sum::<f32>())
        .collect();
    assert!(relative_error(&da.lock(), &expected_a) < 1e-4);
    assert!(relative_error(&db.lock(), &expected_b) < 1e-4);
}
