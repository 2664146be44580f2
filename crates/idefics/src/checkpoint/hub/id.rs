//! Names of models on the hub: `org/name`, or `org/name@revision`.

use std::{fmt, str::FromStr};

use super::HubError;

/// A model on the hub, at a branch, tag or commit.
///
/// Its parts end up in addresses and file names, so nothing that could lead elsewhere gets in here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    name: String,
    revision: String,
}

impl ModelId {
    /// `org/name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Branch, tag or commit; `main` unless something else was asked for.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The folder of this model in the cache.
    pub(super) fn folder(&self) -> String {
        format!("models--{}", self.name.replace('/', "--"))
    }
}

impl FromStr for ModelId {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let valid = name.split_once('/').is_some_and(|(org, name)| is_name(org) && is_name(name));
        if valid && is_revision(revision) {
            Ok(Self { name: name.to_owned(), revision: revision.to_owned() })
        } else {
            Err(HubError::BadId { id: text.escape_debug().to_string() })
        }
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.revision)
    }
}

/// The hub's own rule (`huggingface_hub`, `validate_repo_id`): letters, digits, `-`, `_`, `.`; `--` and `..` are
/// forbidden, and so are `-` and `.` at either end.
fn is_name(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=96).contains(&part.len())
        && part.chars().all(allowed)
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("--")
        && !part.contains("..")
}

/// A git reference that is also a relative path inside `refs/`.
fn is_revision(revision: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    let part = |part: &str| {
        !part.is_empty() && part.chars().all(allowed) && !part.starts_with(['-', '.']) && !part.contains("..")
    };
    revision.len() <= 255 && revision.split('/').all(part)
}

/// Whether a revision is a full commit id.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names() {
        let rows = [
            ("HuggingFaceM4/idefics-9b", "main", "models--HuggingFaceM4--idefics-9b"),
            ("a/b@v1.0", "v1.0", "models--a--b"),
            ("a/b_c.d@refs/pr/12", "refs/pr/12", "models--a--b_c.d"),
        ];
        for (text, revision, folder) in rows {
            let id: ModelId = text.parse().unwrap();
            assert_eq!((id.revision(), id.folder().as_str()), (revision, folder));
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let rows = [
            "",
            "gpt2",
            "/",
            "a/",
            "/b",
            "a/b/c",
            "../b",
            "a/..",
            "a/b..c",
            "a--b/c",
            ".a/b",
            "a/b-",
            "a/b?x=1",
            "a/b#c",
            "a/b%2f",
            "a\\b/c",
            "a/b c",
            "a/b@",
            "a/b@../main",
            "a/b@x/../y",
            "a/b@/main",
            "a/b@main/",
            "a/b@-x",
            "a/b@a b",
            "a/b@x\n",
            "a/ü",
            "http://host/a",
        ];
        for text in rows {
            assert!(matches!(text.parse::<ModelId>(), Err(HubError::BadId { .. })), "{text}");
        }
    }
}
