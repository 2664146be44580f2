//! Requests to values: JSON within limits of size and time, errors without a word of what was sent.

use std::time::Duration;

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, header},
};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout_at},
};

use crate::{
    error::{ApiError, Kind},
    state::{App, UPLOAD_UNIT},
};

/// A body must come at least so fast, once `read_timeout` is over.
const BYTES_PER_SECOND: f64 = 32.0 * 1024.0;

/// What is thrown away of a refused request, at most and so long.
pub(crate) const DISCARD_BYTES: usize = 256 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(10);

/// The same where nobody has shown a key: as much as an honest mistake sends.
pub(crate) const DISCARD_BYTES_OF_STRANGERS: usize = 8 << 20;

/// Parsing a larger body would hold up other requests of the thread.
const PARSE_ASIDE_BYTES: usize = 64 << 10;

/// A share of the memory for requests that are being read; given back when dropped.
#[derive(Debug)]
pub(crate) struct Upload(
    #[expect(dead_code, reason = "what counts is when it is dropped")] Option<OwnedSemaphorePermit>,
);

/// Reads a request's JSON.
pub(crate) async fn read_json<T: DeserializeOwned + Send + 'static>(
    app: &App,
    request: Request,
) -> Result<(T, Upload), ApiError> {
    read_with(app, request, parse).await
}

/// Reads a request whose fields are those of two types. Not `#[serde(flatten)]`, which forgets where an error is.
pub(crate) async fn read_json_as_both<A, B>(app: &App, request: Request) -> Result<(A, B, Upload), ApiError>
where
    A: DeserializeOwned + Send + 'static,
    B: DeserializeOwned + Send + 'static,
{
    let both = |bytes: &[u8]| Ok((parse(bytes)?, parse(bytes)?));
    let ((a, b), upload) = read_with(app, request, both).await?;
    Ok((a, b, upload))
}

async fn read_with<T: Send + 'static>(
    app: &App,
    request: Request,
    parse: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
) -> Result<(T, Upload), ApiError> {
    if !is_json(request.headers()) {
        discard_request(request, DISCARD_BYTES).await;
        return Err(ApiError::new(Kind::MediaType, "expected `content-type: application/json`"));
    }
    let (bytes, upload) = read(app, request.into_body()).await?;
    let value = if bytes.len() > PARSE_ASIDE_BYTES {
        tokio::task::spawn_blocking(move || parse(&bytes))
            .await
            .unwrap_or_else(|_| Err(ApiError::new(Kind::Internal, "the request could not be parsed")))?
    } else {
        parse(&bytes)?
    };
    Ok((value, upload))
}

async fn read(app: &App, mut body: Body) -> Result<(Vec<u8>, Upload), ApiError> {
    let limits = &app.options.limits;
    let start = Instant::now();
    let mut bytes = Vec::new();
    let mut permit: Option<OwnedSemaphorePermit> = None;
    let announced = axum::body::HttpBody::size_hint(&body).lower();
    if announced > limits.body_bytes as u64 {
        discard(body, DISCARD_BYTES).await;
        return Err(too_large(limits.body_bytes));
    }
    loop {
        let allowed = limits.read_timeout + Duration::from_secs_f64(bytes.len() as f64 / BYTES_PER_SECOND);
        let frame = timeout_at(start + allowed, body.frame()).await;
        let frame = match frame {
            Ok(None) => break,
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(_))) => return Err(ApiError::new(Kind::Invalid, "the request ended too early")),
            Err(_) => return Err(ApiError::new(Kind::Timeout, "the request did not come in time")),
        };
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limits.body_bytes {
            drop((bytes, permit));
            discard(body, DISCARD_BYTES).await;
            return Err(too_large(limits.body_bytes));
        }
        bytes.extend_from_slice(&data);
        let held = permit.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = bytes.len().div_ceil(UPLOAD_UNIT).saturating_sub(held);
        if missing > 0 {
            let Ok(new) = app.uploads.clone().try_acquire_many_owned(missing as u32) else {
                drop((bytes, permit));
                discard(body, DISCARD_BYTES).await;
                return Err(uploads_full());
            };
            match &mut permit {
                Some(permit) => permit.merge(new),
                None => permit = Some(new),
            }
        }
    }
    Ok((bytes, Upload(permit)))
}

/// Reads the body of a refused request and throws it away, up to `most` bytes: most clients look for an answer only
/// when all is sent, and a connection that ends before is reset, with the answer lost.
pub(crate) async fn discard_request(request: Request, most: usize) {
    // A client that expects a word before it sends its body gets the refusal in its place.
    if !request.headers().contains_key(header::EXPECT) {
        discard(request.into_body(), most).await;
    }
}

async fn discard(mut body: Body, most: usize) {
    let deadline = Instant::now() + DISCARD_TIME;
    let mut discarded = 0;
    while discarded <= most
        && let Ok(Some(Ok(frame))) = timeout_at(deadline, body.frame()).await
    {
        discarded += frame.data_ref().map_or(0, axum::body::Bytes::len);
    }
}

fn uploads_full() -> ApiError {
    ApiError::new(Kind::Overloaded, "too many large requests at once; try again later")
        .code("uploads_full")
        .retry_after(Duration::from_secs(1))
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(Kind::TooLarge, format!("the request has more than {limit} bytes, the limit"))
        .code("request_too_large")
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value: T = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        match error.classify() {
            serde_json::error::Category::Data => {
                let problem = own_words(&error.to_string());
                // Our own words alone can name a key of the request; a map's key is the client's.
                if path == "." || path.contains("logit_bias") {
                    ApiError::new(Kind::Invalid, format!("the request: {problem}"))
                } else {
                    ApiError::field(path, problem)
                }
            }
            _ => malformed(&error),
        }
    })?;
    deserializer.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

fn malformed(error: &serde_json::Error) -> ApiError {
    let (line, column) = (error.line(), error.column());
    ApiError::new(Kind::Invalid, format!("the request is not valid JSON (line {line}, column {column})"))
        .code("invalid_json")
}

/// Of a message of serde, the part that we wrote: what comes before "expected" repeats the request.
fn own_words(message: &str) -> String {
    let message = message.rsplit_once(" at line ").map_or(message, |(message, _)| message);
    if message.starts_with("missing field `") || message.starts_with("duplicate field `") {
        message.to_owned()
    } else if let Some((_, expected)) = message.rsplit_once("expected ") {
        format!("expected {expected}")
    } else {
        "not what is expected there".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[expect(dead_code, reason = "only parsed")]
        count: u32,
    }

    #[derive(Debug, Deserialize)]
    struct Outer {
        #[expect(dead_code, reason = "only parsed")]
        list: Vec<Inner>,
    }

    #[test]
    fn messages_name_the_place_and_never_the_content() {
        for (json, expected) in [
            (r#"{"list":[{"count":"se, expected cret"}]}"#, "`list[0].count`: expected u32"),
            (r#"{"list":[{"count":-1}]}"#, "`list[0].count`: expected u32"),
            (r#"{"list":[{}]}"#, "`list[0]`: missing field `count`"),
            ("{}", "the request: missing field `list`"),
            ("[1]", "`[0]`: expected a sequence"),
            ("\"secret\"", "the request: expected struct Outer"),
            ("{\"list\":[secret]}", "the request is not valid JSON (line 1, column 10)"),
            ("", "the request is not valid JSON (line 1, column 0)"),
            (r#"{"list":[]} secret"#, "the request is not valid JSON (line 1, column 13)"),
            ("\u{fffd}", "the request is not valid JSON (line 1, column 1)"),
        ] {
            let error = parse::<Outer>(json.as_bytes()).unwrap_err();
            assert_eq!(error.message, expected, "{json}");
            assert_eq!(error.kind, Kind::Invalid);
        }
        let deep = "[".repeat(100_000);
        assert!(parse::<serde_json::Value>(deep.as_bytes()).is_err(), "depth is bounded");
    }

    #[test]
    fn the_content_type_counts_without_its_parameters() {
        for (value, expected) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("text/plain", false),
            ("application/jsonp", false),
        ] {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, value.parse().unwrap())]);
            assert_eq!(is_json(&headers), expected, "{value}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }
}
