//! Spans of requests for OpenTelemetry: which route, how it ended, what its answers took. Never what was asked or
//! answered.
//!
//! Built in by the feature `otel`. Without it there is no [`Exporter`], and who asks for one is told so.

#[cfg(not(feature = "otel"))]
mod absent;
#[cfg(feature = "otel")]
mod otlp;

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use axum::http::HeaderMap;
use idefics::generate::Usage;

#[cfg(not(feature = "otel"))]
pub(crate) use absent::{Exporter, RequestSpan};
#[cfg(feature = "otel")]
pub(crate) use otlp::{Exporter, RequestSpan};

/// Where spans of requests go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Traces {
    /// Nowhere.
    #[default]
    Off,
    /// Where OpenTelemetry's variables say, `OTEL_EXPORTER_OTLP_ENDPOINT` first among them; nowhere if they name no
    /// place.
    FromEnvironment,
    /// To the collector at this address, such as `http://localhost:4318/v1/traces`.
    To(String),
}

/// Routes that are asked every few seconds by programs that look after the server.
const PROBES: [&str; 3] = ["/health", "/livez", "/metrics"];

/// What a span says of a request when it begins.
#[cfg_attr(not(feature = "otel"), expect(dead_code, reason = "an exporter reads it"))]
pub(crate) struct Beginning<'a> {
    pub(crate) method: &'static str,
    /// The pattern, never the path as it was sent.
    pub(crate) route: &'a str,
    pub(crate) request_id: &'a str,
    /// Where the caller's own span may be named (W3C Trace Context).
    pub(crate) headers: &'a HeaderMap,
}

/// What it says when it has ended.
#[cfg_attr(not(feature = "otel"), expect(dead_code, reason = "an exporter reads it"))]
pub(crate) struct Ending<'a> {
    /// None where the client left before there was one.
    pub(crate) status: Option<u16>,
    /// Whether the client took the whole response.
    pub(crate) is_complete: bool,
    /// Of a request that asked for answers.
    pub(crate) answers: Option<(&'a str, Figures)>,
}

impl Exporter {
    /// The span of a request; none for routes that only look whether the server is there.
    pub(crate) fn span(&self, beginning: &Beginning<'_>) -> Option<RequestSpan> {
        (!PROBES.contains(&beginning.route)).then(|| self.begin(beginning))
    }
}

/// What the answers to a request took, gathered while they are written; one for all prompts of the request.
#[derive(Debug, Default)]
pub(crate) struct AnswerFigures(Mutex<Figures>);

/// See there.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Figures {
    /// Whether the model was asked for anything.
    pub(crate) is_asked: bool,
    /// Longest time that a prompt waited in the engine's queue.
    pub(crate) queued: Option<Duration>,
    /// From the request to its first token.
    pub(crate) first_token: Option<Duration>,
    /// Of the answers that came to their end.
    pub(crate) usage: Option<Usage>,
}

impl AnswerFigures {
    /// What is known by now.
    pub(crate) fn get(&self) -> Figures {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn asked(&self) {
        self.change(|figures| figures.is_asked = true);
    }

    pub(crate) fn started(&self, queued: Duration) {
        self.change(|figures| figures.queued = figures.queued.max(Some(queued)));
    }

    pub(crate) fn first_token(&self, after: Duration) {
        self.change(|figures| {
            figures.first_token = Some(figures.first_token.map_or(after, |it| it.min(after)));
        });
    }

    pub(crate) fn finished(&self, usage: &Usage) {
        self.change(|figures| {
            let sum = figures.usage.get_or_insert_default();
            sum.prompt_tokens += usage.prompt_tokens;
            sum.cached_tokens += usage.cached_tokens;
            sum.images += usage.images;
            sum.cached_images += usage.cached_images;
            sum.generated_tokens += usage.generated_tokens;
        });
    }

    fn change(&self, change: impl FnOnce(&mut Figures)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The variable that names a collector, if any does and nothing else says that no spans are wanted. `variable` looks
/// one up.
fn asked_by(variable: impl Fn(&str) -> Option<String>) -> Option<&'static str> {
    let is = |name: &str, value: &str| variable(name).is_some_and(|it| it.eq_ignore_ascii_case(value));
    if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return None;
    }
    ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"]
        .into_iter()
        .find(|name| variable(name).is_some_and(|value| !value.is_empty()))
}

/// Looks up a variable of the process.
fn of_process(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_in_the_environment_is_heeded_unless_switched_off() {
        let general = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");
        let of_traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:4318/v1/traces");
        for (variables, expected) in [
            (vec![], None),
            (vec![("OTEL_EXPORTER_OTLP_ENDPOINT", "")], None),
            (vec![general], Some(general.0)),
            (vec![general, of_traces], Some(of_traces.0)),
            (vec![general, ("OTEL_SDK_DISABLED", "TRUE")], None),
            (vec![general, ("OTEL_SDK_DISABLED", "false")], Some(general.0)),
            (vec![of_traces, ("OTEL_TRACES_EXPORTER", "none")], None),
            (vec![of_traces, ("OTEL_TRACES_EXPORTER", "otlp")], Some(of_traces.0)),
        ] {
            let look_up = |name: &str| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            };
            assert_eq!(asked_by(look_up), expected, "{variables:?}");
        }
    }

    #[test]
    fn figures_of_several_prompts_are_one() {
        let figures = AnswerFigures::default();
        assert_eq!(figures.get(), Figures::default());
        figures.asked();
        for (queued, first_token, generated_tokens) in [(3, 9, 5), (7, 8, 6), (1, 20, 0)] {
            figures.started(Duration::from_millis(queued));
            figures.first_token(Duration::from_millis(first_token));
            figures.finished(&Usage { prompt_tokens: 10, generated_tokens, ..Usage::default() });
        }
        let usage = Usage { prompt_tokens: 30, generated_tokens: 11, ..Usage::default() };
        let expected = Figures {
            is_asked: true,
            queued: Some(Duration::from_millis(7)),
            first_token: Some(Duration::from_millis(8)),
            usage: Some(usage),
        };
        assert_eq!(figures.get(), expected);
    }
}
