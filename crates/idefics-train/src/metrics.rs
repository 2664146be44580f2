//! What a run writes about itself: `metrics.jsonl`, one object for each step and each evaluation.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{TrainError, error::io_error};

/// One line of the metrics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// A step of the optimiser.
    Step(StepRecord),
    /// A step whose data was skipped.
    Skip(SkipRecord),
    /// A loss on held-out data.
    Evaluation(EvaluationRecord),
}

/// A step of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Its number, the first being 1.
    pub step: u64,
    /// Mean cross-entropy of its targets, in nats.
    pub loss: f64,
    /// Mean squared log-sum of the logits.
    pub z: f64,
    /// Share of targets that the model found most likely.
    pub accuracy: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Tokens of this step.
    pub tokens: u64,
    /// Targets of this step.
    pub targets: u64,
    /// Pictures of this step.
    pub images: u64,
    /// How long it took.
    pub seconds: f64,
    /// Of which it waited for data.
    pub data_seconds: f64,
}

/// A step whose data was skipped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SkipRecord {
    /// The step that it would have been.
    pub step: u64,
    /// What was wrong.
    pub reason: String,
}

/// A loss on held-out data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// The step after which it was.
    pub step: u64,
    /// Mean cross-entropy, in nats.
    pub loss: f64,
    /// Share of targets that the model found most likely.
    pub accuracy: f64,
    /// Targets.
    pub targets: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Record {
    /// The step that it belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(record) => record.step,
            Self::Skip(record) => record.step,
            Self::Evaluation(record) => record.step,
        }
    }
}

/// The file of records.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Metrics {
    /// Begins a file, or goes on with one: what it says of steps after `step` was forgotten and is cut off. Of
    /// skipped steps the first `skipped` stay, since a run that goes back does not read their data again.
    pub fn open(path: &Path, step: u64, skipped: u64) -> Result<Self, TrainError> {
        let mut skips = 0;
        let is_kept = |record: &Record| match record {
            Record::Skip(_) => {
                skips += 1;
                skips <= skipped
            }
            _ => record.step() <= step && step > 0,
        };
        let kept: String = read(path)?.into_iter().filter(is_kept).map(|record| line(&record)).collect();
        let partial = path.with_extension("jsonl.partial");
        fs::write(&partial, kept).map_err(io_error("write", &partial))?;
        fs::rename(&partial, path).map_err(io_error("rename", &partial))?;
        let file = OpenOptions::new().append(true).open(path).map_err(io_error("write", path))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file) })
    }

    /// Writes a record; it is there for readers at once.
    pub fn write(&mut self, record: &Record) -> Result<(), TrainError> {
        self.file
            .write_all(line(record).as_bytes())
            .and_then(|()| self.file.flush())
            .map_err(io_error("write", &self.path))
    }
}

/// The records of a file, as far as they can be read: a run that was killed may have left half a line.
pub fn read(path: &Path) -> Result<Vec<Record>, TrainError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(io_error("read", path)(error)),
    }
}

fn line(record: &Record) -> String {
    let mut line = serde_json::to_string(record).expect("a record is made of numbers and texts");
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_forgotten_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let record = |step| {
            Record::Evaluation(EvaluationRecord { step, loss: 0.5, accuracy: 0.25, targets: 3, seconds: 1.0 })
        };
        let mut metrics = Metrics::open(&path, 0, 0).unwrap();
        (1..5).for_each(|step| metrics.write(&record(step)).unwrap());
        fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"kind\":\"st").unwrap();
        let mut metrics = Metrics::open(&path, 2, 0).unwrap();
        metrics.write(&record(3)).unwrap();
        assert_eq!(read(&path).unwrap(), [record(1), record(2), record(3)]);
        // Skipped data is not met again, steps are.
        let skip = |step| Record::Skip(SkipRecord { step, reason: "loss NaN".to_owned() });
        for skip in [skip(4), skip(5)] {
            metrics.write(&skip).unwrap();
        }
        Metrics::open(&path, 1, 1).unwrap();
        assert_eq!(read(&path).unwrap(), [record(1), skip(4)]);
    }
}
