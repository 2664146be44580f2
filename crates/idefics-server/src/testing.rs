//! A server on the small random model of the fixtures, and requests to it without a socket.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    http::{Request, Response, header},
};
use http_body_util::BodyExt;
use idefics::{
    Idefics, LoadOptions, Processor,
    generate::{Engine, EngineOptions, StepModel},
};
use idefics_testing::fixture;
use serde_json::Value;
use tower::ServiceExt;

use crate::{
    backend::Backend,
    options::ServerOptions,
    router::router,
    service::{Loaded, ModelCard, Service},
    state::App,
    trace::Exporter,
};

/// The name of the test model.
pub(crate) const MODEL: &str = "tiny";

/// A server with a model of `fixtures/`.
pub(crate) struct TestServer {
    pub(crate) app: Arc<App>,
    pub(crate) engine: Arc<dyn Backend>,
    router: Router,
}

/// What came back.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: axum::http::HeaderMap,
    pub(crate) body: String,
}

pub(crate) fn loaded(model: &str, options: EngineOptions) -> Loaded {
    loaded_as(model, options, |model| model)
}

/// The same with something around the model.
pub(crate) fn loaded_as<M: StepModel + Send + Sync + 'static>(
    model: &str,
    options: EngineOptions,
    wrap: impl FnOnce(Idefics) -> M,
) -> Loaded {
    let directory = fixture(model);
    let processor = Processor::from_pretrained(&directory).unwrap();
    let model = Idefics::from_pretrained(&directory, &LoadOptions::default()).unwrap();
    let generation = model.default_generation(Some(processor.special_tokens())).unwrap();
    let backend = Engine::start(Arc::new(wrap(model)), Arc::new(processor.clone()), options).unwrap();
    let card = ModelCard {
        id: MODEL.to_owned(),
        aliases: vec!["other-name".to_owned()],
        created: 1_700_000_000,
        dtype: "f32".to_owned(),
    };
    Loaded { backend: Arc::new(backend), processor, generation, card }
}

impl TestServer {
    pub(crate) fn new() -> Self {
        Self::with(ServerOptions::default())
    }

    pub(crate) fn with(options: ServerOptions) -> Self {
        Self::of(loaded("tiny", EngineOptions::default()), options)
    }

    pub(crate) fn base() -> Self {
        Self::of(loaded("tiny-base", EngineOptions::default()), ServerOptions::default())
    }

    pub(crate) fn of(loaded: Loaded, options: ServerOptions) -> Self {
        let server = Self::loading(options);
        let engine = loaded.backend.clone();
        server.app.set_ready(Arc::new(Service::new(loaded)));
        Self { engine, ..server }
    }

    /// One whose model is not there yet.
    pub(crate) fn loading(options: ServerOptions) -> Self {
        let traces = Exporter::start(&options.traces).unwrap();
        let app = Arc::new(App::new(options, traces));
        Self { router: router(&app).unwrap(), app, engine: Arc::new(NoEngine) }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.start(request).await;
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        Reply { status, headers, body: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    /// The response as soon as its head is there.
    pub(crate) async fn start(&self, request: Request<Body>) -> Response<Body> {
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, json: &Value) -> Reply {
        self.send(post(path, json)).await
    }
}

pub(crate) fn post(path: &str, json: &Value) -> Request<Body> {
    let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
    request.body(Body::from(json.to_string())).unwrap()
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The data of server-sent events.
    pub(crate) fn events(&self) -> Vec<String> {
        let events = self.body.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        events.map(str::to_owned).collect()
    }

    /// The same as JSON, without the `[DONE]` that must end them.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.body);
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// Stands where a model is not loaded yet.
struct NoEngine;

impl Backend for NoEngine {
    fn submit(
        &self,
        _submission: idefics::generate::Submission,
    ) -> Result<idefics::generate::Ticket, idefics::generate::Rejected> {
        Err(idefics::generate::Rejected::ShuttingDown)
    }

    fn longest_answer(
        &self,
        _inputs: &idefics::SequenceInputs,
        _config: &idefics::generate::GenerationConfig,
    ) -> usize {
        0
    }

    fn stats(&self) -> idefics::generate::Stats {
        idefics::generate::Stats::default()
    }

    fn max_positions(&self) -> usize {
        0
    }

    fn vocab_size(&self) -> usize {
        0
    }

    fn stop(&self) {}
}

/// A picture of the fixtures as a `data:` URI.
pub(crate) fn picture(name: &str) -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    let bytes = std::fs::read(fixture(&format!("processor/{name}"))).unwrap();
    format!("data:image/jpeg;base64,{}", BASE64_STANDARD.encode(bytes))
}
