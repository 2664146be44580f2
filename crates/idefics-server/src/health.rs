//! Life, readiness and figures.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{error::ApiError, state::App};

/// Whether requests are answered: the model is loaded, a forward pass has worked, and the server is not ending.
#[utoipa::path(get, path = "/health", tag = "Operation", responses((status = 200), (status = 503)))]
pub(crate) async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let service = app.service()?;
    Ok(Json(json!({"status": "ok", "model": service.card().id})))
}

/// Whether the process is there.
#[utoipa::path(get, path = "/livez", tag = "Operation", responses((status = 200)))]
pub(crate) async fn livez() -> Json<Value> {
    Json(json!({"status": "alive"}))
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "Operation", responses((status = 200, body = String)))]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], app.metrics.render(&app)).into_response()
}
