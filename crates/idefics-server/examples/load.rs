//! Many clients at a running server, whose answers must be those that each prompt gets alone.
//!
//! ```sh
//! cargo build --release -p idefics-cli && cargo run --release -p idefics-server --example load -- --model fixtures/tiny
//! ```
//!
//! Mixed prompts, with and without pictures, streamed and not, greedy and drawn, one or several answers, are asked one
//! after another of one `idefics serve`, and then by all clients of another. Any other answer, any error, and memory
//! that grows after the caches are full, end in a status that is not zero. The built `idefics` lies beside this
//! program, or is named in `IDEFICS`. `--address HOST:PORT` takes a server that runs already, for both; with API keys,
//! `IDEFICS_API_KEY` holds one.
#![allow(clippy::print_stdout, missing_docs)]

mod http;

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use base64::{Engine, prelude::BASE64_STANDARD};
use http::Client;
use serde_json::{Value, json};

/// Memory is read so many times on the way.
const READINGS: usize = 40;

/// The first share of the requests fills the caches; what is held then may not grow.
const WARM_UP: f64 = 0.25;

struct Options {
    model: PathBuf,
    address: Option<String>,
    clients: usize,
    requests: usize,
    /// Prompts that differ; asked in turn.
    prompts: usize,
    max_tokens: usize,
    /// Memory for caches of the server.
    cache_mib: usize,
    /// Growth of memory that ends in an error, in MiB.
    max_growth: f64,
}

/// A server, and its end.
struct Server {
    address: String,
    child: Option<Child>,
}

/// What the clients have to tell.
#[derive(Default)]
struct Outcome {
    different: Mutex<Vec<String>>,
    errors: Mutex<Vec<String>>,
    tokens: AtomicUsize,
    /// Of the server's memory in MiB, in the order of requests.
    readings: Mutex<Vec<Memory>>,
}

/// In MiB.
#[derive(Debug, Clone, Copy)]
struct Memory {
    resident: f64,
    /// Of it, only kept for later requests.
    kept: f64,
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let key = std::env::var("IDEFICS_API_KEY").ok();
    let prompts: Vec<Value> = (0..options.prompts).map(|number| prompt(number, options.max_tokens)).collect();
    let start = Instant::now();
    let alone = {
        let server = Server::start(&options)?;
        let mut client = Client::connect(&server.address, key.clone())?;
        prompts.iter().map(|prompt| ask(&mut client, prompt)).collect::<Result<Vec<_>, _>>()?
    };
    println!("{} prompts one after another: {:.1} s", prompts.len(), start.elapsed().as_secs_f64());

    let server = Server::start(&options)?;
    let connect = || Client::connect(&server.address, key.clone());
    let start = Instant::now();
    let outcome = by_all_clients(&options, &connect, &prompts, &alone);
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} requests by {} clients: {seconds:.1} s, {:.1} requests/s, {:.1} tokens/s",
        options.requests,
        options.clients,
        options.requests as f64 / seconds,
        outcome.tokens.load(Relaxed) as f64 / seconds
    );
    let metrics = String::from_utf8(connect()?.get("/metrics")?.body)?;
    let count = |name: &str| figure(&metrics, name).unwrap_or(f64::NAN);
    println!(
        "the engine: {:.1} rows a step, {} pictures read and {} reused, {} prompt tokens reused, {} preemptions",
        count("idefics_engine_rows_total") / count("idefics_engine_steps_total"),
        count("idefics_engine_images_encoded_total"),
        count("idefics_engine_images_reused_total"),
        count("idefics_engine_reused_tokens_total"),
        count("idefics_engine_preemptions_total"),
    );
    let Outcome { different, errors, readings, .. } = outcome;
    let growth = growth(&readings.into_inner().expect("no client panics"));
    let lists = [("different answers", different), ("errors", errors)].map(|(what, list)| {
        let list = list.into_inner().expect("no client panics");
        println!("{what}: {}", list.len());
        list.iter().take(5).for_each(|problem| println!("  {problem}"));
        list.len()
    });
    if lists != [0, 0] {
        bail!("{} of {} requests went wrong", lists.iter().sum::<usize>(), options.requests);
    }
    if growth > options.max_growth {
        bail!("the server's memory grew by {growth:.1} MiB, more than {:.1}", options.max_growth);
    }
    println!("every answer is the one that its prompt gets alone");
    Ok(())
}

fn by_all_clients(
    options: &Options,
    connect: &(impl Fn() -> anyhow::Result<Client> + Sync),
    prompts: &[Value],
    alone: &[Answer],
) -> Outcome {
    let outcome = Outcome::default();
    let next = AtomicUsize::new(0);
    let push = |list: &Mutex<Vec<String>>, problem| list.lock().expect("no client panics").push(problem);
    let work = || -> anyhow::Result<()> {
        let mut client = connect()?;
        loop {
            let number = next.fetch_add(1, Relaxed);
            if number >= options.requests {
                return Ok(());
            }
            if number.is_multiple_of((options.requests / READINGS).max(1)) {
                let memory = memory(&mut client)?;
                outcome.readings.lock().expect("no client panics").push(memory);
            }
            // An order that mixes long and short, with and without pictures.
            let index = number.wrapping_mul(7919) % prompts.len();
            match ask(&mut client, &prompts[index]) {
                Ok(answer) => {
                    outcome.tokens.fetch_add(answer.tokens, Relaxed);
                    if answer != alone[index] {
                        let [got, expected] = [&answer.text, &alone[index].text];
                        push(&outcome.different, format!("prompt {index}: {got:?}, alone {expected:?}"));
                    }
                }
                Err(error) => {
                    push(&outcome.errors, format!("prompt {index}: {error:#}"));
                    client = connect()?;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..options.clients).map(|_| scope.spawn(work)).collect();
        for client in clients {
            if let Err(error) = client.join().expect("no client panics") {
                push(&outcome.errors, format!("a client gave up: {error:#}"));
            }
        }
    });
    outcome
}

/// By how many MiB the server's memory grew after warm-up: from the median of the first third of the readings to that
/// of the last. What is kept for later requests has a limit of its own and is told beside it.
fn growth(readings: &[Memory]) -> f64 {
    let warm = &readings[(readings.len() as f64 * WARM_UP) as usize..];
    if warm.len() < 3 {
        println!("memory: too few requests to say");
        return 0.0;
    }
    let third = warm.len() / 3;
    let of = |readings: &[Memory], which: fn(&Memory) -> f64| median(readings.iter().map(which).collect());
    let resident: fn(&Memory) -> f64 = |memory| memory.resident;
    let (early, late) = (of(&warm[..third], resident), of(&warm[warm.len() - third..], resident));
    let most = readings.iter().map(resident).fold(0.0, f64::max);
    let kept = of(&warm[warm.len() - third..], |memory| memory.kept);
    println!(
        "memory after warm-up: {early:.1} MiB, at the end {late:.1} MiB ({:+.1}), at most {most:.1}; {kept:.1} of it kept \
         for later requests",
        late - early
    );
    late - early
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Server {
    fn start(options: &Options) -> anyhow::Result<Self> {
        if let Some(address) = &options.address {
            return Ok(Self { address: address.clone(), child: None });
        }
        let idefics = binary()?;
        let child = Command::new(&idefics)
            .args(["serve", "--port", "0", "--log-level", "warn", "--model"])
            .arg(&options.model)
            .args(["--cache-mib", &options.cache_mib.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", idefics.display()))?;
        // From here on it ends with this value, whatever happens.
        let mut server = Self { address: String::new(), child: Some(child) };
        let out = server.child.as_mut().and_then(|child| child.stdout.take()).context("stdout is piped")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        line.trim()
            .strip_prefix("http://")
            .context("the server ended at once")?
            .clone_into(&mut server.address);
        while Client::connect(&server.address, None)?.get("/health")?.status == 503 {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // One that has ended needs no end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The command, in `IDEFICS` or where cargo puts it: a folder above its examples.
fn binary() -> anyhow::Result<PathBuf> {
    if let Some(named) = std::env::var_os("IDEFICS") {
        return Ok(named.into());
    }
    let here = std::env::current_exe()?;
    let built = here.parent().and_then(Path::parent).map(|folder| folder.join("idefics"));
    built.filter(|path| path.is_file()).context(
        "no `idefics` beside this program: cargo build --release -p idefics-cli, or name one in IDEFICS",
    )
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

/// A dialogue of one to three turns, with no, one or two of some pictures, in one of all ways to answer.
fn prompt(number: usize, max_tokens: usize) -> Value {
    let words =
        ["Hello", "What is this?", "Tell me a story about it", "Why", "And now something longer: a b c d"];
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
    prompt
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
fn memory(client: &mut Client) -> anyhow::Result<Memory> {
    let text = String::from_utf8(client.get("/metrics")?.body)?;
    let mib = |name: &str| figure(&text, name).map(|bytes| bytes / f64::from(1 << 20));
    let resident = mib("idefics_resident_memory_bytes").context("the metrics tell no memory")?;
    Ok(Memory { resident, kept: mib("idefics_engine_kept_bytes").unwrap_or(0.0) })
}

fn figure(metrics: &str, name: &str) -> Option<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        model: Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny"),
        address: None,
        clients: 64,
        requests: 10_000,
        prompts: 0,
        max_tokens: 24,
        cache_mib: 256,
        max_growth: 16.0,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--model" => options.model = value.into(),
            "--address" => options.address = Some(value),
            "--clients" => options.clients = value.parse()?,
            "--requests" => options.requests = value.parse()?,
            "--prompts" => options.prompts = value.parse()?,
            "--max-tokens" => options.max_tokens = value.parse()?,
            "--cache-mib" => options.cache_mib = value.parse()?,
            "--max-growth" => options.max_growth = value.parse()?,
            _ => bail!("unknown option {flag}"),
        }
    }
    if options.clients == 0 || options.requests == 0 || options.max_tokens == 0 {
        bail!("expected at least one client, request and token");
    }
    if options.prompts == 0 {
        options.prompts = options.requests;
    }
    Ok(options)
}
