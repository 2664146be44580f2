//! Makes `models/idefics-tiny`, the model that the command `idefics` uses when none is named, out of packages in
//! the registries and with this project's own `init`, `train` and `quantize`.
//!
//! `idefics-tiny-recipe all` runs every step in its order and skips what is done: each step writes into a folder
//! of its own and marks it as complete at the end. Nothing depends on the machine but the time.

mod archive;
mod average;
mod calibrate;
mod clipart;
mod color;
mod concepts;
mod emoji;
mod evaluate;
mod fetch;
mod language;
mod onnx;
mod pixels;
mod render;
mod sample;
mod samples;
mod scene;
mod steps;
mod style;
mod things;
mod train;
mod vision;
mod wordnet;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;

use steps::{Folders, Step};

/// Makes the default model.
#[derive(Debug, Parser)]
struct Arguments {
    /// The step to run, or `all`
    #[arg(value_enum)]
    step: Step,

    /// Where packages, pictures, texts and checkpoints go
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/work"))]
    work: PathBuf,

    /// Do the step again though it is done
    #[arg(long)]
    again: bool,

    #[command(flatten)]
    evaluation: evaluate::Options,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let folders = Folders::new(&arguments.work);
    if arguments.step == Step::All {
        return Step::ORDER
            .iter()
            .try_for_each(|step| step.run(&folders, &arguments.evaluation, arguments.again));
    }
    arguments.step.run(&folders, &arguments.evaluation, true)
}
