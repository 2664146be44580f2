//! `POST /v1/chat/completions`: a dialogue in, the assistant's next turn out.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use idefics::{
    Segment,
    dialogue::{DIALOGUE_END_OF_UTTERANCE, Role, Turn, dialogue},
    generate::{Generated, GenerationConfig},
};
use serde_json::Value;

use super::{
    chat_stream, fingerprint, finish_reason, logprobs, refuse_unless_empty,
    types::{
        AnswerMessage, ChatChoice, ChatRequest, ChatResponse, Common, Content, ImageUrl, Message, Part,
        PromptTokensDetails, Usage, WithCommon,
    },
};
use crate::{
    body,
    error::ApiError,
    grammar::AnswerForm,
    ids, media,
    options::Limits,
    sampling::{self, Sampling, count, number},
    service::{self, Ask, Hears, Length, PromptFacts, Service, Words},
    state::{App, Place},
};

/// Bound of lengths in tokens; the model's context is the tighter one.
const MAX_TOKENS: usize = 1 << 20;

/// What all parts of an answer to one request say about it.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

impl Head {
    pub(super) fn new(prefix: &str, service: &Service) -> Self {
        Self {
            id: format!("{prefix}-{}", ids::fresh()),
            created: ids::unix_time(),
            model: service.card().id.clone(),
        }
    }
}

/// Where an answer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// Behind `Assistant:`. The space in front belongs to the form of the dialogue.
    Turn,
    /// Behind words of the assistant, which it continues. A space in front is what keeps the words apart.
    Midst,
}

impl Start {
    /// Of the answer to a dialogue, by what its prompt ends with.
    fn of(turns: &[Turn]) -> Self {
        let last = turns.iter().rfind(|turn| turn.role != Role::System);
        let open = last.filter(|turn| turn.role == Role::Assistant).and_then(|turn| turn.content.last());
        let is_midst = |segment: &Segment| match segment {
            // A space at their end was taken off the prompt, and is not to come twice.
            Segment::Text(words) => words.ends_with(|last: char| !last.is_whitespace()),
            Segment::Image(_) => true,
        };
        if open.is_some_and(is_midst) { Self::Midst } else { Self::Turn }
    }

    /// The text of an answer that begins here.
    pub(super) fn text_of(self, text: &str) -> &str {
        match self {
            Self::Turn => text.trim_start(),
            Self::Midst => text,
        }
    }
}

/// The assistant's answer to a dialogue of texts and pictures.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "OpenAI", request_body = WithCommon<ChatRequest>,
    responses((status = 200, description = "The answer, or server-sent events of `ChatChunk` that end with `[DONE]`",
        body = ChatResponse), (status = 400), (status = 401), (status = 404), (status = 413), (status = 415),
        (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(place): Extension<Arc<Place>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (request, common, upload) = body::read_json_as_both::<ChatRequest, Common>(&app, request).await?;
    let service = app.service()?.clone();
    service.check_name(request.model.as_deref())?;
    let length = Length::of(request.max_completion_tokens.or(request.max_tokens));
    let (config, answers) = options(&app.options.limits, &service, &request, &common)?;
    let answer_form = answer_form(request.response_format.as_ref())?;
    let include_usage = request.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
    let turns = turns(request.messages, &app.options.limits)?;
    let start = Start::of(&turns);
    let words = Words::Segments(dialogue(service.form, &turns), DIALOGUE_END_OF_UTTERANCE);
    let reports_logprobs = config.logprobs.is_some();
    let hears = Hears::of(request.stream);
    let ask = Ask { words, config, length, answer_form, truncate: None, hears, upload: Some(upload), place };
    let answer = service::ask(&app, ask).await?;
    let head = Head::new("chatcmpl", &service);
    if hears == Hears::Tokens {
        let usage = include_usage.then_some(());
        return Ok(chat_stream::respond(&app, service, answer, head, answers, start, usage));
    }
    let prompt = answer.prompt;
    let generated = answer.finish().await?;
    Ok(Json(response(&service, head, prompt, &generated, answers, start, reports_logprobs)).into_response())
}

fn response(
    service: &Service,
    head: Head,
    prompt: PromptFacts,
    generated: &Generated,
    answers: usize,
    start: Start,
    reports_logprobs: bool,
) -> ChatResponse {
    let tokenizer = service.processor().tokenizer();
    let choice = |(index, sequence): (usize, &idefics::generate::Completion)| ChatChoice {
        index,
        message: AnswerMessage {
            role: "assistant",
            content: start.text_of(sequence.text.as_deref().unwrap_or_default()).to_owned(),
            refusal: None,
        },
        logprobs: reports_logprobs.then(|| logprobs::chat(tokenizer, &sequence.logprobs)),
        finish_reason: finish_reason(sequence.finish_reason),
    };
    // Greedy search gives one answer, which is every answer.
    let sequences = generated.sequences.iter().cycle().take(answers);
    ChatResponse {
        id: head.id,
        object: "chat.completion",
        created: head.created,
        model: head.model,
        system_fingerprint: fingerprint(),
        choices: sequences.enumerate().map(choice).collect(),
        usage: usage(prompt, generated),
    }
}

pub(super) fn usage(prompt: PromptFacts, generated: &Generated) -> Usage {
    let usage = generated.usage;
    Usage {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.generated_tokens,
        total_tokens: usage.prompt_tokens + usage.generated_tokens,
        prompt_tokens_details: PromptTokensDetails {
            cached_tokens: usage.cached_tokens,
            image_tokens: prompt.image_tokens,
        },
    }
}

/// The options of a request and how many answers it wants.
fn options(
    limits: &Limits,
    service: &Service,
    request: &ChatRequest,
    common: &Common,
) -> Result<(GenerationConfig, usize), ApiError> {
    refuse_unless_empty("tools", request.tools.as_ref())?;
    refuse_unless_empty("functions", request.functions.as_ref())?;
    if request.modalities.iter().flatten().any(|modality| modality != "text") {
        return Err(ApiError::unsupported("modalities", "any output but text"));
    }
    let answers = answers(limits, common)?;
    let mut config = common_options(limits, service, common, answers)?;
    let max = count("max_completion_tokens", request.max_completion_tokens, 1..=MAX_TOKENS)?.or(count(
        "max_tokens",
        request.max_tokens,
        1..=MAX_TOKENS,
    )?);
    set_lengths(&mut config, max.unwrap_or(limits.default_tokens), common)?;
    config.stop_strings.extend(service.form.stop_strings().iter().map(ToString::to_string));
    config.trim_stop_strings = true;
    let top = count("top_logprobs", request.top_logprobs, 0..=limits.top_logprobs)?;
    config.logprobs = match (request.logprobs.unwrap_or(false), top) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(ApiError::field("top_logprobs", "expected `logprobs` to be true beside it"));
        }
    };
    Ok((config, answers))
}

/// How many answers are returned.
pub(super) fn answers(limits: &Limits, common: &Common) -> Result<usize, ApiError> {
    Ok(count("n", common.n, 1..=limits.answers)?.unwrap_or(1))
}

/// What chat and plain completions have in common, where so many answers are written.
pub(super) fn common_options(
    limits: &Limits,
    service: &Service,
    common: &Common,
    written: usize,
) -> Result<GenerationConfig, ApiError> {
    let penalty = |param, value| number(param, value, |x| (-2.0..=2.0).contains(&x), "from -2 to 2");
    let sampling = Sampling {
        temperature: number("temperature", common.temperature, |x| (0.0..=2.0).contains(&x), "from 0 to 2")?,
        top_p: number("top_p", common.top_p, |x| (0.0..=1.0).contains(&x), "from 0 to 1")?,
        top_k: count("top_k", common.top_k, 0..=MAX_TOKENS)?,
        min_p: number("min_p", common.min_p, |x| (0.0..=1.0).contains(&x), "from 0 to 1")?,
        typical_p: None,
        repetition_penalty: number(
            "repetition_penalty",
            common.repetition_penalty,
            |x| x > 0.0 && x <= 10.0,
            "above 0 and at most 10",
        )?,
        frequency_penalty: penalty("frequency_penalty", common.frequency_penalty)?,
        presence_penalty: penalty("presence_penalty", common.presence_penalty)?,
        seed: sampling::seed(common.seed.as_ref())?,
        do_sample: None,
        answers: written,
    };
    let mut config = service.generation().clone();
    sampling.apply(&mut config);
    let stops = match &common.stop {
        None => Vec::new(),
        Some(super::types::OneOrMany::One(stop)) => vec![stop.clone()],
        Some(super::types::OneOrMany::Many(stops)) => stops.clone(),
    };
    config.stop_strings = sampling::stops("stop", stops, limits.stops)?;
    config.trim_stop_strings = !config.stop_strings.is_empty();
    if let Some(biases) = &common.logit_bias {
        let vocab_size = service.backend().vocab_size();
        config.sequence_bias.extend(sampling::biases(biases, vocab_size, limits.biases)?);
    }
    Ok(config)
}

/// Lengths count new tokens, whatever the checkpoint proposes.
pub(super) fn set_lengths(
    config: &mut GenerationConfig,
    max: usize,
    common: &Common,
) -> Result<(), ApiError> {
    config.max_length = None;
    config.max_new_tokens = Some(max);
    config.min_length = 0;
    config.min_new_tokens = count("min_tokens", common.min_tokens, 0..=max)?.filter(|&min| min > 0);
    Ok(())
}

/// The form that answers must have, if any.
pub(super) fn answer_form(format: Option<&Value>) -> Result<Option<(AnswerForm, &'static str)>, ApiError> {
    const PARAM: &str = "response_format";
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(None) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some((AnswerForm::any_object(), PARAM))),
        Some("json_schema") => match format.pointer("/json_schema/schema") {
            Some(schema) => Ok(Some((AnswerForm::Json(schema.clone()), PARAM))),
            None => Err(ApiError::field("response_format.json_schema", "expected an object with `schema`")),
        },
        _ => Err(ApiError::field("response_format.type", "expected `text`, `json_object` or `json_schema`")),
    }
}

fn turns(messages: Vec<Message>, limits: &Limits) -> Result<Vec<Turn>, ApiError> {
    if messages.is_empty() || messages.len() > limits.messages {
        return Err(ApiError::field("messages", format_args!("expected 1 to {} messages", limits.messages)));
    }
    let turn = |(index, message)| turn(message, &format!("messages[{index}]"));
    messages.into_iter().enumerate().map(turn).collect()
}

fn turn(message: Message, at: &str) -> Result<Turn, ApiError> {
    let role = match message.role.as_str() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" | "function" => return Err(ApiError::unsupported(format!("{at}.role"), "a tool")),
        _ => {
            return Err(ApiError::field(
                format!("{at}.role"),
                "expected `system`, `developer`, `user` or `assistant`",
            ));
        }
    };
    refuse_unless_empty(&format!("{at}.tool_calls"), message.tool_calls.as_ref())?;
    let content = match message.content {
        Some(Content::Text(text)) => vec![Segment::Text(text)],
        Some(Content::Parts(parts)) => {
            let segment = |(index, part)| segment(part, &format!("{at}.content[{index}]"));
            parts.into_iter().enumerate().map(segment).collect::<Result<_, _>>()?
        }
        None if role == Role::Assistant => Vec::new(),
        None => return Err(ApiError::field(format!("{at}.content"), "expected a string or a list of parts")),
    };
    Ok(Turn { role, content })
}

fn segment(part: Part, at: &str) -> Result<Segment, ApiError> {
    match part.kind.as_str() {
        "text" => {
            let missing = || ApiError::field(format!("{at}.text"), "expected a string");
            part.text.map(Segment::Text).ok_or_else(missing)
        }
        "image_url" => match part.image_url {
            Some(ImageUrl::Plain(url) | ImageUrl::Object { url }) => {
                media::source(url, &format!("{at}.image_url")).map(Segment::Image)
            }
            None => {
                Err(ApiError::field(format!("{at}.image_url"), "expected a string or an object with `url`"))
            }
        },
        _ => Err(ApiError::field(format!("{at}.type"), "expected `text` or `image_url`")),
    }
}
