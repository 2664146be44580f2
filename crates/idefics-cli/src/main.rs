//! The command `idefics`: one file per subcommand under `commands/`.

mod cancel;
mod commands;
mod counter;
mod images;
mod lines;
mod model;
mod options;
mod output;
mod progress;
mod prompts;
mod source;
mod task;
mod templates;

use clap::{Parser, Subcommand};
use idefics_kernels::{
    Isa,
    allocator::{Allocator, keep_freed_blocks},
};

/// Run, score and inspect IDEFICS-1 models: interleaved images and text in, text out.
#[derive(Parser)]
#[command(name = "idefics", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Generate(Box<commands::generate::Args>),
    Chat(Box<commands::chat::Args>),
    Caption(Box<commands::caption::Args>),
    Ask(Box<commands::ask::Args>),
    Classify(commands::classify::Args),
    Score(commands::score::Args),
    Inspect(commands::inspect::Args),
    Serve(Box<commands::serve::Args>),
    Quantize(commands::quantize::Args),
    Init(Box<commands::init::Args>),
    Merge(commands::merge::Args),
    Bench(commands::bench::Args),
    Train(Box<commands::train::Args>),
    Download(commands::download::Args),
}

/// Freed memory stays for the next layer.
#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> std::process::ExitCode {
    keep_freed_blocks();
    let command = Cli::parse().command;
    if let Err(message) = Isa::asked() {
        eprintln!("error: IDEFICS_ISA: {message}");
        return std::process::ExitCode::FAILURE;
    }
    let result = match command {
        Command::Generate(args) => commands::generate::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Caption(args) => commands::caption::run(&args),
        Command::Ask(args) => commands::ask::run(&args),
        Command::Classify(args) => commands::classify::run(&args),
        Command::Score(args) => commands::score::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Serve(args) => commands::serve::run(*args),
        Command::Quantize(args) => commands::quantize::run(&args),
        Command::Init(args) => commands::init::run(&args),
        Command::Merge(args) => commands::merge::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Train(args) => commands::train::run(&args),
        Command::Download(args) => commands::download::run(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            // One line: what failed, then its causes.
            eprintln!("error: {error:#}");
            if error.is::<cancel::Stopped>() {
                cancel::STATUS.into()
            } else {
                std::process::ExitCode::FAILURE
            }
        }
    }
}
