//! `POST /tokenize`: the tokens of a prompt and where each stands.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::header,
    response::{IntoResponse, Response},
};
use idefics::processor::{AddEndOfUtterance, ProcessOptions};

use super::{
    markdown,
    types::{SimpleToken, TokenizeRequest},
};
use crate::{
    body,
    error::{ApiError, Kind},
    media,
    state::App,
};

/// The tokens of a prompt. Places are those in the prompt's string, in which a picture is `<image>` between two
/// `<fake_token_around_image>`. Pictures are not looked at. Words that no context has room for are refused.
#[utoipa::path(post, path = "/tokenize", tag = "text-generation-inference", request_body = TokenizeRequest,
    responses((status = 200, body = Vec<SimpleToken>), (status = 422)))]
pub(crate) async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (request, upload) = body::read_json::<TokenizeRequest>(&app, request).await?;
    let service = app.service()?.clone();
    let prompt = markdown::parse(&request.inputs)?;
    media::check_count(&prompt, &app.options.limits)?;
    media::check_bytes(&service, &prompt, service.backend().max_positions())?;
    let work = move || {
        let _held = upload;
        let options =
            ProcessOptions { add_end_of_utterance: AddEndOfUtterance::Never, ..ProcessOptions::default() };
        let processor = service.processor();
        let text = processor.prompt_text(&prompt, &options)?;
        let tokens = processor.tokenizer().encode_with_places(&text);
        let tokens =
            tokens.map_err(|_| ApiError::new(Kind::Internal, "the prompt could not be tokenized"))?;
        let token = |(id, place): (u32, std::ops::Range<usize>)| SimpleToken {
            id,
            text: String::from_utf8_lossy(&processor.tokenizer().token_bytes(id)).into_owned(),
            start: place.start,
            stop: place.end,
        };
        // Written here as well: an answer has many times the bytes of its words.
        let tokens: Vec<SimpleToken> = tokens.into_iter().map(token).collect();
        serde_json::to_vec(&tokens)
            .map_err(|_| ApiError::new(Kind::Internal, "the tokens could not be written"))
    };
    let json = media::aside(&app, work).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}
