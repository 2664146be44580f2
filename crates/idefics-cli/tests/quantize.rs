//! `idefics quantize` and `--quantize` as a user runs them.

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

/// Asserts failure whose last line holds `expected`.
#[track_caller]
fn check_fails(output: &Output, expected: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
    assert!(stderr.contains(expected), "\n  gave     {stderr}\n  expected {expected}");
}

#[test]
fn a_quantized_directory_answers_as_packing_while_loading_does() {
    let model = fixture("tiny");
    for format in ["nf4", "q8"] {
        let out = tempfile::tempdir().unwrap();
        let summary =
            stdout(&idefics(&["quantize", text(&model), text(out.path()), "--format", format, "--json"]));
        let summary: Value = serde_json::from_str(&summary).unwrap();
        assert_eq!((&summary["packed"], &summary["files"]), (&42.into(), &1.into()), "{format}");
        let report = stdout(&idefics(&["inspect", text(out.path()), "--json"]));
        let report: Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["problems"], serde_json::json!([]), "{format}");
        let decoder =
            report["components"].as_array().unwrap().iter().find(|c| c["name"] == "decoder").unwrap();
        assert_eq!(decoder["dtypes"][format], 4 * (4 * 32 * 32 + 3 * 32 * 48), "{decoder}");
        let answer = |options: &[&str]| {
            let prompt = ["generate", "--text", "What is in this image?", "--max-new-tokens", "8", "--json"];
            let answer = stdout(&idefics(&[&prompt, options].concat()));
            let answer: Value = serde_json::from_str(&answer).unwrap();
            answer["token_ids"].clone()
        };
        let written = answer(&["--model", text(out.path())]);
        assert_eq!(written, answer(&["--model", text(&model), "--quantize", format]), "{format}");
        assert_eq!(written.as_array().unwrap().len(), 8, "{written}");
    }
}

#[test]
fn options_reach_the_output() {
    let out = tempfile::tempdir().unwrap();
    let model = fixture("tiny");
    let options =
        ["--format", "nf4", "--double-quant", "--parts", "text,vision", "--max-shard-gb", "0.00005"];
    let message = stdout(&idefics(&[&["quantize", text(&model), text(out.path())], &options[..]].concat()));
    assert!(message.contains("40 weights in nf4+dq") && message.contains("files"), "{message}");
    let config: Value = serde_json::from_slice(&fs::read(out.path().join("config.json")).unwrap()).unwrap();
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["bnb_4bit_use_double_quant"], true);
    assert_eq!(
        quantization["llm_int8_skip_modules"],
        serde_json::json!(["lm_head", "model.gated_cross_attn_layers", "model.perceiver_resampler"])
    );
    assert!(out.path().join("model.safetensors.index.json").exists());
    assert!(!out.path().join("model.safetensors").exists());
    let keys = stdout(&idefics(&["inspect", text(out.path()), "--keys"]));
    for line in [
        "nf4+dq  model.layers.0.mlp.up_proj.weight  [48, 32]",
        "f32     model.gated_cross_attn_layers.0.mlp.up_proj.weight  [48, 32]",
        "f32     lm_head.weight  [448, 32]",
        "f32 by the configuration, quantized (bitsandbytes)",
        "decoder                    36           34,816",
    ] {
        assert!(keys.contains(line), "{line} in\n{keys}");
    }
}

#[test]
fn mistakes_end_in_one_line() {
    let model = fixture("tiny");
    let out = tempfile::tempdir().unwrap();
    let quantize =
        |options: &[&str]| idefics(&[&["quantize", text(&model), text(out.path())], options].concat());
    check_fails(&quantize(&["--format", "q8", "--double-quant"]), "error: --double-quant: only nf4");
    check_fails(&quantize(&["--format", "fp4"]), "invalid value 'fp4'");
    check_fails(&quantize(&["--format", "nf4", "--max-shard-gb", "0"]), "expected a number above 0");
    fs::write(out.path().join("notes.txt"), "mine").unwrap();
    check_fails(&quantize(&["--format", "nf4"]), "is not empty and holds no unfinished output");
    check_fails(
        &idefics(&["quantize", text(&model), text(&model), "--format", "nf4"]),
        "is the model's own directory",
    );
    let packed = fixture("tiny-nf4");
    let target = out.path().join("new");
    check_fails(
        &idefics(&["quantize", text(&packed), text(&target), "--format", "q8"]),
        "error: the model is quantized already (nf4+dq): start from the unquantized one",
    );
    assert!(!target.exists(), "nothing is left behind");
}
