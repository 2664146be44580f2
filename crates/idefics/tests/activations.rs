//! Every intermediate value and all logits of the tiny checkpoints against the reference's
//! (`fixtures/tiny*/expected.safetensors`), each sequence alone and without padding, in f32.

mod common;

use std::collections::HashMap;

use common::{TINIES, TINY, Tiny, image_index, pictures};
use idefics::{
    ComputeType, Idefics, LoadOptions, SequenceInputs,
    generate::{LogitsOf, Row, StepModel, log_softmax},
    model::{OtherSizes, Stage},
    ops,
    processor::PixelValues,
};
use idefics_testing::{Tensors, assert_close, golden_fill, tolerance};

/// Values by stage of one pass.
type Seen = HashMap<Stage, Vec<f32>>;

/// What the vision tower and the resampler show of `pictures`.
fn seen_of_pictures(model: &Idefics, pictures: &[&PixelValues]) -> Seen {
    let mut seen = Seen::new();
    model
        .model()
        .encode_images_observed(pictures, &mut |stage, x| {
            let earlier = seen.insert(stage, ops::to_vec(x).expect("values"));
            assert!(earlier.is_none(), "{stage} was shown twice: the pictures did not go together");
        })
        .expect("image states");
    seen
}

/// What the text model shows of one sequence, read in one step.
fn seen_of_sequence(model: &Idefics, inputs: &SequenceInputs) -> Seen {
    let mut cache = model.start(inputs).expect("image states");
    let row = Row {
        cache: &mut cache,
        token_ids: &inputs.token_ids,
        image_index: &inputs.image_index,
        logits: LogitsOf::Nothing,
    };
    let mut seen = Seen::new();
    model
        .model()
        .forward_observed(&mut [row], &mut |stage, x| {
            let earlier = seen.insert(stage, ops::to_vec(x).expect("values"));
            assert!(earlier.is_none(), "{stage} was shown twice");
        })
        .expect("hidden states");
    seen
}

/// All logits of all sequences, read in one step: `[T, V]` each.
fn logits(model: &Idefics, inputs: &[SequenceInputs]) -> Vec<Vec<f32>> {
    let mut caches: Vec<_> = inputs.iter().map(|inputs| model.start(inputs).expect("image states")).collect();
    let mut rows: Vec<_> = inputs
        .iter()
        .zip(&mut caches)
        .map(|(inputs, cache)| Row {
            cache,
            token_ids: &inputs.token_ids,
            image_index: &inputs.image_index,
            logits: LogitsOf::All,
        })
        .collect();
    model.step(&mut rows).expect("logits")
}

fn check(what: &str, expected: &Tensors, name: &str, got: &[f32]) {
    let (_, values) = expected.f32(name);
    assert_close(&format!("{what}: {name}"), got, values, tolerance::ACTIVATION);
}

#[test]
fn pictures_have_the_reference_s_values_at_every_stage() {
    for tiny in TINIES {
        let expected = tiny.expected();
        let pictures = pictures();
        let pictures: Vec<&PixelValues> = pictures.iter().map(AsRef::as_ref).collect();
        for (name, model) in tiny.models() {
            let config = model.config();
            let seen = seen_of_pictures(&model, &pictures);
            let mut stages = vec![(Stage::VisionEmbeddings, "vision.embeddings".to_owned())];
            let layers = config.vision_config.num_hidden_layers;
            stages.extend((0..layers).map(|n| (Stage::VisionLayer(n), format!("vision.layers.{n}"))));
            stages.push((Stage::VisionLayer(layers - 1), "vision.out".to_owned()));
            let out = if config.use_resampler {
                let blocks = config.perceiver_config.resampler_depth;
                let block = |n| (Stage::PerceiverBlock(n), format!("perceiver.blocks.{n}"));
                stages.extend((0..blocks).map(block));
                "perceiver.out"
            } else {
                "vision.out"
            };
            stages.push((Stage::ImageHiddenStates, out.to_owned()));

            // Nothing of the fixture is left out.
            let of_pictures = |name: &&str| name.starts_with("vision.") || name.starts_with("perceiver.");
            let listed = expected.names().filter(of_pictures).count();
            let checked: std::collections::BTreeSet<_> = stages.iter().map(|(_, name)| name).collect();
            assert_eq!(checked.len(), listed, "{name}: stages");
            for (stage, tensor) in &stages {
                check(&name, &expected, tensor, &seen[stage]);
            }
        }
    }
}

#[test]
fn sequences_have_the_reference_s_values_at_every_stage() {
    for tiny in TINIES {
        let expected = tiny.expected();
        for (name, model) in tiny.models() {
            for (case, inputs) in tiny.cases.iter().zip(tiny.inputs()) {
                check_sequence(&name, &expected, case, &model, &inputs);
            }
        }
    }
}

fn check_sequence(name: &str, expected: &Tensors, case: &str, model: &Idefics, inputs: &SequenceInputs) {
    let config = model.config();
    let seen = seen_of_sequence(model, inputs);
    let mut stages = vec![Stage::Norm];
    stages.extend((0..config.num_hidden_layers).map(Stage::DecoderLayer));
    stages.extend((0..config.num_cross_layers()).map(Stage::GatedBlock));
    for stage in &stages {
        check(name, expected, &format!("{case}.{stage}"), &seen[stage]);
    }
    for stage in (0..config.num_cross_layers()).map(Stage::CrossAttention) {
        // The reference computes rows that see no image, too, and gates them away; here they do not exist.
        let (shape, values) = expected.f32(&format!("{case}.{stage}"));
        let seeing =
            inputs.image_index.iter().zip(values.chunks(shape[1])).filter(|(seen, _)| seen.is_some());
        let values: Vec<f32> = seeing.flat_map(|(_, row)| row).copied().collect();
        let got = seen.get(&stage).map_or(&[][..], Vec::as_slice);
        assert_close(&format!("{name}: {case}.{stage}"), got, &values, tolerance::ACTIVATION);
        stages.push(stage);
    }
    let prefix = format!("{case}.");
    let is_stage =
        |name: &&str| name.starts_with(&prefix) && (name.contains(".out") || name.contains(".attn"));
    assert_eq!(expected.names().filter(is_stage).count() + 1, stages.len(), "{name}: {case}: stages");
}

#[test]
fn logits_are_the_reference_s_alone_and_in_a_batch() {
    for tiny in TINIES {
        let expected = tiny.expected();
        let inputs = tiny.inputs();
        let (_, last) = expected.f32("batch.last_logits"); // [B, V]
        for (name, model) in tiny.models() {
            let vocab = model.vocab_size();
            let together = logits(&model, &inputs);
            for (row, (case, inputs)) in tiny.cases.iter().zip(&inputs).enumerate() {
                let (_, values) = expected.f32(&format!("{case}.logits"));
                let alone = logits(&model, std::slice::from_ref(inputs)).remove(0);
                assert_close(&format!("{name}: {case}"), &alone, values, tolerance::LOGITS);
                assert_eq!(alone, together[row], "{name}: {case} in a batch");
                let end = &together[row][together[row].len() - vocab..];
                let padded = &last[row * vocab..][..vocab];
                assert_close(&format!("{name}: {case}, padded batch"), end, padded, tolerance::LOGITS);
            }
        }
    }
}

/// The reference's left-padded batch without its pads is what the sequences are alone.
#[test]
fn the_padded_batch_holds_the_same_sequences() {
    for tiny in TINIES {
        let expected = tiny.expected();
        let (shape, ids) = expected.i64("batch.input_ids");
        let (_, attention) = expected.i64("batch.attention_mask");
        let seen = image_index(&expected, "batch.image_attention_mask");
        assert_eq!(shape[0], tiny.cases.len());
        for (row, inputs) in tiny.inputs().iter().enumerate() {
            let tokens: Vec<usize> =
                (row * shape[1]..(row + 1) * shape[1]).filter(|&token| attention[token] == 1).collect();
            let ids: Vec<u32> = tokens.iter().map(|&token| ids[token] as u32).collect();
            let seen: Vec<Option<u32>> = tokens.iter().map(|&token| seen[token]).collect();
            assert_eq!((&ids, &seen), (&inputs.token_ids, &inputs.image_index), "{} row {row}", tiny.name);
        }
    }
}

#[test]
fn positions_are_interpolated_as_in_the_reference() {
    let expected = TINY.expected();
    let sizes = [(64, 16), (48, 48), (32, 56), (72, 40), (44, 60), (36, 36)];
    let listed = expected.names().filter(|name| name.starts_with("interpolated.")).count();
    assert_eq!(listed, 2 * sizes.len(), "the fixture has these sizes and no other");
    let options =
        LoadOptions { compute: ComputeType::F32, other_sizes: OtherSizes::Interpolate, ..Default::default() };
    let model = TINY.open(&options);
    let last = Stage::VisionLayer(model.config().vision_config.num_hidden_layers - 1);
    for (height, width) in sizes {
        let name = format!("{height}x{width}");
        let data = golden_fill(&format!("pixel_values.{name}"), &[1, 3, height, width]);
        let picture = PixelValues::new(data, height, width);
        let seen = seen_of_pictures(&model, &[&picture]);
        for (stage, part) in [(Stage::VisionEmbeddings, "embeddings"), (last, "out")] {
            check("tiny", &expected, &format!("interpolated.{name}.{part}"), &seen[&stage]);
        }
        let refused = TINY.model().model().encode_images(&[&picture]).map(|_| ()).unwrap_err().to_string();
        let said =
            format!("takes pictures of 32x32 pixels, got {name}; other sizes need interpolated positions");
        assert!(refused.contains(&said), "{refused}");
    }
}

/// Pictures of several sizes go through the tower together and come out as alone.
#[test]
fn pictures_of_different_sizes_do_not_disturb_each_other() {
    let options =
        LoadOptions { compute: ComputeType::F32, other_sizes: OtherSizes::Interpolate, ..Default::default() };
    let model = TINY.open(&options);
    let picture = |height: usize, width: usize| {
        PixelValues::new(golden_fill("pixel_values.mixed", &[3, height, width]), height, width)
    };
    let pictures = [picture(32, 32), picture(72, 40), picture(16, 24), picture(32, 32), picture(40, 8)];
    let together = model.model().encode_images(&pictures.each_ref()).expect("image states");
    for (index, (picture, together)) in pictures.iter().zip(together).enumerate() {
        let alone = model.model().encode_images(&[picture]).expect("image states").remove(0);
        let values = |x| ops::to_vec(x).expect("values");
        assert_eq!(values(&alone.hidden), values(&together.hidden), "picture {index}");
    }
}

/// Log-probabilities in f64 arithmetic over rows of `vocab`.
fn log_probabilities(logits: &[f32], vocab: usize) -> Vec<f32> {
    let mut all = logits.to_vec();
    all.chunks_mut(vocab).for_each(log_softmax);
    all
}

fn mean_distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).sum();
    (sum / a.len() as f64) as f32
}

/// `C.bf16_mean_distance [1]` is how far the reference's own run in bf16 lies from its run in f32: the mean over
/// all positions and the vocabulary of the absolute difference of log-probabilities.
#[test]
fn bf16_stays_as_close_to_f32_as_the_reference_s_own() {
    for tiny in TINIES {
        let expected = tiny.expected();
        let model = bf16_model(tiny);
        let (mut ours, mut theirs) = (0.0, 0.0);
        for (case, inputs) in tiny.cases.iter().zip(tiny.inputs()) {
            let (_, values) = expected.f32(&format!("{case}.logits"));
            let got = logits(&model, &[inputs]).remove(0);
            assert_close(&format!("{}: {case} in bf16", tiny.name), &got, values, tolerance::BF16_LOGITS);
            let vocab = model.vocab_size();
            ours += mean_distance(&log_probabilities(&got, vocab), &log_probabilities(values, vocab));
            theirs += expected.f32(&format!("{case}.bf16_mean_distance")).1[0];
        }
        assert!(ours > 0.0, "{}: nothing was rounded", tiny.name);
        assert!(ours <= theirs, "{}: {ours} from f32, the reference {theirs}", tiny.name);
    }
}

fn bf16_model(tiny: Tiny) -> Idefics {
    tiny.open(&LoadOptions { compute: ComputeType::Bf16, ..Default::default() })
}
