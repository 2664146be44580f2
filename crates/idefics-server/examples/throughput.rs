//! What many clients get out of one model, and what the server costs on top of its engine.
//!
//! ```sh
//! cargo run --release -p idefics-server --example throughput -- --model fixtures/tiny --rounds 200
//! cargo run --release -p idefics-server --example throughput -- --shape 9b --format nf4 --tokens 16
//! ```
//!
//! The same closed loop runs against the engine by itself and against the server in the same process: each client
//! sends a prompt, waits for its answer, sends the next. The two take turns, so that a machine that changes speed
//! changes both. Then the time to the first token of a short prompt is taken, alone and behind long ones.
#![allow(clippy::print_stdout, missing_docs)]

mod http;

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use http::Client;
use idefics::{
    Idefics, LoadOptions, Processor, SequenceInputs,
    bench::{Format, RandomWeights, shape},
    generate::{Engine, EngineEvent, EngineOptions, GenerationConfig, StepModel, Submission},
    model::Model,
    ops::{Compute, Context as Ops, Isa},
};
use idefics_server::{Backend, Loaded, ModelCard, Server, ServerOptions};
use serde_json::json;

struct Options {
    model: Option<PathBuf>,
    shape: String,
    format: Format,
    clients: Vec<usize>,
    /// Requests of each client in one measurement.
    rounds: usize,
    /// Measurements of each kind.
    repeats: usize,
    prompt: usize,
    tokens: usize,
    /// Tokens of the prompts that a short one comes behind.
    long: usize,
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let (backend, processor) = if let Some(directory) = &options.model {
        let model = Idefics::from_pretrained(directory, &LoadOptions::default())?;
        let processor = Processor::from_pretrained(directory)?;
        (engine(model, &processor)?, processor)
    } else {
        let config = shape(&options.shape).with_context(|| format!("unknown shape {}", options.shape))?;
        let weights = RandomWeights::new(&config, options.format);
        let compute = if options.format == Format::F32 { Compute::F32 } else { Compute::Bf16 };
        let model = Model::new(config, &weights, Ops { isa: Isa::best(), compute })?;
        // Any tokenizer will do: what random weights write is not looked at.
        let processor = Processor::from_pretrained(tiny())?;
        (engine(model, &processor)?, processor)
    };
    let address = serve(backend.clone(), processor)?;
    for &clients in &options.clients {
        let (mut by_engine, mut by_server) = (Vec::new(), Vec::new());
        for repeat in 0..options.repeats {
            let seed = (repeat * clients * options.rounds) as u32;
            by_engine.push(rate(clients, &options, |number| ask_engine(&*backend, &options, seed + number)));
            by_server.push(rate(clients, &options, {
                let address = address.clone();
                let options = &options;
                let clients: Vec<_> =
                    (0..clients).map(|_| Client::connect(&address, None)).collect::<Result<_, _>>()?;
                let pool = std::sync::Mutex::new(clients);
                move |number| {
                    let mut client =
                        pool.lock().expect("no client panics").pop().expect("one for each thread");
                    ask_server(&mut client, options, seed + number);
                    pool.lock().expect("no client panics").push(client);
                }
            }));
        }
        let (engine, server) = (median(by_engine), median(by_server));
        println!(
            "{clients:3} clients: engine {engine:8.2} tokens/s, server {server:8.2} tokens/s, overhead {:5.1} %",
            100.0 * (engine / server - 1.0)
        );
    }
    first_tokens(&address, &options)
}

/// The time to the first token of a short prompt: alone, then behind long ones.
fn first_tokens(address: &str, options: &Options) -> anyhow::Result<()> {
    for others in [0, 1, 4, 15] {
        let long = std::thread::scope(|scope| {
            for other in 0..others {
                scope.spawn(move || {
                    let mut client = Client::connect(address, None).expect("the server is there");
                    let request = completion(options.long, 1, 1_000_000 + other);
                    client.post("/v1/completions", &request).expect("an answer");
                });
            }
            // They are in the engine before the short one.
            std::thread::sleep(Duration::from_millis(if others == 0 { 0 } else { 100 }));
            let mut client = Client::connect(address, None)?;
            let mut request = completion(8, 4, 2_000_000 + others);
            request["stream"] = json!(true);
            let start = Instant::now();
            let mut first = None;
            client.post_watched("/v1/completions", &request, |_| {
                first.get_or_insert_with(|| start.elapsed());
            })?;
            first.context("a token")
        })?;
        println!(
            "first token of 8 prompt tokens behind {others:2} prompts of {} tokens: {:8.1} ms",
            options.long,
            long.as_secs_f64() * 1e3
        );
    }
    Ok(())
}

fn engine<M: StepModel + Send + Sync + 'static>(
    model: M,
    processor: &Processor,
) -> anyhow::Result<Arc<dyn Backend>> {
    let engine = Engine::start(Arc::new(model), Arc::new(processor.clone()), EngineOptions::default())?;
    Ok(Arc::new(engine))
}

/// A server on a port of its own, for as long as the process lives.
fn serve(backend: Arc<dyn Backend>, processor: Processor) -> anyhow::Result<String> {
    let options = ServerOptions { address: ([127, 0, 0, 1], 0).into(), ..ServerOptions::default() };
    let server = Server::bind(options)?;
    let address = server.address().to_string();
    let card = ModelCard { id: "model".to_owned(), aliases: Vec::new(), created: 0, dtype: String::new() };
    let loaded = Loaded { backend, processor, generation: GenerationConfig::default(), card };
    std::thread::spawn(move || server.run(move || Ok(loaded)));
    while Client::connect(&address, None)?.get("/health")?.status != 200 {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(address)
}

/// Tokens a second of so many clients, each asking again when it has its answer.
fn rate(clients: usize, options: &Options, ask: impl Fn(u32) + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..clients {
            let ask = &ask;
            scope.spawn(move || {
                for round in 0..options.rounds {
                    ask((client * options.rounds + round) as u32);
                }
            });
        }
    });
    (clients * options.rounds * options.tokens) as f64 / start.elapsed().as_secs_f64()
}

fn ask_engine(backend: &dyn Backend, options: &Options, number: u32) {
    let token_ids = prompt(options.prompt, number);
    let inputs = SequenceInputs { image_index: vec![None; token_ids.len()], token_ids, images: Vec::new() };
    let config = GenerationConfig {
        max_new_tokens: Some(options.tokens),
        min_new_tokens: Some(options.tokens),
        ..GenerationConfig::default()
    };
    let (sender, events) = mpsc::channel();
    let on_event = move |event| match sender.send(event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    let _ticket = backend.submit(Submission::new(inputs, config, on_event)).expect("the engine has room");
    let end =
        events.into_iter().find(|event| matches!(event, EngineEvent::Finished(_) | EngineEvent::Failed(_)));
    assert!(matches!(end, Some(EngineEvent::Finished(_))), "{end:?}");
}

fn ask_server(client: &mut Client, options: &Options, number: u32) {
    let request = completion(options.prompt, options.tokens, number);
    let reply = client.post("/v1/completions", &request).expect("a reply");
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
}

fn completion(prompt_tokens: usize, tokens: usize, number: u32) -> serde_json::Value {
    json!({"prompt": prompt(prompt_tokens, number), "max_tokens": tokens, "min_tokens": tokens})
}

/// Tokens that no other prompt begins with, so that nothing is reused.
fn prompt(length: usize, number: u32) -> Vec<u32> {
    let mut state = number.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let token = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        10 + (state >> 16) % 400
    };
    std::iter::once(1).chain(std::iter::repeat_with(token)).take(length).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny")
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        model: None,
        shape: "9b".to_owned(),
        format: Format::Nf4,
        clients: vec![1, 16],
        rounds: 1,
        repeats: 3,
        prompt: 16,
        tokens: 16,
        long: 100,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--model" => options.model = Some(value.into()),
            "--shape" => options.shape = value,
            "--format" => {
                options.format = match value.as_str() {
                    "f32" => Format::F32,
                    "bf16" => Format::Bf16,
                    "q8" => Format::Q8,
                    "nf4" => Format::Nf4,
                    _ => bail!("--format: expected f32, bf16, q8 or nf4"),
                }
            }
            "--clients" => options.clients = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--rounds" => options.rounds = value.parse()?,
            "--repeats" => options.repeats = value.parse()?,
            "--prompt" => options.prompt = value.parse()?,
            "--tokens" => options.tokens = value.parse()?,
            "--long" => options.long = value.parse()?,
            _ => bail!("unknown option {flag}"),
        }
    }
    Ok(options)
}
