//! The `OpenAPI` document, made from the types that are parsed.

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{Http, HttpAuthScheme, SecurityScheme},
};

use crate::{health, openai, tgi};

#[derive(OpenApi)]
#[openapi(
    info(title = "IDEFICS", description = "Interleaved pictures and text in, text out: the dialects of OpenAI and \
        of text-generation-inference. Errors are `{\"error\": {\"message\", \"type\", \"param\", \"code\"}}` in the \
        first and `{\"error\", \"error_type\"}` in the second."),
    paths(
        openai::chat::chat,
        openai::completions::completions,
        openai::models::list,
        openai::models::one,
        tgi::generate,
        tgi::generate_stream,
        tgi::info,
        tgi::tokenize,
        health::health,
        health::livez,
        health::metrics,
    ),
    components(schemas(openai::types::ChatChunk)),
    security(("key" = [])),
    modifiers(&Keys),
)]
struct Document;

struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        document.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

/// `GET /openapi.json`.
pub(crate) async fn document() -> Response {
    let json = Document::openapi().to_json().expect("the document has string keys");
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}
