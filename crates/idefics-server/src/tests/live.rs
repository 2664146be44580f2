//! A server on a socket of its own, and requests as bytes.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use idefics::generate::EngineOptions;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};

use crate::{
    backend::Backend,
    listen::Server,
    options::{Limits, ServerOptions},
    state::App,
    testing::loaded,
};

/// A server on a socket of its own.
pub(super) struct Live {
    pub(super) address: SocketAddr,
    pub(super) app: Arc<App>,
    pub(super) engine: Arc<dyn Backend>,
    pub(super) end: Option<mpsc::UnboundedSender<()>>,
    pub(super) task: tokio::task::JoinHandle<()>,
}

impl Live {
    pub(super) async fn start(limits: Limits) -> Self {
        Self::with(ServerOptions { limits, ..ServerOptions::default() }).await
    }

    pub(super) async fn with(options: ServerOptions) -> Self {
        let options = ServerOptions { address: ([127, 0, 0, 1], 0).into(), ..options };
        let server = Server::bind(options).unwrap();
        let (address, app) = (server.address(), server.app());
        let model = loaded("tiny", EngineOptions::default());
        let engine = model.backend.clone();
        let (end, ends) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move { server.serve(move || Ok(model), ends).await.unwrap() });
        let live = Self { address, app, engine, end: Some(end), task };
        live.wait("ready", |live| live.app.service().is_ok()).await;
        live
    }

    pub(super) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends a request and reads all that comes back.
    pub(super) async fn exchange(&self, request: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(request).await.unwrap();
        read_to_end(&mut stream).await
    }

    /// Waits for something that must come to be.
    pub(super) async fn wait(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !is_so(self) {
            assert!(start.elapsed() < Duration::from_mins(1), "never {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// All is given back and the server answers.
    pub(super) async fn is_well(&self) {
        self.wait("idle", |live| live.app.requests_in_progress() == 0).await;
        self.wait("free of work", |live| {
            let stats = live.engine.stats();
            stats.running == 0 && stats.waiting == 0
        })
        .await;
        self.wait("free of pictures", |live| {
            live.app.media.available_permits() == live.app.options.limits.media_tasks
        })
        .await;
        let reply = self.exchange(&request("/generate", &short())).await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
}

pub(super) async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut reply = Vec::new();
    // A reset after the response is the same to us as an end.
    let _ =
        tokio::time::timeout(Duration::from_mins(1), stream.read_to_end(&mut reply)).await.expect("an end");
    String::from_utf8_lossy(&reply).into_owned()
}

pub(super) fn request(path: &str, body: &Value) -> Vec<u8> {
    raw_request(path, body.to_string().as_bytes())
}

pub(super) fn raw_request(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

pub(super) fn short() -> Value {
    json!({"inputs": "Hello", "parameters": {"max_new_tokens": 2}})
}
