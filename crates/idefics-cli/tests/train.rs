//! `idefics train` as a user runs it: to the end, interrupted, killed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use idefics_testing::fixture;
use serde_json::Value;

struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (index, name) in ["444.jpg", "422.jpg", "rgb.png", "grey.png"].into_iter().enumerate() {
            for copy in 0..8 {
                let target = dir.path().join(format!("pets-{index}-{copy}-{name}"));
                fs::copy(fixture("processor").join(name), &target).unwrap();
                fs::write(target.with_extension("txt"), format!("a picture of kind {index}\n")).unwrap();
            }
        }
        let config = format!(
            "model = '{}'\noutput = 'unset'\n[run]\nsteps = 40\n[sequence]\nlength = 64\nmax_images = 1\n\
             [optimizer]\nlearning_rate = 2e-3\n[batch]\ntokens = 80\nimages = 4\n[augment]\n\
             [checkpoints]\nevery = 1\n[evaluation]\nheld_out = 0.1\nevery = 20\n\
             [[data]]\nformat = 'images'\npath = '{}'\nprompt = '<image>This is'\nanswer = ' {{caption}}'\n",
            fixture("tiny").display(),
            dir.path().display(),
        );
        fs::write(dir.path().join("run.toml"), config).unwrap();
        Self { dir }
    }

    fn output(&self, name: &str) -> PathBuf {
        self.dir.path().join("runs").join(name)
    }

    fn command(&self, name: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_idefics"));
        command.env("HF_HUB_OFFLINE", "1").arg("train").arg(self.dir.path().join("run.toml"));
        command.args(["--output", self.output(name).to_str().unwrap()]).args(args);
        command
    }

    fn run(&self, name: &str, args: &[&str]) -> Output {
        self.command(name, args).output().unwrap()
    }

    /// Starts a run and waits until it has a checkpoint.
    fn start(&self, name: &str, args: &[&str]) -> Child {
        let mut command = self.command(name, args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        loop {
            let entries = fs::read_dir(self.output(name)).into_iter().flatten().flatten();
            let is_checkpoint = |path: &Path| path.join("training/state.json").is_file();
            let visible = |path: &Path| !path.file_name().unwrap().to_string_lossy().starts_with('.');
            if entries.map(|entry| entry.path()).any(|path| visible(&path) && is_checkpoint(&path)) {
                return child;
            }
            assert!(child.try_wait().unwrap().is_none(), "the run ended before its first checkpoint");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn weights(&self, name: &str) -> Vec<u8> {
        fs::read(self.output(name).join("model/model.safetensors")).unwrap()
    }
}

#[track_caller]
fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_folder_of_pictures_becomes_a_model() {
    let run = Run::new();
    let report = run.run("dry", &["--dry-run"]);
    assert!(stdout(&report).contains("fits"));
    let stderr = String::from_utf8_lossy(&report.stderr).into_owned();
    assert!(stderr.contains("data: 29 samples") && stderr.contains("memory:"), "{stderr}");
    assert!(!run.output("dry").exists(), "nothing is written before a run");
    let output = run.run("whole", &["--json"]);
    let summary: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((summary["end"].as_str(), summary["step"].as_u64()), (Some("finished"), Some(40)));
    let model = run.output("whole").join("model");
    assert_eq!(summary["model"].as_str(), model.to_str());
    for file in ["metrics.jsonl", "curves.png", "tensorboard"] {
        assert!(run.output("whole").join(file).exists(), "{file}");
    }
    let evaluations: Vec<f64> = fs::read_to_string(run.output("whole").join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|record| record["kind"] == "evaluation")
        .map(|record| record["loss"].as_f64().unwrap())
        .collect();
    assert!(evaluations.len() == 2 && evaluations[1] < evaluations[0], "{evaluations:?}");
    // The model says what it was taught.
    let mut command = Command::new(env!("CARGO_BIN_EXE_idefics"));
    command.args(["generate", "--model", model.to_str().unwrap(), "--max-new-tokens", "20"]);
    command.arg("--image").arg(fixture("processor").join("444.jpg")).args(["--text", "This is"]);
    assert!(stdout(&command.output().unwrap()).contains("a picture of kind"));
}

/// SIGKILL comes wherever it comes; whatever is left is enough to end as the run that was never killed.
#[test]
fn a_run_that_is_killed_ends_as_if_it_had_not_been() {
    let run = Run::new();
    stdout(&run.run("whole", &[]));
    let mut child = run.start("killed", &[]);
    child.kill().unwrap();
    child.wait().unwrap();
    stdout(&run.run("killed", &["--resume"]));
    assert!(run.weights("killed") == run.weights("whole"));
}

#[cfg(unix)]
#[test]
fn signals_save_and_say_how_to_go_on() {
    let run = Run::new();
    for signal in ["-TERM", "-INT"] {
        // Long enough that the signal finds it at work.
        let child = run.start(signal, &["--steps", "1000000"]);
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        // What it says can be typed as it is, and means the run with its flags.
        let config = run.output(signal).join("config.toml");
        let resume = format!("go on with: idefics train {} --resume", config.display());
        assert!(said.contains("stopped after") && said.trim().ends_with(&resume), "{said}");
        let step: u64 = said.split_whitespace().nth(2).unwrap().parse().unwrap();
        let steps = (step + 1).to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_idefics"));
        command.env("HF_HUB_OFFLINE", "1").current_dir("/").arg("train").arg(&config);
        let resumed = stdout(&command.args(["--resume", "--steps", &steps]).output().unwrap());
        assert!(resumed.contains(&format!("finished after {steps} of {steps} steps")), "{resumed}");
    }
}

#[test]
fn mistakes_are_one_line() {
    let run = Run::new();
    let check = |args: &[&str], expected: &str| {
        let output = run.run("x", args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        let last = stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: ") && last.contains(expected), "{args:?}: {stderr}");
    };
    check(&["--set", "run.stepz=1"], "unknown field `stepz`");
    check(&["--resume"], "there is no checkpoint to resume from");
    check(&["--set", "data=[{format='csv', path='nowhere.csv'}]"], "nowhere.csv");
    check(&["--set", "sequence.length=100000", "--set", "batch.tokens=100000"], "do not fit the model's");
    check(&["--model", "/nowhere/at/all"], "/nowhere/at/all");
}
