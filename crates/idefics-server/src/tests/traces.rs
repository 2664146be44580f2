//! Spans at a collector: a stub that keeps what it is sent, read by the field numbers of OpenTelemetry's `.proto`
//! files and not by the crates that wrote it.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::mpsc::{self, Receiver},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::live::{Live, raw_request, request};
use crate::{auth::ApiKeys, options::ServerOptions, testing::picture, trace::Traces};

/// A field of a message.
#[derive(Debug, Clone, PartialEq)]
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

/// A message in protobuf's wire format: its fields by number.
fn message(mut bytes: &[u8]) -> BTreeMap<u64, Vec<Field>> {
    let mut fields: BTreeMap<u64, Vec<Field>> = BTreeMap::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, length).to_vec())
            }
            5 => Field::Number(u32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap()).into()),
            other => panic!("wire type {other}"),
        };
        fields.entry(tag >> 3).or_default().push(field);
    }
    fields
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = take(bytes, 1)[0];
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            break;
        }
    }
    value
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(count);
    *bytes = rest;
    taken
}

/// The bytes of all fields of one number.
fn parts(fields: &BTreeMap<u64, Vec<Field>>, number: u64) -> Vec<Vec<u8>> {
    let bytes = |field: &Field| match field {
        Field::Bytes(bytes) => bytes.clone(),
        Field::Number(_) => panic!("field {number} is a number"),
    };
    fields.get(&number).into_iter().flatten().map(bytes).collect()
}

fn text(fields: &BTreeMap<u64, Vec<Field>>, number: u64) -> String {
    String::from_utf8(parts(fields, number).concat()).unwrap()
}

fn hex(fields: &BTreeMap<u64, Vec<Field>>, number: u64) -> String {
    parts(fields, number).concat().iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

fn number(fields: &BTreeMap<u64, Vec<Field>>, number: u64) -> u64 {
    match fields.get(&number).and_then(|fields| fields.first()) {
        Some(Field::Number(value)) => *value,
        None => 0,
        Some(Field::Bytes(_)) => panic!("field {number} is no number"),
    }
}

/// `KeyValue`s as JSON.
fn attributes(encoded: Vec<Vec<u8>>) -> BTreeMap<String, Value> {
    let attribute = |encoded: Vec<u8>| {
        let pair = message(&encoded);
        let value = message(&parts(&pair, 2).concat());
        let (&kind, _) = value.first_key_value().unwrap();
        let value = match kind {
            1 => json!(text(&value, 1)),
            2 => json!(number(&value, 2) == 1),
            3 => json!(number(&value, 3) as i64),
            4 => json!(f64::from_bits(number(&value, 4))),
            other => panic!("a value of kind {other}"),
        };
        (text(&pair, 1), value)
    };
    encoded.into_iter().map(attribute).collect()
}

#[derive(Debug)]
struct Span {
    trace_id: String,
    parent_id: String,
    name: String,
    kind: u64,
    nanoseconds: u64,
    status: u64,
    attributes: BTreeMap<String, Value>,
    service: Value,
}

/// The spans of an `ExportTraceServiceRequest`.
fn spans(body: &[u8]) -> Vec<Span> {
    let mut spans = Vec::new();
    for of_resource in parts(&message(body), 1).iter().map(|bytes| message(bytes)) {
        let resource = message(&parts(&of_resource, 1).concat());
        let service = attributes(parts(&resource, 1))["service.name"].clone();
        for span in parts(&of_resource, 2).iter().flat_map(|scope| parts(&message(scope), 2)) {
            let span = message(&span);
            spans.push(Span {
                trace_id: hex(&span, 1),
                parent_id: hex(&span, 4),
                name: text(&span, 5),
                kind: number(&span, 6),
                nanoseconds: number(&span, 8) - number(&span, 7),
                status: number(&message(&parts(&span, 15).concat()), 3),
                attributes: attributes(parts(&span, 9)),
                service: service.clone(),
            });
        }
    }
    spans
}

/// What came to the collector: the head in lower case, and the body.
type Delivery = (String, Vec<u8>);

/// A collector that takes everything. Its address, and what it got.
fn collector() -> (String, Receiver<Delivery>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    let (sender, deliveries) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            // A connection may bring several.
            while let Some(delivery) = delivery(&mut stream) {
                stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
                if sender.send(delivery).is_err() {
                    return;
                }
            }
        }
    });
    (address, deliveries)
}

fn delivery(stream: &mut impl BufRead) -> Option<Delivery> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    head.make_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
    let mut body = vec![0; length.trim().parse().ok()?];
    stream.read_exact(&mut body).ok()?;
    Some((head, body))
}

/// Sends requests to a server with a collector, ends the server, and returns all spans.
async fn traced(options: ServerOptions, requests: &[Vec<u8>]) -> (Vec<String>, Vec<Span>, Vec<u8>) {
    let (address, deliveries) = collector();
    let mut live = Live::with(ServerOptions { traces: Traces::To(address), ..options }).await;
    let mut replies = Vec::new();
    for request in requests {
        replies.push(live.exchange(request).await);
    }
    live.end.take().unwrap().send(()).unwrap();
    live.task.await.unwrap();
    // Nothing is waited for: what is there when the server has ended is all there is.
    let (mut all, mut bytes) = (Vec::new(), Vec::new());
    while let Ok((head, body)) = deliveries.recv_timeout(Duration::ZERO) {
        assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
        assert!(head.contains("\r\ncontent-type: application/x-protobuf\r\n"), "{head}");
        all.extend(spans(&body));
        bytes.extend_from_slice(&body);
    }
    (replies, all, bytes)
}

/// A request with more lines in its head.
fn with_headers(request: &[u8], headers: &str) -> Vec<u8> {
    let line_end = request.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    [&request[..line_end], headers.as_bytes(), &request[line_end..]].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_a_span_with_its_figures_and_no_word_of_it() {
    let keys = ApiKeys::parse("the-secret-key", "test").unwrap();
    let body = json!({"max_tokens": 3, "messages": [{"role": "user", "content": [
        {"type": "text", "text": "a secret"},
        {"type": "image_url", "image_url": {"url": picture("444.jpg")}},
    ]}]});
    let headers = "authorization: Bearer the-secret-key\r\nx-request-id: id-of-mine\r\n\
        traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n";
    let asked = with_headers(&request("/v1/chat/completions?secret=1", &body), headers);
    let options = ServerOptions { keys, ..ServerOptions::default() };
    let (replies, spans, bytes) = traced(options, &[asked]).await;
    let [span] = spans.as_slice() else { panic!("{spans:?}") };
    assert_eq!(span.trace_id, "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(span.parent_id, "b7ad6b7169203331");
    assert_eq!((span.name.as_str(), span.kind, span.status), ("POST /v1/chat/completions", 2, 0));
    assert_eq!(span.service, "idefics");
    let reply = &replies[0];
    let answer: Value = serde_json::from_str(&reply[reply.find("{\"id\"").unwrap()..]).unwrap();
    let usage = &answer["usage"];
    for (name, expected) in [
        ("http.request.method", json!("POST")),
        ("http.route", json!("/v1/chat/completions")),
        ("http.response.status_code", json!(200)),
        ("idefics.request.id", json!("id-of-mine")),
        ("gen_ai.response.model", json!("tiny")),
        ("gen_ai.usage.input_tokens", usage["prompt_tokens"].clone()),
        ("gen_ai.usage.output_tokens", json!(3)),
        ("idefics.cached_tokens", usage["prompt_tokens_details"]["cached_tokens"].clone()),
        ("idefics.images", json!(1)),
        ("idefics.cached_images", json!(0)),
    ] {
        assert_eq!(span.attributes.get(name), Some(&expected), "{name} in {span:?}");
    }
    let seconds = |name: &str| span.attributes[name].as_f64().unwrap();
    let (queued, first_token) =
        (seconds("idefics.queue_seconds"), seconds("idefics.time_to_first_token_seconds"));
    assert!(0.0 < queued && queued < first_token && first_token < span.nanoseconds as f64 * 1e-9, "{span:?}");
    assert!(!String::from_utf8_lossy(&bytes).contains("secret"), "words, queries and keys stay here");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_and_streams_are_spans_and_probes_are_none() {
    let get = |path: &str| {
        format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").into_bytes()
    };
    let stream = json!({"prompt": ["Hello", "Hello"], "max_tokens": 4, "stream": true});
    let requests = [
        get("/health"),
        get("/livez"),
        get("/metrics"),
        get("/a/secret/path"),
        raw_request("/generate", b"{"),
        request("/v1/completions", &stream),
    ];
    let (_, spans, _) = traced(ServerOptions::default(), &requests).await;
    let seen: Vec<_> = spans
        .iter()
        .map(|span| {
            let status = span.attributes["http.response.status_code"].as_i64().unwrap();
            let written = span.attributes.get("gen_ai.usage.output_tokens").and_then(Value::as_i64);
            (span.name.as_str(), status, written)
        })
        .collect();
    let expected =
        [("GET other", 404, None), ("POST /generate", 422, None), ("POST /v1/completions", 200, Some(8))];
    assert_eq!(seen, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_seen_in_its_span() {
    let (address, deliveries) = collector();
    let options = ServerOptions { traces: Traces::To(address), ..ServerOptions::default() };
    let mut live = Live::with(options).await;
    let mut stream = live.connect().await;
    let long =
        json!({"prompt": vec!["Hello"; 32], "max_tokens": 120, "min_tokens": 120, "n": 16, "temperature": 1});
    stream.write_all(&request("/v1/completions", &long)).await.unwrap();
    live.wait("running", |live| live.engine.stats().running > 0).await;
    drop(stream);
    live.is_well().await;
    live.end.take().unwrap().send(()).unwrap();
    live.task.await.unwrap();
    let all: Vec<_> = deliveries.try_iter().flat_map(|(_, body)| spans(&body)).collect();
    assert_eq!(all.len(), 2, "one left, one asked whether all is well: {all:?}");
    let left: Vec<_> =
        all.iter().filter(|span| span.attributes.contains_key("idefics.client_left")).collect();
    let [left] = left.as_slice() else { panic!("{all:?}") };
    assert_eq!(left.name, "POST /v1/completions");
    assert!(!left.attributes.contains_key("http.response.status_code"), "there was none: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_collector_the_server_answers_and_ends() {
    // Nobody listens there: the port was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let traces = Traces::To(format!("http://{address}/v1/traces"));
    let mut live = Live::with(ServerOptions { traces, ..ServerOptions::default() }).await;
    live.is_well().await;
    live.end.take().unwrap().send(()).unwrap();
    live.task.await.unwrap();
}
