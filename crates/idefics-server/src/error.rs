//! What a request can be refused for, and how each dialect writes it.
//!
//! A handler returns an [`ApiError`]; `observe` turns it into a body in the shape of the route's dialect, in one
//! place, so that an error of the framework looks like one of ours. Messages name fields and limits, and never repeat what a
//! request holds: they end up in logs of clients and proxies.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use idefics::{
    generate::{GenerateError, Rejected},
    processor::{FetchError, ImageError, ProcessorError},
};
use serde_json::{Value, json};

/// A refusal.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) kind: Kind,
    pub(crate) message: String,
    /// The field of the request that is at fault, like `messages[0].content`.
    pub(crate) param: Option<String>,
    /// A word for programs.
    pub(crate) code: Option<&'static str>,
    pub(crate) retry_after: Option<Duration>,
}

/// The kind of a refusal; each has one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Invalid,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    Timeout,
    TooLarge,
    MediaType,
    Unprocessable,
    Overloaded,
    /// The model failed.
    Internal,
    /// The server failed, around the model.
    Panicked,
    Unavailable,
}

/// The language that a route speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAi,
    Tgi,
}

impl Dialect {
    /// By the path, since an unknown key is refused before any route is looked up.
    pub(crate) fn of(path: &str) -> Self {
        match path {
            "/generate" | "/generate_stream" | "/info" | "/tokenize" | "/" => Self::Tgi,
            _ => Self::OpenAi,
        }
    }
}

impl Kind {
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Timeout => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Unprocessable => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal | Self::Panicked => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// `error.type` of `OpenAI`.
    fn openai_type(self) -> &'static str {
        match self {
            Self::Unauthorized => "authentication_error",
            Self::Forbidden => "permission_error",
            Self::NotFound => "not_found_error",
            Self::Overloaded => "rate_limit_error",
            Self::Internal | Self::Panicked => "server_error",
            Self::Unavailable => "service_unavailable_error",
            _ => "invalid_request_error",
        }
    }

    /// `error_type` of text-generation-inference.
    fn tgi_type(self) -> &'static str {
        match self {
            Self::Overloaded | Self::Unavailable => "overloaded",
            Self::Internal => "generation",
            Self::Panicked => "incomplete_generation",
            Self::Unauthorized | Self::Forbidden => "unauthorized",
            Self::NotFound | Self::MethodNotAllowed => "not_found",
            _ => "validation",
        }
    }
}

impl ApiError {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A field with a value that cannot be honoured.
    pub(crate) fn field(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        Self { message: format!("`{param}`: {problem}"), param: Some(param), ..Self::new(Kind::Invalid, "") }
    }

    /// A field that is known and not supported. Never silently ignored.
    pub(crate) fn unsupported(param: impl Into<String>, what: &str) -> Self {
        Self::field(param, format_args!("{what} is not supported by this server"))
            .code("unsupported_parameter")
    }

    /// A promise inside was broken while a request was handled; called where that is noticed.
    pub(crate) fn panicked() -> Self {
        tracing::error!("a request handler panicked");
        Self::new(Kind::Panicked, "the server failed")
    }

    pub(crate) fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    pub(crate) fn retry_after(self, after: Duration) -> Self {
        Self { retry_after: Some(after), ..self }
    }

    /// The status, which depends on the dialect: text-generation-inference has statuses of its own for input that
    /// does not validate and for a model that fails.
    pub(crate) fn status(&self, dialect: Dialect) -> StatusCode {
        match (dialect, self.kind) {
            (Dialect::Tgi, Kind::Invalid) => StatusCode::UNPROCESSABLE_ENTITY,
            (Dialect::Tgi, Kind::Internal) => StatusCode::FAILED_DEPENDENCY,
            (_, kind) => kind.status(),
        }
    }

    /// The body.
    pub(crate) fn body(&self, dialect: Dialect) -> Value {
        match dialect {
            Dialect::OpenAi => json!({"error": {
                "message": self.message,
                "type": self.kind.openai_type(),
                "param": self.param,
                "code": self.code,
            }}),
            Dialect::Tgi => {
                let is_validation = matches!(self.kind, Kind::Invalid | Kind::Unprocessable);
                let prefix = if is_validation { "Input validation error: " } else { "" };
                json!({"error": format!("{prefix}{}", self.message), "error_type": self.kind.tgi_type()})
            }
        }
    }

    /// The whole response.
    pub(crate) fn render(&self, dialect: Dialect) -> Response {
        let mut response = (self.status(dialect), Json(self.body(dialect))).into_response();
        if let Some(after) = self.retry_after {
            // Whole seconds, and never "at once".
            let seconds = after.as_secs_f64().ceil().clamp(1.0, 3600.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// A response that waits for `observe` to be written in the dialect of its route.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.kind.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Rejected> for ApiError {
    fn from(rejected: Rejected) -> Self {
        match rejected {
            Rejected::QueueFull { retry_after, .. } => {
                Self::new(Kind::Overloaded, "too many requests are waiting; try again later")
                    .code("queue_full")
                    .retry_after(retry_after)
            }
            Rejected::NeverFits { .. } => {
                Self::new(Kind::Invalid, rejected.to_string()).code("request_too_large")
            }
            Rejected::TooLong(error) | Rejected::Invalid(error) => error.into(),
            Rejected::ShuttingDown => Self::new(Kind::Unavailable, "the server is shutting down")
                .code("shutting_down")
                .retry_after(Duration::from_secs(5)),
        }
    }
}

impl From<GenerateError> for ApiError {
    fn from(error: GenerateError) -> Self {
        use GenerateError as E;
        match &error {
            E::InvalidOption { .. } | E::UnknownToken { .. } | E::NoCandidate { .. } => Self::new(Kind::Invalid, error.to_string()),
            E::EmptyPrompt { .. } => Self::new(Kind::Invalid, "the prompt has no tokens"),
            E::PromptTooLong { prompt_tokens, max_positions, .. } => Self::new(
                Kind::Invalid,
                format!(
                    "the prompt has {prompt_tokens} tokens, the answer needs at least one more, and the model's context is {max_positions} tokens"
                ),
            )
            .code("context_length_exceeded"),
            E::NoRoom { prompt_tokens, max_length, .. } => Self::new(
                Kind::Invalid,
                format!("the prompt has {prompt_tokens} tokens, prompt and answer together may have {max_length}"),
            )
            .code("context_length_exceeded"),
            // What is left is our fault; details go to the log.
            _ => Self::new(Kind::Internal, "the model failed to answer"),
        }
    }
}

impl From<ProcessorError> for ApiError {
    fn from(error: ProcessorError) -> Self {
        match error {
            // The address may hold secrets: only the picture's place in the prompt is told.
            ProcessorError::Image { source, .. } => source.into(),
            _ => Self::new(Kind::Internal, "the prompt could not be processed"),
        }
    }
}

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        let (kind, code) = match &error {
            ImageError::TooManyBytes { .. } | ImageError::TooManyPixels { .. } => {
                (Kind::TooLarge, "image_too_large")
            }
            ImageError::UnknownFormat | ImageError::Unsupported { .. } => {
                (Kind::MediaType, "unsupported_image")
            }
            ImageError::Fetch(FetchError::Disabled) => (Kind::Invalid, "remote_images_disabled"),
            ImageError::Fetch(_) => (Kind::Invalid, "image_not_fetched"),
            ImageError::File(_) | ImageError::NotAFile => (Kind::Internal, "image_unreadable"),
            _ => (Kind::Unprocessable, "invalid_image"),
        };
        Self::new(kind, error.to_string()).code(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_dialect_has_its_shape_and_status() {
        let error = ApiError::field("temperature", "expected a number from 0 to 2");
        assert_eq!(
            error.body(Dialect::OpenAi),
            json!({"error": {"message": "`temperature`: expected a number from 0 to 2",
                "type": "invalid_request_error", "param": "temperature", "code": null}})
        );
        assert_eq!(
            error.body(Dialect::Tgi),
            json!({"error": "Input validation error: `temperature`: expected a number from 0 to 2",
                "error_type": "validation"})
        );
        for (kind, openai, tgi) in [
            (Kind::Invalid, 400, 422),
            (Kind::Unauthorized, 401, 401),
            (Kind::NotFound, 404, 404),
            (Kind::TooLarge, 413, 413),
            (Kind::MediaType, 415, 415),
            (Kind::Unprocessable, 422, 422),
            (Kind::Overloaded, 429, 429),
            (Kind::Internal, 500, 424),
            (Kind::Panicked, 500, 500),
            (Kind::Unavailable, 503, 503),
        ] {
            let error = ApiError::new(kind, "x");
            assert_eq!(error.status(Dialect::OpenAi), openai, "{kind:?}");
            assert_eq!(error.status(Dialect::Tgi), tgi, "{kind:?}");
        }
    }

    #[test]
    fn waiting_time_is_in_whole_seconds() {
        for (after, expected) in [(0, "1"), (1200, "2"), (90_000_000, "3600")] {
            let retry_after = Duration::from_millis(after);
            let rejected = Rejected::QueueFull { waiting: 1, limit: 1, retry_after };
            let response = ApiError::from(rejected).render(Dialect::OpenAi);
            assert_eq!(response.status(), 429);
            assert_eq!(response.headers()[header::RETRY_AFTER], expected);
        }
    }
}
