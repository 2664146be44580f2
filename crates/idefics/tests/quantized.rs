//! Packed weights against bitsandbytes, and packed models against transformers with bitsandbytes and against
//! themselves in other forms.

use std::{path::Path, sync::Arc};

use half::{bf16, f16};
use idefics::{
    ComputeType, Idefics, LoadOptions, SequenceInputs,
    checkpoint::{Checkpoint, Part},
    generate::{LogitsOf, Row, StepModel},
    model::Model,
    ops::{Compute, Context, Isa},
    processor::PixelValues,
    quantize::{Format, Quantizer, Recipe, quantize_weights},
};
use idefics_kernels::{nested, nf4};
use idefics_testing::{Tensors, assert_close, fixture, fixture_json, golden_fill, tolerance};
use serde_json::Value;
use sha2::{Digest, Sha256};

const FORMATS: [Format; 3] = [Format::Nf4, Format::Nf4DoubleQuant, Format::Q8];

/// The weight of a case of `quantize.json`: blocks of very different sizes, some of zeros, in one of the types.
fn weight_of(case: &Value) -> Vec<f32> {
    let shape: Vec<usize> = serde_json::from_value(case["shape"].clone()).expect("a shape");
    let mut values = golden_fill(case["name"].as_str().expect("a name"), &shape);
    for (block, values) in values.chunks_mut(64).enumerate() {
        let factor = if block % 31 == 5 { 0.0 } else { 0.5f32.powi((block % 13) as i32) };
        for value in values.iter_mut() {
            *value *= factor;
        }
    }
    let rounded = |value: f32| match case["dtype"].as_str() {
        Some("f32") => value,
        Some("f16") => f16::from_f32(value).to_f32(),
        Some("bf16") => bf16::from_f32(value).to_f32(),
        other => panic!("{other:?}"),
    };
    values.into_iter().map(rounded).collect()
}

fn digest(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

fn digest_f32(values: &[f32]) -> String {
    digest(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

#[test]
fn codes_and_scales_are_those_of_bitsandbytes_bit_for_bit() {
    let fixture = fixture_json("quantize.json");
    let floats = |key: &str| -> Vec<f32> { serde_json::from_value(fixture[key].clone()).expect("numbers") };
    assert_eq!(nf4::CODE_VALUES[..], floats("quant_map"));
    assert_eq!(nested::dynamic_map()[..], floats("nested_quant_map"));
    let cases = fixture["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 27);
    for case in cases {
        let what = format!("{} {}", case["name"], case["dtype"]);
        let (codes, scales) = nf4::quantize(&weight_of(case));
        let nested = nested::quantize(&scales);
        assert_eq!(digest(&codes), case["codes"], "{what}: codes");
        assert_eq!(digest_f32(&scales), case["absmax"], "{what}: scales");
        assert_eq!(f64::from(nested.offset), case["nested_offset"], "{what}: mean of the scales");
        assert_eq!(digest_f32(&nested.absmax), case["nested_absmax"], "{what}: scales of the scales");
        assert_eq!(digest(&nested.codes), case["nested_codes"], "{what}: codes of the scales");
    }
}

/// The wide fixture in every packed form, on every tier, in both types: all its linear layers are whole blocks.
fn wide_models() -> impl Iterator<Item = (String, Model)> {
    FORMATS.into_iter().flat_map(|format| {
        let checkpoint = Checkpoint::open(fixture("tiny-nf4")).expect("a sound checkpoint");
        let mut weights = checkpoint.weights.clone();
        for (name, weight) in checkpoint.weights.iter_packed() {
            weights.insert(name, weight.to_dense());
        }
        let parts = Part::ALL.into_iter().collect();
        quantize_weights(&mut weights, &Recipe { format, parts }).expect("packed weights");
        let config = checkpoint.config;
        let computes = [Compute::F32, Compute::Bf16];
        let contexts = computes
            .into_iter()
            .flat_map(|compute| Isa::available().map(move |isa| Context { isa, compute }));
        contexts.map(move |ctx| {
            let model = Model::new(config.clone(), &weights, ctx).expect("a model");
            (format!("{format} {} {:?}", ctx.isa.tier(), ctx.compute), model)
        })
    })
}

/// Logits of a sequence after each of its tokens, fed in chunks together with others.
fn in_chunks(model: &Model, inputs: &[SequenceInputs], chunk: usize) -> Vec<Vec<f32>> {
    let mut caches: Vec<_> = inputs.iter().map(|inputs| model.start(inputs).expect("image states")).collect();
    let mut all = vec![Vec::new(); inputs.len()];
    let longest = inputs.iter().map(|inputs| inputs.token_ids.len()).max().unwrap_or(0);
    for start in (0..longest).step_by(chunk) {
        let mut rows: Vec<_> = inputs
            .iter()
            .zip(&mut caches)
            .map(|(inputs, cache)| {
                let n = inputs.token_ids.len();
                let range = start.min(n)..(start + chunk).min(n);
                let (token_ids, image_index) = (&inputs.token_ids[range.clone()], &inputs.image_index[range]);
                Row { cache, token_ids, image_index, logits: LogitsOf::All }
            })
            .collect();
        for (all, new) in all.iter_mut().zip(model.step(&mut rows).expect("logits")) {
            all.extend(new);
        }
    }
    all
}

/// Few rows go through fused products and many through unpacked panels: the bits must be the same.
#[test]
fn batches_chunks_and_threads_do_not_change_a_bit() {
    let inputs: Vec<SequenceInputs> = cases("tiny-nf4").into_iter().map(|(inputs, _)| inputs).collect();
    for (name, model) in wide_models() {
        let whole = in_chunks(&model, &inputs, 100);
        for (index, input) in inputs.iter().enumerate() {
            let alone = in_chunks(&model, std::slice::from_ref(input), 100);
            assert_eq!(alone[0], whole[index], "{name}, sequence {index} alone");
        }
        for chunk in [1, 2, 5] {
            assert_eq!(in_chunks(&model, &inputs, chunk), whole, "{name}, chunks of {chunk}");
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread pool");
        assert_eq!(pool.install(|| in_chunks(&model, &inputs, 100)), whole, "{name}, one thread");
    }
}

fn open(directory: &Path, quantize: Option<Format>) -> Idefics {
    let quantize = quantize.map(Recipe::new);
    let options = LoadOptions { compute: ComputeType::F32, quantize, ..Default::default() };
    Idefics::from_pretrained(directory, &options).expect("a model")
}

/// Logits of all positions, the sequences fed together: `[T, V + A]` each.
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

/// Mean Kullback-Leibler divergence of the distributions by `got` from those by `expected`, over positions.
fn divergence(got: &[f32], expected: &[f32], vocab: usize) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        logits.iter().map(|logit| f64::from(*logit) - sum.ln()).collect()
    };
    let rows = got.chunks_exact(vocab).zip(expected.chunks_exact(vocab));
    let divergences = rows.map(|(got, expected)| {
        let (q, p) = (log_softmax(got), log_softmax(expected));
        p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    });
    divergences.sum::<f64>() / (got.len() / vocab) as f64
}

/// The sequences of a packed fixture with the logits that transformers and bitsandbytes give.
fn cases(name: &str) -> Vec<(SequenceInputs, Vec<f32>)> {
    let expected = Tensors::fixture(&format!("{name}/expected.safetensors"));
    let pixels = golden_fill("pixel_values", &[3, 3, 16, 16]);
    let pictures: Vec<_> = pixels
        .chunks_exact(3 * 16 * 16)
        .map(|pixels| Arc::new(PixelValues::new(pixels.to_vec(), 16, 16)))
        .collect();
    let names: Vec<&str> = expected.names().filter_map(|name| name.strip_suffix(".logits")).collect();
    assert_eq!(names.len(), 3);
    let ids = |name: String| expected.i64(&name).1;
    names
        .into_iter()
        .map(|case| {
            let images = ids(format!("{case}.images"));
            let inputs = SequenceInputs {
                token_ids: ids(format!("{case}.input_ids")).iter().map(|id| *id as u32).collect(),
                image_index: ids(format!("{case}.image_index"))
                    .iter()
                    .map(|index| u32::try_from(*index).ok())
                    .collect(),
                images: images.iter().map(|index| Arc::clone(&pictures[*index as usize])).collect(),
            };
            (inputs, expected.f32(&format!("{case}.logits")).1.to_vec())
        })
        .collect()
}

#[test]
fn directories_of_bitsandbytes_give_the_logits_of_transformers() {
    for name in ["tiny-nf4", "tiny-nf4-plain"] {
        let (inputs, expected): (Vec<_>, Vec<_>) = cases(name).into_iter().unzip();
        for isa in Isa::available() {
            let checkpoint = Checkpoint::open(fixture(name)).expect("a sound checkpoint");
            let model = |compute| {
                Model::new(checkpoint.config.clone(), &checkpoint.weights, Context { isa, compute })
                    .expect("a model")
            };
            let what = format!("{name} {}", isa.tier());
            for (got, expected) in in_chunks(&model(Compute::F32), &inputs, 100).iter().zip(&expected) {
                assert_close(&what, got, expected, tolerance::LOGITS);
                let divergence = divergence(got, expected, 93);
                assert!(divergence < 1e-9, "{what}: mean KL divergence {divergence:e}");
            }
            for (got, expected) in in_chunks(&model(Compute::Bf16), &inputs, 100).iter().zip(&expected) {
                assert_close(&format!("{what} bf16"), got, expected, tolerance::BF16_LOGITS);
            }
        }
    }
}

/// Sequences for the checkpoint `tiny`: with two pictures, with one that comes late, with none.
fn tiny_inputs() -> Vec<SequenceInputs> {
    let pixels = golden_fill("pixel_values", &[2, 3, 32, 32]);
    let pictures: Vec<_> =
        pixels.chunks_exact(3 * 32 * 32).map(|p| Arc::new(PixelValues::new(p.to_vec(), 32, 32))).collect();
    [(24, 2, 2), (17, 9, 1), (11, 0, 0)]
        .into_iter()
        .map(|(n, first, n_images)| SequenceInputs {
            token_ids: (0..n).map(|i| (i * 37 % 448) as u32).collect(),
            image_index: (0..n)
                .map(|i| {
                    let seen = (n_images > 0 && i >= first).then(|| (i - first) / 4);
                    seen.map(|image| image.min(n_images - 1) as u32)
                })
                .collect(),
            images: pictures[..n_images].to_vec(),
        })
        .collect()
}

#[test]
fn a_written_directory_gives_the_logits_of_packing_while_loading() {
    for format in FORMATS {
        let out = tempfile::tempdir().expect("a temporary directory");
        let quantizer = Quantizer::open(fixture("tiny"), &Recipe::new(format)).expect("a sound model");
        let quantizer = quantizer.with_max_shard_bytes(60_000).expect("a plan");
        quantizer.write(out.path(), &mut |_| ()).expect("a directory");
        let (written, loaded) = (open(out.path(), None), open(&fixture("tiny"), Some(format)));
        let inputs = tiny_inputs();
        assert_eq!(logits(&written, &inputs), logits(&loaded, &inputs), "{format}");
    }
}

/// How far each format moves the distributions of a model of random weights, where nothing averages out: the
/// bounds only tell the formats apart and catch slips. 8 bits cost a hundredth of what 4 bits cost.
#[test]
fn packed_models_stay_near_the_dense_one() {
    let inputs = tiny_inputs();
    let dense = logits(&open(&fixture("tiny"), None), &inputs).concat();
    for (format, limit) in [(Format::Q8, 1e-3), (Format::Nf4, 0.2), (Format::Nf4DoubleQuant, 0.2)] {
        let packed = logits(&open(&fixture("tiny"), Some(format)), &inputs).concat();
        let divergence = divergence(&packed, &dense, 451);
        eprintln!("{format}: mean KL divergence {divergence:.3e}");
        assert!(divergence > 1e-9 && divergence < limit, "{format}: mean KL divergence {divergence:e}");
    }
}
