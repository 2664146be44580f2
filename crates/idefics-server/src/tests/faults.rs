//! Clients that go away, are too slow, or send what nobody should; over real sockets. `docs/reliability.md` lists
//! them.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use idefics::processor::FetchPolicy;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::live::{Live, raw_request, read_to_end, request, short};
use crate::{
    auth::ApiKeys,
    options::{Limits, ServerOptions},
    testing::picture,
};

/// Many long answers: work for a while on any machine.
fn long() -> Value {
    json!({"prompt": vec!["Hello"; 32], "max_tokens": 120, "n": 16, "temperature": 1, "min_tokens": 120,
        "stream": false})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_it_sends_takes_nothing_along() {
    let live = Live::start(Limits::default()).await;
    let whole = request("/generate", &short());
    for cut in [1, whole.len() / 2, whole.len() - 1] {
        let mut stream = live.connect().await;
        stream.write_all(&whole[..cut]).await.unwrap();
        drop(stream);
    }
    live.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_it_waits_cancels_its_answers() {
    let live = Live::start(Limits::default()).await;
    for path in ["/v1/completions", "/v1/completions"] {
        let mut stream = live.connect().await;
        stream.write_all(&request(path, &long())).await.unwrap();
        live.wait("running", |live| live.engine.stats().running > 0).await;
        drop(stream);
        live.is_well().await;
    }
    assert!(live.engine.stats().cancelled > 0);
    let metrics =
        live.exchange(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
    let counted = "idefics_requests_total{method=\"POST\",route=\"/v1/completions\",status=\"499\"} 2\n";
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_midst_of_a_stream_cancels_its_answers() {
    let live = Live::start(Limits::default()).await;
    let mut body = long();
    body["stream"] = json!(true);
    let mut stream = live.connect().await;
    stream.write_all(&request("/v1/completions", &body)).await.unwrap();
    let mut some = [0; 1000];
    stream.read_exact(&mut some).await.unwrap();
    drop(stream);
    live.is_well().await;
    assert!(live.engine.stats().cancelled > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_before_its_pictures_are_read_costs_no_more() {
    let limits = Limits { media_tasks: 1, ..Limits::default() };
    let live = Live::start(limits).await;
    let held = live.app.media.clone().acquire_owned().await.unwrap();
    let mut stream = live.connect().await;
    stream.write_all(&request("/v1/chat/completions", &seen(&picture("444.jpg")))).await.unwrap();
    live.wait("there", |live| live.app.requests_in_progress() == 1).await;
    drop(stream);
    live.wait("gone", |live| live.app.requests_in_progress() == 0).await;
    drop(held);
    live.is_well().await;
    assert_eq!(live.engine.stats().images_encoded, 0);
}

fn seen(url: &str) -> Value {
    json!({"max_tokens": 2, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}]}]})
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_mislead_or_never_end_are_refused_in_time() {
    let fetch = FetchPolicy {
        timeout: Duration::from_millis(500),
        max_bytes: 1 << 20,
        allowed_addresses: vec![[127, 0, 0, 1].into()],
        allow_any_port: true,
        ..FetchPolicy::default()
    };
    let live = Live::with(ServerOptions { fetch, ..ServerOptions::default() }).await;
    let host = picture_host();
    for (path, status, code) in [
        ("good", "200", None),
        ("to-private", "400", Some("image_not_fetched")),
        ("to-itself", "400", Some("image_not_fetched")),
        ("silent", "400", Some("image_not_fetched")),
        ("dripping", "400", Some("image_not_fetched")),
        ("endless", "400", Some("image_not_fetched")),
        ("text", "415", Some("unsupported_image")),
        ("missing", "400", Some("image_not_fetched")),
    ] {
        let start = Instant::now();
        let url = format!("http://{host}/{path}?token=secret");
        let reply = live.exchange(&request("/v1/chat/completions", &seen(&url))).await;
        assert_eq!(reply.get(9..12), Some(status), "{path}: {reply}");
        assert!(code.is_none_or(|code| reply.contains(code)), "{path}: {reply}");
        assert!(!reply.contains("secret"), "{reply}");
        assert!(start.elapsed() < Duration::from_secs(30), "{path}");
    }
    live.is_well().await;
}

/// Serves pictures and mischief by path.
fn picture_host() -> SocketAddr {
    use std::io::{BufRead, BufReader, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let good = std::fs::read(idefics_testing::fixture("processor/444.jpg")).unwrap();
    let serve = move |stream: std::net::TcpStream| -> std::io::Result<()> {
        let mut line = String::new();
        let mut stream = BufReader::new(stream);
        stream.read_line(&mut line)?;
        let mut header = String::new();
        while header != "\r\n" {
            header.clear();
            stream.read_line(&mut header)?;
        }
        let stream = stream.get_mut();
        let path = line.split(['/', '?']).nth(1).unwrap_or_default();
        let ok = "HTTP/1.1 200 OK\r\nconnection: close\r\n";
        let to = |url: &str| format!("HTTP/1.1 302 Found\r\nlocation: {url}\r\ncontent-length: 0\r\n\r\n");
        match path {
            "good" => {
                write!(stream, "{ok}content-length: {}\r\n\r\n", good.len())?;
                stream.write_all(&good)
            }
            "to-private" => stream.write_all(to("http://127.0.0.2/secret").as_bytes()),
            "to-itself" => stream.write_all(to("/to-itself").as_bytes()),
            "silent" => {
                std::thread::sleep(Duration::from_secs(5));
                Ok(())
            }
            "dripping" => {
                write!(stream, "{ok}\r\n")?;
                loop {
                    stream.write_all(b"x")?;
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            "endless" => {
                write!(stream, "{ok}\r\n")?;
                loop {
                    stream.write_all(&[0; 4096])?;
                }
            }
            "text" => write!(stream, "{ok}content-length: 6\r\n\r\nsecret"),
            _ => stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 6\r\n\r\nsecret"),
        }
    };
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = serve.clone();
            // The other side goes away when it has seen enough.
            std::thread::spawn(move || drop(serve(stream)));
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_too_slowly_is_let_go() {
    let limits = Limits { read_timeout: Duration::from_millis(200), ..Limits::default() };
    let live = Live::start(limits).await;
    // Within the head: there is nobody to answer yet.
    let mut stream = live.connect().await;
    stream.write_all(b"POST /generate HTTP/1.1\r\nhost: local").await.unwrap();
    let reply = read_to_end(&mut stream).await;
    assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 408"), "{reply}");
    // Within the body.
    let whole = request("/generate", &short());
    let mut stream = live.connect().await;
    stream.write_all(&whole[..whole.len() - 5]).await.unwrap();
    let reply = read_to_end(&mut stream).await;
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply}");
    live.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_let_go_and_stops_nobody() {
    let limits = Limits { write_timeout: Duration::from_millis(300), ..Limits::default() };
    let live = Live::start(limits).await;
    // More than the buffers of both sides: the page is small, so it is asked for very often.
    let mut stream = live.connect().await;
    let many = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(2000);
    let sending = async {
        let _ = stream.write_all(&many).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let _ = tokio::time::timeout(Duration::from_secs(2), sending).await;
    live.is_well().await;
    // The connection ends although nobody reads.
    live.wait("closed", |_| stream.try_write(b"x").is_err()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_are_refused_with_a_status() {
    let live = Live::start(Limits::default()).await;
    let body = vec![b' '; 100 << 20];
    let reply = live.exchange(&raw_request("/generate", &body)).await;
    assert!(reply.starts_with("HTTP/1.1 413"), "{reply}");
    // The same without saying so before.
    let mut stream = live.connect().await;
    let head = "POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = [b"100000\r\n".as_slice(), &vec![b' '; 1 << 20], b"\r\n"].concat();
    for _ in 0..100 {
        stream.write_all(&chunk).await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let reply = read_to_end(&mut stream).await;
    assert!(reply.starts_with("HTTP/1.1 413"), "{reply}");
    live.is_well().await;
}

/// Sends a whole request with some MB and reads what comes back.
async fn refusal_of_a_large_request(live: &Live, path: &str, headers: &str) -> String {
    let body = vec![b' '; 5 << 20];
    let length = body.len();
    let head =
        format!("POST {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n\r\n");
    live.exchange(&[head.as_bytes(), &body].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_who_is_still_sending() {
    const JSON: &str = "host: localhost\r\ncontent-type: application/json";
    let keys = ApiKeys::parse("a-secret-key", "test").unwrap();
    let live = Live::with(ServerOptions { keys, ..ServerOptions::default() }).await;
    let foreign = "host: evil.example\r\ncontent-type: application/json";
    for (headers, status) in [(JSON, "401"), (foreign, "403")] {
        let reply = refusal_of_a_large_request(&live, "/generate", headers).await;
        assert_eq!(reply.get(9..12), Some(status), "{reply}");
    }
    let limits = Limits { requests: 1, upload_bytes: 1 << 20, ..Limits::default() };
    let live = Live::start(limits).await;
    for (path, headers, status) in [
        ("/generate", JSON, "429"),
        ("/generate", "host: localhost\r\ncontent-type: text/plain", "415"),
        ("/nowhere", JSON, "404"),
        ("/info", JSON, "405"),
    ] {
        let reply = refusal_of_a_large_request(&live, path, headers).await;
        assert_eq!(reply.get(9..12), Some(status), "{path}: {reply}");
    }
    let place = live.app.place(Arc::default()).unwrap();
    let reply = refusal_of_a_large_request(&live, "/generate", JSON).await;
    assert_eq!(reply.get(9..12), Some("429"), "{reply}");
    drop(place);
    live.is_well().await;
    live.app.set_draining();
    let reply = refusal_of_a_large_request(&live, "/generate", JSON).await;
    assert_eq!(reply.get(9..12), Some("503"), "{reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_fuzzed_requests_leave_the_server_well() {
    let live = Live::start(Limits::default()).await;
    let chat = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]}],
        "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "n": 1, "stream": false});
    let seeds = [
        ("/v1/chat/completions", chat.to_string()),
        ("/v1/completions", json!({"prompt": "Hi", "max_tokens": 2, "logprobs": 1}).to_string()),
        ("/generate", json!({"inputs": "a ![](data:,x) b", "parameters": {"max_new_tokens": 2}}).to_string()),
        ("/tokenize", json!({"inputs": "words"}).to_string()),
    ];
    let mut random = Random(0x01de_f1c5);
    let mut statuses = std::collections::BTreeMap::<String, usize>::new();
    for round in 0..1000 {
        let (path, seed) = &seeds[round % seeds.len()];
        let mut body = seed.clone().into_bytes();
        for _ in 0..=random.below(4) {
            mutate(&mut body, &mut random);
        }
        let reply = live.exchange(&raw_request(path, &body)).await;
        let status = reply.get(9..12).unwrap_or("none").to_owned();
        assert!(
            ["200", "400", "413", "415", "422"].contains(&status.as_str()),
            "{path} {:?}: {reply}",
            String::from_utf8_lossy(&body)
        );
        *statuses.entry(status).or_default() += 1;
    }
    assert!(statuses.len() > 1, "some pass and some do not: {statuses:?}");
    live.is_well().await;
}

/// Changes, removes, repeats or inserts bytes; numbers and punctuation of JSON more often than others.
fn mutate(body: &mut Vec<u8>, random: &mut Random) {
    const PIECES: [&[u8]; 12] = [
        b"\"",
        b"{",
        b"]",
        b",",
        b"null",
        b"-1",
        b"1e308",
        b"99999999999999999999",
        b"\\u0000",
        b"\xff",
        b"true",
        b"[[",
    ];
    if body.is_empty() {
        body.extend_from_slice(b"{");
    }
    let at = random.below(body.len());
    match random.below(5) {
        0 => body[at] = random.below(256) as u8,
        1 => {
            let end = (at + 1 + random.below(8)).min(body.len());
            body.drain(at..end);
        }
        2 => {
            let end = (at + 1 + random.below(16)).min(body.len());
            let copy = body[at..end].to_vec();
            body.splice(at..at, copy);
        }
        3 => body.truncate(at),
        _ => {
            let piece = PIECES[random.below(PIECES.len())];
            body.splice(at..at, piece.iter().copied());
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn asked_to_end_it_finishes_what_runs_and_refuses_the_rest() {
    let mut live = Live::start(Limits::default()).await;
    let mut running = live.connect().await;
    let mut body = long();
    body["n"] = json!(1);
    body["stream"] = json!(true);
    running.write_all(&request("/v1/completions", &body)).await.unwrap();
    live.wait("running", |live| live.engine.stats().running > 0).await;
    let mut waiting = live.connect().await;
    live.end.take().unwrap().send(()).unwrap();
    live.wait("ending", |live| live.app.is_draining()).await;
    waiting.write_all(&request("/generate", &short())).await.unwrap();
    let refused = read_to_end(&mut waiting).await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("retry-after"), "{refused}");
    let reply = read_to_end(&mut running).await;
    assert!(reply.contains("data: [DONE]"), "the running answer is complete");
    live.task.await.unwrap();
    assert!(TcpStream::connect(live.address).await.is_err(), "nobody listens any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_take_too_long_at_the_end_are_cut_off_as_errors() {
    let limits = Limits { drain_timeout: Duration::ZERO, ..Limits::default() };
    let mut live = Live::start(limits).await;
    let mut streams = Vec::new();
    for is_streamed in [true, false] {
        let mut body = long();
        body["stream"] = json!(is_streamed);
        let mut stream = live.connect().await;
        stream.write_all(&request("/v1/completions", &body)).await.unwrap();
        streams.push(stream);
    }
    live.wait("running", |live| live.engine.stats().running + live.engine.stats().waiting > 40).await;
    live.end.take().unwrap().send(()).unwrap();
    let streamed = read_to_end(&mut streams[0]).await;
    assert!(streamed.contains("\"code\":\"shutting_down\"") && !streamed.contains("[DONE]"), "{streamed}");
    let whole = read_to_end(&mut streams[1]).await;
    assert!(whole.starts_with("HTTP/1.1 503"), "{whole}");
    live.task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn asked_to_end_twice_it_waits_for_nothing() {
    let limits = Limits { drain_timeout: Duration::from_hours(1), ..Limits::default() };
    let mut live = Live::start(limits).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = live.connect().await;
        stream.write_all(&request("/v1/completions", &long())).await.unwrap();
        streams.push(stream);
    }
    live.wait("running", |live| live.engine.stats().running + live.engine.stats().waiting > 40).await;
    let end = live.end.take().unwrap();
    end.send(()).unwrap();
    live.wait("ending", |live| live.app.is_draining()).await;
    end.send(()).unwrap();
    let reply = read_to_end(&mut streams[1]).await;
    assert!(reply.starts_with("HTTP/1.1 503") && reply.contains("retry-after"), "{reply}");
    assert!(reply.contains("\"code\":\"shutting_down\""), "{reply}");
    live.task.await.unwrap();
}
