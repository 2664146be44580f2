//! The outermost layer: request ids, one log line and one count for each request, errors in the route's dialect,
//! panics as errors.
//!
//! A log line has the route's pattern, never the path or query as it was sent, and no word of a request.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use hyper::body::{Frame, SizeHint};
use tracing::{Instrument, Span, info_span};

use crate::{
    error::{ApiError, Dialect},
    ids,
    state::App,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The layer.
pub(crate) async fn observe(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(request.headers());
    let method = known_method(request.method());
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let dialect = Dialect::of(request.uri().path());
    let span = info_span!("request", id, method, route);
    let answered = AssertUnwindSafe(next.run(request).instrument(span.clone())).catch_unwind().await;
    let response = answered.unwrap_or_else(|_| span.in_scope(ApiError::panicked).into_response());
    let mut response = in_dialect(response, dialect);
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, HeaderValue::from_str(&id).expect("ids are ASCII"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    let status = response.status().as_u16();
    let end = End { app, span, method, route, status, start, is_complete: false };
    response.map(|body| Body::new(Observed { body, end }))
}

/// Writes an error of ours in the words of its dialect; errors of the framework have become ours before.
fn in_dialect(mut response: Response, dialect: Dialect) -> Response {
    let Some(error) = response.extensions_mut().remove::<ApiError>() else { return response };
    let mut rendered = error.render(dialect);
    for (name, value) in response.headers() {
        if *name != header::CONTENT_LENGTH && *name != header::CONTENT_TYPE {
            rendered.headers_mut().insert(name, value.clone());
        }
    }
    rendered
}

/// The client's id, so that its logs and ours can be laid side by side, or one of ours.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let is_plain = |id: &&str| {
        (1..=64).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    };
    given.filter(is_plain).map_or_else(|| format!("req-{}", ids::fresh()), str::to_owned)
}

/// Methods can be any word; metrics and logs know these.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}

/// A body whose end is noted. What goes on while it is read belongs to the request's span.
struct Observed {
    body: Body,
    end: End,
}

struct End {
    app: Arc<App>,
    span: Span,
    method: &'static str,
    route: String,
    status: u16,
    start: Instant,
    is_complete: bool,
}

impl HttpBody for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let _entered = this.end.span.enter();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        this.end.is_complete |= frame.is_none() || this.body.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.end.is_complete |= self.body.is_end_stream();
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let took = self.start.elapsed();
        self.app.metrics.request(self.method, &self.route, self.status, took);
        let (status, milliseconds) = (self.status, took.as_secs_f64() * 1e3);
        self.span.in_scope(|| {
            if self.is_complete {
                tracing::info!(status, milliseconds, "done");
            } else {
                tracing::info!(status, milliseconds, "the client went away");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_clients_are_kept_where_they_are_plain() {
        for (given, is_kept) in [
            ("abc-123_X.y", true),
            ("", false),
            ("with space", false),
            ("quote\"", false),
            (&"x".repeat(65), false),
        ] {
            let headers = HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_str(given).unwrap())]);
            let id = request_id(&headers);
            assert_eq!(id == given, is_kept, "{given}");
            assert!(is_kept || id.starts_with("req-"));
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
