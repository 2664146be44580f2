//! The commands that write and score, run as a user runs them, on the small checkpoints of `fixtures/`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// Runs `idefics ARGS -m fixtures/MODEL`, in `fixtures/processor`, where the pictures lie.
fn idefics(model: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_idefics"))
        .args(args)
        .arg("--model")
        .arg(fixtures().join(model))
        .args(["--dtype", "f32"])
        .current_dir(fixtures().join("processor"))
        .output()
        .expect("the command runs")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// A failed run has one line of stderr that says why.
fn refusal(model: &str, args: &[&str]) -> String {
    let output = idefics(model, args);
    assert!(!output.status.success(), "{args:?}");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

#[test]
fn generate_prints_text_or_json_and_both_agree() {
    let prompt = ["User: What is this?", "420.jpg", "--text", "<end_of_utterance>\nAssistant:"];
    let args =
        |more: &[&'static str]| [&["generate"], &prompt[..], &["--max-new-tokens", "6"], more].concat();
    let text = stdout(&idefics("tiny", &args(&[])));
    let answer = &lines(&stdout(&idefics("tiny", &args(&["--json", "--logprobs", "2"]))))[0];
    assert_eq!(text.trim_end_matches('\n'), answer["text"].as_str().unwrap());
    assert_eq!(answer["token_ids"].as_array().unwrap().len(), 6);
    assert_eq!(answer["finish_reason"], "length");
    assert_eq!(answer["usage"]["generated_tokens"], 6);
    assert_eq!((&answer["usage"]["images"], &answer["usage"]["image_tokens"]), (&json!(1), &json!(3)));
    assert_eq!(answer["logprobs"][5]["top"].as_array().unwrap().len(), 2);
    assert!(answer["timings"]["prefill_seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn seeds_and_threads_reproduce_answers() {
    let run = |more: &[&str]| {
        let args = ["generate", "a picture:", "420.jpg", "--json", "-n", "3", "--temperature", "2.0"];
        let output = stdout(&idefics("tiny", &[&args[..], more].concat()));
        lines(&output).into_iter().map(|line| line["token_ids"].clone()).collect::<Vec<_>>()
    };
    let first = run(&["--seed", "5"]);
    assert_eq!(first.len(), 3);
    assert_ne!(first[0], first[1]);
    assert_eq!(first, run(&["--seed", "5", "--threads", "1"]));
    assert_ne!(first, run(&["--seed", "6"]));
}

#[test]
fn a_file_of_prompts_is_answered_in_order_whatever_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompts.jsonl");
    let prompts = [
        r#"{"prompt": [{"image": "420.jpg"}, {"text": "one"}], "id": "a"}"#,
        r#"{"prompt": [{"image": "missing.jpg"}]}"#,
        r#"{"prompt": [{"text": "two"}], "generation": {"max_new_tokens": 3}}"#,
        r#"{"prompt": [{"text": "three"}], "generation": {"max_tokens": 3}}"#,
        "{oops",
    ];
    fs::write(&file, prompts.join("\n")).unwrap();
    let file = file.display().to_string();
    let run = |batch: &str| {
        let output = idefics("tiny", &["generate", "--prompts", &file, "--json", "--batch-size", batch]);
        assert_eq!(output.status.code(), Some(1), "three lines are bad");
        let mut lines = lines(&String::from_utf8(output.stdout).unwrap());
        for line in &mut lines {
            line.as_object_mut().unwrap().remove("timings");
        }
        lines
    };
    let together = run("8");
    assert_eq!(together, run("1"));
    assert_eq!(together.len(), 5);
    assert_eq!((&together[0]["id"], &together[0]["line"]), (&json!("a"), &json!(1)));
    assert_eq!(together[2]["token_ids"].as_array().unwrap().len(), 3);
    for (index, word) in [(1, "missing.jpg"), (3, "max_tokens"), (4, "line 5")] {
        let error = together[index]["error"].as_str().unwrap();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn score_gives_log_probabilities_of_texts_and_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("texts.jsonl");
    let prompts = [
        r#"{"prompt": [{"image": "420.jpg"}, {"text": "a b"}], "continuation": " c d", "id": 1}"#,
        r#"{"prompt": [{"image": "420.jpg"}, {"text": "a b c d"}]}"#,
        r#"{"token_ids": [1, 261, 268]}"#,
    ];
    fs::write(&file, prompts.join("\n")).unwrap();
    let scored = lines(&stdout(&idefics("tiny", &["score", "--prompts", &file.display().to_string()])));
    let list = |value: &Value, name: &str| value[name].as_array().unwrap().clone();
    assert_eq!(scored[0]["id"], 1);
    let (continued, whole) = (list(&scored[0], "logprobs"), list(&scored[1], "logprobs"));
    assert!(!continued.is_empty());
    assert_eq!(whole.len() + 1, list(&scored[1], "token_ids").len(), "the first token has none");
    assert_eq!(whole[whole.len() - continued.len()..], continued, "the end of the same text");
    assert_eq!(list(&scored[2], "logprobs").len(), 2);
    let sum: f64 = continued.iter().map(|logprob| logprob.as_f64().unwrap()).sum();
    assert!((scored[0]["sum_logprob"].as_f64().unwrap() - sum).abs() < 1e-9);
    let perplexity = (-sum / continued.len() as f64).exp();
    assert!((scored[0]["perplexity"].as_f64().unwrap() - perplexity).abs() < 1e-6 * perplexity);
}

#[test]
fn captions_of_a_directory_continue_where_they_stopped() {
    for model in ["tiny", "tiny-base"] {
        let dir = tempfile::tempdir().unwrap();
        for name in ["420.jpg", "grey.png", "palette.bmp"] {
            fs::copy(fixtures().join("processor").join(name), dir.path().join(name)).unwrap();
        }
        let pictures = dir.path().display().to_string();
        let output = dir.path().join("captions.csv");
        let output_name = output.display().to_string();
        let args = ["caption", &pictures, "--max-new-tokens", "4", "-o", &output_name];
        stdout(&idefics(model, &args));
        let whole = fs::read_to_string(&output).unwrap();
        assert!(whole.starts_with("image,caption,finish_reason\n"));
        assert_eq!(csv_rows(&whole), 3, "{model}");
        fs::write(&output, &whole[..whole.len() - 3]).unwrap();
        let rerun = idefics(model, &args);
        stdout(&rerun);
        assert!(String::from_utf8_lossy(&rerun.stderr).contains("2 of 3 pictures are done already"));
        assert_eq!(fs::read_to_string(&output).unwrap(), whole, "{model}");
    }
}

fn csv_rows(text: &str) -> usize {
    csv::Reader::from_reader(text.as_bytes()).records().map(Result::unwrap).count()
}

#[test]
fn a_question_is_answered_and_labels_are_ranked() {
    for model in ["tiny", "tiny-base"] {
        let answer = &lines(&stdout(&idefics(model, &["ask", "420.jpg", "What is this?", "--json"])))[0];
        assert_eq!((&answer["image"], &answer["question"]), (&json!("420.jpg"), &json!("What is this?")));
        assert!(answer["answer"].is_string());
        let args = ["classify", "420.jpg", "grey.png", "--labels", "cat,polar bear,dog", "--json"];
        for line in lines(&stdout(&idefics(model, &args))) {
            let labels = line["labels"].as_array().unwrap();
            let sum: f64 = labels.iter().map(|label| label["probability"].as_f64().unwrap()).sum();
            assert!((sum - 1.0).abs() < 1e-9 && labels.len() == 3);
            assert_eq!(line["label"], labels[0]["label"]);
            assert!(labels[0]["logprob"].as_f64().unwrap() >= labels[1]["logprob"].as_f64().unwrap());
        }
    }
}

#[test]
fn records_of_another_question_are_not_taken_for_done() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["answers.jsonl", "answers.csv"] {
        let output = dir.path().join(name);
        let output_name = output.display().to_string();
        let ask =
            |question| ["ask", "420.jpg", question, "--max-new-tokens", "2", "-o", output_name.as_str()];
        stdout(&idefics("tiny", &ask("What color?")));
        let before = fs::read_to_string(&output).unwrap();
        let message = refusal("tiny", &ask("How many?"));
        assert!(message.contains("another job") && message.contains("What color?"), "{message}");
        let caption = ["caption", "420.jpg", "-o", output_name.as_str()];
        assert!(refusal("tiny", &caption).contains("caption"));
        assert_eq!(fs::read_to_string(&output).unwrap(), before, "{name}");
        stdout(&idefics("tiny", &ask("What color?")));
        assert_eq!(fs::read_to_string(&output).unwrap(), before, "{name}");
    }
}

/// Presses Ctrl-C as soon as a batch has its first line of stdout, and returns the whole lines and stderr.
#[cfg(unix)]
fn interrupted(args: &[&str]) -> (Vec<Value>, String) {
    use std::io::{BufRead, BufReader, Read};
    let mut child = Command::new(env!("CARGO_BIN_EXE_idefics"))
        .args(args)
        .arg("--model")
        .arg(fixtures().join("tiny"))
        .current_dir(fixtures().join("processor"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the command runs");
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    reader.read_line(&mut text).unwrap();
    let pid = child.id();
    assert!(
        Command::new("sh").args(["-c", &format!("kill -INT {pid}")]).status().expect("`kill` runs").success()
    );
    reader.read_to_string(&mut text).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    (lines(&text), String::from_utf8(output.stderr).unwrap())
}

#[test]
#[cfg(unix)]
fn a_batch_that_is_stopped_says_so_and_leaves_whole_answers() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompts.jsonl");
    fs::write(&file, "{\"prompt\": [{\"text\": \"one\"}]}\n".repeat(3000)).unwrap();
    let file = file.display().to_string();
    let long = ["--json", "--batch-size", "2", "--max-new-tokens", "60"];
    let (answers, stderr) = interrupted(&[&["generate", "--prompts", &file][..], &long].concat());
    assert!(answers.iter().all(|answer| answer["finish_reason"] != "cancelled"), "{answers:?}");
    let told = format!("stopped after {} of 3000 prompts", answers.len());
    assert!(stderr.contains(&told), "{told}: {stderr}");
    let pictures = ["420.jpg"; 1000];
    let (answers, stderr) = interrupted(&[&["ask"][..], &pictures, &["Who?"], &long].concat());
    assert!(stderr.contains(&format!("stopped after {} of 1000 pictures", answers.len())), "{stderr}");
}

#[test]
fn mistakes_end_in_one_clear_line() {
    let long = "a b ".repeat(200);
    for (args, word) in [
        (&["generate"][..], "no prompt"),
        (&["generate", "x", "--temperature", "0"], "temperature"),
        (&["generate", "x", "--num-beams", "2", "-n", "3"], "num_return_sequences"),
        (&["generate", "x", "--suppress-tokens", "99999"], "99999"),
        (&["generate", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (&["generate", &long], "128 positions"),
        (&["generate", "--image", "missing.jpg"], "missing.jpg"),
        (&["generate", "--image", "http://127.0.0.1/x.png"], "127.0.0.1"),
        (&["generate", "x", "--threads", "0"], "--threads"),
        (&["classify", "420.jpg", "--labels", "cat"], "--labels"),
        (&["ask", "420.jpg", " "], "question"),
        (&["ask", "420.jpg", "Who?", "-n", "3", "--sample"], "--num-return-sequences"),
        (&["caption", "420.jpg", "--logprobs"], "--logprobs"),
        (&["serve", "--port", "0", "--add-end-of-utterance", "always"], "--add-end-of-utterance"),
        (&["serve", "--port", "0", "--cors-origin", "https://ui.example/"], "https://ui.example/"),
        (&["score", "--prompts", "/missing.jsonl"], "/missing.jsonl"),
        (&["caption", "420.jpg", "-o", "/missing/x.csv"], "/missing/x.csv"),
    ] {
        let message = refusal("tiny", args);
        assert!(message.starts_with("error: ") && message.contains(word), "{args:?}: {message}");
    }
    assert!(refusal("processor", &["generate", "x"]).contains("error: "), "a directory without a model");
}
