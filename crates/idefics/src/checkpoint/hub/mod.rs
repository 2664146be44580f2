//! Models of the Hugging Face hub, in the cache that Python's `huggingface_hub` shares.
//!
//! Environment: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, with the
//! meanings of `huggingface_hub/constants.py`. Surprising: only the files that this project reads are fetched, so a
//! snapshot made here may lack others; the Python client adds them when asked.
//!
//! Written on plain HTTP rather than on the crate `hf-hub`, which passes the access token on to the hosts that the
//! hub redirects to, trusts the server's tags as file names, and knows no offline mode.

mod cache;
mod client;
mod error;
mod id;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

pub use error::HubError;
pub use id::ModelId;

use super::{INDEX_FILE, Index, MAX_INDEX_BYTES, WEIGHTS_FILE};
use cache::ModelCache;
use client::{Client, Repository};
use error::io_error;

/// Files beside the weights that are fetched where a model has them.
const SIDE_FILES: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// Told how a download goes on, file by file.
pub trait Progress {
    /// A file begins, or begins again after a broken connection: `done` of `total` bytes are already there.
    fn start(&mut self, file: &str, done: u64, total: u64);
    /// More bytes arrived.
    fn advance(&mut self, bytes: u64);
    /// The file is complete and checked.
    fn finish(&mut self, file: &str);
}

/// Tells nobody.
impl Progress for () {
    fn start(&mut self, _file: &str, _done: u64, _total: u64) {}
    fn advance(&mut self, _bytes: u64) {}
    fn finish(&mut self, _file: &str) {}
}

/// The directory of a model: `model` itself if it is a directory, else a model of the hub, by the settings of the
/// environment, which is downloaded unless the cache has it.
pub fn resolve(model: &str, progress: &mut dyn Progress) -> Result<PathBuf, HubError> {
    if Path::new(model).is_dir() {
        return Ok(PathBuf::from(model));
    }
    let id: ModelId = model.parse()?;
    Hub::from_env()?.resolve(&id, progress)
}

/// A hub and the cache for it.
#[derive(Clone)]
pub struct Hub {
    endpoint: url::Url,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    /// Pause before a broken download is continued; doubled each time.
    retry_pause: Duration,
}

impl Hub {
    /// The hub and cache that the environment names.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| variable(name).map(|value| expand_home(&value, &variable));
        let user_cache = || {
            path("XDG_CACHE_HOME").or_else(|| {
                Some(PathBuf::from(variable("HOME").or_else(|| variable("USERPROFILE"))?).join(".cache"))
            })
        };
        let home = path("HF_HOME").or_else(|| Some(user_cache()?.join("huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or(HubError::NoCacheDirectory)?;
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
        let token = variable("HF_TOKEN")
            .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| std::fs::read_to_string(token_file?).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let is_true = |value: String| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str());
        let offline =
            variable("HF_HUB_OFFLINE").or_else(|| variable("TRANSFORMERS_OFFLINE")).is_some_and(is_true);
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let bad_endpoint = || HubError::BadEndpoint { endpoint: endpoint.escape_debug().to_string() };
        let endpoint = url::Url::parse(&endpoint).map_err(|_| bad_endpoint())?;
        if !matches!(endpoint.scheme(), "http" | "https") || !endpoint.has_host() {
            return Err(bad_endpoint());
        }
        Ok(Self { endpoint, cache, token, offline, retry_pause: Duration::from_millis(500) })
    }

    /// Another cache directory.
    #[must_use]
    pub fn with_cache(mut self, cache: impl Into<PathBuf>) -> Self {
        self.cache = cache.into();
        self
    }

    /// The cache directory.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// The directory of a model; no request is made if the cache has all of it.
    pub fn resolve(&self, id: &ModelId, progress: &mut dyn Progress) -> Result<PathBuf, HubError> {
        match ModelCache::new(&self.cache, id).complete_snapshot(id.revision()) {
            Some(snapshot) => Ok(snapshot),
            None => self.download(id, progress),
        }
    }

    /// Asks the hub what a revision stands for now, fetches what the cache lacks of it, and returns its directory.
    /// A full commit id that the cache has, and offline mode, need no request.
    pub fn download(&self, id: &ModelId, progress: &mut dyn Progress) -> Result<PathBuf, HubError> {
        let cache = ModelCache::new(&self.cache, id);
        if (self.offline || id::is_commit(id.revision()))
            && let Some(snapshot) = cache.complete_snapshot(id.revision())
        {
            return Ok(snapshot);
        }
        if self.offline {
            return Err(HubError::Offline { id: id.to_string(), cache: self.cache.clone() });
        }
        let client = Client::new(&self.endpoint, self.token.as_deref(), self.retry_pause);
        let repository = client.repository(id)?;
        let fetch =
            |file: &str, progress: &mut dyn Progress| client.fetch(&cache, &repository, file, progress);

        // The weights come last: where they are, everything else is.
        for file in SIDE_FILES.into_iter().filter(|file| repository.has(file)) {
            fetch(file, progress)?;
        }
        if !repository.has("config.json") {
            return Err(HubError::MissingFile { id: id.to_string(), file: "config.json".to_owned() });
        }
        let snapshot = cache.snapshot(&repository.commit);
        if repository.has(WEIGHTS_FILE) {
            fetch(WEIGHTS_FILE, progress)?;
        } else if repository.has(INDEX_FILE) {
            fetch(INDEX_FILE, progress)?;
            for shard in shards(id, &repository, &snapshot)? {
                fetch(&shard, progress)?;
            }
        } else {
            return Err(HubError::NoSafetensors { id: id.to_string() });
        }
        cache.write_ref(id.revision(), &repository.commit)?;
        Ok(snapshot)
    }
}

/// The shards that a downloaded index names; their names have been checked.
fn shards(id: &ModelId, repository: &Repository, snapshot: &Path) -> Result<Vec<String>, HubError> {
    let path = snapshot.join(INDEX_FILE);
    let length = path.metadata().map_err(io_error(&path))?.len();
    if length > MAX_INDEX_BYTES {
        let (expected, got) = (format!("at most {MAX_INDEX_BYTES} bytes"), format!("{length} bytes"));
        return Err(HubError::Damaged { file: INDEX_FILE.to_owned(), expected, got });
    }
    let text = std::fs::read_to_string(&path).map_err(io_error(&path))?;
    let index = Index::from_json(&text).map_err(|source| HubError::Index { id: id.to_string(), source })?;
    let shards: Vec<String> = index.shards().into_iter().map(str::to_owned).collect();
    match shards.iter().find(|shard| !repository.has(shard)) {
        Some(shard) => Err(HubError::MissingFile { id: id.to_string(), file: shard.clone() }),
        None => Ok(shards),
    }
}

/// A leading `~` as the home directory, for variables that no shell has expanded.
fn expand_home(path: &str, variable: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    match path.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            PathBuf::from(variable("HOME").unwrap_or_default() + rest)
        }
        _ => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests;
