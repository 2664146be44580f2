//! Broken promises inside: the model panics, or the server does around it. That request ends in an error of its
//! dialect, all others are answered, and no word of a panic is told.

use std::sync::Arc;

use axum::body::Body;
use idefics::{
    Idefics, SequenceInputs,
    generate::{EngineOptions, GenerationConfig, Rejected, Row, Stats, StepModel, Submission, Ticket},
    processor::PixelValues,
};
use serde_json::{Value, json};

use crate::{
    backend::Backend,
    options::ServerOptions,
    testing::{Reply, TestServer, loaded, loaded_as, picture, post},
};

/// What panics say here: it must be found nowhere.
const WORDS: &str = "words of a user";

/// A model that panics where it reads one token, or any picture.
struct Fragile {
    model: Idefics,
    breaks_at: Option<u32>,
}

impl StepModel for Fragile {
    type Image = <Idefics as StepModel>::Image;
    type Cache = <Idefics as StepModel>::Cache;
    type Error = <Idefics as StepModel>::Error;

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn max_positions(&self) -> usize {
        self.model.max_positions()
    }

    fn encode_images(&self, images: &[&PixelValues]) -> Result<Vec<Self::Image>, Self::Error> {
        assert!(images.is_empty(), "{WORDS}");
        self.model.encode_images(images)
    }

    fn new_cache(&self, images: Vec<Self::Image>) -> Self::Cache {
        self.model.new_cache(images)
    }

    fn truncate(&self, cache: &mut Self::Cache, tokens: usize) {
        self.model.truncate(cache, tokens);
    }

    fn set_images(&self, cache: &mut Self::Cache, images: Vec<Self::Image>) {
        self.model.set_images(cache, images);
    }

    fn cache_bytes(&self, tokens: usize) -> usize {
        self.model.cache_bytes(tokens)
    }

    fn image_bytes(&self, image: &PixelValues) -> usize {
        self.model.image_bytes(image)
    }

    fn weight_bytes(&self) -> usize {
        self.model.weight_bytes()
    }

    fn step(&self, rows: &mut [Row<'_, Self::Cache>]) -> Result<Vec<Vec<f32>>, Self::Error> {
        let breaks = |row: &Row<'_, Self::Cache>| row.token_ids.iter().any(|&id| Some(id) == self.breaks_at);
        assert!(!rows.iter().any(breaks), "{WORDS}");
        self.model.step(rows)
    }
}

/// An engine that panics on the thread of its caller.
struct Trap(Arc<dyn Backend>);

impl Backend for Trap {
    fn submit(&self, submission: Submission) -> Result<Ticket, Rejected> {
        assert!(submission.inputs.token_ids.len() < 12, "{WORDS}");
        self.0.submit(submission)
    }

    fn longest_answer(&self, inputs: &SequenceInputs, config: &GenerationConfig) -> usize {
        self.0.longest_answer(inputs, config)
    }

    fn stats(&self) -> Stats {
        self.0.stats()
    }

    fn max_positions(&self) -> usize {
        self.0.max_positions()
    }

    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn stop(&self) {
        self.0.stop();
    }
}

/// A request for each route that generates.
fn requests(words: &str) -> [(&'static str, Value); 7] {
    let messages = json!([{"role": "user", "content": words}]);
    let parameters = json!({"max_new_tokens": 4});
    [
        ("/v1/chat/completions", json!({"messages": messages, "max_tokens": 4})),
        ("/v1/chat/completions", json!({"messages": messages, "max_tokens": 4, "stream": true})),
        ("/v1/completions", json!({"prompt": ["Hi", words], "max_tokens": 4})),
        ("/v1/completions", json!({"prompt": words, "max_tokens": 4, "stream": true})),
        ("/generate", json!({"inputs": words, "parameters": parameters})),
        ("/generate_stream", json!({"inputs": words, "parameters": parameters})),
        ("/", json!({"inputs": words, "parameters": parameters})),
    ]
}

fn speaks_tgi(path: &str) -> bool {
    !path.starts_with("/v1")
}

/// The error in the shape of the route's dialect, whole or as the last event of a stream.
fn check_error(path: &str, reply: &Reply, expected: (u16, &str), tgi: (u16, &str)) {
    let (status, kind) = if speaks_tgi(path) { tgi } else { expected };
    let error = if reply.status == 200 {
        let events = reply.events();
        assert!(!reply.body.contains("[DONE]"), "{path}: {}", reply.body);
        serde_json::from_str(events.last().unwrap()).unwrap()
    } else {
        assert_eq!(reply.status, status, "{path}: {}", reply.body);
        reply.json()
    };
    if speaks_tgi(path) {
        assert_eq!(error["error_type"], kind, "{path}: {error}");
        assert!(error["error"].as_str().is_some_and(|words| !words.is_empty()), "{path}: {error}");
    } else {
        assert_eq!(error["error"]["type"], kind, "{path}: {error}");
        assert!(error["error"]["message"].is_string(), "{path}: {error}");
    }
    assert!(!reply.body.contains(WORDS), "{path}: {}", reply.body);
    assert!(reply.headers.contains_key("x-request-id"), "{path}");
}

/// A server whose model breaks at the last token of `Hello Q`, unless `is_sound`.
fn fragile_server() -> TestServer {
    let breaks_at = {
        let loaded = loaded("tiny", EngineOptions::default());
        let id = *loaded.processor.tokenize("Hello Q").unwrap().last().unwrap();
        assert!(!loaded.processor.tokenize("Hello").unwrap().contains(&id));
        Some(id)
    };
    let model = loaded_as("tiny", EngineOptions::default(), |model| Fragile { model, breaks_at });
    TestServer::of(model, ServerOptions::default())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_panics_fails_one_request_and_leaves_the_others_their_answers() {
    let (sound, server) = (TestServer::new(), fragile_server());
    for ((path, bad), (_, good)) in requests("Hello Q").into_iter().zip(requests("Hello")) {
        // Both at once, so that they meet in a step.
        let (failed, answered) = tokio::join!(server.send(post(path, &bad)), server.send(post(path, &good)));
        check_error(path, &failed, (500, "server_error"), (424, "generation"));
        assert_eq!(answered.status, 200, "{path}: {}", answered.body);
        let expected = sound.post(path, &good).await;
        assert_eq!(texts(&answered), texts(&expected), "{path}");
        assert_eq!(server.app.requests_in_progress(), 0, "{path}");
    }
    let messages = json!([{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": picture("444.jpg")}}]}]);
    let seen = server.post("/v1/chat/completions", &json!({"messages": messages})).await;
    check_error("/v1/chat/completions", &seen, (500, "server_error"), (0, ""));
    assert_eq!(server.get("/health").await.status, 200);
    let metrics = server.get("/metrics").await.body;
    assert!(metrics.lines().any(|line| line == "idefics_answers_failed_total 8"), "{metrics}");
}

/// All that was written, in either dialect, whole or streamed.
fn texts(reply: &Reply) -> String {
    let whole = serde_json::from_str::<Value>(&reply.body).map(|json| vec![json]);
    let parts = whole.unwrap_or_else(|_| {
        let events = reply.events();
        events.iter().filter_map(|event| serde_json::from_str(event).ok()).collect()
    });
    let mut text = String::new();
    for part in &parts {
        let choices = part["choices"].as_array().into_iter().flatten();
        let generated = part.as_array().into_iter().flatten().chain([part]);
        let words = choices
            .flat_map(|it| [&it["message"]["content"], &it["delta"]["content"], &it["text"]])
            .chain(generated.map(|it| &it["generated_text"]));
        words.filter_map(Value::as_str).for_each(|words| text.push_str(words));
    }
    assert!(!text.is_empty(), "{}", reply.body);
    text
}

#[tokio::test]
async fn a_handler_that_panics_fails_its_request_alone() {
    let mut loaded = loaded("tiny", EngineOptions::default());
    loaded.backend = Arc::new(Trap(loaded.backend));
    let server = TestServer::of(loaded, ServerOptions::default());
    for (path, request) in requests("a b c d e f g h i j k l m n") {
        let reply = server.post(path, &request).await;
        assert_ne!(reply.status, 200, "{path}");
        check_error(path, &reply, (500, "server_error"), (500, "incomplete_generation"));
        assert_eq!(server.app.requests_in_progress(), 0, "{path}: the place is given back");
        let short = json!({"inputs": "Hi", "parameters": {"max_new_tokens": 1}});
        assert_eq!(server.post("/generate", &short).await.status, 200, "after {path}");
    }
}

#[tokio::test]
async fn a_stream_whose_making_panics_ends_in_an_error() {
    use axum::response::sse::Event;
    use futures_util::{StreamExt, stream};
    use http_body_util::BodyExt;

    use crate::{error::Dialect, openai};

    let server = TestServer::new();
    for (dialect, expected) in [
        (
            Dialect::OpenAi,
            json!({"message": "the server failed", "type": "server_error", "param": null, "code": null}),
        ),
        (Dialect::Tgi, json!("the server failed")),
    ] {
        let events = stream::iter(0..3).map(|index| {
            assert!(index < 1, "{WORDS}");
            Event::default().data("one")
        });
        let body: Body = openai::stream(&server.app, dialect, events).into_body();
        let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        let (first, last) = body.trim_end().split_once("\n\n").unwrap();
        assert_eq!(first, "data: one");
        let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(error["error"], expected, "{dialect:?}");
    }
}
