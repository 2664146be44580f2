//! How the server behaves. The defaults are safe for a machine that others can reach.

use std::{net::SocketAddr, time::Duration};

use idefics::processor::{ExifOrientation, FetchPolicy, ImageLimits};

use crate::{auth::ApiKeys, trace::Traces};

/// Where and for whom.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Address to listen on.
    pub address: SocketAddr,
    /// Who may ask. Without keys anybody who can connect.
    pub keys: ApiKeys,
    /// Names by which the server may be called, beside addresses and `localhost`. Where it listens on loopback, a
    /// request for any other name is refused: a web page could have pointed its own name at this machine.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may call the server from a browser, or `*` for all. None by default.
    pub cors_origins: Vec<String>,
    /// What one request, and all together, may cost.
    pub limits: Limits,
    /// What may be fetched. Nothing by default.
    pub fetch: FetchPolicy,
    /// Whether EXIF orientation is heeded.
    pub orientation: ExifOrientation,
    /// Whether system calls that the server has no use for are given up once the model is there.
    pub sandbox: Sandbox,
    /// Where spans of requests go.
    pub traces: Traces,
}

/// Whether the process gives up system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sandbox {
    /// Not.
    #[default]
    Off,
    /// Files cannot be written or opened, programs not started, connections not made. With fetching of pictures or
    /// export of traces on, files can be read and connections made. Linux only.
    On,
}

/// Bounds, each with a clear refusal.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time; others wait to be accepted.
    pub connections: usize,
    /// Requests at a time, waiting and running; others get 429.
    pub requests: usize,
    /// Bytes of one request.
    pub body_bytes: usize,
    /// Bytes of all requests that are being read.
    pub upload_bytes: usize,
    /// Pictures of one request.
    pub images: usize,
    /// Size of a picture.
    pub image: ImageLimits,
    /// Pictures that are decoded or fetched at a time.
    pub media_tasks: usize,
    /// Messages of a dialogue.
    pub messages: usize,
    /// Prompts of one completion request.
    pub prompts: usize,
    /// Answers to one prompt.
    pub answers: usize,
    /// Tokens of an answer where the request does not say.
    pub default_tokens: usize,
    /// Stop strings of one request.
    pub stops: usize,
    /// Alternatives to each token.
    pub top_logprobs: usize,
    /// Tokens in `logit_bias`.
    pub biases: usize,
    /// Time for the head of a request, and as much again for its body, which gets a second more for every 32 KiB
    /// that have come.
    pub read_timeout: Duration,
    /// Time for a client to take what was sent.
    pub write_timeout: Duration,
    /// Time for an answer, from when it has its place in the engine; what is there by then is returned.
    pub answer_timeout: Duration,
    /// Time that answers get to finish when the server is asked to end.
    pub drain_timeout: Duration,
    /// Time between the comments that keep a silent stream alive.
    pub keep_alive: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            keys: ApiKeys::default(),
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            limits: Limits::default(),
            fetch: FetchPolicy::disabled(),
            orientation: ExifOrientation::default(),
            sandbox: Sandbox::default(),
            traces: Traces::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            requests: 256,
            body_bytes: 32 << 20,
            upload_bytes: 256 << 20,
            images: 16,
            image: ImageLimits { max_bytes: 20 << 20, max_pixels: 50_000_000, ..ImageLimits::default() },
            media_tasks: std::thread::available_parallelism().map_or(2, |n| n.get().max(2)),
            messages: 512,
            prompts: 32,
            answers: 16,
            default_tokens: 512,
            stops: 16,
            top_logprobs: 20,
            biases: 1024,
            read_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_mins(1),
            answer_timeout: Duration::from_mins(10),
            drain_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(15),
        }
    }
}
