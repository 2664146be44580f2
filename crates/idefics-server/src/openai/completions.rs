//! `POST /v1/completions`: prompts in, what follows out. Words are taken as they are, special tokens included.

use std::{collections::VecDeque, sync::Arc};

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response, sse::Event as SseEvent},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{
    StreamExt,
    future::try_join_all,
    stream::{self, SelectAll},
};
use idefics::{
    Prompt, Segment,
    generate::{Completion, Event, FinishReason, Generated, GenerationConfig},
    processor::{AddEndOfUtterance, ImageSource, SpecialTokenText},
};

use super::{
    chat::{Head, answer_form, answers, common_options, set_lengths, usage},
    data, error_event, fingerprint, finish_reason, logprobs, refuse_unless_empty,
    types::{
        Common, CompletionChoice, CompletionRequest, CompletionResponse, PromptForm, PromptWithImages, Usage,
        WithCommon,
    },
};
use crate::{
    body,
    error::{ApiError, Dialect},
    media,
    options::Limits,
    sampling::count,
    service::{self, Answer, Ask, Hears, Length, Next, Service, Words},
    state::{App, Place},
};

/// Where a picture stands in the words of llama.cpp's form.
const MEDIA_MARKER: &str = "<__media__>";

/// `OpenAI`'s length of an answer if none is named.
const DEFAULT_TOKENS: usize = 16;

/// What follows the prompts.
#[utoipa::path(post, path = "/v1/completions", tag = "OpenAI", request_body = WithCommon<CompletionRequest>,
    responses((status = 200, description = "The answers, or server-sent events of the same shape that end with `[DONE]`",
        body = CompletionResponse), (status = 400), (status = 401), (status = 404), (status = 413), (status = 415),
        (status = 422), (status = 429), (status = 503)))]
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Extension(place): Extension<Arc<Place>>,
    request: Request,
) -> Result<Response, ApiError> {
    let (request, common, upload) =
        body::read_json_as_both::<CompletionRequest, Common>(&app, request).await?;
    let service = app.service()?.clone();
    service.check_name(request.model.as_deref())?;
    let limits = &app.options.limits;
    let length = Length::of(request.max_tokens);
    let options = options(limits, &service, &request, &common)?;
    let hears = Hears::of(request.stream);
    if hears == Hears::Tokens && options.written > options.answers {
        return Err(ApiError::unsupported("best_of", "a stream of the best of several"));
    }
    let answer_form = answer_form(request.response_format.as_ref())?;
    let prompts = prompts(request.prompt, limits)?;
    let include_usage = request.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
    let echoes = if request.echo.unwrap_or(false) {
        if options.config.logprobs.is_some() {
            return Err(ApiError::unsupported("echo", "`echo` beside `logprobs`"));
        }
        prompts.iter().map(|words| spell(&service, words)).collect()
    } else {
        vec![String::new(); prompts.len()]
    };
    let mut upload = Some(upload);
    let last = prompts.len() - 1;
    let asks = prompts.into_iter().enumerate().map(|(index, words)| Ask {
        words,
        config: options.config.clone(),
        length,
        answer_form: answer_form.clone(),
        truncate: None,
        hears,
        upload: if index == last { upload.take() } else { None },
        place: place.clone(),
    });
    let answers = try_join_all(asks.map(|ask| service::ask(&app, ask))).await?;
    let head = Head::new("cmpl", &service);
    if hears == Hears::Tokens {
        return Ok(respond_streaming(&app, service, answers, head, &options, &echoes, include_usage));
    }
    let facts: Vec<_> = answers.iter().map(|answer| answer.prompt).collect();
    let all = try_join_all(answers.into_iter().map(Answer::finish)).await?;
    let mut choices = Vec::with_capacity(all.len() * options.answers);
    let mut total = Usage::default();
    for ((generated, facts), echo) in all.iter().zip(facts).zip(&echoes) {
        add(&mut total, &usage(facts, generated));
        for completion in best(generated, &options).into_iter().cycle().take(options.answers) {
            choices.push(choice(&service, choices.len(), completion, echo, &options));
        }
    }
    let response = CompletionResponse {
        id: &head.id,
        object: "text_completion",
        created: head.created,
        model: &head.model,
        system_fingerprint: fingerprint(),
        choices,
        usage: Some(total),
    };
    Ok(Json(response).into_response())
}

struct Options {
    config: GenerationConfig,
    /// Returned for each prompt.
    answers: usize,
    /// Written for each prompt.
    written: usize,
    reports_logprobs: bool,
}

fn options(
    limits: &Limits,
    service: &Service,
    request: &CompletionRequest,
    common: &Common,
) -> Result<Options, ApiError> {
    if request.suffix.as_ref().and_then(serde_json::Value::as_str) != Some("") {
        refuse_unless_empty("suffix", request.suffix.as_ref())?;
    }
    let answers = answers(limits, common)?;
    let written = count("best_of", request.best_of, answers..=limits.answers)?.unwrap_or(answers);
    let mut config = common_options(limits, service, common, written)?;
    let max = count("max_tokens", request.max_tokens, 1..=1 << 20)?.unwrap_or(DEFAULT_TOKENS);
    set_lengths(&mut config, max, common)?;
    config.logprobs = count("logprobs", request.logprobs, 0..=limits.top_logprobs)?;
    let reports_logprobs = config.logprobs.is_some();
    if written > answers {
        // What the best are chosen by.
        config.logprobs.get_or_insert(0);
    }
    Ok(Options { config, answers, written, reports_logprobs })
}

fn prompts(form: PromptForm, limits: &Limits) -> Result<Vec<Words>, ApiError> {
    let text = |text| Words::Segments(vec![Segment::Text(text)], AddEndOfUtterance::Never);
    let prompts = match form {
        PromptForm::Text(one) => vec![text(one)],
        PromptForm::Texts(many) => many.into_iter().map(text).collect(),
        // An empty list has no kind.
        PromptForm::Ids(ids) if ids.is_empty() => Vec::new(),
        PromptForm::Ids(ids) => vec![Words::Ids(ids)],
        PromptForm::ManyIds(many) => many.into_iter().map(Words::Ids).collect(),
        PromptForm::WithImages(one) => vec![with_images(one)?],
        PromptForm::ManyWithImages(many) => many.into_iter().map(with_images).collect::<Result<_, _>>()?,
    };
    if prompts.is_empty() || prompts.len() > limits.prompts {
        return Err(ApiError::field("prompt", format_args!("expected 1 to {} prompts", limits.prompts)));
    }
    Ok(prompts)
}

fn with_images(prompt: PromptWithImages) -> Result<Words, ApiError> {
    let PromptWithImages { prompt_string, multimodal_data } = prompt;
    let expected = prompt_string.matches(MEDIA_MARKER).count();
    if expected != multimodal_data.len() {
        let got = multimodal_data.len();
        return Err(ApiError::field(
            "prompt.multimodal_data",
            format_args!("expected a picture for each `{MEDIA_MARKER}`: {expected}, got {got}"),
        ));
    }
    let mut images = multimodal_data.into_iter();
    let mut segments = Prompt::new();
    for (index, text) in prompt_string.split(MEDIA_MARKER).enumerate() {
        if index > 0
            && let Some(image) = images.next()
        {
            segments.push(Segment::Image(base64_image(image)?));
        }
        if !text.is_empty() {
            segments.push(Segment::text(text));
        }
    }
    Ok(Words::Segments(segments, AddEndOfUtterance::Never))
}

fn base64_image(data: String) -> Result<ImageSource, ApiError> {
    if data.starts_with("data:") {
        return media::source(data, "prompt.multimodal_data");
    }
    let bytes = BASE64_STANDARD
        .decode(data)
        .map_err(|_| ApiError::field("prompt.multimodal_data", "expected base64 or `data:` URIs"))?;
    Ok(ImageSource::Bytes(bytes.into()))
}

/// A prompt as it is put in front of its answer.
fn spell(service: &Service, words: &Words) -> String {
    match words {
        Words::Segments(prompt, _) => service::words_of(prompt),
        Words::Ids(ids) => service.processor().decode(ids, SpecialTokenText::Skip).unwrap_or_default(),
    }
}

/// Of the answers that were written, those to return: by the mean log-probability of their tokens.
fn best<'a>(generated: &'a Generated, options: &Options) -> Vec<&'a Completion> {
    let mut sequences: Vec<_> = generated.sequences.iter().collect();
    if options.written > options.answers {
        sequences.sort_by(|a, b| mean_logprob(b).total_cmp(&mean_logprob(a)));
        sequences.truncate(options.answers);
    }
    sequences
}

pub(crate) fn mean_logprob(completion: &Completion) -> f32 {
    let sum: f32 = completion.logprobs.iter().map(|it| it.logprob).sum();
    sum / completion.logprobs.len().max(1) as f32
}

fn choice(
    service: &Service,
    index: usize,
    completion: &Completion,
    echo: &str,
    options: &Options,
) -> CompletionChoice {
    let tokenizer = service.processor().tokenizer();
    let logprobs = options
        .reports_logprobs
        .then(|| logprobs::completion(tokenizer, &completion.logprobs, echo.chars().count()));
    CompletionChoice {
        index,
        text: format!("{echo}{}", completion.text.as_deref().unwrap_or_default()),
        logprobs,
        finish_reason: Some(finish_reason(completion.finish_reason)),
    }
}

fn add(total: &mut Usage, more: &Usage) {
    total.prompt_tokens += more.prompt_tokens;
    total.completion_tokens += more.completion_tokens;
    total.total_tokens += more.total_tokens;
    total.prompt_tokens_details.cached_tokens += more.prompt_tokens_details.cached_tokens;
    total.prompt_tokens_details.image_tokens += more.prompt_tokens_details.image_tokens;
}

/// What the stream of one prompt says.
type Item = (usize, Result<Next, ApiError>);

fn respond_streaming(
    app: &App,
    service: Arc<Service>,
    answers: Vec<Answer>,
    head: Head,
    options: &Options,
    echoes: &[String],
    include_usage: bool,
) -> Response {
    let facts = answers.iter().map(|answer| answer.prompt).collect();
    let is_sampled = options.config.do_sample;
    let streams = answers.into_iter().enumerate().map(|(index, answer)| {
        let items = stream::unfold(Some(answer), move |answer| async move {
            let mut answer = answer?;
            let next = answer.next().await;
            let is_last = !matches!(next, Ok(Next::Event(_)));
            Some(((index, next), (!is_last).then_some(answer)))
        });
        items.boxed()
    });
    let items: SelectAll<stream::BoxStream<'static, Item>> = stream::select_all(streams);
    let mut chunks = Chunks {
        service,
        head,
        answers: options.answers,
        is_sampled,
        include_usage,
        offsets: vec![0; echoes.len() * options.answers],
        facts,
        total: Usage::default(),
        ready: VecDeque::new(),
    };
    for (prompt, echo) in echoes.iter().enumerate().filter(|(_, echo)| !echo.is_empty()) {
        for answer in 0..options.answers {
            chunks.push(prompt, answer, echo.clone(), None, None);
        }
    }
    let events = stream::unfold(Some((items, chunks)), |state| async {
        let (mut items, mut chunks) = state?;
        loop {
            if let Some(event) = chunks.ready.pop_front() {
                return Some((event, Some((items, chunks))));
            }
            match items.next().await {
                Some((prompt, Ok(Next::Event(event)))) => {
                    if event.finish_reason == Some(FinishReason::Cancelled) {
                        return Some((error_event(&service::shut_down(), Dialect::OpenAi), None));
                    }
                    chunks.event(prompt, &event);
                }
                Some((prompt, Ok(Next::Finished(generated)))) => {
                    add(&mut chunks.total, &usage(chunks.facts[prompt], &generated));
                }
                Some((_, Err(error))) => return Some((error_event(&error, Dialect::OpenAi), None)),
                None => {
                    if std::mem::take(&mut chunks.include_usage) {
                        chunks.push_usage();
                        continue;
                    }
                    return Some((SseEvent::default().data("[DONE]"), None));
                }
            }
        }
    });
    super::stream(app, Dialect::OpenAi, events)
}

struct Chunks {
    service: Arc<Service>,
    head: Head,
    answers: usize,
    is_sampled: bool,
    include_usage: bool,
    /// Characters that were sent of each choice.
    offsets: Vec<usize>,
    facts: Vec<service::PromptFacts>,
    total: Usage,
    ready: VecDeque<SseEvent>,
}

impl Chunks {
    fn event(&mut self, prompt: usize, event: &Event) {
        // Greedy search gives one answer, which is every answer.
        for answer in 0..self.answers {
            if answer == event.sequence || !self.is_sampled {
                let reason = event.finish_reason.map(finish_reason);
                if !event.text.is_empty() || event.logprob.is_some() || reason.is_some() {
                    self.push(prompt, answer, event.text.clone(), Some(event), reason);
                }
            }
        }
    }

    fn push(
        &mut self,
        prompt: usize,
        answer: usize,
        text: String,
        event: Option<&Event>,
        finish_reason: Option<&'static str>,
    ) {
        let index = prompt * self.answers + answer;
        let tokenizer = self.service.processor().tokenizer();
        let logprob = event.and_then(|event| event.logprob.as_ref());
        let logprobs =
            logprob.map(|it| logprobs::completion(tokenizer, std::slice::from_ref(it), self.offsets[index]));
        self.offsets[index] += text.chars().count();
        let choice = CompletionChoice { index, text, logprobs, finish_reason };
        self.push_chunk(vec![choice], None);
    }

    fn push_usage(&mut self) {
        self.push_chunk(Vec::new(), Some(self.total));
    }

    fn push_chunk(&mut self, choices: Vec<CompletionChoice>, usage: Option<Usage>) {
        let chunk = CompletionResponse {
            id: &self.head.id,
            object: "text_completion",
            created: self.head.created,
            model: &self.head.model,
            system_fingerprint: fingerprint(),
            choices,
            usage,
        };
        self.ready.push_back(data(&chunk));
    }
}
