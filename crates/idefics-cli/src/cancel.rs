//! Ctrl-C ends an answer after its present token; a second one ends the process.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::Context;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Of a process that Ctrl-C ended: 128 + SIGINT, as shells expect.
pub(crate) const STATUS: u8 = 130;

/// Work that Ctrl-C ended before all of it was done.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) done: usize,
    pub(crate) total: usize,
    /// What was worked on, in the plural.
    pub(crate) what: &'static str,
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped after {} of {} {}", self.done, self.total, self.what)
    }
}

impl std::error::Error for Stopped {}

/// Watches for Ctrl-C from now on.
pub(crate) fn on_interrupt() -> anyhow::Result<()> {
    let handler = || {
        if REQUESTED.swap(true, Ordering::Relaxed) {
            std::process::exit(STATUS.into());
        }
    };
    ctrlc::set_handler(handler).context("cannot watch for Ctrl-C")
}

/// True once Ctrl-C was pressed.
pub(crate) fn flag() -> &'static AtomicBool {
    &REQUESTED
}

/// Forgets a Ctrl-C, for work that begins anew.
pub(crate) fn reset() {
    REQUESTED.store(false, Ordering::Relaxed);
}

pub(crate) fn is_requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
