//! Which route is whose.

use std::sync::Arc;

use axum::{
    Router,
    http::{HeaderValue, Method, header},
    middleware,
    routing::{get, post},
};
use tower_http::cors::CorsLayer;

use crate::{
    error::{ApiError, Kind},
    gate, health, observe, openai, openapi, pages,
    state::App,
    tgi,
};

/// All routes under all layers.
pub(crate) fn router(app: &Arc<App>) -> Router {
    // These take a place before their body is read.
    let generating = Router::new()
        .route("/v1/chat/completions", post(openai::chat::chat))
        .route("/v1/completions", post(openai::completions::completions))
        .route("/generate", post(tgi::generate))
        .route("/generate_stream", post(tgi::generate_stream))
        .route("/tokenize", post(tgi::tokenize))
        .route("/", post(tgi::compat))
        .route_layer(middleware::from_fn_with_state(app.clone(), gate::place));
    let mut router = Router::new()
        .route("/v1/models", get(openai::models::list))
        .route("/v1/models/{*id}", get(openai::models::one))
        .route("/info", get(tgi::info))
        .route("/health", get(health::health))
        .route("/livez", get(health::livez))
        .route("/metrics", get(health::metrics))
        .route("/openapi.json", get(openapi::document))
        .merge(pages::routes())
        .merge(generating)
        .method_not_allowed_fallback(async || {
            ApiError::new(Kind::MethodNotAllowed, "this route has other methods")
        })
        .fallback(async || ApiError::new(Kind::NotFound, "there is no such route"))
        .layer(middleware::from_fn_with_state(app.clone(), gate::gate));
    if let Some(cors) = cors(&app.options.cors_origins) {
        // Outside the gate: a browser asks for permission without a key.
        router = router.layer(cors);
    }
    router.layer(middleware::from_fn_with_state(app.clone(), observe::observe)).with_state(app.clone())
}

/// Pages of these origins may call; credentials are never shared.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins: Vec<HeaderValue> =
        origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()).collect();
    let headers = [header::AUTHORIZATION, header::CONTENT_TYPE];
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST])
            .allow_headers(headers)
            .expose_headers([header::HeaderName::from_static("x-request-id"), header::RETRY_AFTER]),
    )
}
