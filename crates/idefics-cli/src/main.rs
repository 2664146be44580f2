//! The command `idefics`: one file per subcommand under `commands/`.

mod commands;
mod output;
mod progress;

use clap::{Parser, Subcommand};

/// Run, score and inspect IDEFICS-1 models: interleaved images and text in, text out.
#[derive(Parser)]
#[command(name = "idefics", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Inspect(commands::inspect::Args),
    Download(commands::download::Args),
}

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().command {
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Download(args) => commands::download::run(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            // One line: what failed, then its causes.
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
