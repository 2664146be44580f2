//! How long work is shown: bars on a terminal, plain lines elsewhere; both on stderr.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use idefics::checkpoint::hub;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Bytes being worked through.
pub(crate) struct ByteProgress {
    kind: Kind,
}

enum Kind {
    Bar(ProgressBar),
    Lines(Lines),
}

/// The state of plain lines.
struct Lines {
    what: String,
    done: u64,
    total: u64,
    last: Instant,
}

/// Time between two plain lines.
const LINE_PAUSE: Duration = Duration::from_secs(10);

impl ByteProgress {
    /// Begins to show `what`, of which `done` of `total` bytes are there.
    pub(crate) fn start(what: &str, done: u64, total: u64) -> Self {
        let kind = if std::io::stderr().is_terminal() {
            let style =
                "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ({eta})";
            let style =
                ProgressStyle::with_template(style).expect("the template is right").progress_chars("=> ");
            Kind::Bar(
                ProgressBar::new(total).with_style(style).with_message(what.to_owned()).with_position(done),
            )
        } else {
            let lines = Lines { what: what.to_owned(), done, total, last: Instant::now() };
            lines.print();
            Kind::Lines(lines)
        };
        Self { kind }
    }

    /// More bytes are done.
    pub(crate) fn advance(&mut self, bytes: u64) {
        match &mut self.kind {
            Kind::Bar(bar) => bar.inc(bytes),
            Kind::Lines(lines) => {
                lines.done += bytes;
                if lines.last.elapsed() >= LINE_PAUSE {
                    lines.print();
                    lines.last = Instant::now();
                }
            }
        }
    }

    /// All are done.
    pub(crate) fn finish(self) {
        match self.kind {
            Kind::Bar(bar) => bar.finish(),
            Kind::Lines(lines) => eprintln!("{}: done", lines.what),
        }
    }
}

impl Lines {
    fn print(&self) {
        eprintln!("{}: {} of {}", self.what, HumanBytes(self.done), HumanBytes(self.total));
    }
}

/// Shows the files of a download one after the other.
#[derive(Default)]
pub(crate) struct DownloadProgress {
    current: Option<ByteProgress>,
}

impl hub::Progress for DownloadProgress {
    fn start(&mut self, file: &str, done: u64, total: u64) {
        self.current = Some(ByteProgress::start(file, done, total));
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(current) = &mut self.current {
            current.advance(bytes);
        }
    }

    fn finish(&mut self, _file: &str) {
        if let Some(current) = self.current.take() {
            current.finish();
        }
    }
}
