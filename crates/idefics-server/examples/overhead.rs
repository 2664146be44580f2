//! What the server costs on top of its engine.
//!
//! ```sh
//! cargo run --release -p idefics-server --example overhead -- --model fixtures/tiny
//! ```
//!
//! Clients ask with words and wait for the whole answer, or hear each token as it comes, then ask again: straight at
//! the engine, where each makes its own tokens of the words as the command line does, and at the server in the same
//! process. The ways take turns in changing order. Other work on the machine makes some turns slower and none faster,
//! so that the turns that are compared are those that a quarter of each way's are faster than; the medians stand
//! beside. The clients' own work counts against the server, and the allocator is that of `idefics`.
#![allow(clippy::print_stdout, missing_docs)]

mod http;
mod measure;

use std::{path::PathBuf, sync::Mutex};

use anyhow::{Context, bail};
use http::Client;
use idefics::{Segment, processor::ProcessOptions};
use measure::{
    Served, Which, ask_engine, ask_server, completion, compute_of, format_of, quantile, seconds_of, serve,
    tiny,
};

struct Options {
    which: Which,
    clients: usize,
    /// Requests of each client in a turn.
    rounds: usize,
    turns: usize,
    words: usize,
    tokens: usize,
}

/// A way to ask.
struct Way {
    name: &'static str,
    /// Over HTTP, or in the process.
    at_server: bool,
    /// Token by token, or whole.
    streamed: bool,
}

/// Each at the engine and then at the server.
const WAYS: [Way; 4] = [
    Way { name: "engine, whole", at_server: false, streamed: false },
    Way { name: "server, whole", at_server: true, streamed: false },
    Way { name: "engine, streamed", at_server: false, streamed: true },
    Way { name: "server, streamed", at_server: true, streamed: true },
];

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let served = serve(&options.which)?;
    println!(
        "{}: {} clients, prompts of {} words, answers of {} tokens",
        options.which.name(),
        options.clients,
        options.words,
        options.tokens
    );
    let connections: Vec<_> = (0..options.clients)
        .map(|_| Ok(Mutex::new(Client::connect(&served.address, None)?)))
        .collect::<anyhow::Result<_>>()?;
    // Warms up.
    for way in 0..WAYS.len() {
        seconds(&served, &options, &connections, way, 0);
    }
    let mut measured: [Measured; WAYS.len()] = Default::default();
    for turn in 1..=options.turns {
        for place in 0..WAYS.len() {
            let way = (place + turn) % WAYS.len();
            let (before, worked_before) = (served.backend.stats(), worked());
            measured[way].seconds.push(seconds(&served, &options, &connections, way, turn));
            let after = served.backend.stats();
            measured[way].worked += worked() - worked_before;
            measured[way].rows += after.rows - before.rows;
            measured[way].steps += after.steps - before.steps;
        }
    }
    let tokens = (options.clients * options.rounds * options.tokens) as f64;
    println!("                  tokens/s  rows a step  processors, a token  overhead (by medians)");
    for (index, (way, it)) in WAYS.iter().zip(&measured).enumerate() {
        print!(
            "{:16}  {:8.1}  {:11.1}  {:16.1} µs",
            way.name,
            tokens / quantile(&it.seconds, QUARTER),
            it.rows as f64 / it.steps as f64,
            1e6 * it.worked / (tokens * options.turns as f64),
        );
        let overhead = |part: f64| {
            let engine = quantile(&measured[index - 1].seconds, part);
            100.0 * (quantile(&it.seconds, part) / engine - 1.0)
        };
        if way.at_server {
            println!("  {:.1} % ({:.1})", overhead(QUARTER), overhead(0.5));
        } else {
            println!();
        }
    }
    Ok(())
}

/// The turns that are compared are slower than this part of all.
const QUARTER: f64 = 0.25;

/// What was measured of a way.
#[derive(Default)]
struct Measured {
    /// Of each turn.
    seconds: Vec<f64>,
    /// Seconds of all processors.
    worked: f64,
    rows: u64,
    steps: u64,
}

/// Seconds that one turn takes.
fn seconds(
    served: &Served,
    options: &Options,
    connections: &[Mutex<Client>],
    way: usize,
    turn: usize,
) -> f64 {
    // All ways of a turn ask other words: nothing is known from the one before.
    let first = (turn * WAYS.len() + way) * options.clients * options.rounds;
    let way = &WAYS[way];
    seconds_of(options.clients, options.rounds, |client, number| {
        let words = words(options.words, first + number);
        if way.at_server {
            let mut request = completion(&words, options.tokens);
            request["stream"] = way.streamed.into();
            ask_server(&mut connections[client].lock().expect("one thread each"), &request);
        } else {
            let inputs = served.processor.process(&[vec![Segment::Text(words)]], &ProcessOptions::default());
            let inputs = inputs.expect("words have tokens").remove(0);
            ask_engine(&*served.backend, inputs, options.tokens, way.streamed);
        }
    })
}

/// Seconds that all processors have worked for this process, in hundredths; nothing where the system does not tell.
fn worked() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may hold anything, the 12th and 13th fields are the ticks in and out of the kernel.
    let fields = stat.rsplit(')').next().unwrap_or_default().split(' ');
    let ticks: Vec<f64> = fields.skip(12).take(2).filter_map(|field| field.parse().ok()).collect();
    ticks.iter().sum::<f64>() / 100.0
}

/// Words that no other request begins with.
fn words(count: usize, number: usize) -> String {
    const WORDS: [&str; 8] = ["a", "house", "with", "the", "green", "door", "and", "cat"];
    let rest = (1..count).map(|index| WORDS[(number / 8_usize.pow(index as u32 % 7) + index) % 8]);
    std::iter::once(number.to_string()).chain(rest.map(str::to_owned)).collect::<Vec<_>>().join(" ")
}

fn options() -> anyhow::Result<Options> {
    let (mut shape, mut format, mut model) = (None, idefics::bench::Format::F32, None);
    let mut options =
        Options { which: Which::Directory(tiny()), clients: 16, rounds: 4, turns: 30, words: 12, tokens: 32 };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--model" => model = Some(PathBuf::from(value)),
            "--shape" => shape = Some(value),
            "--format" => format = format_of(&value)?,
            "--clients" => options.clients = value.parse()?,
            "--rounds" => options.rounds = value.parse()?,
            "--turns" => options.turns = value.parse()?,
            "--words" => options.words = value.parse()?,
            "--tokens" => options.tokens = value.parse()?,
            _ => bail!("unknown option {flag}"),
        }
    }
    if [options.clients, options.rounds, options.turns, options.words, options.tokens].contains(&0) {
        bail!("expected at least one of everything");
    }
    options.which = match (model, shape) {
        (Some(model), None) => Which::Directory(model),
        (None, Some(shape)) => Which::Random(shape, format, compute_of(None, format)?),
        (None, None) => options.which,
        (Some(_), Some(_)) => bail!("expected --model or --shape, got both"),
    };
    Ok(options)
}
