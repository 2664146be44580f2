//! The cache of one model, laid out as Python's `huggingface_hub` does, so that both share it:
//! `models--org--name/{refs/<revision>, blobs/<etag>, snapshots/<commit>/<file>}`, where a snapshot's files are
//! links to blobs, and `.locks/models--org--name/<etag>.lock` beside.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::{HubError, ModelId, error::io_error, id::is_commit};
use crate::checkpoint::{INDEX_FILE, Index, MAX_INDEX_BYTES, WEIGHTS_FILE, read_text};

/// The folder of one model in the cache.
pub(super) struct ModelCache {
    root: PathBuf,
    locks: PathBuf,
}

impl ModelCache {
    pub(super) fn new(cache: &Path, id: &ModelId) -> Self {
        Self { root: cache.join(id.folder()), locks: cache.join(".locks").join(id.folder()) }
    }

    /// The snapshot that a revision stands for, if all files that a model needs are there.
    pub(super) fn complete_snapshot(&self, revision: &str) -> Option<PathBuf> {
        let snapshot = self.snapshot(&self.commit_of(revision)?);
        let has = |name: &str| snapshot.join(name).is_file();
        let described = has("config.json") && (has("tokenizer.json") || has("tokenizer.model"));
        (described && (has(WEIGHTS_FILE) || has_all_shards(&snapshot))).then_some(snapshot)
    }

    /// The commit that a revision stood for when it was last asked for.
    fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = read_text(&self.root.join("refs").into(), revision, 1024).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// The directory of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The content that has this tag.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Content under way, as the Python client calls it too: either continues what the other began.
    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Notes which commit a revision stands for.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_parent(&path)?;
        fs::write(&path, commit).map_err(io_error(&path))
    }

    /// Makes `file` of a snapshot a link to a blob.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let link = self.snapshot(commit).join(file);
        create_parent(&link)?;
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(&link)(error)),
            _ => {}
        }
        // Relative, so that the cache can be moved.
        let target = Path::new("../../blobs").join(etag);
        link_or_copy(&target, &self.blob(etag), &link).map_err(io_error(&link))
    }

    /// Waits until no other process downloads this content; the lock ends with the returned file.
    pub(super) fn lock(&self, etag: &str) -> Result<File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        create_parent(&self.blob(etag))?;
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(io_error(&path))?;
        file.lock().map_err(io_error(&path))?;
        Ok(file)
    }
}

fn has_all_shards(snapshot: &Path) -> bool {
    let index = read_text(&snapshot.into(), INDEX_FILE, MAX_INDEX_BYTES).ok();
    let index = index.and_then(|text| Index::from_json(&text).ok());
    index.is_some_and(|index| index.shards().iter().all(|shard| snapshot.join(shard).is_file()))
}

#[cfg(unix)]
fn link_or_copy(target: &Path, _blob: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Elsewhere links may need rights that few have; the Python client then keeps plain files, too.
#[cfg(not(unix))]
fn link_or_copy(_target: &Path, blob: &Path, link: &Path) -> io::Result<()> {
    fs::copy(blob, link).map(drop)
}

fn create_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().expect("a path inside the cache has a parent");
    fs::create_dir_all(parent).map_err(io_error(parent))
}
