//! `idefics init`, `idefics merge` and `--adapter` as a user runs them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use idefics_testing::fixture;
use serde_json::Value;

fn idefics(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_idefics"));
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent");
    command.args(args).output().expect("the binary runs")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

#[track_caller]
fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// Asserts failure whose message holds `expected`.
#[track_caller]
fn check_fails(args: &[&str], expected: &str) {
    let output = idefics(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
    assert!(stderr.contains(expected), "\n  gave     {stderr}\n  expected {expected}");
}

fn answer(options: &[&str]) -> Value {
    let prompt = ["generate", "--text", "What is in this image?", "--max-new-tokens", "8", "--json"];
    let answer = stdout(&idefics(&[&prompt, options].concat()));
    let answer: Value = serde_json::from_str(&answer).unwrap();
    answer["token_ids"].clone()
}

#[test]
fn a_merged_model_answers_as_the_adapter_beside_its_base_does() {
    let (base, adapter, other) = (fixture("tiny"), fixture("adapters/regex"), fixture("adapters/list"));
    let out = tempfile::tempdir().unwrap();
    let half = format!("{}=-0.5", text(&other));
    let merged = stdout(&idefics(&[
        "merge",
        text(&base),
        text(&adapter),
        text(out.path()),
        "--adapter",
        &half,
        "--json",
    ]));
    let merged: Value = serde_json::from_str(&merged).unwrap();
    assert!(merged["merged"].as_u64().unwrap() > 0, "{merged}");
    let beside = answer(&["--model", text(&base), "--adapter", text(&adapter), "--adapter", &half]);
    assert_eq!(answer(&["--model", text(out.path())]), beside);
    assert_ne!(answer(&["--model", text(&base)]), beside);
}

#[test]
fn a_new_model_is_inspected_and_runs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new");
    let (vision, language) = (fixture("init/clip"), fixture("init/llama-mha"));
    let options = [
        "init",
        "--vision",
        text(&vision),
        "--text",
        text(&language),
        "--out",
        text(&out),
        "--end-of-utterance",
        "--cross-layer-interval",
        "2",
        "--resampler-n-latents",
        "3",
        "--resampler-depth",
        "1",
        "--resampler-n-heads",
        "2",
        "--resampler-head-dim",
        "8",
        "--json",
    ];
    let summary: Value = serde_json::from_str(&stdout(&idefics(&options))).unwrap();
    assert_eq!((&summary["dropped_rows"], &summary["dtype"]), (&16.into(), &"bf16".into()));
    let report: Value = serde_json::from_str(&stdout(&idefics(&["inspect", text(&out), "--json"]))).unwrap();
    assert_eq!(report["problems"], serde_json::json!([]));
    assert_eq!(answer(&["--model", text(&out)]).as_array().unwrap().len(), 8);
}

#[test]
fn commands_that_cannot_be_followed_say_why() {
    let (base, adapter) = (fixture("tiny"), fixture("adapters/regex"));
    let (base, adapter) = (text(&base), text(&adapter));
    let out = tempfile::tempdir().unwrap();
    let new = out.path().join("new");
    let new = text(&new);
    check_fails(&["merge", base, adapter, base], "is the model's own directory");
    check_fails(&["merge", base, "/nowhere", new], "/nowhere/adapter_config.json");
    check_fails(&["merge", base, &format!("{adapter}=x"), new], "expected a number behind `=`, got `x`");
    check_fails(&["generate", "--model", base, "--text", "x", "--adapter", base], "adapter_config.json");
    let config = format!("{base}/config.json");
    check_fails(&["init", "--out", new], "--from-config");
    check_fails(&["init", "--from-config", &config, "--out", new, "--no-resampler"], "cannot be used with");
    let clip = fixture("init/clip");
    check_fails(
        &["init", "--vision", text(&clip), "--text", text(&clip), "--out", new],
        "`model_type` is `clip`, expected `llama`",
    );
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}
