//! What the server costs on top of its engine.
//!
//! ```sh
//! cargo run --release -p idefics-server --example overhead -- --model fixtures/tiny
//! ```
//!
//! Clients ask with words and wait for the whole answer, then ask again: straight at the engine, where each makes its
//! own tokens of the words as the command line does; at the server in the same process, whole; and streamed. The
//! three take turns in changing order, so that a machine that changes speed changes all of them; each turn has its
//! own overhead, and the median is reported. The clients' own work counts against the server.
#![allow(clippy::print_stdout, missing_docs)]

mod http;
mod measure;

use std::{path::PathBuf, sync::Mutex};

use anyhow::{Context, bail};
use http::Client;
use idefics::{Segment, processor::ProcessOptions};
use measure::{
    Served, Which, ask_engine, ask_server, completion, compute_of, format_of, median, seconds_of, serve,
    spread, tiny,
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

/// Ways to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Engine,
    Whole,
    Streamed,
}

const WAYS: [Way; 3] = [Way::Engine, Way::Whole, Way::Streamed];

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
    for way in WAYS {
        seconds(&served, &options, &connections, way, 0);
    }
    let mut times = [const { Vec::new() }; WAYS.len()];
    let (mut rows, mut steps) = ([0; WAYS.len()], [0; WAYS.len()]);
    for turn in 1..=options.turns {
        for place in 0..WAYS.len() {
            let index = (place + turn) % WAYS.len();
            let before = served.backend.stats();
            times[index].push(seconds(&served, &options, &connections, WAYS[index], turn));
            let after = served.backend.stats();
            rows[index] += after.rows - before.rows;
            steps[index] += after.steps - before.steps;
        }
    }
    let tokens = (options.clients * options.rounds * options.tokens) as f64;
    println!("          tokens/s  rows a step  overhead (turns, %)");
    for (index, (way, seconds)) in WAYS.iter().zip(&times).enumerate() {
        let overheads: Vec<f64> =
            seconds.iter().zip(&times[0]).map(|(seconds, engine)| 100.0 * (seconds / engine - 1.0)).collect();
        let name = format!("{way:?}").to_lowercase();
        print!(
            "{name:8}  {:8.1}  {:11.1}",
            tokens / median(seconds),
            rows[index] as f64 / steps[index] as f64
        );
        match way {
            Way::Engine => println!(),
            Way::Whole | Way::Streamed => {
                println!("  {:.1} % ({})", median(&overheads), spread(&overheads, 1));
            }
        }
    }
    Ok(())
}

/// Seconds that one turn takes.
fn seconds(served: &Served, options: &Options, connections: &[Mutex<Client>], way: Way, turn: usize) -> f64 {
    // All ways of a turn ask other words: nothing is known from the one before.
    let first = (turn * WAYS.len() + way as usize) * options.clients * options.rounds;
    seconds_of(options.clients, options.rounds, |client, number| {
        let words = words(options.words, first + number);
        if way == Way::Engine {
            let inputs = served.processor.process(&[vec![Segment::Text(words)]], &ProcessOptions::default());
            let inputs = inputs.expect("words have tokens").remove(0);
            ask_engine(&*served.backend, inputs, options.tokens);
        } else {
            let mut request = completion(&words, options.tokens);
            request["stream"] = (way == Way::Streamed).into();
            ask_server(&mut connections[client].lock().expect("one thread each"), &request);
        }
    })
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
        Options { which: Which::Directory(tiny()), clients: 16, rounds: 8, turns: 9, words: 12, tokens: 32 };
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
