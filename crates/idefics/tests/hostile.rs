//! Broken, foreign and malicious files and prompts through the whole library: each ends in an error of one line
//! that names what is wrong, and never in a panic or in an answer.
//!
//! The single rules have their tests beside the code (headers of safetensors, each truncation of each picture,
//! each spelling of a private address); here stands what a user gets to see.

mod common;

use std::{
    error::Error,
    fs,
    io::{Read, Write},
    net::TcpListener,
    path::Path,
    sync::Arc,
    thread,
};

use common::{TINY, TINY_BASE};
use idefics::{
    ComputeType, Idefics, LoadOptions, Processor, Prompt, Segment, SequenceInputs,
    checkpoint::Checkpoint,
    generate::{GenerateError, GenerationConfig, ScoreOptions, ScoreRequest, score},
    processor::{FetchPolicy, ImageSource, ProcessOptions},
};
use idefics_testing::{
    Golden, TokenizerKind, fixture, golden_fill, idefics_tokenizer_dir, write_golden_checkpoint,
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The error and its causes as a program prints them; one line without control characters.
fn message(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    assert!(!message.chars().any(char::is_control), "one line: {message:?}");
    assert!(message.len() < 1000, "short: {message}");
    message
}

#[track_caller]
fn check_message(what: &str, error: &dyn Error, expected: &str) {
    let message = message(error);
    assert!(message.contains(expected), "{what}\n  gave     {message}\n  expected {expected}");
}

// Checkpoints

/// A copy of a fixture directory that a test may spoil.
fn copy_of(name: &str) -> TempDir {
    let copy = tempfile::tempdir().expect("a temporary directory");
    for entry in fs::read_dir(fixture(name)).expect("a fixture") {
        let entry = entry.expect("a file");
        fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("a copy");
    }
    copy
}

#[track_caller]
fn check_spoilt(name: &str, spoil: impl FnOnce(&Path), expected: &str) {
    let copy = copy_of(name);
    spoil(copy.path());
    match Idefics::from_pretrained(copy.path(), &LoadOptions::default()) {
        Ok(_) => panic!("opened although expected: {expected}"),
        Err(error) => check_message(name, &error, expected),
    }
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).expect("a file")).expect("json");
    edit(&mut value);
    fs::write(path, value.to_string()).expect("a file");
}

fn truncate(path: &Path, bytes: usize) {
    let whole = fs::read(path).expect("a file");
    fs::write(path, &whole[..bytes.min(whole.len())]).expect("a file");
}

const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00002-of-00004.safetensors";

#[test]
fn spoilt_checkpoints_are_refused() {
    let write = |name: &'static str, content: &'static str| {
        move |dir: &Path| fs::write(dir.join(name), content).expect("a file")
    };
    let remove = |name: &'static str| move |dir: &Path| fs::remove_file(dir.join(name)).expect("a file");

    check_spoilt("tiny", remove("config.json"), "cannot read");
    check_spoilt("tiny", write("config.json", ""), "config.json`: ");
    check_spoilt("tiny", write("config.json", "{\"hidden_size\": 18446744073709551615}"), "hidden_size");
    check_spoilt("tiny", write("config.json", "{\"model_type\": \"llama\"}"), "llama");
    check_spoilt("tiny", write("generation_config.json", "[1]"), "not a usable generation configuration");
    check_spoilt("tiny", remove("model.safetensors"), "holds neither `model.safetensors` nor");
    check_spoilt("tiny", write("model.safetensors", ""), "the file has 0 bytes");
    check_spoilt("tiny", |dir| truncate(&dir.join("model.safetensors"), 7), "the file has 7 bytes");
    check_spoilt("tiny", |dir| truncate(&dir.join("model.safetensors"), 9000), "is it truncated");
    check_spoilt("tiny", |dir| truncate(&dir.join("model.safetensors"), 300_000), "the file holds");
    check_spoilt(
        "tiny",
        |dir| {
            fs::remove_file(dir.join("model.safetensors")).expect("a file");
            fs::write(dir.join("pytorch_model.bin"), "PK\u{3}\u{4}").expect("a file");
        },
        "pytorch_model.bin` is a pickle",
    );

    // The weights of one model under the configuration of another.
    let foreign = fs::read(fixture("tiny-base/config.json")).expect("a fixture");
    check_spoilt(
        "tiny",
        |dir| fs::write(dir.join("config.json"), foreign).expect("a file"),
        "`additional_vocab_size` is 2, but",
    );

    check_spoilt("tiny-base", remove(SHARD), "is missing");
    check_spoilt("tiny-base", |dir| truncate(&dir.join(SHARD), 50_000), "the file holds");
    check_spoilt("tiny-base", write(INDEX, "{\"weight_map\": {\"a\": 3}}"), INDEX);
    let shard_of_norm = |shard: &'static str| {
        move |dir: &Path| {
            edit_json(&dir.join(INDEX), |index| index["weight_map"]["model.norm.weight"] = json!(shard));
        }
    };
    check_spoilt("tiny-base", shard_of_norm("../tiny/model.safetensors"), "is not a plain name");
    check_spoilt("tiny-base", shard_of_norm("/etc/passwd"), "is not a plain name");
    check_spoilt(
        "tiny-base",
        shard_of_norm("model-00001-of-00004.safetensors"),
        "does not describe its shards",
    );
    check_spoilt(
        "tiny-base",
        |dir| {
            let other = dir.join("model-00003-of-00004.safetensors");
            fs::copy(other, dir.join(SHARD)).expect("a copy");
        },
        "model-0000",
    );
}

#[cfg(unix)]
#[test]
fn a_shard_may_not_lead_out_of_its_directory() {
    let outside = tempfile::tempdir().expect("a temporary directory");
    check_spoilt(
        "tiny-base",
        |dir| {
            fs::rename(dir.join(SHARD), outside.path().join(SHARD)).expect("a rename");
            std::os::unix::fs::symlink(outside.path().join(SHARD), dir.join(SHARD)).expect("a link");
        },
        SHARD,
    );
}

/// The golden model A with one number changed.
fn damaged(tensor: &str, at: usize, value: f32) -> (TempDir, Idefics) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_golden_checkpoint(dir.path(), Golden::A);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Golden::A
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let mut values = golden_fill(&name, &shape);
            if name == tensor {
                values[at] = value;
            }
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    assert!(tensors.iter().any(|(name, ..)| name == tensor), "{tensor}");
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("shape and bytes agree"))
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).expect("a file");
    let model = Idefics::from_pretrained(
        dir.path(),
        &LoadOptions { compute: ComputeType::F32, ..Default::default() },
    );
    (dir, model.expect("damaged values are found by looking, not by opening"))
}

fn words(token_ids: &[u32]) -> SequenceInputs {
    SequenceInputs {
        token_ids: token_ids.to_vec(),
        image_index: vec![None; token_ids.len()],
        images: Vec::new(),
    }
}

#[test]
fn damaged_numbers_are_found_and_give_no_answer() {
    for (tensor, value) in [
        ("model.layers.1.mlp.up_proj.weight", f32::NAN),
        ("lm_head.weight", f32::NAN),
        ("lm_head.additional_fc.weight", f32::NAN),
        ("model.layers.0.self_attn.q_proj.weight", f32::INFINITY),
        ("model.norm.weight", f32::NEG_INFINITY),
    ] {
        let (dir, model) = damaged(tensor, 5, value);
        let checkpoint = Checkpoint::open(dir.path()).expect("a sound header");
        let found: Vec<_> =
            checkpoint.weights.iter().filter(|(_, weight)| !weight.count_non_finite().is_none()).collect();
        assert_eq!(found.iter().map(|(name, _)| *name).collect::<Vec<_>>(), [tensor]);

        let inputs = [words(&[1, 5, 6, 9])];
        let base = GenerationConfig { max_new_tokens: Some(3), ..Default::default() };
        for config in [
            base.clone(),
            GenerationConfig { do_sample: true, seed: Some(1), ..base.clone() },
            GenerationConfig { num_beams: 2, ..base.clone() },
        ] {
            let error = model.generate(&inputs, &config).expect_err(tensor);
            assert!(matches!(error, GenerateError::NotFinite { .. }), "{tensor}: {error:?}");
            check_message(tensor, &error, "the weights may be damaged");
        }
        let request = ScoreRequest { inputs: inputs[0].clone(), continuation: None };
        let error = score(&model, &[request], &ScoreOptions::default()).expect_err(tensor);
        check_message(tensor, &error, "the weights may be damaged");
    }
}

#[test]
fn a_processor_of_another_model_is_refused() {
    let model = TINY.model();
    let processor =
        Processor::from_pretrained(idefics_tokenizer_dir(TokenizerKind::Base)).expect("a processor");
    let error = model.check_processor(&processor).expect_err("other vocabulary");
    check_message(
        "vocabulary",
        &error,
        "the tokenizer has 32002 token ids, but the model has embeddings for 451",
    );
    for tiny in [TINY, TINY_BASE] {
        let own = Processor::from_pretrained(fixture(tiny.name)).expect("a processor");
        tiny.model().check_processor(&own).expect("the model's own");
    }

    // Those who do not ask get an error at the first token that does not exist.
    let prompt = vec![Segment::text("User: hello")];
    let inputs = processor.process(&[prompt], &ProcessOptions::default()).expect("inputs");
    let error = model.generate(&inputs, &GenerationConfig::default()).expect_err("unknown tokens");
    check_message("tokens", &error, "outside the vocabulary of 451");

    // And a picture of another size at the first picture.
    let prompt = vec![picture("rgb.png")];
    let options = ProcessOptions { image_size: Some((224, 224)), ..ProcessOptions::default() };
    let own = Processor::from_pretrained(fixture("tiny")).expect("a processor");
    let inputs = own.process(&[prompt], &options).expect("inputs");
    let error = model.generate(&inputs, &GenerationConfig::default()).expect_err("another size");
    check_message("size", &error, "takes pictures of 32x32 pixels, got 224x224");
}

// Prompts

fn picture(name: &str) -> Segment {
    ImageSource::Path(fixture("processor").join(name)).into()
}

fn process(
    prompt: Prompt,
    options: &ProcessOptions,
) -> Result<SequenceInputs, idefics::processor::ProcessorError> {
    let processor = Processor::from_pretrained(fixture("tiny")).expect("a processor");
    Ok(processor.process(&[prompt], options)?.remove(0))
}

#[track_caller]
fn check_picture(what: &str, source: ImageSource, options: &ProcessOptions, expected: &str) {
    let prompt = vec![Segment::text("What is this?"), source.into()];
    let error = process(prompt, options).expect_err(what);
    let message = message(&error);
    assert!(message.starts_with("prompt 0, segment 1 ("), "{what}: {message}");
    assert!(message.ends_with(expected), "{what}\n  gave     {message}\n  expected {expected}");
}

#[test]
fn broken_picture_files_are_named() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let written = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).expect("a file");
        ImageSource::Path(path)
    };
    let options = ProcessOptions::default();
    let of = |name: &str| fs::read(fixture("processor").join(name)).expect("a fixture");
    check_picture("no file", ImageSource::Path(dir.path().join("none.png")), &options, "(os error 2)");
    check_picture("a directory", ImageSource::Path(dir.path().to_owned()), &options, "not a regular file");
    check_picture("zero bytes", written("zero.png", b""), &options, "image is empty (zero bytes)");
    let no_format = "not an image in an accepted format (accepted: JPEG, PNG, WebP, GIF, BMP)";
    check_picture("words", written("words.jpg", b"hello"), &options, no_format);
    check_picture("svg", written("a.svg", b"<svg onload='alert(1)'/>"), &options, no_format);
    check_picture("in memory", ImageSource::Bytes(Arc::from(*b"II*\0")), &options, no_format);
    for name in
        ["rgba.png", "420.jpg", "progressive.jpg", "lossy.webp", "lossless.webp", "plain.gif", "rgb.bmp"]
    {
        let bytes = of(name);
        let half = written(name, &bytes[..bytes.len() / 2]);
        let prompt = vec![half.into()];
        let message = message(&process(prompt, &options).expect_err(name));
        assert!(
            message.ends_with("image is truncated") || message.ends_with("image is malformed"),
            "{message}"
        );
    }

    // A few bytes that announce 3.6 thousand million pixels.
    let mut bomb = of("grey.png");
    bomb[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let checksum = crc32(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&checksum.to_be_bytes());
    let expected = "PNG image of 60000x60000 pixels exceeds the limit of 100000000 pixels";
    check_picture("bomb", written("bomb.png", &bomb), &options, expected);
    let tight = ProcessOptions {
        limits: idefics::processor::ImageLimits { max_bytes: 100, ..Default::default() },
        ..ProcessOptions::default()
    };
    check_picture(
        "large",
        written("large.png", &of("rgb.png")),
        &tight,
        "image has more than 100 bytes, the limit",
    );
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    })
}

/// Odd shapes are pictures like any other.
#[test]
fn odd_pictures_get_an_answer() {
    let model = TINY.model();
    let processor = Processor::from_pretrained(fixture("tiny")).expect("a processor");
    let config = GenerationConfig { max_new_tokens: Some(4), logprobs: Some(0), ..Default::default() };
    for name in ["one_pixel.png", "three_high.png", "one_wide.png", "tall.png"] {
        let prompt = vec![picture(name), Segment::text("What is this?")];
        let inputs = processor.process(&[prompt], &ProcessOptions::default()).expect("inputs");
        let answer = model.generate(&inputs, &config).expect("an answer").remove(0).sequences.remove(0);
        assert_eq!(answer.token_ids.len(), 4, "{name}");
        assert!(answer.logprobs.iter().all(|token| token.logprob.is_finite()), "{name}");
    }
}

/// A server on the loopback address that answers everything with `head`; its `host:port`.
fn serve(head: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            // A request of this size comes in one piece on the loopback device.
            let _ = stream.read(&mut request);
            let _ = stream.write_all(head.as_bytes());
        }
    });
    address
}

#[test]
fn addresses_cannot_reach_what_is_private() {
    let options = ProcessOptions::default();
    let url = |address: &str| ImageSource::Url(address.to_owned());
    let private = |host: &str| format!("host `{host}` has an address that is not public");
    check_picture("loopback", url("http://127.0.0.1/a.png"), &options, &private("127.0.0.1"));
    check_picture("a name", url("http://localhost/a.png"), &options, &private("localhost"));
    check_picture("metadata", url("http://169.254.169.254/latest"), &options, &private("169.254.169.254"));
    check_picture("a number", url("http://2130706433/"), &options, &private("127.0.0.1"));
    check_picture("IPv6", url("http://[::1]/"), &options, &private("[::1]"));
    check_picture("mapped", url("http://[::ffff:10.0.0.1]/"), &options, &private("[::ffff:a00:1]"));
    check_picture(
        "a file",
        url("file:///etc/passwd"),
        &options,
        "scheme `file` is refused (accepted: http, https)",
    );
    check_picture("a port", url("http://127.0.0.1:22/"), &options, "port 22 is refused (accepted: 80, 443)");
    check_picture("nonsense", url("http://"), &options, "not a valid URL");
    check_picture(
        "a bad data URI",
        ImageSource::DataUri("data:image/png;base64,@@".to_owned()),
        &options,
        "base64",
    );

    // One store of our own is allowed; where it sends us is not.
    let trusting = ProcessOptions {
        fetch: FetchPolicy {
            allowed_addresses: vec!["127.0.0.1".parse().expect("an address")],
            allow_any_port: true,
            ..FetchPolicy::default()
        },
        ..ProcessOptions::default()
    };
    for (target, host) in
        [("http://10.0.0.1/", "10.0.0.1"), ("http://127.0.0.2/", "127.0.0.2"), ("//[fd00::1]/", "[fd00::1]")]
    {
        let host_port = serve(format!(
            "HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        ));
        check_picture(target, url(&format!("http://{host_port}/a.png")), &trusting, &private(host));
    }
    // What a server says never reaches the message.
    let host_port = serve(
        "HTTP/1.1 200 OK\r\nContent-Length: 17\r\nConnection: close\r\n\r\nsecret-of-a-store".to_owned(),
    );
    check_picture(
        "words for a picture",
        url(&format!("http://{host_port}/a.png")),
        &trusting,
        "not an image in an accepted format (accepted: JPEG, PNG, WebP, GIF, BMP)",
    );
}

#[test]
fn addresses_in_words_are_words() {
    let prompt = vec![Segment::text("http://127.0.0.1/a.png"), Segment::text("/etc/passwd")];
    let inputs = process(prompt, &ProcessOptions::default()).expect("words");
    assert!(inputs.images.is_empty());
}

#[test]
fn prompts_that_do_not_fit_are_refused_with_the_numbers() {
    let model = TINY.model();
    let config = GenerationConfig::default();
    let error = |inputs: SequenceInputs| model.generate(&[inputs], &config).expect_err("a bad prompt");
    check_message("empty", &error(words(&[])), "prompt 0 has no tokens");
    let long = "prompt 0 has 128 tokens, the answer needs at least one more, and the model has 128 positions";
    check_message("long", &error(words(&[5; 128])), long);
    check_message("unknown token", &error(words(&[5, 451])), "token id 451 is outside the vocabulary of 451");
    let mut ragged = words(&[1, 2, 3]);
    ragged.image_index.pop();
    check_message("ragged", &error(ragged), "prompt 0 has 3 tokens but 2 image indices");
    let mut blind = words(&[1, 2, 3]);
    blind.image_index[2] = Some(0);
    check_message("no such picture", &error(blind), "a token sees image 0, but its sequence has 0");

    let megabyte =
        process(vec![Segment::text("a ".repeat(1 << 19))], &ProcessOptions::default()).expect("tokens");
    assert!(megabyte.token_ids.len() > 1 << 19);
    check_message("a megabyte", &error(megabyte), "and the model has 128 positions");
}
