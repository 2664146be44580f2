//! A whole model into a directory, file by file and tensor by tensor.

use std::{
    cell::RefCell,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use super::{
    QuantizeError, Recipe,
    files::write_side_files,
    plan::{Plan, Shard},
    state::State,
    verify::verify,
};
use crate::{
    checkpoint::{
        Checkpoint, INDEX_FILE, check_not_same,
        write::{MAX_SHARD_BYTES, SIDE_FILES_BYTES, check_space, io_error, write_json, write_whole},
    },
    files::ModelFiles,
};

/// A model that is to be written quantized.
///
/// Nothing but the tensor at work is held in memory, nor are mapped pages. Files get their names when they are whole and have been
/// read back; a run that was interrupted is continued by doing the same again.
pub struct Quantizer {
    checkpoint: Checkpoint,
    recipe: Recipe,
    max_shard_bytes: u64,
    plan: Plan,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// The directory.
    pub directory: PathBuf,
    /// Weight files.
    pub files: usize,
    /// How many of them an earlier run had finished.
    pub kept: usize,
    /// Weights that are packed now.
    pub packed: usize,
    /// Weights that were copied.
    pub copied: usize,
    /// Bytes of all weights before.
    pub source_bytes: u64,
    /// Bytes of the weight files.
    pub bytes: u64,
}

impl Quantizer {
    /// Opens a model and lays out what is to be written.
    pub fn open(files: impl Into<ModelFiles>, recipe: &Recipe) -> Result<Self, QuantizeError> {
        let checkpoint = Checkpoint::open(files)?;
        let packed = checkpoint.weights.iter_packed().next().map(|(_, weight)| weight.format_name());
        if packed.is_some() || checkpoint.config.quantization_config.is_some() {
            let format = packed.unwrap_or("by its configuration").to_owned();
            return Err(QuantizeError::AlreadyQuantized { format });
        }
        let plan = Plan::new(&checkpoint, recipe, MAX_SHARD_BYTES)?;
        Ok(Self { checkpoint, recipe: recipe.clone(), max_shard_bytes: MAX_SHARD_BYTES, plan })
    }

    /// Splits the weights into files of about so many bytes instead of 5 GB; no tensor is split.
    pub fn with_max_shard_bytes(mut self, bytes: u64) -> Result<Self, QuantizeError> {
        self.plan = Plan::new(&self.checkpoint, &self.recipe, bytes)?;
        self.max_shard_bytes = bytes;
        Ok(self)
    }

    /// Bytes that [`write`](Self::write) will report as progress: each weight is read to be written, and again
    /// to be compared.
    pub fn work_bytes(&self) -> u64 {
        2 * self.plan.source_bytes()
    }

    /// Bytes of the weight files to be written.
    pub fn output_bytes(&self) -> u64 {
        self.plan.shards.iter().map(Shard::bytes).sum()
    }

    /// Writes the model to `out`, an empty or a new directory or one that the same call left unfinished.
    /// `progress` is called with the bytes done since the last call.
    pub fn write(&self, out: &Path, progress: &mut dyn FnMut(u64)) -> Result<Summary, QuantizeError> {
        fs::create_dir_all(out).map_err(io_error("create", out))?;
        if let Some(directory) = self.checkpoint.origin.directory() {
            check_not_same(directory, out)?;
        }
        let mut state = State::new(&self.checkpoint, &self.recipe, self.max_shard_bytes)?.resume(out)?;
        let mut remaining = Vec::new();
        for shard in &self.plan.shards {
            if state.is_finished(out, &shard.name)? {
                progress(2 * shard.source_bytes());
            } else {
                remaining.push(shard);
            }
        }
        check_space(out, remaining.iter().map(|shard| shard.bytes()).sum::<u64>() + SIDE_FILES_BYTES)?;
        state.save(out)?;
        for shard in &remaining {
            let path = out.join(&shard.name);
            // Both closures report progress, one after the other.
            let progress = RefCell::new(&mut *progress);
            let write = |file: &mut BufWriter<File>| write_shard(shard, file, &path, *progress.borrow_mut());
            let check = |written: &Path| {
                verify(written, shard, *progress.borrow_mut())?;
                state.finish(&shard.name, written)
            };
            write_whole(&path, write, check)?;
            state.save(out)?;
        }
        if self.plan.shards.len() > 1 {
            write_json(&out.join(INDEX_FILE), &self.plan.index())?;
        }
        write_side_files(&self.checkpoint.origin, out, &self.recipe, self.checkpoint.weights.main_dtype())?;
        State::remove(out)?;
        Ok(self.summary(out, self.plan.shards.len() - remaining.len()))
    }

    fn summary(&self, out: &Path, kept: usize) -> Summary {
        let entries = || self.plan.shards.iter().flat_map(|shard| &shard.entries);
        let packed = entries().filter(|entry| entry.format.is_some()).count();
        Summary {
            directory: out.to_owned(),
            files: self.plan.shards.len(),
            kept,
            packed,
            copied: entries().count() - packed,
            source_bytes: self.plan.source_bytes(),
            bytes: self.output_bytes(),
        }
    }
}

#[cfg(test)]
impl Quantizer {
    /// Compares the only file of an output with the model.
    pub(super) fn verify_file(&self, path: &Path) -> Result<(), QuantizeError> {
        verify(path, &self.plan.shards[0], &mut |_| ())
    }
}

/// Header, then the tensors in the order of the plan.
fn write_shard(
    shard: &Shard,
    file: &mut impl Write,
    path: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), QuantizeError> {
    file.write_all(&shard.header()).map_err(io_error("write", path))?;
    for entry in &shard.entries {
        let packed = entry.packed()?;
        for data in entry.data(packed.as_ref()) {
            file.write_all(&data).map_err(io_error("write", path))?;
        }
        entry.source.release_pages();
        progress(entry.source.bytes().len() as u64);
    }
    Ok(())
}
