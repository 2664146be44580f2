//! `idefics serve`: a model behind HTTP, in the dialects of OpenAI and of text-generation-inference.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use clap::ValueEnum;
use idefics::{
    config::IdeficsConfig,
    generate::{Engine, EngineOptions, Memory, Scheduler},
    processor::{AddEndOfUtterance, FetchPolicy},
};
use idefics_server::{
    ApiKeys, Limits, Loaded, ModelCard, Sandbox, Server, ServerOptions, Traces,
    logging::{self, LogFormat, LogLevel},
};

use crate::{model::ModelArgs, output};

/// Serve a model over HTTP: OpenAI's and text-generation-inference's dialects, metrics, a web chat
///
/// Listens on this machine alone, fetches no pictures, and takes at most as much as the limits below say. SIGTERM
/// or Ctrl-C lets running answers finish; a second one does not.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  idefics serve -m HuggingFaceM4/idefics-9b-instruct --quantize nf4\n  \
    curl localhost:8080/v1/chat/completions -H 'content-type: application/json' \\\n    \
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    network: NetworkArgs,

    #[command(flatten)]
    limits: LimitArgs,

    /// How log lines on stderr look
    #[arg(long, value_enum, default_value = "text", help_heading = "Logs")]
    log_format: LogFormatName,

    /// Least important lines that are logged: error, warn, info, debug, trace or off
    #[arg(long, default_value = "info", value_name = "LEVEL", help_heading = "Logs")]
    log_level: LogLevel,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    /// Address to listen on; 0.0.0.0 or :: for all
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    host: IpAddr,

    /// Port to listen on; 0 takes a free one
    #[arg(long, short, default_value_t = 8080, value_name = "PORT")]
    port: u16,

    /// API keys, one a line; `IDEFICS_API_KEYS` may hold more
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,

    /// Listen for other machines without API keys
    #[arg(long)]
    without_api_keys: bool,

    /// Host name by which the server may be called, beside addresses and localhost; may be given several times
    #[arg(long = "allowed-host", value_name = "NAME")]
    allowed_hosts: Vec<String>,

    /// Origin whose pages may call the server from a browser, such as `https://ui.example`, or `*` for all; may be given
    /// several times
    #[arg(long = "cors-origin", value_name = "ORIGIN")]
    cors_origins: Vec<String>,

    /// Fetch pictures that requests name by address, by the rules under "Images"
    #[arg(long, conflicts_with = "no_fetch")]
    allow_remote_images: bool,

    /// Give up system calls that a server needs not once the model is loaded (Linux)
    #[arg(long)]
    sandbox: bool,

    /// Name of the model for clients; the first is shown, all are known [default: that of the model]
    #[arg(long = "served-model-name", value_name = "NAME")]
    names: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Requests at a time, waiting and running; others get 429
    #[arg(long, value_name = "N", default_value_t = Limits::default().requests)]
    max_requests: usize,

    /// Connections at a time
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections)]
    max_connections: usize,

    /// Sequences that are answered together
    #[arg(long, value_name = "N", default_value_t = Scheduler::interactive().max_sequences)]
    max_batch: usize,

    /// Memory for keys, values and pictures of all requests, in MiB; a request that needs more is refused [default:
    /// three quarters of what is free beside the weights]
    #[arg(long, value_name = "MIB")]
    cache_mib: Option<usize>,

    /// Largest request, in MiB
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().body_bytes >> 20)]
    max_body_mib: usize,

    /// Pictures of one request
    #[arg(long, value_name = "N", default_value_t = Limits::default().images)]
    max_images: usize,

    /// Longest answer where a chat request does not say, in tokens
    #[arg(long, value_name = "N", default_value_t = Limits::default().default_tokens)]
    default_max_tokens: usize,

    /// Seconds that an answer may take once it has its place among those that are written
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().answer_timeout.as_secs())]
    answer_timeout: u64,

    /// Seconds that running answers get when the server is asked to end
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().drain_timeout.as_secs())]
    drain_timeout: u64,

    /// Seconds that a client may take to send the head of a request, and as many for its body, with one more for every
    /// 32 KiB of it
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().read_timeout.as_secs())]
    read_timeout: u64,

    /// Seconds that a client may leave an answer unread
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().write_timeout.as_secs())]
    write_timeout: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormatName {
    /// For people
    Text,
    /// A JSON object a line
    Json,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    logging::start(
        match args.log_format {
            LogFormatName::Text => LogFormat::Text,
            LogFormatName::Json => LogFormat::Json,
        },
        args.log_level,
    );
    let options = server_options(&args)?;
    let engine = engine_options(&args.limits)?;
    let server = Server::bind(options)?;
    // Programs that ask for port 0 read the address from here.
    output::print(&format!("http://{}", server.address()))?;
    let (model, names) = (args.model, args.network.names);
    server.run(move || load(&model, &names, engine).map_err(Into::into))?;
    Ok(())
}

fn load(model: &ModelArgs, names: &[String], options: EngineOptions) -> anyhow::Result<Loaded> {
    let source = model.find()?;
    if let Some(note) = source.note("--model") {
        logging::warn(&note);
    }
    let loaded = model.open(source)?;
    let generation = loaded.model.default_generation(Some(loaded.processor.special_tokens()))?;
    let mut names = names.iter().cloned();
    let card = ModelCard {
        id: names.next().unwrap_or_else(|| public_name(&loaded.name)),
        aliases: names.chain([loaded.name.clone()]).collect(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        dtype: model.packed_as().map_or_else(|| stored_as(loaded.model.config()), str::to_owned),
    };
    let decoder = Arc::new(loaded.processor.clone());
    let engine = Engine::start(loaded.model, decoder, options).context("cannot start the engine")?;
    Ok(Loaded { backend: Arc::new(engine), processor: loaded.processor, generation, card })
}

/// What clients are told of `--model`: of a directory its last part, as where it lies is nobody's business.
fn public_name(model: &str) -> String {
    let path = Path::new(model);
    // `.` and the like have no name of their own.
    let directory = path.is_dir().then(|| path.canonicalize().ok()).flatten();
    let name = directory.as_deref().and_then(Path::file_name);
    name.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The type of the weights, as the checkpoint has it.
fn stored_as(config: &IdeficsConfig) -> String {
    match &config.quantization_config {
        Some(packed) if packed.load_in_4bit => "nf4".to_owned(),
        Some(_) => "q8".to_owned(),
        None => {
            config.dtype.clone().or_else(|| config.torch_dtype.clone()).unwrap_or_else(|| "f32".to_owned())
        }
    }
}

fn server_options(args: &Args) -> anyhow::Result<ServerOptions> {
    let network = &args.network;
    let images = args.model.process_options();
    if images.add_end_of_utterance == AddEndOfUtterance::Always {
        bail!("--add-end-of-utterance: a server writes the ends of turns itself");
    }
    let keys = api_keys(network)?;
    if keys.is_empty() && !network.host.is_loopback() && !network.without_api_keys {
        bail!(
            "--host {} lets other machines in, and there are no API keys: name a file by --api-key-file, set \
             IDEFICS_API_KEYS, or say --without-api-keys",
            network.host
        );
    }
    Ok(ServerOptions {
        address: SocketAddr::new(network.host, network.port),
        keys,
        allowed_hosts: network.allowed_hosts.clone(),
        cors_origins: network.cors_origins.clone(),
        limits: Limits { image: images.limits, ..limits(&args.limits)? },
        fetch: FetchPolicy { enabled: network.allow_remote_images, ..images.fetch },
        orientation: images.orientation,
        sandbox: if network.sandbox { Sandbox::On } else { Sandbox::Off },
        traces: Traces::FromEnvironment,
    })
}

fn api_keys(network: &NetworkArgs) -> anyhow::Result<ApiKeys> {
    let mut keys = ApiKeys::default();
    if let Some(path) = &network.api_key_file {
        keys = keys.with(ApiKeys::from_file(path)?);
    }
    // Not a flag: other users see the command line of a process, not its environment.
    if let Some(text) = std::env::var("IDEFICS_API_KEYS").ok().filter(|text| !text.is_empty()) {
        keys = keys.with(ApiKeys::parse(&text.replace([',', ' '], "\n"), "IDEFICS_API_KEYS")?);
    }
    Ok(keys)
}

fn limits(args: &LimitArgs) -> anyhow::Result<Limits> {
    let at_least_one = [
        ("--max-requests", args.max_requests),
        ("--max-connections", args.max_connections),
        ("--max-batch", args.max_batch),
        ("--max-body-mib", args.max_body_mib),
        ("--default-max-tokens", args.default_max_tokens),
        ("--answer-timeout", args.answer_timeout as usize),
        ("--read-timeout", args.read_timeout as usize),
        ("--write-timeout", args.write_timeout as usize),
    ];
    for (flag, value) in at_least_one {
        // Semaphores and timers have bounds; nobody means more.
        if !(1..=1 << 30).contains(&value) {
            bail!("{flag}: expected 1 to {}, got {value}", 1 << 30);
        }
    }
    let defaults = Limits::default();
    let body_bytes = args.max_body_mib << 20;
    Ok(Limits {
        connections: args.max_connections,
        requests: args.max_requests,
        body_bytes,
        upload_bytes: defaults.upload_bytes.max(2 * body_bytes),
        images: args.max_images,
        default_tokens: args.default_max_tokens,
        answer_timeout: Duration::from_secs(args.answer_timeout),
        drain_timeout: Duration::from_secs(args.drain_timeout),
        read_timeout: Duration::from_secs(args.read_timeout),
        write_timeout: Duration::from_secs(args.write_timeout),
        ..defaults
    })
}

fn engine_options(args: &LimitArgs) -> anyhow::Result<EngineOptions> {
    if args.cache_mib == Some(0) {
        bail!("--cache-mib: expected at least 1, got 0");
    }
    Ok(EngineOptions {
        scheduler: Scheduler { max_sequences: args.max_batch, ..Scheduler::interactive() },
        memory: args.cache_mib.map(|mib| Memory::of(mib.saturating_mul(1 << 20))),
        max_waiting: args.max_requests,
        ..EngineOptions::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_known_by_its_last_part() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("idefics-mine");
        std::fs::create_dir(&model).unwrap();
        for path in [model.clone(), model.join(""), model.join("."), model.join("..").join("idefics-mine")] {
            assert_eq!(public_name(path.to_str().unwrap()), "idefics-mine", "{}", path.display());
        }
        for name in ["HuggingFaceM4/idefics-9b-instruct", "no-such-thing"] {
            assert_eq!(public_name(name), name);
        }
    }
}
