//! Progress over a number of things: a bar on a terminal, plain lines elsewhere; both on stderr.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between two plain lines.
const LINE_PAUSE: Duration = Duration::from_secs(10);

pub(crate) struct Counter {
    /// Nothing where plain lines are written.
    bar: Option<ProgressBar>,
    what: &'static str,
    done: usize,
    total: usize,
    last_line: Instant,
}

impl Counter {
    /// Begins to count `what`, such as pictures. A single thing is not worth showing.
    pub(crate) fn start(total: usize, what: &'static str) -> Self {
        let bar = (std::io::stderr().is_terminal() && total > 1).then(|| {
            let style = ProgressStyle::with_template("[{wide_bar}] {pos}/{len} {msg} ({eta})");
            let style = style.expect("the template is right").progress_chars("=> ");
            ProgressBar::new(total as u64).with_style(style).with_message(what)
        });
        Self { bar, what, done: 0, total, last_line: Instant::now() }
    }

    /// More are done.
    pub(crate) fn advance(&mut self, count: usize) {
        self.done += count;
        if let Some(bar) = &self.bar {
            bar.inc(count as u64);
        } else if self.last_line.elapsed() >= LINE_PAUSE {
            eprintln!("{} of {} {}", self.done, self.total, self.what);
            self.last_line = Instant::now();
        }
    }

    /// Lets something else write to the terminal.
    pub(crate) fn aside<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
