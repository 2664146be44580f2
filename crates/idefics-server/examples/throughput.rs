//! What many clients get out of one model, against one client; and how long a short request waits behind long ones.
//!
//! ```sh
//! cargo run --release -p idefics-server --example throughput                                # random 9B in NF4
//! cargo run --release -p idefics-server --example throughput -- --dtype int8                # activations in 8 bits
//! cargo run --release -p idefics-server --example throughput -- --model fixtures/tiny --long 100
//! ```
//!
//! Each client sends a prompt, waits for its answer over HTTP, sends the next. The numbers of clients take turns, so
//! that a machine that changes speed changes all of them, and each turn has its own ratio; medians are reported. Then
//! as many sequences decode together in the engine with nothing else to do, which is what `idefics bench` measures at
//! that batch. Last the time to the first token of a short prompt, alone and while the engine reads long ones.
#![allow(clippy::print_stdout, missing_docs)]

mod http;
mod measure;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use http::Client;
use idefics::{
    bench::Format,
    generate::{EngineEvent, Scheduler},
};
use measure::{
    Served, Which, ask_server, completion, compute_of, format_of, inputs_of, median, prompt, seconds_of,
    serve, spread, submit,
};

struct Options {
    which: Which,
    clients: Vec<usize>,
    /// Requests of each client in a turn.
    rounds: usize,
    turns: usize,
    prompt: usize,
    tokens: usize,
    /// Prompts that a short one comes behind, and their tokens.
    others: Vec<usize>,
    long: usize,
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let served = serve(&options.which)?;
    println!("{}: prompts of {} tokens, answers of {}", options.which.name(), options.prompt, options.tokens);
    throughput(&served, &options)?;
    for &clients in &options.clients {
        let rates: Vec<f64> =
            (0..options.turns).map(|turn| decode_rate(&served, &options, clients, turn)).collect();
        println!(
            "engine, {clients} decoding together: {:.2} tokens/s (turns: {})",
            median(&rates),
            spread(&rates, 2)
        );
    }
    first_tokens(&served, &options)
}

/// Tokens a second of all clients together.
fn throughput(served: &Served, options: &Options) -> anyhow::Result<()> {
    let mut rates = vec![Vec::new(); options.clients.len()];
    let mut rows = vec![0.0; options.clients.len()];
    for turn in 0..options.turns {
        for (index, &clients) in options.clients.iter().enumerate() {
            let connections: Vec<_> = (0..clients)
                .map(|_| Ok(std::sync::Mutex::new(Client::connect(&served.address, None)?)))
                .collect::<anyhow::Result<_>>()?;
            let first = (turn * options.clients.len() + index) * 100_000;
            let before = served.backend.stats();
            let seconds = seconds_of(clients, options.rounds, |client, number| {
                let request = completion(&prompt(options.prompt, first + number), options.tokens);
                ask_server(&mut connections[client].lock().expect("one thread each"), &request);
            });
            let after = served.backend.stats();
            rows[index] = (after.rows - before.rows) as f64 / (after.steps - before.steps) as f64;
            rates[index].push((clients * options.rounds * options.tokens) as f64 / seconds);
        }
    }
    println!("clients  tokens/s  rows a step  against the first (turns)");
    for (index, &clients) in options.clients.iter().enumerate() {
        let ratios: Vec<f64> = rates[index].iter().zip(&rates[0]).map(|(rate, first)| rate / first).collect();
        println!(
            "{clients:7}  {:8.2}  {:11.1}  {:.2} ({})",
            median(&rates[index]),
            rows[index],
            median(&ratios),
            spread(&ratios, 2)
        );
    }
    Ok(())
}

fn is_token(event: &EngineEvent) -> bool {
    matches!(event, EngineEvent::Token(_))
}

/// Tokens a second of so many sequences, from when all have their first token until the first one ends.
fn decode_rate(served: &Served, options: &Options, sequences: usize, turn: usize) -> f64 {
    let requests: Vec<_> = (0..sequences)
        .map(|number| {
            let inputs = inputs_of(prompt(options.prompt, 50_000_000 + turn * 1000 + number));
            submit(&*served.backend, inputs, options.tokens, is_token)
        })
        .collect();
    let times: Vec<Vec<Instant>> = requests
        .into_iter()
        .map(|(_ticket, events)| events.into_iter().map(|(time, _)| time).collect())
        .collect();
    let all_have_one = times.iter().map(|times| times[0]).max().expect("there are sequences");
    let one_ends = times.iter().map(|times| times[times.len() - 1]).min().expect("there are sequences");
    let within = times.iter().flatten().filter(|&&time| all_have_one < time && time <= one_ends).count();
    within as f64 / one_ends.saturating_duration_since(all_have_one).as_secs_f64()
}

/// The time to the first token of a short prompt: alone, then behind long ones.
fn first_tokens(served: &Served, options: &Options) -> anyhow::Result<()> {
    const SHORT: usize = 8;
    let scheduler = Scheduler::interactive();
    let largest = scheduler.max_step_tokens.min(served.backend.max_positions() - 1);
    let mut steps = Vec::new();
    for turn in 0..options.turns {
        steps.push(first_token(served, largest, 70_000_000 + turn)?.as_secs_f64());
    }
    let step = median(&steps);
    println!("a step of {largest} prompt tokens, the largest there is: {step:.3} s");
    println!("first token of a prompt of {SHORT} tokens, the median and all turns:");
    for &others in &options.others {
        let mut times = Vec::new();
        for turn in 0..options.turns {
            let long: Vec<_> = (0..others)
                .map(|other| {
                    let inputs = inputs_of(prompt(options.long, 80_000_000 + turn * 1000 + other));
                    // Long answers, too: a small model would be through with the prompts at once.
                    let tokens = served.backend.max_positions().saturating_sub(options.long).max(1);
                    submit(&*served.backend, inputs, tokens, is_token)
                })
                .collect();
            let start = Instant::now();
            while served.backend.stats().running < others {
                if start.elapsed() > Duration::from_mins(1) {
                    bail!("{others} prompts of {} tokens do not run together; try --long", options.long);
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            times.push(first_token(served, SHORT, 90_000_000 + turn)?.as_secs_f64());
            // Dropped tickets cancel: what the long ones still had to read is not waited for.
            drop(long);
            while served.backend.stats().running > 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // The step that runs when the prompt comes, and those in which it gets its share.
        let bound = 1 + scheduler.steps_to_read(SHORT, others);
        println!(
            "  behind {others:2} of {} tokens: {:.3} s ({}); bound: {bound} steps, {:.3} s",
            options.long,
            median(&times),
            spread(&times, 3),
            bound as f64 * step
        );
    }
    Ok(())
}

/// From a request to the first piece of its stream.
fn first_token(served: &Served, tokens: usize, number: usize) -> anyhow::Result<Duration> {
    let mut client = Client::connect(&served.address, None)?;
    let mut request = completion(&prompt(tokens, number), 1);
    request["stream"] = true.into();
    // A piece for each token, also for one that is part of a character.
    request["logprobs"] = 0.into();
    let start = Instant::now();
    let mut first = None;
    client.post_watched("/v1/completions", &request, |_| {
        first.get_or_insert_with(|| start.elapsed());
    })?;
    first.context("expected a token, got an empty stream")
}

fn options() -> anyhow::Result<Options> {
    let (mut shape, mut format, mut dtype, mut model) = ("9b".to_owned(), Format::Nf4, None, None);
    let mut options = Options {
        which: Which::Directory(measure::tiny()),
        clients: vec![1, 16],
        rounds: 1,
        turns: 3,
        prompt: 16,
        tokens: 32,
        others: vec![0, 4, 15],
        long: 300,
    };
    let numbers = |value: &str| value.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--model" => model = Some(Path::new(&value).to_owned()),
            "--shape" => shape = value,
            "--format" => format = format_of(&value)?,
            "--dtype" => dtype = Some(value),
            "--clients" => options.clients = numbers(&value)?,
            "--rounds" => options.rounds = value.parse()?,
            "--turns" => options.turns = value.parse()?,
            "--prompt" => options.prompt = value.parse()?,
            "--tokens" => options.tokens = value.parse()?,
            "--others" => options.others = numbers(&value)?,
            "--long" => options.long = value.parse()?,
            _ => bail!("unknown option {flag}"),
        }
    }
    if options.clients.is_empty() || options.tokens < 2 || options.turns == 0 || options.rounds == 0 {
        bail!("expected numbers of clients, at least 2 tokens, at least one turn and one round");
    }
    if model.is_some() && dtype.is_some() {
        bail!("--dtype is for random weights");
    }
    let compute = compute_of(dtype.as_deref(), format)?;
    options.which = model.map_or(Which::Random(shape, format, compute), Which::Directory);
    Ok(options)
}
