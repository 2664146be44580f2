//! A build without the feature `otel`: no exporter, and a line that says so where one is asked for.

use super::{Beginning, Ending, Traces, asked_by, of_process};

/// There is none.
pub(crate) enum Exporter {}

/// There is none.
pub(crate) enum RequestSpan {}

impl Exporter {
    #[expect(clippy::unnecessary_wraps, reason = "with the feature it can fail")]
    pub(crate) fn start(traces: &Traces) -> Result<Option<Self>, String> {
        let asked = match traces {
            Traces::Off => None,
            Traces::FromEnvironment => asked_by(of_process),
            Traces::To(_) => Some("an address for traces"),
        };
        if let Some(asked) = asked {
            tracing::warn!(
                "{asked} is set, but this build exports no traces; build it with `--features otel`"
            );
        }
        Ok(None)
    }

    pub(super) fn begin(&self, _: &Beginning<'_>) -> RequestSpan {
        match *self {}
    }

    pub(crate) fn finish(&self) {
        match *self {}
    }
}

impl RequestSpan {
    pub(crate) fn trace_id(&self) -> String {
        match *self {}
    }

    pub(crate) fn end(self, _: &Ending<'_>) {
        match self {}
    }
}
