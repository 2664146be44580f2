//! What measurements of engine and server share: a model, its engine, a server around it in the same process, and
//! clients that ask, wait for the answer and ask again.
#![allow(dead_code, reason = "each example uses a part of it")]

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use idefics::{
    Idefics, LoadOptions, Processor, SequenceInputs,
    bench::{Format, RandomWeights, shape},
    checkpoint::read_config,
    generate::{Engine, EngineEvent, EngineOptions, GenerationConfig, StepModel, Submission, Ticket},
    model::Model,
    ops::{Compute, Context as Ops, Isa},
};
use idefics_kernels::allocator::{Allocator, keep_freed_blocks};
use idefics_server::{Backend, Loaded, ModelCard, Server, ServerOptions};
use serde_json::{Value, json};

use crate::http::Client;

/// The allocator of the program `idefics`.
#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Which model to measure.
pub(crate) enum Which {
    /// A checkpoint.
    Directory(PathBuf),
    /// Random weights of a published size, or of a `config.json`, and what products are computed in.
    Random(String, Format, Compute),
}

/// A model that answers, directly and over HTTP.
pub(crate) struct Served {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) processor: Processor,
    /// `HOST:PORT`.
    pub(crate) address: String,
}

impl Which {
    /// What the tables are headed with.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Directory(path) => path.display().to_string(),
            Self::Random(shape, format, compute) => {
                format!("{shape}, {format:?}, random weights, products in {compute:?}")
            }
        }
    }
}

/// Loads the model and serves it on a port of its own, for as long as the process lives. To be called first, while
/// there is one thread.
pub(crate) fn serve(which: &Which) -> anyhow::Result<Served> {
    keep_freed_blocks();
    let (backend, processor) = match which {
        Which::Directory(directory) => {
            let model = Idefics::from_pretrained(directory, &LoadOptions::default())?;
            let processor = Processor::from_pretrained(directory)?;
            (engine(model, &processor)?, processor)
        }
        Which::Random(size, format, compute) => {
            let config = match shape(size) {
                Some(config) => config,
                None => read_config(Path::new(size))
                    .with_context(|| format!("--shape: expected 9b, 80b or a directory, got `{size}`"))?,
            };
            let weights = RandomWeights::new(&config, *format);
            let model = Model::new(config, &weights, Ops { isa: Isa::best(), compute: *compute })?;
            // Any tokenizer will do: what random weights write is not looked at.
            let processor = Processor::from_pretrained(tiny())?;
            (engine(model, &processor)?, processor)
        }
    };
    let options = ServerOptions { address: ([127, 0, 0, 1], 0).into(), ..ServerOptions::default() };
    let server = Server::bind(options)?;
    let address = server.address().to_string();
    let card = ModelCard { id: "model".to_owned(), aliases: Vec::new(), created: 0, dtype: String::new() };
    let generation = GenerationConfig::default();
    let loaded = Loaded { backend: backend.clone(), processor: processor.clone(), generation, card };
    std::thread::spawn(move || server.run(move || Ok(loaded)));
    while Client::connect(&address, None)?.get("/health")?.status != 200 {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Served { backend, processor, address })
}

fn engine<M: StepModel + Send + Sync + 'static>(
    model: M,
    processor: &Processor,
) -> anyhow::Result<Arc<dyn Backend>> {
    let engine = Engine::start(Arc::new(model), Arc::new(processor.clone()), EngineOptions::default())?;
    Ok(Arc::new(engine))
}

/// The small model of the fixtures.
pub(crate) fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny")
}

pub(crate) fn format_of(name: &str) -> anyhow::Result<Format> {
    Ok(match name {
        "f32" => Format::F32,
        "bf16" => Format::Bf16,
        "q8" => Format::Q8,
        "nf4" => Format::Nf4,
        _ => bail!("--format: expected f32, bf16, q8 or nf4, got `{name}`"),
    })
}

/// What products with weights of `format` are computed in, unless `name` says so.
pub(crate) fn compute_of(name: Option<&str>, format: Format) -> anyhow::Result<Compute> {
    Ok(match name {
        None if format == Format::F32 => Compute::F32,
        None | Some("bf16") => Compute::Bf16,
        Some("f32") => Compute::F32,
        Some("int8") => Compute::Int8,
        Some(other) => bail!("--dtype: expected f32, bf16 or int8, got `{other}`"),
    })
}

/// Seconds until `clients` threads have each asked `rounds` times. `ask` gets the client and a number that no other
/// request of this call has.
pub(crate) fn seconds_of(clients: usize, rounds: usize, ask: impl Fn(usize, usize) + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..clients {
            let ask = &ask;
            scope.spawn(move || {
                for round in 0..rounds {
                    ask(client, client * rounds + round);
                }
            });
        }
    });
    start.elapsed().as_secs_f64()
}

/// An answer of exactly so many tokens.
fn exactly(tokens: usize) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: Some(tokens),
        min_new_tokens: Some(tokens),
        ..GenerationConfig::default()
    }
}

/// Inputs without pictures.
pub(crate) fn inputs_of(token_ids: Vec<u32>) -> SequenceInputs {
    SequenceInputs { image_index: vec![None; token_ids.len()], token_ids, images: Vec::new() }
}

/// Gives the engine a request; what is `wanted` of its events comes through the channel, with the time on the
/// engine's thread.
pub(crate) fn submit(
    backend: &dyn Backend,
    inputs: SequenceInputs,
    tokens: usize,
    wanted: fn(&EngineEvent) -> bool,
) -> (Ticket, mpsc::Receiver<(Instant, EngineEvent)>) {
    let (sender, events) = mpsc::channel();
    let on_event = move |event| {
        if !wanted(&event) || sender.send((Instant::now(), event)).is_ok() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    };
    let ticket = backend.submit(Submission::new(inputs, exactly(tokens), on_event)).expect("there is room");
    (ticket, events)
}

/// Asks the engine and waits for the end of the answer, hearing each token if it is `streamed`.
pub(crate) fn ask_engine(backend: &dyn Backend, inputs: SequenceInputs, tokens: usize, streamed: bool) {
    let is_end = |event: &EngineEvent| matches!(event, EngineEvent::Finished(_) | EngineEvent::Failed(_));
    let is_heard = |event: &EngineEvent| !matches!(event, EngineEvent::Started);
    let (_ticket, events) = submit(backend, inputs, tokens, if streamed { is_heard } else { is_end });
    let mut heard = 0;
    loop {
        match events.recv() {
            Ok((_, EngineEvent::Token(_))) => heard += 1,
            Ok((_, EngineEvent::Finished(_))) => break,
            end => panic!("{end:?}"),
        }
    }
    assert_eq!(heard, if streamed { tokens } else { 0 });
}

/// Asks the server and waits for the whole answer.
pub(crate) fn ask_server(client: &mut Client, request: &Value) {
    let reply = client.post("/v1/completions", request).expect("a reply");
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    if request["stream"] == true {
        assert!(reply.body.ends_with(b"data: [DONE]\n\n"), "{}", String::from_utf8_lossy(&reply.body));
    }
}

/// A request for exactly so many tokens.
pub(crate) fn completion(prompt: &impl serde::Serialize, tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": tokens, "min_tokens": tokens})
}

/// Tokens that no other prompt begins with, so that nothing is reused.
pub(crate) fn prompt(length: usize, number: usize) -> Vec<u32> {
    let mut state = (number as u32).wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let token = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        10 + (state >> 16) % 400
    };
    std::iter::once(1).chain(std::iter::repeat_with(token)).take(length).collect()
}

pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value that `part` of all are below.
pub(crate) fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() as f64 * part) as usize]
}

/// All values, smallest first, for who wants to see how far they spread.
pub(crate) fn spread(values: &[f64], digits: usize) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.iter().map(|value| format!("{value:.digits$}")).collect::<Vec<_>>().join(" ")
}
