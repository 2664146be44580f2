//! Models built from what the reference wrote, compared with what the reference computes.

use std::{collections::BTreeMap, fs};

use idefics::{
    ComputeType, Idefics, LoadOptions, Processor, Prompt, Segment, SequenceInputs,
    checkpoint::{Checkpoint, read_config},
    generate::{LogitsOf, Row, StepModel},
    model::Stage,
    ops,
    processor::{ImageSource, PixelValues, ProcessOptions},
};
use idefics_testing::{Tensors, Tolerance, assert_close, fixture, golden_fill, tolerance};
use tempfile::TempDir;

use super::*;

/// Blocks small enough for the models of the fixtures.
fn blocks(cross_layer_interval: usize) -> Blocks {
    let resampler = PerceiverConfig {
        use_resampler: true,
        resampler_n_latents: 4,
        resampler_depth: 2,
        resampler_n_heads: 2,
        resampler_head_dim: 8,
        qk_layer_norms_perceiver: true,
    };
    Blocks { cross_layer_interval, resampler: Some(resampler), ..Blocks::default() }
}

fn unimodal(text: &str, vision: &str, interval: usize) -> Initializer {
    let directory = |name: &str| fixture(&format!("init/{name}"));
    let source =
        Source::Unimodal { text: directory(text), vision: directory(vision), blocks: blocks(interval) };
    Initializer { dtype: Some(DType::F32), ..Initializer::new(source) }
}

fn build(initializer: &Initializer) -> (TempDir, PathBuf, Summary) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let summary = initializer.write(&out, &mut |_, _| ()).unwrap_or_else(|error| panic!("{error}"));
    (dir, out, summary)
}

fn open(directory: &Path) -> Idefics {
    let options = LoadOptions { compute: ComputeType::F32, ..LoadOptions::default() };
    Idefics::from_pretrained(directory, &options).unwrap_or_else(|error| panic!("{error}"))
}

fn message(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Logits of all positions of a text, `[T, V + A]`.
fn logits(model: &Idefics, token_ids: &[u32]) -> Vec<f32> {
    let image_index = vec![None; token_ids.len()];
    let inputs = SequenceInputs {
        token_ids: token_ids.to_vec(),
        image_index: image_index.clone(),
        images: Vec::new(),
    };
    let mut cache = model.start(&inputs).unwrap();
    let row = Row { cache: &mut cache, token_ids, image_index: &image_index, logits: LogitsOf::All };
    model.step(&mut [row]).unwrap().remove(0)
}

/// The tower's output before the resampler, `[P, E]`.
fn features(model: &Idefics, side: usize) -> Vec<f32> {
    let picture = PixelValues::new(golden_fill("pixel_values", &[1, 3, side, side]), side, side);
    let last = Stage::VisionLayer(model.config().vision_config.num_hidden_layers - 1);
    let mut found = Vec::new();
    let mut observe = |stage, x: &ops::Tensor| {
        if stage == last {
            found = ops::to_vec(x).unwrap();
        }
    };
    model.model().encode_images_observed(&[&picture], &mut observe).unwrap();
    found
}

#[test]
fn text_and_pictures_are_read_as_the_source_models_read_them() {
    let expected = Tensors::fixture("init/expected.safetensors");
    let token_ids: Vec<u32> = expected.i64("input_ids").1.iter().map(|&id| id as u32).collect();
    for (text, vision, interval) in [("llama-gqa", "clip-vision", 3), ("llama-mha", "clip", 1)] {
        let (_dir, out, summary) = build(&unimodal(text, vision, interval));
        let model = open(&out);
        let config = model.config();
        assert_eq!((config.vocab_size, config.additional_vocab_size), (448, 2), "{text}");
        assert_eq!(config.num_cross_layers() * interval, config.num_hidden_layers);

        let (shape, reference) = expected.f32(&format!("{text}.logits"));
        assert_eq!(summary.dropped_rows, shape[1] - 448);
        let reference: Vec<f32> =
            reference.chunks(shape[1]).flat_map(|row| row[..448].iter().copied()).collect();
        let got = logits(&model, &token_ids);
        let got: Vec<f32> = got.chunks(450).flat_map(|row| row[..448].iter().copied()).collect();
        assert_close(text, &got, &reference, tolerance::LOGITS);

        let (_, reference) = expected.f32(&format!("{vision}.features"));
        assert_close(vision, &features(&model, 16), reference, tolerance::ACTIVATION);
    }
}

#[test]
fn rope_and_eps_of_the_text_model_are_carried() {
    let (_dir, out, _) = build(&unimodal("llama-gqa", "clip-vision", 1));
    let config = read_config(&out).unwrap();
    assert_eq!((config.rope_theta(), config.rms_norm_eps), (50_000.0, 1e-5));
    assert_eq!(config.max_position_embeddings, 256);
    assert!(!config.tie_word_embeddings);
}

#[test]
fn the_tokenizer_has_idefics_tokens_behind_its_own() {
    for (text, wanted, added) in [
        ("llama-gqa", AddedTokens::Base, 2),
        ("llama-gqa", AddedTokens::Instruct, 3),
        ("llama-mha", AddedTokens::Instruct, 3),
    ] {
        let initializer = Initializer { added_tokens: wanted, ..unimodal(text, "clip-vision", 1) };
        let (_dir, out, _) = build(&initializer);
        let processor = Processor::from_pretrained(&out).unwrap_or_else(|error| panic!("{error}"));
        let tokenizer = processor.tokenizer();
        assert_eq!(tokenizer.id_bound(), 448 + added, "{text}");
        let special = tokenizer.special_tokens();
        assert_eq!((special.fake_token_around_image.id, special.image.id), (448, 449));
        assert_eq!(special.end_of_utterance.as_ref().map(|token| token.id), (added == 3).then_some(450));
        assert_eq!(special.pad.id, 0);
        assert!(tokenizer.is_legacy_llama());
        // The same text as before, token for token.
        let base = fixture("tiny");
        let reference = Processor::from_pretrained(&base).unwrap();
        let text = "Question: What is <image> in this image? Answer:";
        assert_eq!(tokenizer.encode(text).unwrap(), reference.tokenizer().encode(text).unwrap());
        open(&out).check_processor(&processor).unwrap();
    }
}

#[test]
fn a_prompt_with_a_picture_runs() {
    let (_dir, out, _) = build(&unimodal("llama-gqa", "clip-vision", 1));
    let (model, processor) = (open(&out), Processor::from_pretrained(&out).unwrap());
    let picture = fixture("processor").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let picture = picture.into_iter().find(|path| path.extension().is_some_and(|e| e == "png")).unwrap();
    let prompt: Prompt = vec![ImageSource::Path(picture).into(), Segment::text("a dog")];
    let inputs = processor.process(&[prompt], &ProcessOptions::default()).unwrap().remove(0);
    let mut cache = model.start(&inputs).unwrap();
    let row = Row {
        cache: &mut cache,
        token_ids: &inputs.token_ids,
        image_index: &inputs.image_index,
        logits: LogitsOf::Last,
    };
    assert!(model.step(&mut [row]).unwrap()[0].iter().all(|logit| logit.is_finite()));
}

/// Every file of a directory by its name.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap()))
        .collect()
}

#[test]
fn a_seed_gives_the_same_bytes_on_any_number_of_threads() {
    let initializer = unimodal("llama-gqa", "clip-vision", 3);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (_dir, out, _) = pool.install(|| build(&initializer));
        files(&out)
    };
    assert!(on(1) == on(3));
}

#[test]
fn another_seed_changes_what_is_new_and_nothing_else() {
    let first = unimodal("llama-mha", "clip", 2);
    let (_a, first_out, summary) = build(&first);
    let (_b, second_out, _) = build(&Initializer { seed: 1, ..first });
    let [first, second] = [first_out, second_out].map(|out| Checkpoint::open(out).unwrap());
    let mut new = 0;
    for (name, weight) in first.weights.iter() {
        let same = weight.bytes() == second.weights.get(name).unwrap().bytes();
        let part = Component::of(name);
        let is_new = matches!(part, Component::GatedCrossAttention | Component::Perceiver)
            || name.contains(".additional_");
        new += if is_new { weight.len() as u64 } else { 0 };
        let drawn = matches!(Rule::of(&first.config, name, weight.shape()), Rule::Normal { .. });
        assert_eq!(same, !(is_new && drawn), "{name}");
    }
    assert_eq!(new, summary.new_parameters);
}

#[test]
fn a_model_from_scratch_follows_its_configuration() {
    let config = read_config(fixture("tiny")).unwrap();
    let source = Source::Scratch(Box::new(config.clone()));
    let initializer = Initializer {
        tokenizer: Some(fixture("tiny")),
        dtype: Some(DType::Bf16),
        max_shard_bytes: Some(50_000),
        ..Initializer::new(source)
    };
    let (_dir, out, summary) = build(&initializer);
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert!(checkpoint.files.len() > 1);
    assert_eq!(checkpoint.config.hidden_size, config.hidden_size);
    assert_eq!(checkpoint.config.declared_dtype(), Some(DType::Bf16));
    assert_eq!(
        summary.text_parameters + summary.vision_parameters + summary.new_parameters,
        config.num_parameters() as u64
    );
    let embedding = checkpoint.weights.get("model.embed_tokens.weight").unwrap().to_f32_vec();
    let variance = embedding.iter().map(|value| f64::from(value * value)).sum::<f64>();
    let expected = Tolerance { absolute: 0.0, relative: 0.05 };
    assert_close("embedding", &[(variance / embedding.len() as f64) as f32], &[1.0 / 32.0], expected);
    Processor::from_pretrained(&out).unwrap();
}

/// A copy of a fixture with one file changed.
fn changed(name: &str, file: &str, change: impl FnOnce(&mut serde_json::Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join(file);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
    dir
}

#[test]
fn text_models_that_idefics_cannot_hold_are_refused() {
    let check = |field: &str, value: serde_json::Value, expected: &str| {
        let text = changed("init/llama-gqa", "config.json", |config| config[field] = value);
        let source = Source::Unimodal {
            text: text.path().to_owned(),
            vision: fixture("init/clip-vision"),
            blocks: blocks(1),
        };
        let out = tempfile::tempdir().unwrap();
        let error = Initializer::new(source).write(&out.path().join("out"), &mut |_, _| ()).unwrap_err();
        let text = message(&error);
        assert!(text.contains(expected), "{field}: {text}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "{field}: something was written");
    };
    check("attention_bias", json!(true), "no biases");
    check("mlp_bias", json!(true), "`mlp_bias` is true");
    check("head_dim", json!(16), "`head_dim` is 16");
    check("num_key_value_heads", json!(3), "share them evenly");
    check("num_attention_heads", json!(0), "share the hidden size evenly");
    check("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "plain rotary embedding");
    check("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4}), "plain rotary embedding");
    check("model_type", json!("mistral"), "`model_type` is `mistral`, expected `llama`");
    check("quantization_config", json!({"quant_method": "gptq"}), "not quantized");
    check("hidden_act", json!("mish"), "not a usable configuration");
    check("num_hidden_layers", json!(4), "no tensor `model.layers.3.");
    check("num_hidden_layers", json!(2), "9 tensors that IDEFICS has no place for");
    check("intermediate_size", json!(40), "expected [40, 32]");
    check("vocab_size", json!(440), "has 448 tokens, but there are 440 embeddings");
}

#[test]
fn other_options_that_give_no_model_are_refused() {
    let check = |initializer: &Initializer, expected: &str| {
        let out = tempfile::tempdir().unwrap();
        let error = initializer.write(&out.path().join("out"), &mut |_, _| ()).unwrap_err();
        let text = message(&error);
        assert!(text.contains(expected), "{text}");
    };
    check(&unimodal("llama-gqa", "clip-vision", 2), "possible: 1, 3");
    check(&unimodal("llama-gqa", "llama-mha", 1), "expected `clip` or `clip_vision_model`");
    check(&unimodal("clip", "clip-vision", 1), "`model_type` is `clip`, expected `llama`");
    let mut bad_gate = unimodal("llama-gqa", "clip-vision", 1);
    if let Source::Unimodal { blocks, .. } = &mut bad_gate.source {
        blocks.alpha_initializer = "twos".to_owned();
    }
    check(&bad_gate, "`twos`");
    let config = IdeficsConfig { vocab_size: 500, ..read_config(fixture("tiny")).unwrap() };
    let scratch = Initializer {
        tokenizer: Some(fixture("tiny")),
        ..Initializer::new(Source::Scratch(Box::new(config)))
    };
    check(&scratch, "has 451 tokens, but there are 503 embeddings");

    let taken = tempfile::tempdir().unwrap();
    fs::write(taken.path().join("x"), "x").unwrap();
    let error = unimodal("llama-gqa", "clip-vision", 1).write(taken.path(), &mut |_, _| ()).unwrap_err();
    assert!(message(&error).contains("not empty"), "{error}");
}

#[test]
fn progress_adds_up() {
    let initializer = unimodal("llama-gqa", "clip-vision", 1);
    let dir = tempfile::tempdir().unwrap();
    let (mut done, mut total) = (0, 0);
    let mut progress = |bytes, all| {
        done += bytes;
        total = all;
    };
    let summary = initializer.write(&dir.path().join("out"), &mut progress).unwrap();
    assert!(done == total && total == summary.bytes && total > 0);
}
