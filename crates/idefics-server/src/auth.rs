//! API keys: who may ask.
//!
//! Keys are kept and compared as SHA-256, so that neither the comparison nor a dump of memory tells of their
//! length or beginning; every key is compared, in constant time, whether or not one has matched.

use std::{fmt, path::Path};

use axum::http::{HeaderMap, header};
use base64::{Engine, prelude::BASE64_STANDARD};
use ring::digest::{SHA256, digest};
use subtle::{Choice, ConstantTimeEq};

/// The keys that open the server; none of them, and it is open to all.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the file of API keys {path}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file without a key would leave the server open, which nobody means who names one.
    #[error("there is no key in {0}")]
    Empty(String),
    /// A key that no header can carry.
    #[error("key {number} in {origin}: expected 8 to 512 visible ASCII characters")]
    Malformed {
        /// Where it was read.
        origin: String,
        /// Which one, from 1.
        number: usize,
    },
}

impl ApiKeys {
    /// Reads keys from a text, one a line; empty lines and lines that start with `#` do not count. `origin` is
    /// named in messages.
    pub fn parse(text: &str, origin: &str) -> Result<Self, KeyError> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let mut keys = Vec::new();
        for (index, key) in lines.enumerate() {
            if !(8..=512).contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(KeyError::Malformed { origin: origin.to_owned(), number: index + 1 });
            }
            keys.push(hash(key.as_bytes()));
        }
        if keys.is_empty() { Err(KeyError::Empty(origin.to_owned())) } else { Ok(Self(keys)) }
    }

    /// Reads keys from a file.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        let name = path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|source| KeyError::Read { path: name.clone(), source })?;
        Self::parse(&text, &name)
    }

    /// Both lists together.
    #[must_use]
    pub fn with(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Whether the server is open to all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request with these headers may pass: `Authorization: Bearer KEY`, or `Basic` with the key as
    /// password, which is how a browser can open a page.
    pub(crate) fn allow(&self, headers: &HeaderMap) -> bool {
        self.is_empty() || presented_key(headers).is_some_and(|key| self.contains(&key))
    }

    fn contains(&self, key: &[u8]) -> bool {
        let hash = hash(key);
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&hash));
        found.into()
    }
}

/// Keys are never printed.
impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

fn presented_key(headers: &HeaderMap) -> Option<Vec<u8>> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, credentials) = value.split_once(' ')?;
    let credentials = credentials.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(credentials.as_bytes().to_vec());
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let decoded = BASE64_STANDARD.decode(credentials).ok()?;
        let colon = decoded.iter().position(|&byte| byte == b':')?;
        return Some(decoded[colon + 1..].to_vec());
    }
    None
}

fn hash(key: &[u8]) -> [u8; 32] {
    digest(&SHA256, key).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(keys: &ApiKeys, authorization: &str) -> bool {
        let mut headers = HeaderMap::new();
        if !authorization.is_empty() {
            headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        }
        keys.allow(&headers)
    }

    #[test]
    fn a_key_opens_in_either_scheme() {
        let keys = ApiKeys::parse("# people\nfirst-key-1\n\n second-key-2 \n", "test").unwrap();
        let basic = |text: &str| format!("Basic {}", BASE64_STANDARD.encode(text));
        for (authorization, expected) in [
            ("Bearer first-key-1".to_owned(), true),
            ("bearer second-key-2".to_owned(), true),
            ("Bearer first-key-".to_owned(), false),
            ("Bearer first-key-12".to_owned(), false),
            ("Bearer FIRST-KEY-1".to_owned(), false),
            ("Bearer # people".to_owned(), false),
            ("Bearer ".to_owned(), false),
            ("Token first-key-1".to_owned(), false),
            ("first-key-1".to_owned(), false),
            (basic("anybody:first-key-1"), true),
            (basic(":second-key-2"), true),
            (basic("first-key-1"), false),
            (basic("first-key-1:"), false),
            ("Basic first-key-1".to_owned(), false),
            (String::new(), false),
        ] {
            assert_eq!(allows(&keys, &authorization), expected, "{authorization}");
        }
        assert!(allows(&ApiKeys::default(), ""), "without keys all may pass");
    }

    #[test]
    fn lists_of_keys_are_checked_and_never_shown() {
        for (text, expected) in [
            ("", "there is no key in test"),
            ("# only a comment", "there is no key in test"),
            ("good-key-1\nshort", "key 2 in test: expected 8 to 512 visible ASCII characters"),
            ("with a space", "key 1 in test: expected 8 to 512 visible ASCII characters"),
        ] {
            assert_eq!(ApiKeys::parse(text, "test").unwrap_err().to_string(), expected, "{text}");
        }
        let shown = format!("{:?}", ApiKeys::parse("secret-key", "test").unwrap());
        assert_eq!(shown, "ApiKeys(1)");
    }
}
