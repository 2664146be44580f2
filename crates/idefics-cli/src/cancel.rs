//! Ctrl-C ends an answer after its present token; a second one ends the process.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Watches for Ctrl-C from now on.
pub(crate) fn on_interrupt() -> anyhow::Result<()> {
    let handler = || {
        if REQUESTED.swap(true, Ordering::Relaxed) {
            // 128 + SIGINT, as shells expect.
            std::process::exit(130);
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
