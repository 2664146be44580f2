//! The hub's HTTP interface: which files a revision has, and their content.
//!
//! Redirects are followed by hand, as the access token may go to the hub alone, never to the storage hosts that it
//! redirects to, and as the first answer carries the tag and the size of the content.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
    time::Duration,
};

use serde::Deserialize;
use url::Url;

use super::{HubError, ModelId, Progress, cache::ModelCache, error::io_error, id::is_commit};
use crate::files::sha256;

/// Most redirects that are followed for one file.
const MAX_REDIRECTS: usize = 10;
/// How often a broken download is tried in a row without a byte of progress.
const MAX_ATTEMPTS: u32 = 5;
/// Largest description of a repository that is read.
const MAX_DESCRIPTION: u64 = 16 << 20;

/// A hub that answers requests.
pub(super) struct Client<'a> {
    agent: ureq::Agent,
    endpoint: &'a Url,
    token: Option<&'a str>,
    retry_pause: Duration,
}

/// A model at one commit.
pub(super) struct Repository {
    id: ModelId,
    pub(super) commit: String,
    files: BTreeSet<String>,
}

impl Repository {
    pub(super) fn has(&self, file: &str) -> bool {
        self.files.contains(file)
    }
}

/// The content that a file name stands for.
struct Content {
    /// Names the content; a SHA-256 for large files.
    etag: String,
    size: u64,
}

type Response = ureq::http::Response<ureq::Body>;

impl<'a> Client<'a> {
    pub(super) fn new(endpoint: &'a Url, token: Option<&'a str>, retry_pause: Duration) -> Self {
        let config = ureq::Agent::config_builder()
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("idefics-rs/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_mins(1)))
            .timeout_per_read(Some(Duration::from_mins(1)));
        Self { agent: config.build().into(), endpoint, token, retry_pause }
    }

    /// Asks which commit a revision stands for and which files it has.
    pub(super) fn repository(&self, id: &ModelId) -> Result<Repository, HubError> {
        #[derive(Deserialize)]
        struct Description {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url = self.address(&format!("api/models/{}/revision/{}", id.name(), quoted(id.revision())));
        let (response, url) = self.follow("GET", url, None, Leave::Never)?;
        refuse_status(&response, &url, id, "")?;
        let mut text = Vec::new();
        let mut body = response.into_body().into_reader().take(MAX_DESCRIPTION);
        body.read_to_end(&mut text)
            .map_err(|source| HubError::Transport { url: shown(&url), source: Box::new(source.into()) })?;
        let described: Description =
            serde_json::from_slice(&text).map_err(|error| bad_answer(&url, error.to_string()))?;
        if !is_commit(&described.sha) {
            return Err(bad_answer(&url, "`sha` is not a commit id"));
        }
        let files = described.siblings.into_iter().map(|file| file.rfilename).collect();
        Ok(Repository { id: id.clone(), commit: described.sha, files })
    }

    /// Brings a file of a repository into the cache, unless its content is there already. `file` is one file name.
    pub(super) fn fetch(
        &self,
        cache: &ModelCache,
        repository: &Repository,
        file: &str,
        progress: &mut dyn Progress,
    ) -> Result<(), HubError> {
        let id = &repository.id;
        let url = self.address(&format!("{}/resolve/{}/{}", id.name(), repository.commit, quoted(file)));
        let (response, at) = self.head(&url)?;
        if !response.status().is_redirection() {
            refuse_status(&response, &at, id, file)?;
        }
        let content = Content::from_headers(&response).map_err(|problem| bad_answer(&at, problem))?;
        let _lock = cache.lock(&content.etag)?;
        if !cache.blob(&content.etag).is_file() {
            let part = cache.incomplete(&content.etag);
            self.complete(&part, &url, id, file, &content, progress)?;
            content.check(&part, file)?;
            fs::rename(&part, cache.blob(&content.etag)).map_err(io_error(&part))?;
            progress.finish(file);
        }
        cache.link(&repository.commit, file, &content.etag)
    }

    /// Asks the hub about an address, again where it is busy or does not answer.
    fn head(&self, url: &Url) -> Result<(Response, Url), HubError> {
        let mut attempts = 1;
        loop {
            let result = self.follow("HEAD", url.clone(), None, Leave::Never);
            let is_passing = match &result {
                Ok((response, _)) => is_busy(response),
                Err(error) => matches!(error, HubError::Transport { .. }),
            };
            if !is_passing || attempts == MAX_ATTEMPTS {
                return result;
            }
            self.pause_after(attempts);
            attempts += 1;
        }
    }

    /// Downloads until `part` has the size of the content, continuing what is there.
    fn complete(
        &self,
        part: &Path,
        url: &Url,
        id: &ModelId,
        file: &str,
        content: &Content,
        progress: &mut dyn Progress,
    ) -> Result<(), HubError> {
        let mut out = File::options().create(true).append(true).open(part).map_err(io_error(part))?;
        let mut attempts = 0;
        loop {
            let mut done = out.metadata().map_err(io_error(part))?.len();
            if done > content.size {
                out.set_len(0).map_err(io_error(part))?;
                done = 0;
            }
            progress.start(file, done, content.size);
            if done == content.size {
                return Ok(());
            }
            let broken = match self.follow("GET", url.clone(), Some(done), Leave::WithoutToken) {
                Ok((response, _)) if is_busy(&response) => {
                    Some(io::Error::other(format!("status {}", response.status().as_u16())))
                }
                Ok((response, at)) => {
                    refuse_status(&response, &at, id, file)?;
                    if done > 0 && !continues(&response, done) {
                        out.set_len(0).map_err(io_error(part))?;
                        done = 0;
                        progress.start(file, 0, content.size);
                    }
                    let mut body = response.into_body().into_reader().take(content.size - done);
                    let before = done;
                    let result = copy(&mut body, &mut out, part, &mut done, progress)?;
                    if done > before {
                        attempts = 0;
                    }
                    result.err()
                }
                Err(HubError::Transport { source, .. }) => Some(io::Error::other(source)),
                Err(error) => return Err(error),
            };
            if done < content.size {
                attempts += 1;
                let broken = broken.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                if attempts >= MAX_ATTEMPTS {
                    return Err(HubError::BrokeOff { file: file.to_owned(), attempts, source: broken });
                }
                self.pause_after(attempts);
            }
        }
    }

    /// Waits before the next of several attempts, longer after each.
    fn pause_after(&self, attempts: u32) {
        std::thread::sleep(self.retry_pause * 2u32.pow(attempts - 1));
    }

    /// Sends a request and follows redirects; returns the last answer and its address. `from` asks for the bytes
    /// from there on.
    fn follow(
        &self,
        method: &str,
        mut url: Url,
        from: Option<u64>,
        leave: Leave,
    ) -> Result<(Response, Url), HubError> {
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(method, &url, from)?;
            let location = response.headers().get("location").filter(|_| response.status().is_redirection());
            let Some(location) = location else { return Ok((response, url)) };
            let location = location.to_str().ok().and_then(|location| url.join(location).ok());
            let Some(next) = location else { return Err(bad_answer(&url, "a redirect to no address")) };
            let downgraded = url.scheme() == "https" && next.scheme() != "https";
            if !matches!(next.scheme(), "http" | "https") || downgraded {
                return Err(bad_answer(&url, "a redirect to an insecure address"));
            }
            if leave == Leave::Never && next.origin() != self.endpoint.origin() {
                return Ok((response, url));
            }
            url = next;
        }
        Err(bad_answer(&url, "too many redirects"))
    }

    fn send(&self, method: &str, url: &Url, from: Option<u64>) -> Result<Response, HubError> {
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(url.as_str())
            // Sizes and positions are those of the plain content.
            .header("accept-encoding", "identity");
        if let Some(from) = from.filter(|from| *from > 0) {
            request = request.header("range", format!("bytes={from}-"));
        }
        if let Some(token) = self.token.filter(|_| url.origin() == self.endpoint.origin()) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let transport = |source| HubError::Transport { url: shown(url), source: Box::new(source) };
        let request = request.body(()).map_err(|error| transport(ureq::Error::Http(error)))?;
        self.agent.run(request).map_err(transport)
    }

    fn address(&self, path: &str) -> Url {
        let base = self.endpoint.as_str().trim_end_matches('/');
        Url::parse(&format!("{base}/{path}"))
            .expect("checked names behind a checked endpoint make an address")
    }
}

/// Whether redirects to other hosts are followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leave {
    /// No: the hub's own answer is wanted.
    Never,
    /// Yes, but the access token stays behind.
    WithoutToken,
}

impl Content {
    /// Tag and size: the hub's own headers for content that lies on a storage host, the usual ones otherwise.
    fn from_headers(response: &Response) -> Result<Self, &'static str> {
        let header = |names: [&str; 2]| {
            let value = names.iter().find_map(|name| response.headers().get(*name));
            value.and_then(|value| value.to_str().ok())
        };
        let etag = header(["x-linked-etag", "etag"]).ok_or("no `etag`")?;
        let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
        // It becomes a file name.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if etag.is_empty() || etag.len() > 128 || !etag.chars().all(plain) {
            return Err("an odd `etag`");
        }
        let size = header(["x-linked-size", "content-length"]).and_then(|size| size.parse().ok());
        Ok(Self { etag: etag.to_owned(), size: size.ok_or("no size")? })
    }

    /// Checks what arrived; a wrong file is deleted, as continuing it would not make it right.
    fn check(&self, part: &Path, file: &str) -> Result<(), HubError> {
        // Tags of small files are git's and not SHA-256; their size was checked.
        if self.etag.len() != 64 || !self.etag.chars().all(|c| c.is_ascii_hexdigit()) {
            return Ok(());
        }
        let got = sha256(part).map_err(io_error(part))?;
        if got.eq_ignore_ascii_case(&self.etag) {
            return Ok(());
        }
        fs::remove_file(part).map_err(io_error(part))?;
        Err(HubError::Damaged { file: file.to_owned(), expected: self.etag.clone(), got })
    }
}

/// Copies a body to a file and counts in `done`. The outer result is about the file, the inner about the connection.
fn copy(
    body: &mut impl Read,
    out: &mut File,
    part: &Path,
    done: &mut u64,
    progress: &mut dyn Progress,
) -> Result<io::Result<()>, HubError> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        let length = match body.read(&mut buffer) {
            Ok(0) => return Ok(Ok(())),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Ok(Err(error)),
        };
        out.write_all(&buffer[..length]).map_err(io_error(part))?;
        *done += length as u64;
        progress.advance(length as u64);
    }
}

/// Whether an answer holds the bytes from `from` on, and not the whole again.
fn continues(response: &Response, from: u64) -> bool {
    let range = response.headers().get("content-range").and_then(|range| range.to_str().ok());
    response.status() == 206 && range.is_some_and(|range| range.starts_with(&format!("bytes {from}-")))
}

/// Whether the same request may succeed a little later.
fn is_busy(response: &Response) -> bool {
    response.status() == 429 || response.status().is_server_error()
}

fn refuse_status(response: &Response, url: &Url, id: &ModelId, file: &str) -> Result<(), HubError> {
    match response.status().as_u16() {
        200 | 206 => Ok(()),
        status @ (401 | 403) => Err(HubError::AccessDenied { id: id.to_string(), status }),
        404 if file.is_empty() => Err(HubError::NotFound { what: id.to_string() }),
        404 => Err(HubError::NotFound { what: format!("{id}/{file}") }),
        status => Err(HubError::Status { url: shown(url), status }),
    }
}

fn bad_answer(url: &Url, problem: impl Into<String>) -> HubError {
    HubError::BadAnswer { url: shown(url), problem: problem.into() }
}

/// An address without its query: signatures of storage hosts are secrets.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.to_string()
}

/// A name as one segment of an address.
fn quoted(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    let quote = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    name.bytes().map(quote).collect()
}
