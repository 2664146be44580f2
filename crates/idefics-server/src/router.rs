//! Which route is whose.

use std::sync::Arc;

use axum::{
    Router,
    http::{HeaderValue, Method, header, uri::Authority},
    middleware,
    routing::{get, post},
};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::{gate, health, observe, openai, openapi, pages, state::App, tgi};

/// An origin that no browser sends.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot allow the origin `{0}`: expected `*`, or a scheme, a host and perhaps a port, such as `https://ui.example`, \
     without a path"
)]
pub struct WrongOrigin(pub String);

/// All routes under all layers.
pub(crate) fn router(app: &Arc<App>) -> Result<Router, WrongOrigin> {
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
        .method_not_allowed_fallback(gate::no_method)
        .fallback(gate::no_route)
        .layer(middleware::from_fn_with_state(app.clone(), gate::gate));
    if let Some(cors) = cors(&app.options.cors_origins)? {
        // Outside the gate: a browser asks for permission without a key.
        router = router.layer(cors);
    }
    Ok(router.layer(middleware::from_fn_with_state(app.clone(), observe::observe)).with_state(app.clone()))
}

/// Pages of these origins may call; credentials are never shared.
fn cors(origins: &[String]) -> Result<Option<CorsLayer>, WrongOrigin> {
    if origins.is_empty() {
        return Ok(None);
    }
    let named = origins.iter().filter(|origin| *origin != "*").map(|origin| origin_value(origin));
    let named = named.collect::<Result<Vec<_>, _>>()?;
    let allowed = if named.len() < origins.len() { AllowOrigin::any() } else { AllowOrigin::list(named) };
    Ok(Some(
        CorsLayer::new()
            .allow_origin(allowed)
            .allow_methods([Method::GET, Method::POST])
            // Clients have headers of their own, which are ignored here.
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers([header::HeaderName::from_static("x-request-id"), header::RETRY_AFTER]),
    ))
}

/// An origin as browsers write it: in small letters, without a path.
fn origin_value(origin: &str) -> Result<HeaderValue, WrongOrigin> {
    let wrong = || WrongOrigin(origin.to_owned());
    // That of pages from files.
    if origin != "null" {
        let (scheme, authority) = origin.split_once("://").ok_or_else(wrong)?;
        let is_scheme = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
        let is_authority = authority.parse::<Authority>().is_ok() && !authority.contains(['@', '*']);
        if !is_scheme || !is_authority {
            return Err(wrong());
        }
    }
    HeaderValue::from_str(&origin.to_ascii_lowercase()).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_what_browsers_send() {
        for (origin, expected) in [
            ("https://ui.example", Some("https://ui.example")),
            ("HTTPS://UI.example:8443", Some("https://ui.example:8443")),
            ("http://[::1]:3000", Some("http://[::1]:3000")),
            ("chrome-extension://abcdef", Some("chrome-extension://abcdef")),
            ("null", Some("null")),
            ("https://ui.example/", None),
            ("https://ui.example/app", None),
            ("https://*.example", None),
            ("https://me@ui.example", None),
            ("https://ui .example", None),
            ("https://\u{fc}i.example", None),
            ("https://", None),
            ("ui.example", None),
            ("a\nb", None),
            ("", None),
        ] {
            let value = origin_value(origin).ok();
            assert_eq!(value.as_ref().map(|value| value.to_str().unwrap()), expected, "{origin:?}");
        }
    }
}
