//! Why a model cannot be had from the hub.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::super::IndexError;

/// Why a model cannot be had from the hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Neither a directory nor a possible name.
    #[error("`{id}` is neither a directory nor a model of the hub (`org/name` or `org/name@revision`)")]
    BadId {
        /// What was asked for, made printable.
        id: String,
    },
    /// An endpoint that is no web address.
    #[error("`HF_ENDPOINT` is `{endpoint}`, expected an http or https address")]
    BadEndpoint {
        /// What it is.
        endpoint: String,
    },
    /// No place for the cache.
    #[error("no cache directory: set `HF_HOME` or `HF_HUB_CACHE`")]
    NoCacheDirectory,
    /// Not in the cache, and no request may be made.
    #[error("`{id}` is not (completely) in `{cache}`, and `HF_HUB_OFFLINE` forbids to download it")]
    Offline {
        /// The model.
        id: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The hub wants to know who asks, or has not granted access.
    #[error(
        "the hub refuses `{id}` ({status}): if the model is gated, accept its terms on its page, then set `HF_TOKEN` \
         to an access token or log in with `hf auth login`"
    )]
    AccessDenied {
        /// The model.
        id: String,
        /// 401 or 403.
        status: u16,
    },
    /// No such model, revision or file.
    #[error("the hub has no `{what}` (404)")]
    NotFound {
        /// Model and file.
        what: String,
    },
    /// Another refusal.
    #[error("`{url}` answered with status {status}")]
    Status {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// No answer.
    #[error("cannot reach `{url}`")]
    Transport {
        /// The address.
        url: String,
        /// What went wrong on the way.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The connection broke again and again.
    #[error("the download of `{file}` broke off {attempts} times; the same command continues it")]
    BrokeOff {
        /// The file.
        file: String,
        /// How often.
        attempts: u32,
        /// The last reason.
        #[source]
        source: io::Error,
    },
    /// An answer that makes no sense.
    #[error("`{url}` gave an answer that is not the hub's: {problem}")]
    BadAnswer {
        /// The address.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// A file that is not what the hub announced.
    #[error("the download of `{file}` is damaged: expected {expected}, got {got}; it was deleted, try again")]
    Damaged {
        /// The file.
        file: String,
        /// Size or digest by the hub.
        expected: String,
        /// Size or digest of what arrived.
        got: String,
    },
    /// An index of shards that cannot be trusted.
    #[error("`{id}`: model.safetensors.index.json")]
    Index {
        /// The model.
        id: String,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// A file that the model lacks.
    #[error("`{id}` has no `{file}`")]
    MissingFile {
        /// The model.
        id: String,
        /// The file.
        file: String,
    },
    /// Only pickled weights, or none.
    #[error(
        "`{id}` has no safetensors weights; pickled ones are not loaded: convert them, or use a revision that has them"
    )]
    NoSafetensors {
        /// The model.
        id: String,
    },
    /// The disk is full.
    #[error("no space left for `{path}`")]
    NoSpace {
        /// The file that did not fit.
        path: PathBuf,
    },
    /// The cache cannot be read or written.
    #[error("cannot use `{path}`")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// Wraps what the system says about a file of the cache.
pub(super) fn io_error(path: &Path) -> impl Fn(io::Error) -> HubError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => HubError::NoSpace { path: path.clone() },
        _ => HubError::Io { path: path.clone(), source },
    }
}
