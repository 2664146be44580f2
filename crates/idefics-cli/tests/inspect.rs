//! `idefics inspect` and `idefics download` as a user runs them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use idefics_testing::{Golden, write_golden_checkpoint};
use serde_json::{Value, json};
use tempfile::TempDir;

fn idefics(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_idefics"));
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent");
    command.args(args).output().expect("the binary runs")
}

/// A model with a byte-pair tokenizer of its 43 tokens: 40 letters without merges and three added ones.
fn model(golden: Golden) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    write_golden_checkpoint(directory.path(), golden);
    write_tokenizer(directory.path(), &["<fake_token_around_image>", "<image>", "<end_of_utterance>"]);
    fs::write(directory.path().join("preprocessor_config.json"), r#"{"image_size": 8}"#).unwrap();
    directory
}

fn write_tokenizer(directory: &Path, added: &[&str]) {
    let mut vocab: serde_json::Map<String, Value> =
        (0..40).map(|id| (char::from_u32(0x4e00 + id).unwrap().to_string(), id.into())).collect();
    for (id, token) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocab.retain(|_, other| *other != id);
        vocab.insert(token.to_owned(), id.into());
    }
    let special = |id: usize, token: &str| {
        json!({"id": id, "content": token, "special": true, "lstrip": false, "rstrip": false, "normalized": false,
            "single_word": false})
    };
    let added: Vec<_> = ["<unk>", "<s>", "</s>"]
        .into_iter()
        .enumerate()
        .chain((40..).zip(added.iter().copied()))
        .map(|(id, token)| special(id, token))
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Prepend", "prepend": "\u{2581}"},
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
    });
    fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

fn inspect(directory: &TempDir, options: &[&str]) -> Output {
    let mut args = vec!["inspect", directory.path().to_str().unwrap()];
    args.extend(options);
    idefics(&args)
}

/// Asserts failure with one line on stderr that holds `expected`.
#[track_caller]
fn check_fails(output: &Output, expected: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
    assert!(stderr.contains(expected), "\n  gave     {stderr}\n  expected {expected}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

/// Overwrites the last numbers of a tensor file.
fn spoil(path: &Path, numbers: &[f32]) {
    let mut bytes = fs::read(path).unwrap();
    let start = bytes.len() - 4 * numbers.len();
    let spoilt: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    bytes[start..].copy_from_slice(&spoilt);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_good_model_is_described() {
    for golden in [Golden::A, Golden::B] {
        let output = inspect(
            &model(golden),
            &["--json", "--keys", "--context", "10", "--batch", "3", "--images", "2"],
        );
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let tensors = golden.tensors();
        assert_eq!(report["tensors"].as_array().unwrap().len(), tensors.len());
        let parameters: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(report["parameters"], parameters);
        assert_eq!(report["components"][0]["dtypes"]["f32"], (40 + 3) * 16);
        assert_eq!(report["special_tokens"][4], json!({"role": "image", "token": "<image>", "id": 41}));
        assert_eq!(report["values"]["not_finite"], serde_json::json!({}));
        assert_eq!(report["problems"], serde_json::json!([]));
        // f32: 2 · 4 layers · 16 · 4 bytes a token; L is 3 latents or 5 positions, of width 12.
        let (latents, blocks) = if golden == Golden::A { (3, 2) } else { (5, 4) };
        assert_eq!(report["memory"]["kv_cache"], 30 * 512);
        assert_eq!(report["memory"]["image_states"], 6 * latents * 12 * 4);
        assert_eq!(report["memory"]["cross_attention"], 6 * latents * 2 * blocks * 16 * 4);
        assert_eq!(report["memory"]["weights_mapped"], 4 * parameters);
    }
}

#[test]
fn text_for_people() {
    let output = inspect(&model(Golden::A), &["--dtype", "bf16"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "4 layers, width 16",
        "gated cross-attention      26",
        "42  <end_of_utterance>          end_of_utterance",
        "256 B a token",
        "all finite",
        "no problems found",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    assert!(!text.contains("model.norm.weight"));
    let keys = String::from_utf8(inspect(&model(Golden::A), &["--keys"]).stdout).unwrap();
    assert!(keys.contains("f32     model.norm.weight  [16]"), "{keys}");
}

#[test]
fn values_that_are_not_finite_are_flagged() {
    let directory = model(Golden::A);
    spoil(&directory.path().join("model.safetensors"), &[f32::NAN, f32::INFINITY, f32::NAN]);
    let output = inspect(&directory, &[]);
    check_fails(&output, "has 2 NaN and 1 infinite values");
    assert!(String::from_utf8_lossy(&output.stdout).contains("2 NaN, 1 infinite"));
}

#[test]
fn problems_fail_after_the_report() {
    let directory = model(Golden::A);
    fs::remove_file(directory.path().join("model.safetensors")).unwrap();
    fs::write(directory.path().join("pytorch_model.bin"), "PK").unwrap();
    let output = inspect(&directory, &[]);
    check_fails(&output, "is a pickle");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("4 layers, width 16") && text.contains("problems\n"), "{text}");

    let directory = model(Golden::A);
    write_tokenizer(directory.path(), &["<image>"]);
    check_fails(&inspect(&directory, &[]), "<fake_token_around_image>");
    write_tokenizer(directory.path(), &["<fake_token_around_image>", "<image>", "<a>", "<b>"]);
    check_fails(
        &inspect(&directory, &[]),
        "the tokenizer has 44 tokens, but the model has embeddings for 43",
    );
    fs::write(directory.path().join("preprocessor_config.json"), r#"{"image_size": 224}"#).unwrap();
    check_fails(
        &inspect(&directory, &[]),
        "makes pictures of 224 x 224 pixels, but the vision tower takes 8 x 8",
    );
    fs::write(directory.path().join("model.safetensors"), "short").unwrap();
    check_fails(&inspect(&directory, &[]), "3 problems: ");
}

#[test]
fn models_that_are_not_there() {
    check_fails(&idefics(&["inspect", "./no-such-model"]), "neither a directory nor a model of the hub");
    check_fails(&idefics(&["inspect", "org/name"]), "`HF_HUB_OFFLINE` forbids");
    check_fails(
        &idefics(&["download", "org/name@v1"]),
        "`org/name@v1` is not (completely) in `/nonexistent/hub`",
    );
    check_fails(&idefics(&["download", "../name"]), "neither a directory nor a model of the hub");
    let empty = tempfile::tempdir().unwrap();
    check_fails(&inspect(&empty, &[]), "config.json");
}

#[test]
fn lines_are_tokenized_one_by_one() {
    let expected = idefics_testing::fixture_json("prompts.json");
    let texts = expected["entries"].as_array().unwrap().iter().filter(|entry| {
        // One row without padding, and no line break inside.
        entry["tokenizer"] == "tiny"
            && entry["texts"].as_array().unwrap().len() == 1
            && !entry["texts"][0].as_str().unwrap().contains('\n')
            && entry["options"]["truncation"].is_null()
    });
    let texts: Vec<_> =
        texts.map(|entry| (entry["texts"][0].as_str().unwrap(), &entry["input_ids"][0])).collect();
    assert!(texts.len() > 10, "the fixture is whole");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lines.txt");
    // An empty line is a line; the characters that Unicode breaks lines at are not.
    let lines: Vec<&str> = texts.iter().map(|(text, _)| *text).chain(["", "a\u{2028}b\u{85}c\r"]).collect();
    let model = idefics_testing::fixture("tiny");
    let arguments = ["inspect", model.to_str().unwrap(), "--tokenize", path.to_str().unwrap()];
    for end in ["", "\n"] {
        fs::write(&path, lines.join("\n") + end).unwrap();
        let output = idefics(&arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let got: Vec<Value> = String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(got.len(), lines.len());
        for ((text, ids), got) in texts.iter().zip(&got) {
            assert_eq!(got, *ids, "{text}");
        }
        assert_eq!(got[texts.len()], json!([]), "an empty line has no tokens");
    }
    fs::write(&path, b"fine\nno \xff text\n").unwrap();
    check_fails(&idefics(&arguments), "lines.txt, line 2: invalid utf-8");
}

#[test]
fn kernels_that_cannot_be_had_are_no_silent_choice() {
    let directory = model(Golden::A);
    for (name, expected) in [("Portable", "unknown kernel tier `Portable`"), ("", "unknown kernel tier ``")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_idefics"));
        let output = command.env("IDEFICS_ISA", name).arg("inspect").arg(directory.path()).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && message.contains(expected), "{message}");
    }
}
