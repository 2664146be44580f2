//! The dialect of `OpenAI`: chat completions, completions, models.

pub(crate) mod chat;
mod chat_stream;
pub(crate) mod completions;
mod logprobs;
pub(crate) mod models;
pub(crate) mod types;

use std::{convert::Infallible, panic::AssertUnwindSafe};

use axum::{
    http::{HeaderValue, header},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::Stream;
use idefics::generate::FinishReason;
use serde::Serialize;

use crate::{
    error::{ApiError, Dialect, Kind},
    state::App,
};

/// Why an answer ended, in this dialect's words. An answer cut off by time is as cut as one by length.
fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::EndToken(_) | FinishReason::StopString(_) => "stop",
        FinishReason::Length | FinishReason::Time | FinishReason::Cancelled => "length",
    }
}

/// `data:` with a JSON value.
pub(crate) fn data(value: &impl Serialize) -> Event {
    let json = serde_json::to_string(value).expect("responses have string keys and finite numbers");
    Event::default().data(json)
}

/// An error in the midst of a stream, where the status is sent already.
pub(crate) fn error_event(error: &ApiError, dialect: Dialect) -> Event {
    data(&error.body(dialect))
}

/// A response of server-sent events, never compressed or cached. If making them panics, the last one is an error.
pub(crate) fn stream(
    app: &App,
    dialect: Dialect,
    events: impl Stream<Item = Event> + Send + 'static,
) -> Response {
    use futures_util::StreamExt;
    let events = AssertUnwindSafe(events).catch_unwind().map(move |event| {
        Ok::<_, Infallible>(event.unwrap_or_else(|_| error_event(&ApiError::panicked(), dialect)))
    });
    let keep_alive = KeepAlive::new().interval(app.options.limits.keep_alive).text("ping");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies of the nginx kind collect what they do not know.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The name of this build, which `OpenAI`'s clients log.
pub(crate) fn fingerprint() -> &'static str {
    concat!("idefics-rs-", env!("CARGO_PKG_VERSION"))
}

/// A field that `OpenAI` has and this server has not: harmless values pass, others are refused.
fn refuse_unless_empty(param: &str, value: Option<&serde_json::Value>) -> Result<(), ApiError> {
    use serde_json::Value;
    match value {
        None | Some(Value::Null | Value::Bool(false)) => Ok(()),
        Some(Value::Array(list)) if list.is_empty() => Ok(()),
        Some(Value::Object(fields)) if fields.is_empty() => Ok(()),
        Some(_) => Err(ApiError { kind: Kind::Invalid, ..ApiError::unsupported(param, "this option") }),
    }
}
