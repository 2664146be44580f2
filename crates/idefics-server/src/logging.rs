//! Structured logs on stderr: for people, or a JSON object a line.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// A JSON object a line.
    Json,
}

/// Starts logging. Where a log is there already, it stays.
pub fn start(format: LogFormat, level: LevelFilter) {
    let builder =
        tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    // A second call, from a test or from a program with a log of its own, changes nothing.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => {
            builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
        }
    };
}

pub use tracing::level_filters::LevelFilter as LogLevel;
