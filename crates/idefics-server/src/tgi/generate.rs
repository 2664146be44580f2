//! `POST /generate` and `/generate_stream`: a prompt in, what follows out.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use idefics::{
    generate::{Completion, Event, FinishReason, Generated, GenerationConfig, TokenLogprob},
    processor::AddEndOfUtterance,
};

use serde_json::Value;

use super::{
    markdown,
    types::{
        BestOfSequence, Details, GenerateRequest, GenerateResponse, Parameters, StreamDetails,
        StreamResponse, Token,
    },
};
use crate::{
    body::{self, Upload},
    error::{ApiError, Dialect},
    grammar::AnswerForm,
    openai::{self, completions::mean_logprob},
    options::Limits,
    sampling::{self, Sampling, count, number},
    service::{self, Answer, Ask, Hears, Length, Next, Service, Words},
    state::{App, Place},
};

/// That server's length of an answer if none is named.
const DEFAULT_TOKENS: usize = 100;

/// What follows the prompt.
#[utoipa::path(post, path = "/generate", tag = "text-generation-inference", request_body = GenerateRequest,
    responses((status = 200, body = GenerateResponse), (status = 422), (status = 424), (status = 429)))]
pub(crate) async fn generate(
    State(app): State<Arc<App>>,
    Extension(place): Extension<Arc<Place>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (request, upload) = body::read_json::<GenerateRequest>(&app, request).await?;
    Ok(Json(answer(&app, place, request, upload).await?).into_response())
}

/// The same, token by token.
#[utoipa::path(post, path = "/generate_stream", tag = "text-generation-inference", request_body = GenerateRequest,
    responses((status = 200, description = "Server-sent events", body = StreamResponse), (status = 422),
        (status = 424), (status = 429)))]
pub(crate) async fn generate_stream(
    State(app): State<Arc<App>>,
    Extension(place): Extension<Arc<Place>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (request, upload) = body::read_json::<GenerateRequest>(&app, request).await?;
    respond_streaming(&app, place, request, upload).await
}

/// `POST /`: a list of one, or a stream.
pub(crate) async fn compat(
    State(app): State<Arc<App>>,
    Extension(place): Extension<Arc<Place>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (request, upload) = body::read_json::<GenerateRequest>(&app, request).await?;
    if request.stream.unwrap_or(false) {
        return respond_streaming(&app, place, request, upload).await;
    }
    Ok(Json([answer(&app, place, request, upload).await?]).into_response())
}

struct Options {
    config: GenerationConfig,
    length: Length,
    answer_form: Option<(AnswerForm, &'static str)>,
    best_of: usize,
    truncate: Option<usize>,
    has_details: bool,
    has_top_tokens: bool,
    returns_full_text: bool,
}

fn options(limits: &Limits, service: &Service, parameters: &Parameters) -> Result<Options, ApiError> {
    let refuse = |is_set, name: &str| {
        if is_set { Err(ApiError::unsupported(name, "this parameter")) } else { Ok(()) }
    };
    refuse(parameters.decoder_input_details == Some(true), "decoder_input_details")?;
    refuse(parameters.watermark == Some(true), "watermark")?;
    refuse(parameters.adapter_id.is_some(), "adapter_id")?;
    let best_of = count("best_of", parameters.best_of, 1..=limits.answers)?.unwrap_or(1);
    let positive = |x: f64| x > 0.0 && x <= 10_000.0;
    let open_unit = |x: f64| x > 0.0 && x <= 1.0;
    let sampling = Sampling {
        temperature: number("temperature", parameters.temperature, positive, "above 0")?,
        top_p: number("top_p", parameters.top_p, open_unit, "above 0 and at most 1")?,
        top_k: count("top_k", parameters.top_k, 1..=1 << 20)?,
        typical_p: number("typical_p", parameters.typical_p, open_unit, "above 0 and at most 1")?,
        repetition_penalty: number("repetition_penalty", parameters.repetition_penalty, positive, "above 0")?,
        frequency_penalty: number(
            "frequency_penalty",
            parameters.frequency_penalty,
            |x| (-2.0..=2.0).contains(&x),
            "from -2 to 2",
        )?,
        seed: sampling::seed(parameters.seed.as_ref())?,
        do_sample: parameters.do_sample.filter(|&sample| sample),
        answers: best_of,
        ..Sampling::default()
    };
    let mut config = service.generation().clone();
    sampling.apply(&mut config);
    config.stop_strings = sampling::stops("stop", parameters.stop.clone().unwrap_or_default(), limits.stops)?;
    // The stop string is part of the answer there.
    config.trim_stop_strings = false;
    config.max_length = None;
    config.min_length = 0;
    config.max_new_tokens =
        Some(count("max_new_tokens", parameters.max_new_tokens, 1..=1 << 20)?.unwrap_or(DEFAULT_TOKENS));
    let top = count("top_n_tokens", parameters.top_n_tokens, 0..=limits.top_logprobs)?.unwrap_or(0);
    config.logprobs = Some(top);
    Ok(Options {
        config,
        length: Length::of(parameters.max_new_tokens),
        answer_form: answer_form(parameters.grammar.as_ref())?,
        best_of,
        truncate: count("truncate", parameters.truncate, 1..=1 << 20)?,
        has_details: parameters.details.unwrap_or(false),
        has_top_tokens: top > 0,
        returns_full_text: parameters.return_full_text.unwrap_or(false),
    })
}

/// The form that the answer must have, if any.
fn answer_form(grammar: Option<&Value>) -> Result<Option<(AnswerForm, &'static str)>, ApiError> {
    const PARAM: &str = "grammar";
    let Some(grammar) = grammar.filter(|grammar| !grammar.is_null()) else { return Ok(None) };
    let form = match (grammar.get("type").and_then(Value::as_str), grammar.get("value")) {
        (Some("json" | "json_object"), Some(schema)) => AnswerForm::Json(schema.clone()),
        (Some("regex"), Some(Value::String(pattern))) => AnswerForm::Regex(pattern.clone()),
        _ => return Err(ApiError::field(PARAM, "expected `type`, `json` or `regex`, and `value`")),
    };
    Ok(Some((form, PARAM)))
}

/// Starts an answer; gives the words to put in front of it as well.
async fn start(
    app: &Arc<App>,
    place: Arc<Place>,
    inputs: &str,
    options: &Options,
    hears: Hears,
    upload: Upload,
) -> Result<(Answer, String), ApiError> {
    let prompt = markdown::parse(inputs)?;
    let front = if options.returns_full_text { service::words_of(&prompt) } else { String::new() };
    let ask = Ask {
        words: Words::Segments(prompt, AddEndOfUtterance::Never),
        config: options.config.clone(),
        length: options.length,
        answer_form: options.answer_form.clone(),
        truncate: options.truncate,
        hears,
        upload: Some(upload),
        place,
    };
    Ok((service::ask(app, ask).await?, front))
}

async fn answer(
    app: &Arc<App>,
    place: Arc<Place>,
    request: GenerateRequest,
    upload: Upload,
) -> Result<GenerateResponse, ApiError> {
    let service = app.service()?.clone();
    let options = options(&app.options.limits, &service, &request.parameters.unwrap_or_default())?;
    let (answer, front) = start(app, place, &request.inputs, &options, Hears::End, upload).await?;
    let generated = answer.finish().await?;
    let mut sequences: Vec<&Completion> = generated.sequences.iter().collect();
    sequences.sort_by(|a, b| mean_logprob(b).total_cmp(&mean_logprob(a)));
    let (best, others) = sequences.split_first().expect("a prompt has an answer");
    let text = |it: &Completion| format!("{front}{}", it.text.as_deref().unwrap_or_default());
    let details = options.has_details.then(|| Details {
        finish_reason: finish_reason(best.finish_reason),
        generated_tokens: best.token_ids.len(),
        seed: generated.seed,
        prefill: Vec::new(),
        tokens: best.logprobs.iter().map(|it| token(&service, it)).collect(),
        top_tokens: options
            .has_top_tokens
            .then(|| best.logprobs.iter().map(|it| top_tokens(&service, it)).collect()),
        best_of_sequences: (options.best_of > 1).then(|| {
            let other = |it: &&Completion| BestOfSequence {
                generated_text: text(it),
                finish_reason: finish_reason(it.finish_reason),
                generated_tokens: it.token_ids.len(),
                seed: generated.seed,
                prefill: Vec::new(),
                tokens: it.logprobs.iter().map(|it| token(&service, it)).collect(),
            };
            others.iter().map(other).collect()
        }),
    });
    Ok(GenerateResponse { generated_text: text(best), details })
}

async fn respond_streaming(
    app: &Arc<App>,
    place: Arc<Place>,
    request: GenerateRequest,
    upload: Upload,
) -> Result<Response, ApiError> {
    let service = app.service()?.clone();
    let options = options(&app.options.limits, &service, &request.parameters.unwrap_or_default())?;
    if options.best_of > 1 {
        return Err(ApiError::unsupported("best_of", "a stream of the best of several"));
    }
    let (answer, front) = start(app, place, &request.inputs, &options, Hears::Tokens, upload).await?;
    let chunks = Chunks { service, answer, text: front, index: 0, last: None };
    let events = stream::unfold(Some(chunks), |chunks| async {
        let mut chunks = chunks?;
        loop {
            match chunks.answer.next().await {
                Ok(Next::Event(event)) if event.finish_reason == Some(FinishReason::Cancelled) => {
                    return Some((openai::error_event(&service::shut_down(), Dialect::Tgi), None));
                }
                Ok(Next::Event(event)) => {
                    if let Some(response) = chunks.event(event) {
                        return Some((openai::data(&response), Some(chunks)));
                    }
                }
                Ok(Next::Finished(generated)) => {
                    let last = chunks.finish(&generated)?;
                    return Some((openai::data(&last), None));
                }
                Err(error) => return Some((openai::error_event(&error, Dialect::Tgi), None)),
            }
        }
    });
    Ok(openai::stream(app, Dialect::Tgi, events))
}

struct Chunks {
    service: Arc<Service>,
    answer: Answer,
    /// The answer so far.
    text: String,
    index: usize,
    /// The last token waits for the counts that come with it.
    last: Option<StreamResponse>,
}

impl Chunks {
    fn event(&mut self, event: Event) -> Option<StreamResponse> {
        self.text.push_str(&event.text);
        let logprob = event.logprob?;
        self.index += 1;
        // The text that is certain by now, so that the texts joined are the answer.
        let token = Token { text: event.text, ..token(&self.service, &logprob) };
        let top_tokens = top_tokens(&self.service, &logprob);
        let response =
            StreamResponse { index: self.index, token, top_tokens, generated_text: None, details: None };
        if event.finish_reason.is_some() {
            self.last = Some(response);
            return None;
        }
        Some(response)
    }

    fn finish(&mut self, generated: &Generated) -> Option<StreamResponse> {
        let sequence = generated.sequences.first()?;
        let details = StreamDetails {
            finish_reason: finish_reason(sequence.finish_reason),
            generated_tokens: sequence.token_ids.len(),
            seed: generated.seed,
            input_length: generated.usage.prompt_tokens,
        };
        let last = self.last.take()?;
        Some(StreamResponse {
            generated_text: Some(std::mem::take(&mut self.text)),
            details: Some(details),
            ..last
        })
    }
}

/// Why an answer ended, in this dialect's words.
fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::EndToken(_) => "eos_token",
        FinishReason::StopString(_) => "stop_sequence",
        FinishReason::Length | FinishReason::Time | FinishReason::Cancelled => "length",
    }
}

fn token(service: &Service, it: &TokenLogprob) -> Token {
    token_of(service, it.token_id, it.logprob)
}

fn top_tokens(service: &Service, it: &TokenLogprob) -> Vec<Token> {
    it.top.iter().map(|&(id, logprob)| token_of(service, id, logprob)).collect()
}

fn token_of(service: &Service, id: u32, logprob: f32) -> Token {
    let tokenizer = service.processor().tokenizer();
    Token {
        id,
        text: String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned(),
        // JSON has no infinity.
        logprob: logprob.max(f32::MIN),
        special: tokenizer.is_special_token(id),
    }
}
