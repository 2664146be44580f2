//! Event files for TensorBoard: scalars alone.
//!
//! Format: records of TFRecord (`tensorflow/core/lib/io/record_writer.cc`: length, masked CRC-32C of it, data,
//! masked CRC-32C of that), each an `Event` of `tensorflow/core/util/event.proto`. Four fields of three messages
//! do not pay for a protobuf library.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{TrainError, error::io_error, metrics::Record};

/// A file of events.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a new file in a directory; TensorBoard reads those of earlier runs beside it. `step` is where the
    /// run goes on: what earlier files say of later steps is to be forgotten.
    pub fn create(directory: &Path, step: u64) -> Result<Self, TrainError> {
        fs::create_dir_all(directory).map_err(io_error("create", directory))?;
        let now = seconds();
        let path = (0..=u32::MAX)
            .map(|number| directory.join(format!("events.out.tfevents.{:010}.idefics.{number}", now as u64)))
            .find(|path| !path.exists())
            .unwrap_or_default();
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let mut events = Self { file: file.map_err(io_error("create", &path))?, path };
        events.write(&event(now, 0, &[bytes_field(3, b"brain.Event:2")].concat()))?;
        if step > 0 {
            // SessionLog with status START: the reader drops what came after this step.
            let start = bytes_field(7, &varint_field(1, 1));
            events.write(&event(now, step, &start))?;
        }
        Ok(events)
    }

    /// Writes the numbers of a record.
    pub fn record(&mut self, record: &Record) -> Result<(), TrainError> {
        let values: Vec<(&str, f64)> = match record {
            Record::Step(record) => vec![
                ("train/loss", record.loss),
                ("train/accuracy", record.accuracy),
                ("train/gradient_norm", record.gradient_norm),
                ("train/learning_rate", record.learning_rate),
                ("speed/tokens_per_second", record.tokens as f64 / record.seconds.max(1e-9)),
                ("speed/images_per_second", record.images as f64 / record.seconds.max(1e-9)),
            ],
            Record::Evaluation(record) => {
                vec![("held_out/loss", record.loss), ("held_out/accuracy", record.accuracy)]
            }
            Record::Skip(_) => return Ok(()),
        };
        let summary: Vec<u8> = values
            .into_iter()
            .flat_map(|(tag, value)| {
                // Summary.Value: tag = 1, simple_value = 2.
                let mut content = bytes_field(1, tag.as_bytes());
                content.push(2 << 3 | 5);
                content.extend((value as f32).to_le_bytes());
                bytes_field(1, &content)
            })
            .collect();
        self.write(&event(seconds(), record.step(), &bytes_field(5, &summary)))
    }

    fn write(&mut self, data: &[u8]) -> Result<(), TrainError> {
        self.file.write_all(&framed(data)).map_err(io_error("write", &self.path))
    }
}

/// `Event`: `wall_time` = 1, step = 2, and one of the others.
fn event(time: f64, step: u64, content: &[u8]) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(time.to_le_bytes());
    event.extend(varint_field(2, step));
    event.extend(content);
    event
}

fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc(data).to_le_bytes());
    record
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint_field(number: u8, value: u64) -> Vec<u8> {
    let mut field = vec![number << 3];
    push_varint(&mut field, value);
    field
}

fn bytes_field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    push_varint(&mut field, bytes.len() as u64);
    field.extend(bytes);
    field
}

fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::EvaluationRecord;

    /// What `tensorboard.compat.proto.event_pb2` 2.21.0 and its `RecordWriter` make of
    /// `Event(wall_time=1.5, step=300, summary=Summary(value=[Summary.Value(tag="a/b", simple_value=0.25)]))`.
    #[test]
    fn bytes_are_tensorboard_s() {
        let mut value = bytes_field(1, b"a/b");
        value.push(2 << 3 | 5);
        value.extend(0.25_f32.to_le_bytes());
        let got = framed(&event(1.5, 300, &bytes_field(5, &bytes_field(1, &value))));
        let hex = got.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
        assert_eq!(
            hex,
            "1a00000000000000129bd82d09000000000000f83f10ac022a0c0a0a0a03612f62150000803ef9cde7ed"
        );
    }

    #[test]
    fn files_do_not_overwrite_each_other() {
        let dir = tempfile::tempdir().unwrap();
        for step in [0, 7] {
            let mut file = EventFile::create(dir.path(), step).unwrap();
            let record =
                EvaluationRecord { step: step + 1, loss: 1.0, accuracy: 0.5, targets: 1, seconds: 1.0 };
            file.record(&Record::Evaluation(record)).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
