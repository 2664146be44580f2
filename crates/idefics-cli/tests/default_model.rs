//! Commands without `--model`, and all other ways to name the model that is a part of the program.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The command, in the folder of the workspace, with nothing in its environment that names a model, and no network.
fn idefics() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_idefics"));
    command.current_dir(root()).env_remove("IDEFICS_MODEL");
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent").stdin(Stdio::null());
    command
}

#[track_caller]
fn run(command: &mut Command) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the command runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let (stdout, stderr) = (text(stdout), text(stderr));
    assert!(status.success(), "{stderr}");
    (stdout, stderr)
}

/// What says that the small model is used, and how to name another.
#[track_caller]
fn check_note(stderr: &str) {
    let notes: Vec<&str> = stderr.lines().filter(|line| line.contains("no model named")).collect();
    let [note] = notes[..] else { panic!("{stderr}") };
    assert!(note.contains("idefics-tiny") && note.contains("HuggingFaceM4/idefics-9b-instruct"), "{note}");
}

#[test]
fn every_command_works_without_a_model_and_says_which_one_it_takes() {
    let cat = "docs/pictures/cat.jpg";
    let folder = tempfile::tempdir().expect("a folder");
    let texts = folder.path().join("texts.jsonl");
    fs::write(&texts, "{\"prompt\": [{\"text\": \"A cat\"}], \"continuation\": \" is here\"}\n")
        .expect("a file");
    for args in [
        &["generate", cat, "Who is this?", "--max-new-tokens", "4"][..],
        &["caption", cat],
        &["ask", cat, "What is this?"],
        &["classify", cat, "--labels", "cat,dog"],
        &["score", "--prompts", texts.to_str().expect("a path that is text")],
        &["chat"],
        &["inspect", "--json"],
        &["bench", "--prefill", "8", "--batches", "1", "--images", "0", "--rounds", "1", "--json"],
    ] {
        let (_, stderr) = run(idefics().args(args));
        check_note(&stderr);
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    }
}

#[test]
fn all_names_of_the_model_mean_the_same() {
    let args = ["generate", "docs/pictures/guitar.jpg", "This is", "--max-new-tokens", "8", "--json"];
    let command = || {
        let mut command = idefics();
        command.args(args);
        command
    };
    let answer = |command: &mut Command| {
        let (stdout, stderr) = run(command);
        let mut answer: Value = serde_json::from_str(&stdout).expect("JSON");
        answer.as_object_mut().expect("an object").remove("timings");
        (answer, stderr)
    };
    let (expected, stderr) = answer(&mut command());
    check_note(&stderr);
    // Nothing is told to somebody who asked for it.
    for name in ["idefics-tiny", "models/idefics-tiny"] {
        assert_eq!(answer(command().args(["--model", name])), (expected.clone(), String::new()), "{name}");
        assert_eq!(answer(command().env("IDEFICS_MODEL", name)), (expected.clone(), String::new()), "{name}");
    }
    assert_eq!(answer(command().env("IDEFICS_MODEL", "")).0, expected);
    // A directory of that name is what is meant where there is one.
    let folder = tempfile::tempdir().expect("a folder");
    fs::create_dir(folder.path().join("idefics-tiny")).expect("a directory");
    let output =
        idefics().current_dir(folder.path()).args(["inspect", "idefics-tiny"]).output().expect("it runs");
    assert!(!output.status.success());
}

#[test]
fn the_environment_names_a_model_and_the_command_line_wins() {
    let directory = |command: &mut Command| {
        let (stdout, stderr) = run(command);
        assert_eq!(stderr, "");
        let report: Value = serde_json::from_str(&stdout).expect("JSON");
        report["directory"].as_str().expect("a name").to_owned()
    };
    let variable = ("IDEFICS_MODEL", "fixtures/tiny");
    let mut command = idefics();
    assert_eq!(directory(command.env(variable.0, variable.1).args(["inspect", "--json"])), "fixtures/tiny");
    let mut command = idefics();
    let named = command.env(variable.0, variable.1).args(["inspect", "idefics-tiny", "--json"]);
    assert_eq!(directory(named), "idefics-tiny");
    // A shape is no model, so nothing is contradicted.
    let shape =
        ["--shape", "fixtures/tiny", "--prefill", "4", "--batches", "1", "--images", "0", "--rounds", "1"];
    run(idefics().env(variable.0, variable.1).arg("bench").args(shape));
}

#[test]
fn a_model_that_is_packed_already_is_not_packed_again_in_silence() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let output = idefics().args(["quantize", "idefics-tiny"]).arg(&out).args(["--format", "q8"]).output();
    let output = output.expect("it runs");
    let is_packed = fs::read_to_string(root().join("models/idefics-tiny/config.json"))
        .expect("a configuration")
        .contains("quantization_config");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.success(), !is_packed, "{stderr}");
    assert!(!is_packed || stderr.contains("already"), "{stderr}");
}

#[test]
fn an_adapter_is_trained_for_it_used_with_it_and_merged_into_it() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["guitar", "elephant"] {
        fs::copy(root().join(format!("docs/pictures/{name}.jpg")), folder.path().join(format!("{name}.jpg")))
            .expect("a picture");
        fs::write(folder.path().join(format!("{name}.txt")), format!("my {name}\n")).expect("a caption");
    }
    let config = format!(
        "model = 'idefics-tiny'\noutput = '{0}/run'\n[run]\nsteps = 1\n[lora]\nr = 2\nalpha = 4.0\n\
         targets = ['q_proj', 'v_proj']\n[sequence]\nlength = 32\nmax_images = 1\n[optimizer]\nlearning_rate = 1e-3\n\
         [batch]\ntokens = 40\nimages = 1\n[[data]]\nformat = 'images'\npath = '{0}'\nprompt = '<image>This is'\n\
         answer = ' {{caption}}'\n",
        folder.path().display()
    );
    let config_path = folder.path().join("run.toml");
    fs::write(&config_path, config).expect("a configuration");
    run(idefics().arg("train").arg(&config_path));
    let adapter = folder.path().join("run/adapter");
    let (_, stderr) = run(idefics().args(["caption", "docs/pictures/guitar.jpg", "--adapter"]).arg(&adapter));
    check_note(&stderr);
    let merged = folder.path().join("merged");
    run(idefics().args(["merge", "idefics-tiny"]).arg(&adapter).arg(&merged));
    run(idefics().arg("inspect").arg(&merged));
}

#[test]
fn a_server_tells_its_clients_what_it_is_called() {
    let mut server = idefics()
        .args(["serve", "--port", "0", "--log-format", "json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the server starts");
    let mut address = String::new();
    let stdout = server.stdout.take().expect("its stdout");
    BufReader::new(stdout).read_line(&mut address).expect("its address");
    let address = address.trim().trim_start_matches("http://").to_owned();
    let get = |path: &str| -> (String, String) {
        let mut stream = TcpStream::connect(&address).expect("a connection");
        let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
    };
    let start = Instant::now();
    while !get("/health").0.contains("200") {
        assert!(start.elapsed() < Duration::from_mins(1), "the server is not ready: {:?}", get("/health"));
        std::thread::sleep(Duration::from_millis(20));
    }
    for (path, field) in [("/v1/models", "/data/0/id"), ("/info", "/model_id")] {
        let (status, body) = get(path);
        let body: Value =
            serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {status}: {error}"));
        assert_eq!(body.pointer(field), Some(&Value::from("idefics-tiny")), "{path}: {body}");
    }
    server.kill().expect("it ends");
    let mut log = String::new();
    server.stderr.take().expect("its stderr").read_to_string(&mut log).expect("a log");
    server.wait().expect("it has ended");
    // The note is a line of the log, and programs can read all lines.
    check_note(&log);
    for line in log.lines() {
        serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}
