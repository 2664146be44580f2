//! Conversations through a pipe, as a script would have them, on the small checkpoints of `fixtures/`.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// Types `lines` into `idefics chat ARGS`, in `fixtures/processor`, where the pictures lie.
fn chat(model: &str, args: &[&str], lines: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_idefics"))
        .args(["chat", "--dtype", "f32", "--model"])
        .arg(fixtures().join(model))
        .args(args)
        .current_dir(fixtures().join("processor"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    // A run that fails at once reads nothing.
    let _ = stdin.write_all(lines.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("the command ends")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn answers(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// What `idefics generate` answers to a prompt that is written out.
fn generated(model: &str, items: &[&str], stop: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_idefics"));
    command.args(["generate", "--dtype", "f32", "--max-new-tokens", "6", "--add-end-of-utterance", "never"]);
    for stop in stop {
        command.args(["--trim-stop", "--stop", stop]);
    }
    let output = command
        .arg("--model")
        .arg(fixtures().join(model))
        .args(items)
        .current_dir(fixtures().join("processor"))
        .output()
        .expect("the command runs");
    answers(&output).trim().to_owned()
}

const SHORT: [&str; 2] = ["--max-new-tokens", "6"];

#[test]
fn each_turn_is_answered_as_its_written_out_prompt_is() {
    let output = chat("tiny", &SHORT, "/image 444.jpg\nhi\nwho\n");
    let text = answers(&output);
    let first = generated(
        "tiny",
        &["--text", "User:", "--image", "444.jpg", "--text", "hi<end_of_utterance>\nAssistant:"],
        &[],
    );
    assert!(!first.is_empty());
    let behind = format!(
        "hi<end_of_utterance>\nAssistant: {first}<end_of_utterance>\nUser: who<end_of_utterance>\nAssistant:"
    );
    let second = generated("tiny", &["--text", "User:", "--image", "444.jpg", "--text", &behind], &[]);
    assert_eq!(text, format!("{first}\n{second}\n"));
    assert_eq!(stderr(&output), "", "a conversation that goes well says nothing else");
}

#[test]
fn base_models_continue_a_plain_dialogue() {
    let text = answers(&chat("tiny-base", &[&SHORT[..], &["--system", "Be brief."]].concat(), "hi\n"));
    let expected = generated("tiny-base", &["--text", "Be brief.\nUser: hi\nAssistant:"], &["\nUser:"]);
    assert_eq!(text.trim_end(), expected);
}

#[test]
fn undo_and_retry_leave_the_same_conversation() {
    let plain = answers(&chat("tiny", &SHORT, "a b\nc\n"));
    let lines: Vec<&str> = plain.lines().collect();
    let output = chat("tiny", &SHORT, "a b\n/image grey.png\nanother\n/undo\n/retry\nc\n");
    let text = answers(&output);
    let again: Vec<&str> = text.lines().collect();
    assert_eq!(again.len(), 4);
    assert_eq!((again[0], again[2], again[3]), (lines[0], lines[0], lines[1]));
    assert!(stderr(&output).contains("taken back: [grey.png] another"), "{}", stderr(&output));
}

#[test]
fn saved_conversations_go_on_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (linked, whole) = (path("linked.jsonl"), path("whole.jsonl"));
    let whole_talk = answers(&chat("tiny", &SHORT, "/image 420.jpg\na b\nc\n"));
    let last = whole_talk.lines().last().unwrap();
    let start = format!("/image 420.jpg\na b\n/save {linked}\n/save --embed {whole}\n");
    answers(&chat("tiny", &SHORT, &start));
    for file in [&linked, &whole] {
        let by_flag = answers(&chat("tiny", &[&SHORT[..], &["--load", file]].concat(), "c\n"));
        let by_command = answers(&chat("tiny", &SHORT, &format!("zz\n/load {file}\nc\n")));
        assert_eq!(by_flag.lines().last().unwrap(), last, "{file}");
        assert_eq!(by_command.lines().last().unwrap(), last, "{file}");
    }
    assert!(fs::read_to_string(&linked).unwrap().contains("420.jpg"));
    // A file of somebody else is not written over.
    let output = chat("tiny", &SHORT, &format!("x\n/save {linked}\n"));
    assert!(!output.status.success() && stderr(&output).contains("--force"), "{}", stderr(&output));
    assert!(fs::read_to_string(&linked).unwrap().contains("420.jpg"));
    answers(&chat("tiny", &SHORT, &format!("x\n/save {linked} --force\n")));
    assert!(!fs::read_to_string(&linked).unwrap().contains("420.jpg"));
}

#[test]
fn a_system_text_replaces_that_of_a_loaded_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (first, second) = (path("first.jsonl"), path("second.jsonl"));
    answers(&chat(
        "tiny",
        &[&SHORT[..], &["--system", "Be brief."]].concat(),
        &format!("a b\n/save {first}\n"),
    ));
    for (flags, expected) in [(&["--system", "Be long."][..], "Be long."), (&[], "Be brief.")] {
        let args = [&SHORT[..], &["--load", &first], flags].concat();
        answers(&chat("tiny", &args, &format!("/save {second} --force\n")));
        let saved = fs::read_to_string(&second).unwrap();
        assert!(saved.contains(expected) && saved.matches("system").count() == 1, "{saved}");
    }
}

#[test]
fn settings_change_what_comes() {
    let output =
        chat("tiny", &[], "/settings max_new_tokens 2\na\n/settings max_new_tokens 6\n/retry\n/settings\n");
    let text = answers(&output);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].len() > lines[0].len() && lines[1].starts_with(lines[0]), "{text}");
    assert!(stderr(&output).contains("max_new_tokens: 6"), "{}", stderr(&output));
}

#[test]
fn long_conversations_forget_their_beginning_and_say_so() {
    // The model has 128 positions.
    let output = chat("tiny", &SHORT, &"a b c d e f g h i j k l m n o p q r s t u\n".repeat(6));
    assert_eq!(answers(&output).lines().count(), 6);
    assert!(stderr(&output).contains("it does not see the first"), "{}", stderr(&output));
}

#[test]
fn mistakes_are_told_and_the_conversation_goes_on() {
    let plain = answers(&chat("tiny", &SHORT, "a b\n"));
    let long = "x ".repeat(200);
    let lines = format!(
        "/imge\n/image missing.png\n/image 444.jpg missing.png\n/load missing.jsonl\n/undo\n/settings top_p 7\n{long}\na b\n"
    );
    let output = chat("tiny", &SHORT, &lines);
    assert_eq!(String::from_utf8_lossy(&output.stdout), plain, "pictures that failed are not part of it");
    assert!(!output.status.success());
    let stderr = stderr(&output);
    for expected in [
        "/imge is no command",
        "picture missing.png",
        "missing.jsonl",
        "nothing to take back",
        "top_p",
        "too long",
        "7 of the lines failed",
    ] {
        assert!(stderr.contains(expected), "{expected}: {stderr}");
    }
}

#[test]
fn piped_text_opens_no_file() {
    let with = answers(&chat("tiny", &SHORT, "see 444.jpg\n"));
    let without = generated("tiny", &["--text", "User: see 444.jpg<end_of_utterance>\nAssistant:"], &[]);
    assert_eq!(with.trim_end(), without);
}

#[test]
fn pictures_can_be_shown_without_a_terminal() {
    let output = chat("tiny", &["--pictures", "kitty"], "/image 444.jpg\n");
    assert!(answers(&output).starts_with("\x1b_Ga=T"));
}
