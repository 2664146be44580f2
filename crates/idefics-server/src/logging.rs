//! Structured logs on stderr: for people, or a JSON object a line.

use std::{io::IsTerminal, panic::PanicHookInfo};

use tracing::level_filters::LevelFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// A JSON object a line.
    Json,
}

/// Starts logging, of panics too. Where a log is there already, it stays.
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
    std::panic::set_hook(Box::new(log_panic));
}

/// Logs something that whoever started the server should know.
pub fn warn(message: &str) {
    tracing::warn!("{message}");
}

/// A panic, by its place. Its words only if the program's source has them: values in them may come from a request,
/// as when a text is cut inside a character.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let message = panic.payload().downcast_ref::<&'static str>().copied();
    let place = panic.location().map(ToString::to_string);
    let thread = std::thread::current();
    tracing::error!(message, place, thread = thread.name(), "panic");
}

pub use tracing::level_filters::LevelFilter as LogLevel;

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn panics_are_logged_without_values() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
        let here = std::thread::current().id();
        // Other tests run beside this one, and their panics are reports of failures.
        let theirs = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().id() == here { log_panic(panic) } else { theirs(panic) }
        }));
        let value = String::from("a user's words");
        let panicked = tracing::subscriber::with_default(subscriber, || {
            [
                std::panic::catch_unwind(|| panic!("{value} are cut")).is_err(),
                std::panic::catch_unwind(|| panic!("only the source")).is_err(),
            ]
        });
        // The hook that is there has the other one inside: from here on it does what that did.
        assert_eq!(panicked, [true, true]);
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert_eq!(log.matches("logging.rs").count(), 2, "{log}");
        assert!(log.contains("only the source") && !log.contains("words"), "{log}");
    }
}
