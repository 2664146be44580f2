//! `GET /v1/models`: the one model there is.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use idefics::dialogue::Form;

use super::types::{ModelList, ModelMeta, ModelObject};
use crate::{error::ApiError, service::Service, state::App};

/// The models of this server.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses((status = 200, body = ModelList)))]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let service = app.service()?;
    Ok(Json(ModelList { object: "list", data: vec![describe(&app, service)] }))
}

/// One of them.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "OpenAI", params(("id" = String, Path)),
    responses((status = 200, body = ModelObject), (status = 404)))]
pub(crate) async fn one(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<ModelObject>, ApiError> {
    let service = app.service()?;
    service.check_name(Some(&id))?;
    Ok(Json(describe(&app, service)))
}

fn describe(app: &App, service: &Service) -> ModelObject {
    let card = service.card();
    ModelObject {
        id: card.id.clone(),
        object: "model",
        created: card.created,
        owned_by: "idefics",
        meta: ModelMeta {
            form: match service.form {
                Form::Base => "base",
                Form::Instruct => "instruct",
            },
            context_length: service.backend().max_positions(),
            vocab_size: service.backend().vocab_size(),
            dtype: card.dtype.clone(),
            input_modalities: ["text", "image"],
            max_images: app.options.limits.images,
        },
    }
}
