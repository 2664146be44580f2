//! The outermost layer: request ids, one log line, one count and one span for each request, errors in the route's
//! dialect, panics as errors.
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
use tracing::{Instrument, Span, field, info_span};

use crate::{
    error::{ApiError, Dialect},
    ids,
    state::App,
    trace::{AnswerFigures, Beginning, Ending, RequestSpan},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// In the metrics, the status of a request whose client left before there was one; nginx's word for it.
const CLIENT_LEFT: u16 = 499;

/// The layer.
pub(crate) async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(request.headers());
    let method = known_method(request.method());
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let dialect = Dialect::of(request.uri().path());
    let span = info_span!("request", id, method, route, trace_id = field::Empty);
    let trace = app.traces.as_ref().and_then(|traces| {
        traces.span(&Beginning { method, route: &route, request_id: &id, headers: request.headers() })
    });
    if let Some(trace) = &trace {
        span.record("trace_id", trace.trace_id());
    }
    let figures = Arc::<AnswerFigures>::default();
    request.extensions_mut().insert(figures.clone());
    // From here on the end is noted, also of a request whose client leaves before there is a response.
    let mut end = End {
        app,
        span: span.clone(),
        trace,
        figures,
        method,
        route,
        status: None,
        start,
        is_complete: false,
    };
    let answered = AssertUnwindSafe(next.run(request).instrument(span.clone())).catch_unwind().await;
    let response = answered.unwrap_or_else(|_| span.in_scope(ApiError::panicked).into_response());
    let mut response = in_dialect(response, dialect);
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, HeaderValue::from_str(&id).expect("ids are ASCII"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    end.status = Some(response.status().as_u16());
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
    trace: Option<RequestSpan>,
    figures: Arc<AnswerFigures>,
    method: &'static str,
    route: String,
    /// None until there is a response.
    status: Option<u16>,
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
        let (status, milliseconds) = (self.status, took.as_secs_f64() * 1e3);
        self.app.metrics.request(self.method, &self.route, status.unwrap_or(CLIENT_LEFT), took);
        self.span.in_scope(|| {
            if self.is_complete {
                tracing::info!(status, milliseconds, "done");
            } else {
                tracing::info!(status, milliseconds, "the client went away");
            }
            // Inside, so that what the exporter has to say stands beside the request.
            if let Some(trace) = self.trace.take() {
                let figures = self.figures.get();
                let model = self.app.loaded().filter(|_| figures.is_asked);
                let answers = model.map(|model| (model.card().id.as_str(), figures));
                trace.end(&Ending { status, is_complete: self.is_complete, answers });
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
