//! Remote pictures and `data:` URIs to bytes, without being made a tool against the network we run in.
//!
//! A server that fetches what strangers name can be aimed at its own neighbours. So: only `http` and `https`, only
//! ports 80 and 443, no credentials, no proxy; the name is resolved here, *every* answer must be a public address,
//! and the connection goes to the addresses that were checked, so a second look-up cannot answer differently.
//! Redirects are followed by hand and each hop is checked again. One budget of time and one of bytes covers all
//! hops. Nothing of an answer's body reaches an error. [`FetchPolicy`] widens each rule by name.

mod address;
mod data_uri;

use std::{
    io::Read,
    net::IpAddr,
    time::{Duration, Instant},
};

use ureq::{
    Agent, Body,
    http::{Response, Uri},
    unversioned::{
        resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver},
        transport::{DefaultConnector, NextTimeout},
    },
};
use url::Url;

use super::error::FetchError;
pub use data_uri::decode_data_uri;

/// What may be fetched, and at what cost.
#[derive(Debug, Clone, PartialEq)]
pub struct FetchPolicy {
    /// Whether anything is fetched at all.
    pub enabled: bool,
    /// Time for one picture, all redirects included.
    pub timeout: Duration,
    /// Largest body in bytes.
    pub max_bytes: usize,
    /// Redirects that are followed.
    pub max_redirects: usize,
    /// Whether addresses that are not public may be reached.
    pub allow_private: bool,
    /// Single addresses that may be reached although they are not public, such as a picture store of one's own.
    pub allowed_addresses: Vec<IpAddr>,
    /// Whether ports other than 80 and 443 may be reached.
    pub allow_any_port: bool,
}

impl Default for FetchPolicy {
    /// Public hosts only, 30 seconds, 64 MiB, three redirects.
    fn default() -> Self {
        Self {
            enabled: true,
            timeout: Duration::from_secs(30),
            max_bytes: 64 << 20,
            max_redirects: 3,
            allow_private: false,
            allowed_addresses: Vec::new(),
            allow_any_port: false,
        }
    }
}

impl FetchPolicy {
    /// Fetches nothing.
    pub fn disabled() -> Self {
        Self { enabled: false, ..Self::default() }
    }

    /// Whether a connection may go to this address.
    fn allows(&self, address: IpAddr) -> bool {
        self.allow_private || self.allowed_addresses.contains(&address) || address::is_public(address)
    }

    /// The rules that an address must keep before it is resolved.
    fn check_url(&self, url: &Url) -> Result<(), FetchError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(FetchError::Scheme(url.scheme().to_owned()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(FetchError::Credentials);
        }
        match url.port_or_known_default() {
            Some(80 | 443) => Ok(()),
            Some(_) if self.allow_any_port => Ok(()),
            Some(port) => Err(FetchError::Port(port)),
            None => Err(FetchError::BadUrl),
        }
    }
}

/// The bytes behind an `http` or `https` address.
pub fn fetch(address: &str, policy: &FetchPolicy) -> Result<Vec<u8>, FetchError> {
    if !policy.enabled {
        return Err(FetchError::Disabled);
    }
    let deadline = Instant::now() + policy.timeout;
    let mut url = Url::parse(address).map_err(|_| FetchError::BadUrl)?;
    for _ in 0..=policy.max_redirects {
        policy.check_url(&url)?;
        let host = url.host_str().ok_or(FetchError::BadUrl)?.to_owned();
        let mut response = request(&url, &host, policy, deadline)?;
        let status = response.status();
        if status.is_success() {
            return read_body(&mut response, &host, policy);
        }
        if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Err(FetchError::Status { host, status: status.as_u16() });
        }
        let location = response.headers().get("location").and_then(|value| value.to_str().ok());
        url = location.and_then(|l| url.join(l).ok()).ok_or(FetchError::BadRedirect(host))?;
    }
    Err(FetchError::TooManyRedirects(policy.max_redirects))
}

/// One hop. A fresh agent each time: no pooled connection outlives its check.
fn request(
    url: &Url,
    host: &str,
    policy: &FetchPolicy,
    deadline: Instant,
) -> Result<Response<Body>, FetchError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(FetchError::Timeout(policy.timeout.as_secs_f64()));
    }
    let config = Agent::config_builder()
        .proxy(None)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .timeout_global(Some(left))
        .max_idle_connections(0)
        .accept("image/*")
        .build();
    let resolver = CheckedResolver { inner: DefaultResolver::default(), policy: policy.clone() };
    let agent = Agent::with_parts(config, DefaultConnector::new(), resolver);
    agent.get(url.as_str()).call().map_err(|e| category(e, host, policy))
}

fn read_body(response: &mut Response<Body>, host: &str, policy: &FetchPolicy) -> Result<Vec<u8>, FetchError> {
    let too_many = || FetchError::TooManyBytes(policy.max_bytes);
    let limit = policy.max_bytes as u64;
    if response.body().content_length().is_some_and(|length| length > limit) {
        return Err(too_many());
    }
    let mut bytes = Vec::new();
    // One byte over the limit tells "too many" from "just enough".
    let mut reader = response.body_mut().with_config().limit(u64::MAX).reader().take(limit.saturating_add(1));
    reader.read_to_end(&mut bytes).map_err(|e| category(ureq::Error::from(e), host, policy))?;
    if bytes.len() > policy.max_bytes { Err(too_many()) } else { Ok(bytes) }
}

/// Resolves a name and refuses it if any of its addresses is out of bounds. The connector is handed exactly the
/// addresses that were checked.
#[derive(Debug)]
struct CheckedResolver {
    inner: DefaultResolver,
    policy: FetchPolicy,
}

impl Resolver for CheckedResolver {
    fn resolve(
        &self,
        uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let addresses = self.inner.resolve(uri, config, timeout)?;
        if addresses.iter().all(|a| self.policy.allows(a.ip())) {
            Ok(addresses)
        } else {
            Err(ureq::Error::Other(Box::new(RefusedAddress)))
        }
    }
}

/// How the resolver's refusal travels through the client.
#[derive(Debug, thiserror::Error)]
#[error("address is not public")]
struct RefusedAddress;

/// What went wrong, without a word of what the other side said.
fn category(error: ureq::Error, host: &str, policy: &FetchPolicy) -> FetchError {
    let host = host.to_owned();
    match error {
        ureq::Error::Timeout(_) => FetchError::Timeout(policy.timeout.as_secs_f64()),
        ureq::Error::HostNotFound => FetchError::HostNotFound(host),
        ureq::Error::Other(e) if e.is::<RefusedAddress>() => FetchError::PrivateAddress(host),
        ureq::Error::Io(e) => match e.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
            Some(ureq::Error::Timeout(_)) => FetchError::Timeout(policy.timeout.as_secs_f64()),
            _ if e.kind() == std::io::ErrorKind::TimedOut => {
                FetchError::Timeout(policy.timeout.as_secs_f64())
            }
            _ => FetchError::Connection(host),
        },
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => FetchError::BadUrl,
        _ => FetchError::Connection(host),
    }
}

#[cfg(test)]
mod tests;
