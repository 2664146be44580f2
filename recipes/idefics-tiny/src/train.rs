//! The stages of training, by the command `idefics` itself: `init`, `train` by the files in `stages/`, `quantize`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use idefics::{adapter::Merger, checkpoint::DType};

use crate::{average, calibrate, steps::Folders};

/// In their order.
const STAGES: [&str; 11] = [
    "1-text",
    "2-names",
    "3-joint",
    "4-all",
    "5-practice",
    "6-contrast",
    "7-reading",
    "8-together",
    "9-both",
    "10-series",
    "11-album",
];

/// The stage that begins with a mean of towers, and the one before it.
const AVERAGED: (&str, &str) = ("7-reading", "6-contrast");

/// The stage that begins with the tower as it will ship, and the one before it.
const SETTLED: (&str, &str) = ("9-both", "8-together");

/// How much of the tower that training began with is in that of the stage which is averaged.
const SHARE: f32 = 0.5;
/// The same in the tower that ships.
const LAST_SHARE: f32 = 0.25;

fn idefics(folders: &Folders, arguments: &[&str]) -> Result<()> {
    let name = format!("idefics{}", std::env::consts::EXE_SUFFIX);
    // Cargo puts the programs of a workspace side by side.
    let beside = std::env::current_exe()?.with_file_name(&name);
    let program = std::env::var_os("IDEFICS").map_or(beside, PathBuf::from);
    ensure!(program.is_file(), "no {}: cargo build --release -p idefics-cli", program.display());
    let status = Command::new(&program)
        .args(arguments)
        .current_dir(&folders.work)
        .status()
        .with_context(|| format!("starting {}", program.display()))?;
    ensure!(status.success(), "idefics {} ended with {status}", arguments.join(" "));
    Ok(())
}

/// The two models with new blocks between them.
pub(crate) fn init(folders: &Folders) -> Result<()> {
    let out = folders.empty("init")?;
    let blocks = [
        "--cross-layer-interval",
        "2",
        "--alpha-type",
        "vector",
        // Open from the start: from zero, gates of so short a training never open far enough for pictures to matter.
        "--alpha-initializer",
        "ones",
        "--resampler-n-latents",
        "24",
        "--resampler-depth",
        "2",
        "--resampler-n-heads",
        "6",
        "--resampler-head-dim",
        "64",
        "--end-of-utterance",
        "--dtype",
        "f32",
        "--seed",
        "5",
    ];
    let mut arguments = vec!["init", "--vision", "vision", "--text", "text", "--out", "init"];
    arguments.extend(blocks);
    idefics(folders, &arguments)?;
    calibrate::calibrate(folders, &out)
}

/// All stages; one that was cut off goes on where it was saved.
pub(crate) fn train(folders: &Folders) -> Result<()> {
    STAGES.iter().try_for_each(|stage| {
        let run = folders.work.join("runs").join(stage);
        if model_of(folders, stage).exists() {
            return Ok(());
        }
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("stages").join(format!("{stage}.toml"));
        let file = file.to_string_lossy();
        let mut arguments = vec!["train", &*file];
        if has_checkpoint(&run) {
            arguments.push("--resume");
        } else if *stage == AVERAGED.0 {
            average::average(folders, &model_of(folders, AVERAGED.1), SHARE, "averaged")?;
        } else if *stage == SETTLED.0 {
            settle(folders, &model_of(folders, SETTLED.1))?;
        }
        idefics(folders, &arguments)
    })
}

/// Whether a stage got so far that it can go on; one that was killed before begins again.
fn has_checkpoint(run: &Path) -> bool {
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().starts_with("checkpoint-"))
}

/// What a stage made.
fn model_of(folders: &Folders, stage: &str) -> PathBuf {
    folders.work.join("runs").join(stage).join("model")
}

/// Gives a model the tower that will ship, with the values that 4 bits leave of it, so that what reads it can learn to.
fn settle(folders: &Folders, model: &Path) -> Result<()> {
    average::average(folders, model, LAST_SHARE, "averaged-again")?;
    folders.empty("packed-tower")?;
    pack(folders, "averaged-again", "packed-tower", "vision")?;
    let settled = folders.empty("settled")?;
    let packed = folders.work.join("packed-tower");
    Merger::open(packed, &[])?.with_dtype(DType::F32).write(&settled, &mut |_| ())?;
    Ok(())
}

/// The trained model in few bits.
pub(crate) fn quantize(folders: &Folders) -> Result<()> {
    folders.empty("idefics-tiny")?;
    let last = model_of(folders, STAGES[STAGES.len() - 1]);
    // Training keeps frozen weights as they came, in f32, beside trained ones in bf16. transformers cannot compute with
    // such a mixture once the matrices are packed, so that all of them get one type first.
    let rounded = folders.empty("rounded")?;
    Merger::open(last, &[])?.with_dtype(DType::Bf16).write(&rounded, &mut |_| ())?;
    // The gated blocks stay: there is room for them in the 32 MB that the model may have.
    pack(folders, "rounded", "idefics-tiny", "text,vision,perceiver")
}

/// The linear layers of `parts` in 4 bits.
fn pack(folders: &Folders, from: &str, to: &str, parts: &str) -> Result<()> {
    idefics(folders, &["quantize", from, to, "--format", "nf4", "--double-quant", "--parts", parts])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_go_on_from_checkpoints_alone() {
        let run = std::env::temp_dir().join(format!("idefics-stage-{}", std::process::id()));
        assert!(!has_checkpoint(&run));
        std::fs::create_dir_all(run.join("tensorboard")).unwrap();
        std::fs::create_dir(run.join(".checkpoint-00000100.partial")).unwrap();
        assert!(!has_checkpoint(&run));
        std::fs::create_dir(run.join("checkpoint-00000100")).unwrap();
        assert!(has_checkpoint(&run));
        std::fs::remove_dir_all(&run).unwrap();
    }
}
