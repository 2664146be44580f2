//! `model.safetensors.index.json`: which shard holds which tensor.
//!
//! The index names files, so it could name files that are none of its business. A shard name is therefore one
//! plain file name, and the file it leads to must lie in the model's directory once links are resolved.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Component, Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::header::{UniqueKeys, printable};

/// What is wrong with an index.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Text that is not an index.
    #[error("not an index of shards")]
    Json(#[from] serde_json::Error),
    /// A map with no tensor.
    #[error("`weight_map` is empty")]
    Empty,
    /// A shard name that is more than a file name, or none.
    #[error("shard name `{name}` is not a plain name of a `.safetensors` file")]
    ShardName {
        /// The name, made printable.
        name: String,
    },
    /// A shard that is not there.
    #[error("shard `{name}` is missing or cannot be read")]
    ShardMissing {
        /// The name.
        name: String,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// A shard that is a directory, a pipe or a device.
    #[error("shard `{name}` is not a regular file")]
    NotAFile {
        /// The name.
        name: String,
    },
    /// A shard whose links lead elsewhere.
    #[error("shard `{name}` is a link to `{target}`, outside the model's directory")]
    Outside {
        /// The name.
        name: String,
        /// Where it leads.
        target: PathBuf,
    },
}

/// The shard of each tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Tensor name to shard name.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads the text of an index file and checks the shard names. Opens nothing.
    pub fn from_json(text: &str) -> Result<Self, IndexError> {
        let file: IndexFile = serde_json::from_str(text)?;
        let index = Self { weight_map: file.weight_map.0 };
        if index.weight_map.is_empty() {
            return Err(IndexError::Empty);
        }
        for name in index.shards() {
            check_shard_name(name)?;
        }
        Ok(index)
    }

    /// The names of the shards, each once, in order.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Whether a shard name is one plain file name, on every system.
fn check_shard_name(name: &str) -> Result<(), IndexError> {
    let mut parts = Path::new(name).components();
    let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name);
    let odd = |c: char| c.is_control() || matches!(c, '/' | '\\' | ':');
    if plain && name.len() <= 255 && name.ends_with(".safetensors") && !name.contains(odd) {
        Ok(())
    } else {
        Err(IndexError::ShardName { name: printable(name) })
    }
}

/// The path of a shard, links resolved. `name` has passed [`Index::from_json`].
pub(super) fn find_shard(directory: &Path, name: &str) -> Result<PathBuf, IndexError> {
    let missing = |source| IndexError::ShardMissing { name: name.to_owned(), source };
    let target = directory.join(name).canonicalize().map_err(missing)?;
    let home = directory.canonicalize().map_err(missing)?;
    let inside =
        target.parent() == Some(&home) || hub_blobs(&home).is_some_and(|blobs| target.starts_with(blobs));
    if !inside {
        return Err(IndexError::Outside { name: name.to_owned(), target });
    }
    if !target.metadata().map_err(missing)?.is_file() {
        return Err(IndexError::NotAFile { name: name.to_owned() });
    }
    Ok(target)
}

/// In the hub's cache, `snapshots/<revision>/` holds links into `blobs/` beside it; those are its own files.
fn hub_blobs(home: &Path) -> Option<PathBuf> {
    let snapshots = home.parent()?;
    let repository = snapshots.parent()?;
    let is_cache =
        snapshots.ends_with("snapshots") && repository.file_name()?.to_str()?.starts_with("models--");
    is_cache.then(|| repository.join("blobs"))
}

#[derive(Deserialize)]
struct IndexFile {
    weight_map: WeightMap,
}

struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_map(WeightMapVisitor)
    }
}

struct WeightMapVisitor;

impl<'de> Visitor<'de> for WeightMapVisitor {
    type Value = WeightMap;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object from tensor names to file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
        let mut seen = UniqueKeys::default();
        let mut entries = BTreeMap::new();
        while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
            seen.add(&tensor)?;
            entries.insert(tensor, shard);
        }
        Ok(WeightMap(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index_of(shard: &str) -> Result<Index, IndexError> {
        let shard = serde_json::to_string(shard).unwrap();
        Index::from_json(&format!("{{\"metadata\":{{\"total_size\":1}},\"weight_map\":{{\"x\":{shard}}}}}"))
    }

    #[test]
    fn plain_names_are_taken() {
        for name in ["model-00001-of-00002.safetensors", "a b.safetensors", "..safetensors"] {
            assert_eq!(index_of(name).unwrap().shards(), BTreeSet::from([name]), "{name}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let rows = [
            "",
            ".",
            "..",
            "../model.safetensors",
            "/etc/model.safetensors",
            "sub/model.safetensors",
            "./model.safetensors",
            "model.safetensors/",
            "..\\model.safetensors",
            "C:model.safetensors",
            "a\u{0}.safetensors",
            "a\n.safetensors",
            "model.bin",
            "config.json",
        ];
        for name in rows {
            let error = index_of(name).expect_err(name);
            assert!(matches!(error, IndexError::ShardName { .. }), "{name}: {error}");
        }
        assert!(matches!(
            index_of(&format!("{}.safetensors", "a".repeat(300))),
            Err(IndexError::ShardName { .. })
        ));
    }

    #[test]
    fn malformed_indices_are_named_errors() {
        let rows = [
            ("", "EOF while parsing"),
            ("{}", "missing field `weight_map`"),
            (r#"{"weight_map":{}}"#, "`weight_map` is empty"),
            (r#"{"weight_map":[]}"#, "expected an object from tensor names to file names"),
            (r#"{"weight_map":{"x":1}}"#, "expected a string"),
            (r#"{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}"#, "`x` stands there twice"),
        ];
        for (json, expected) in rows {
            let error = Index::from_json(json).expect_err(json);
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            let message = format!("{error}: {source}");
            assert!(message.contains(expected), "{json}\n  gave     {message}\n  expected {expected}");
        }
    }

    #[test]
    #[cfg(unix)]
    fn shards_stay_in_their_directory() {
        use std::{fs, os::unix::fs::symlink};
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let snapshot = root.join("models--org--name/snapshots/abc");
        let blobs = root.join("models--org--name/blobs");
        let plain = root.join("plain");
        for directory in [&snapshot, &blobs, &plain] {
            fs::create_dir_all(directory).unwrap();
        }
        for file in [root.join("secret"), blobs.join("123"), plain.join("own.safetensors")] {
            fs::write(file, "x").unwrap();
        }
        symlink("../../blobs/123", snapshot.join("blob.safetensors")).unwrap();
        symlink("../../../secret", snapshot.join("secret.safetensors")).unwrap();
        symlink("own.safetensors", plain.join("link.safetensors")).unwrap();
        symlink("../secret", plain.join("secret.safetensors")).unwrap();
        symlink("../models--org--name/blobs/123", plain.join("blob.safetensors")).unwrap();
        fs::create_dir(plain.join("directory.safetensors")).unwrap();

        assert_eq!(find_shard(&snapshot, "blob.safetensors").unwrap(), blobs.join("123"));
        assert_eq!(find_shard(&plain, "link.safetensors").unwrap(), plain.join("own.safetensors"));
        for (directory, name) in
            [(&snapshot, "secret.safetensors"), (&plain, "secret.safetensors"), (&plain, "blob.safetensors")]
        {
            let error = find_shard(directory, name).expect_err(name);
            assert!(matches!(error, IndexError::Outside { .. }), "{name}: {error}");
        }
        let error = find_shard(&plain, "directory.safetensors").unwrap_err();
        assert!(matches!(error, IndexError::NotAFile { .. }), "{error}");
        let error = find_shard(&plain, "none.safetensors").unwrap_err();
        assert!(matches!(error, IndexError::ShardMissing { .. }), "{error}");
    }
}
