//! Many clients at a running server, whose answers must be those that each prompt gets alone.
//!
//! ```sh
//! idefics serve --model fixtures/tiny --port 8080 &
//! cargo run --release -p idefics-server --example load -- 127.0.0.1:8080 --clients 64 --requests 10000
//! ```
//!
//! First every prompt is asked alone, then all clients ask mixed prompts with and without pictures, streamed and
//! not, greedy and drawn. Any other answer, any error, ends in a status that is not zero. The memory of the server
//! is printed on the way, as its own metrics tell it. With API keys, `IDEFICS_API_KEY` holds one.
#![allow(clippy::print_stdout, missing_docs)]

mod http;

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use anyhow::{Context, bail};
use base64::{Engine, prelude::BASE64_STANDARD};
use http::Client;
use serde_json::{Value, json};

struct Options {
    address: String,
    clients: usize,
    requests: usize,
    max_tokens: usize,
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let key = std::env::var("IDEFICS_API_KEY").ok();
    let connect = || Client::connect(&options.address, key.clone());
    let mut client = connect()?;
    let prompts = prompts(options.max_tokens);
    println!("memory at the start: {}", memory(&mut client)?);
    let start = Instant::now();
    let alone = prompts.iter().map(|prompt| ask(&mut client, prompt)).collect::<Result<Vec<_>, _>>()?;
    println!("{} prompts alone in {:.1} s", prompts.len(), start.elapsed().as_secs_f64());

    let (next, tokens) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let problems = Mutex::new(Vec::new());
    let milestones = Mutex::new(Vec::new());
    let start = Instant::now();
    let work = || -> anyhow::Result<()> {
        let mut client = connect()?;
        loop {
            let number = next.fetch_add(1, Relaxed);
            if number >= options.requests {
                return Ok(());
            }
            if number > 0 && number.is_multiple_of((options.requests / 10).max(1)) {
                let line = format!("memory after {number} requests: {}", memory(&mut client)?);
                println!("{line}");
                milestones.lock().expect("no client panics").push(line);
            }
            // An order that mixes long and short, with and without pictures.
            let index = number.wrapping_mul(7919) % prompts.len();
            let answer = ask(&mut client, &prompts[index]).with_context(|| format!("request {number}"))?;
            tokens.fetch_add(answer.tokens, Relaxed);
            if answer != alone[index] {
                let problem = format!("prompt {index}: {:?} instead of {:?}", answer.text, alone[index].text);
                problems.lock().expect("no client panics").push(problem);
            }
        }
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..options.clients).map(|_| scope.spawn(work)).collect();
        for client in clients {
            if let Err(error) = client.join().expect("no client panics") {
                problems.lock().expect("no client panics").push(format!("{error:#}"));
            }
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    println!("memory at the end: {}", memory(&mut client)?);
    println!(
        "{} requests by {} clients in {seconds:.1} s: {:.1} requests/s, {:.1} tokens/s",
        options.requests,
        options.clients,
        options.requests as f64 / seconds,
        tokens.into_inner() as f64 / seconds
    );
    let problems = problems.into_inner().expect("no client panics");
    for problem in problems.iter().take(10) {
        println!("problem: {problem}");
    }
    if !problems.is_empty() {
        bail!("{} of {} requests went wrong", problems.len(), options.requests);
    }
    println!("every answer is the one that its prompt gets alone");
    Ok(())
}

#[derive(Debug, PartialEq)]
struct Answer {
    text: Vec<String>,
    finish_reasons: Vec<String>,
    tokens: usize,
}

/// Asks, and reads either form of answer.
fn ask(client: &mut Client, request: &Value) -> anyhow::Result<Answer> {
    let reply = client.post("/v1/chat/completions", request)?;
    if reply.status != 200 {
        bail!("status {}: {}", reply.status, String::from_utf8_lossy(&reply.body));
    }
    let count = request["n"].as_u64().unwrap_or(1) as usize;
    let mut answer =
        Answer { text: vec![String::new(); count], finish_reasons: vec![String::new(); count], tokens: 0 };
    if request["stream"] != true {
        let json = reply.json()?;
        for (index, choice) in json["choices"].as_array().into_iter().flatten().enumerate() {
            choice["message"]["content"].as_str().unwrap_or_default().clone_into(&mut answer.text[index]);
            choice["finish_reason"]
                .as_str()
                .unwrap_or_default()
                .clone_into(&mut answer.finish_reasons[index]);
        }
        answer.tokens = json["usage"]["completion_tokens"].as_u64().unwrap_or(0) as usize;
        return Ok(answer);
    }
    let body = String::from_utf8(reply.body)?;
    let mut is_done = false;
    for data in body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")) {
        if data == "[DONE]" {
            is_done = true;
            continue;
        }
        let chunk: Value = serde_json::from_str(data)?;
        if !chunk["error"].is_null() {
            bail!("an error in the stream: {}", chunk["error"]);
        }
        if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
            answer.tokens = tokens as usize;
        }
        for choice in chunk["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap_or(0) as usize;
            answer.text[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
            if let Some(reason) = choice["finish_reason"].as_str() {
                reason.clone_into(&mut answer.finish_reasons[index]);
            }
        }
    }
    if !is_done {
        bail!("the stream did not end with [DONE]");
    }
    Ok(answer)
}

/// Dialogues of one to three turns, with no, one or two of some pictures, in all ways to answer.
fn prompts(max_tokens: usize) -> Vec<Value> {
    let words =
        ["Hello", "What is this?", "Tell me a story about it", "Why", "And now something longer: a b c d"];
    let mut prompts = Vec::new();
    for number in 0..60_usize {
        let mut content = vec![json!({"type": "text", "text": format!("{} {number}", words[number % 5])})];
        for picture in 0..number % 3 {
            content.push(
                json!({"type": "image_url", "image_url": {"url": picture_uri((number / 3 + picture) % 12)}}),
            );
        }
        let mut messages = Vec::new();
        if number.is_multiple_of(4) {
            messages.push(json!({"role": "system", "content": "Be brief."}));
        }
        messages.push(json!({"role": "user", "content": content}));
        if number % 5 == 3 {
            messages.push(json!({"role": "assistant", "content": "Yes."}));
            messages.push(json!({"role": "user", "content": "More?"}));
        }
        let mut prompt = json!({"messages": messages, "max_tokens": 1 + (number * 5) % max_tokens});
        if number % 2 == 1 {
            prompt["stream"] = json!(true);
            prompt["stream_options"] = json!({"include_usage": true});
        }
        if number.is_multiple_of(3) {
            prompt["temperature"] = json!(0.9);
            prompt["seed"] = json!(number);
            prompt["n"] = json!(1 + number % 2);
        }
        prompts.push(prompt);
    }
    prompts
}

/// A BMP of 40 by 30 pixels that looks different for each number.
fn picture_uri(number: usize) -> String {
    let (width, height) = (40_u32, 30_u32);
    let mut bmp = Vec::new();
    let bytes = 54 + 3 * width * height;
    bmp.extend_from_slice(b"BM");
    for value in [bytes, 0, 54, 40, width, height, 1 | 24 << 16, 0, 0, 0, 0, 0, 0] {
        bmp.extend_from_slice(&value.to_le_bytes());
    }
    for pixel in 0..width * height {
        let (x, y) = (pixel % width, pixel / width);
        bmp.extend([(x * 6) as u8, (y * 8) as u8, (number * 20) as u8 ^ (x * y) as u8]);
    }
    format!("data:image/bmp;base64,{}", BASE64_STANDARD.encode(bmp))
}

/// The memory of the server, by its own metrics.
fn memory(client: &mut Client) -> anyhow::Result<String> {
    let text = String::from_utf8(client.get("/metrics")?.body)?;
    let figure = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<f64>().ok().map(|bytes| bytes / f64::from(1 << 20))
    };
    let resident = figure("idefics_resident_memory_bytes ").context("the metrics tell no memory")?;
    let kept = figure("idefics_engine_kept_bytes ").unwrap_or(0.0);
    Ok(format!("{resident:.1} MiB resident, {kept:.1} MiB of them kept for later requests"))
}

fn options() -> anyhow::Result<Options> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().context("expected HOST:PORT, then --clients, --requests, --max-tokens")?;
    let mut options = Options { address, clients: 64, requests: 10_000, max_tokens: 24 };
    while let Some(flag) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{flag} needs a value"))?.parse()?;
        match flag.as_str() {
            "--clients" => options.clients = value,
            "--requests" => options.requests = value,
            "--max-tokens" => options.max_tokens = value,
            _ => bail!("unknown option {flag}"),
        }
    }
    Ok(options)
}
