//! Keys, hosts, readiness, pages, metrics, request ids.

use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use axum::{
    body::Body,
    http::{Request, header},
};
use idefics::{
    LoadOptions,
    generate::{EngineOptions, Memory, StepModel},
};
use idefics_testing::fixture;
use serde_json::json;

use crate::{
    auth::ApiKeys,
    options::{Limits, ServerOptions},
    testing::{MODEL, TestServer, loaded, post},
};

const ROUTES: [&str; 11] = [
    "/",
    "/chat.css",
    "/chat.js",
    "/docs",
    "/v1/models",
    "/info",
    "/health",
    "/metrics",
    "/openapi.json",
    "/v1/models/tiny",
    "/nothing-here",
];

#[tokio::test]
async fn a_key_is_asked_for_everywhere_but_for_a_sign_of_life() {
    let keys = ApiKeys::parse("a-secret-key", "test").unwrap();
    let server = TestServer::with(ServerOptions { keys, ..ServerOptions::default() });
    for path in ROUTES {
        assert_eq!(server.get(path).await.status, 401, "{path}");
        let request = Request::get(path).header(header::AUTHORIZATION, "Bearer a-secret-key");
        let status = server.send(request.body(Body::empty()).unwrap()).await.status;
        assert_eq!(status, if path == "/nothing-here" { 404 } else { 200 }, "{path}");
    }
    assert_eq!(server.get("/livez").await.status, 200);
    for path in ["/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream", "/tokenize", "/"]
    {
        let reply = server.post(path, &json!({"anything": 1})).await;
        assert_eq!(reply.status, 401, "{path}");
        assert!(reply.headers.contains_key(header::WWW_AUTHENTICATE));
    }
    let error = server.get("/v1/models").await.json();
    assert_eq!(error["error"]["type"], "authentication_error");
    assert_eq!(server.get("/info").await.json()["error_type"], "unauthorized");
    let challenge = |reply: crate::testing::Reply| reply.headers[header::WWW_AUTHENTICATE].clone();
    assert_eq!(challenge(server.get("/").await), "Basic realm=\"idefics\"", "a browser can open the page");
    assert_eq!(challenge(server.get("/v1/models").await), "Bearer");
}

#[tokio::test]
async fn until_there_is_a_model_everything_is_503() {
    let server = TestServer::loading(ServerOptions::default());
    for path in ["/health", "/v1/models", "/info"] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, 503, "{path}");
        assert!(reply.headers.contains_key(header::RETRY_AFTER), "{path}");
    }
    for path in ["/v1/chat/completions", "/v1/completions", "/generate", "/tokenize"] {
        let reply = server.post(path, &json!({"anything": 1})).await;
        assert_eq!(reply.status, 503, "{path}: {}", reply.body);
    }
    assert_eq!(server.get("/livez").await.status, 200);
    assert_eq!(server.get("/").await.status, 200);
    assert!(server.get("/metrics").await.body.contains("idefics_ready 0"));

    let server = TestServer::new();
    assert_eq!(server.get("/health").await.json(), json!({"status": "ok", "model": MODEL}));
    server.app.set_draining();
    let reply = server.get("/health").await;
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (503, Some("shutting_down")));
}

#[tokio::test]
async fn a_full_house_is_429_with_a_time() {
    let limits = Limits { requests: 1, ..Limits::default() };
    let server = TestServer::with(ServerOptions { limits, ..ServerOptions::default() });
    let held = server.app.place(Arc::default()).unwrap();
    for (path, kind) in [("/v1/chat/completions", "error"), ("/generate", "error_type")] {
        let reply = server.post(path, &json!({"messages": [], "inputs": "x"})).await;
        assert_eq!(reply.status, 429, "{}", reply.body);
        assert!(reply.headers[header::RETRY_AFTER].to_str().unwrap().parse::<u32>().unwrap() >= 1);
        assert!(reply.json().get(kind).is_some());
    }
    drop(held);
    let reply = server.post("/generate", &json!({"inputs": "x", "parameters": {"max_new_tokens": 1}})).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(server.app.requests_in_progress(), 0, "places are given back");
}

#[tokio::test]
async fn wrong_routes_methods_types_and_bodies_have_their_statuses() {
    let limits = Limits { body_bytes: 1000, ..Limits::default() };
    let server = TestServer::with(ServerOptions { limits, ..ServerOptions::default() });
    let chat = "/v1/chat/completions";
    assert_eq!(server.get("/v2/anything").await.status, 404);
    assert_eq!(server.get(chat).await.status, 405);
    assert_eq!(server.post("/v1/models", &json!({})).await.status, 405);
    let raw = |body: &str, content_type: &str| {
        Request::post(chat)
            .header(header::CONTENT_TYPE, content_type)
            .body(Body::from(body.to_owned()))
            .unwrap()
    };
    for (request, status) in [
        (raw("{}", "text/plain"), 415),
        (raw("{\"messages\": ", "application/json"), 400),
        (raw("not json", "application/json"), 400),
        (raw("", "application/json"), 400),
        (raw("{}", "application/json"), 400),
        (raw(&"x".repeat(1001), "application/json"), 413),
    ] {
        let reply = server.send(request).await;
        assert_eq!(reply.status, status, "{}", reply.body);
        assert!(reply.json()["error"]["message"].is_string());
    }
    assert_eq!(server.app.requests_in_progress(), 0);
    let limits = &server.app.options.limits;
    let units = limits.upload_bytes.div_ceil(crate::state::UPLOAD_UNIT);
    assert_eq!(server.app.uploads.available_permits(), units, "memory of uploads is given back");
}

#[tokio::test]
async fn too_many_bytes_at_once_are_refused() {
    let limits = Limits { upload_bytes: 16 << 10, ..Limits::default() };
    let server = TestServer::with(ServerOptions { limits, ..ServerOptions::default() });
    let reply = server.post("/generate", &json!({"inputs": "x".repeat(40 << 10)})).await;
    assert_eq!(reply.status, 429, "{}", reply.body);
    assert_eq!(server.app.uploads.available_permits(), 4);
}

/// A server with room for one sequence of so many tokens, without a picture. Caches grow by blocks of tokens.
fn server_with_room_for(tokens: usize) -> TestServer {
    let model = idefics::Idefics::from_pretrained(fixture("tiny"), &LoadOptions::default()).unwrap();
    let memory = Some(Memory::of(model.cache_bytes(tokens)));
    let loaded = loaded("tiny", EngineOptions { memory, ..EngineOptions::default() });
    TestServer::of(loaded, ServerOptions::default())
}

#[tokio::test]
async fn what_never_fits_in_memory_is_refused_in_each_dialect() {
    let server = server_with_room_for(64);
    let hello = json!([{"role": "user", "content": "Hello"}]);
    let chat = "/v1/chat/completions";
    let long = json!({"inputs": "Hello", "parameters": {"max_new_tokens": 100}});
    for (path, request, status, kind) in [
        (chat, json!({"messages": hello, "max_tokens": 100}), 400, "invalid_request_error"),
        (chat, json!({"messages": hello, "max_tokens": 100, "stream": true}), 400, "invalid_request_error"),
        (
            chat,
            json!({"messages": hello, "max_tokens": 30, "n": 2, "temperature": 1}),
            400,
            "invalid_request_error",
        ),
        ("/v1/completions", json!({"prompt": "Hello", "max_tokens": 100}), 400, "invalid_request_error"),
        ("/generate", long.clone(), 422, "validation"),
        ("/generate_stream", long, 422, "validation"),
    ] {
        let reply = server.post(path, &request).await;
        assert_eq!(reply.status, status, "{request}: {}", reply.body);
        let body = reply.json();
        let (got, message) = if status == 422 {
            (&body["error_type"], &body["error"])
        } else {
            assert_eq!(body["error"]["code"], "request_too_large");
            (&body["error"]["type"], &body["error"]["message"])
        };
        assert_eq!(got, kind, "{request}");
        let message = message.as_str().unwrap();
        assert!(
            message.contains("bytes of cache") && message.contains("shorten prompt or answer"),
            "{message}"
        );
    }
    assert_eq!(server.engine.stats().rejected, 6);
    let fits = json!({"messages": hello, "max_tokens": 30});
    assert_eq!(server.post(chat, &fits).await.status, 200, "beside them the server works");
}

#[tokio::test]
async fn a_length_that_no_request_names_is_what_memory_allows() {
    let server = server_with_room_for(64);
    let hello = json!([{"role": "user", "content": "Hello"}]);
    let reply = server.post("/v1/chat/completions", &json!({"messages": hello, "min_tokens": 1})).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let usage = &reply.json()["usage"];
    // The last token of an answer is never read, and takes no room.
    assert!(usage["total_tokens"].as_u64().unwrap() <= 65, "{usage}");
    let reply = server.post("/generate", &json!({"inputs": "Hello"})).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    // No room for what a request insists on.
    let insisting = json!({"messages": hello, "min_tokens": 90});
    assert_eq!(server.post("/v1/chat/completions", &insisting).await.status, 400);
}

#[tokio::test]
async fn ids_are_kept_or_made_and_headers_are_careful() {
    let server = TestServer::new();
    let request = Request::get("/health").header("x-request-id", "mine-1").body(Body::empty()).unwrap();
    let reply = server.send(request).await;
    assert_eq!(reply.headers["x-request-id"], "mine-1");
    assert_eq!(reply.headers["x-content-type-options"], "nosniff");
    assert!(server.get("/health").await.headers["x-request-id"].to_str().unwrap().starts_with("req-"));
    assert!(!reply.headers.contains_key("access-control-allow-origin"), "no page of elsewhere may read this");
    let page = server.get("/").await;
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'") && policy.contains("connect-src 'self'"));
}

#[tokio::test]
async fn pages_of_named_origins_may_call() {
    let options =
        ServerOptions { cors_origins: vec!["https://ui.example".to_owned()], ..ServerOptions::default() };
    let server = TestServer::with(options);
    for (origin, is_allowed) in [("https://ui.example", true), ("https://evil.example", false)] {
        let request = Request::get("/v1/models").header(header::ORIGIN, origin).body(Body::empty()).unwrap();
        let reply = server.send(request).await;
        let allowed = reply.headers.get(header::ACCESS_CONTROL_ALLOW_ORIGIN);
        assert_eq!(allowed.is_some_and(|allowed| allowed == origin), is_allowed, "{origin}");
        assert!(!reply.headers.contains_key(header::ACCESS_CONTROL_ALLOW_CREDENTIALS));
    }
}

#[tokio::test]
async fn a_browser_may_send_the_headers_of_its_client() {
    let keys = ApiKeys::parse("a-secret-key", "test").unwrap();
    let cors_origins = vec!["https://ui.example".to_owned()];
    let server = TestServer::with(ServerOptions { keys, cors_origins, ..ServerOptions::default() });
    // What OpenAI's client for JavaScript asks for, before it sends a key.
    let wanted = "authorization,content-type,x-request-id,x-stainless-arch,x-stainless-lang,x-stainless-os";
    let request = Request::options("/v1/chat/completions")
        .header(header::ORIGIN, "https://ui.example")
        .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
        .header(header::ACCESS_CONTROL_REQUEST_HEADERS, wanted);
    let reply = server.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://ui.example");
    assert_eq!(reply.headers[header::ACCESS_CONTROL_ALLOW_HEADERS], wanted);
}

#[tokio::test]
async fn a_star_lets_all_pages_call() {
    let cors_origins = vec!["https://ui.example".to_owned(), "*".to_owned()];
    let server = TestServer::with(ServerOptions { cors_origins, ..ServerOptions::default() });
    let request = Request::get("/v1/models").header(header::ORIGIN, "https://any.example");
    let reply = server.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "*");
    assert!(!reply.headers.contains_key(header::ACCESS_CONTROL_ALLOW_CREDENTIALS));
}

#[test]
fn an_origin_that_never_matches_ends_the_start() {
    for origin in ["https://ui.example/", "ui.example", "a\nb"] {
        let address = ([127, 0, 0, 1], 0).into();
        let cors_origins = vec![origin.to_owned()];
        let options = ServerOptions { address, cors_origins, ..ServerOptions::default() };
        let error = crate::Server::bind(options).err().expect("refused");
        assert!(error.to_string().contains(origin), "{error}");
    }
}

#[tokio::test]
async fn a_foreign_name_is_refused_on_loopback() {
    let server = TestServer::new();
    let mut request = post("/generate", &json!({"inputs": "x"}));
    request.headers_mut().insert(header::HOST, "evil.example".parse().unwrap());
    let reply = server.send(request).await;
    assert_eq!(reply.status, 403, "{}", reply.body);
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let server = TestServer::new();
    let request = json!({"inputs": "Hello", "parameters": {"max_new_tokens": 5}});
    for _ in 0..2 {
        assert_eq!(server.post("/generate", &request).await.status, 200);
    }
    server.get("/no/such/route?with=a-secret").await;
    let metrics = server.get("/metrics").await;
    assert!(metrics.headers["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    for line in [
        "idefics_ready 1.0",
        "idefics_requests_total{method=\"POST\",route=\"/generate\",status=\"200\"} 2",
        "idefics_requests_total{method=\"GET\",route=\"other\",status=\"404\"} 1",
        "idefics_generated_tokens_total 10",
        "idefics_queue_seconds_count 2",
        "idefics_time_to_first_token_seconds_count 2",
        "idefics_inter_token_seconds_count 8",
        "idefics_answer_seconds_count 2",
        "idefics_engine_finished_total 2.0",
        "idefics_answers_cancelled_total 0",
    ] {
        assert!(metrics.body.lines().any(|it| it == line), "{line} in\n{}", metrics.body);
    }
    assert!(metrics.body.ends_with("# EOF\n") && metrics.body.matches("# EOF").count() == 1);
    assert!(!metrics.body.contains("secret"));
    #[cfg(target_os = "linux")]
    assert!(metrics.body.contains("idefics_resident_memory_bytes "));
}

#[tokio::test]
async fn the_document_describes_every_route() {
    let server = TestServer::new();
    let document = server.get("/openapi.json").await.json();
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{id}",
        "/generate",
        "/generate_stream",
        "/info",
        "/tokenize",
        "/health",
        "/livez",
        "/metrics",
    ] {
        assert!(document["paths"].get(path).is_some(), "{path}");
    }
    let schemas = &document["components"]["schemas"];
    assert!(schemas["ChatChunk"]["properties"].get("choices").is_some());
    // Every reference leads somewhere.
    let text = document.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(schemas.get(name).is_some(), "{name}");
    }
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}

/// What is logged while it lives.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn logs_have_ids_and_figures_and_no_word_of_a_request() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let server = TestServer::new();
    let chat = |content: &str| json!({"max_tokens": 2, "messages": [{"role": "user", "content": content}]});
    for json in
        [chat("a secret"), json!({"secret": [1, "secret"]}), json!({"messages": [{"role": "secret"}]})]
    {
        let mut request = post("/v1/chat/completions?secret=1", &json);
        request.headers_mut().insert("x-request-id", "id-of-mine".parse().unwrap());
        request.headers_mut().insert("authorization", "Bearer secret".parse().unwrap());
        server.send(request).await;
    }
    server.get("/secret/path").await;
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(!log.contains("secret"), "{log}");
    assert_eq!(log.lines().filter(|line| line.contains("\"message\":\"done\"")).count(), 4, "{log}");
    assert!(log.lines().any(|line| line.contains("\"answered\"") && line.contains("id-of-mine")), "{log}");
}
