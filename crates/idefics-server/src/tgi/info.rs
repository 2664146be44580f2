//! `GET /info`: what is served and within which bounds.

use std::sync::Arc;

use axum::{Json, extract::State};

use super::types::Info;
use crate::{error::ApiError, state::App};

/// What this server is.
#[utoipa::path(get, path = "/info", tag = "text-generation-inference", responses((status = 200, body = Info)))]
pub(crate) async fn info(State(app): State<Arc<App>>) -> Result<Json<Info>, ApiError> {
    let service = app.service()?;
    let (card, limits) = (service.card(), &app.options.limits);
    let context = service.backend().max_positions();
    Ok(Json(Info {
        model_id: card.id.clone(),
        model_sha: None,
        model_dtype: card.dtype.clone(),
        model_device_type: "cpu",
        model_pipeline_tag: "image-text-to-text",
        max_concurrent_requests: limits.requests,
        max_best_of: limits.answers,
        max_stop_sequences: limits.stops,
        max_input_tokens: context - 1,
        max_total_tokens: context,
        validation_workers: limits.media_tasks,
        max_client_batch_size: limits.prompts,
        router: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        sha: None,
        docker_label: None,
    }))
}
