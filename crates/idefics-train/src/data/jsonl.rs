//! JSON lines, read at any line: the places where lines begin are found once.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use super::{
    DataError, Source,
    json::{find_file, parse},
    sample::{Sample, SampleError},
    source::at,
};

/// Longest line that is read, in bytes: room for some pictures as `data:` URIs.
const MAX_LINE: u64 = 256 << 20;

/// Files of JSON lines.
pub(super) struct JsonLines {
    files: Vec<LineFile>,
    /// Where each sample lies: file, first byte, bytes, number of the line.
    lines: Vec<Line>,
}

struct LineFile {
    path: PathBuf,
    root: PathBuf,
    file: Mutex<File>,
}

struct Line {
    file: u32,
    number: u32,
    start: u64,
    length: u64,
}

impl JsonLines {
    pub(super) fn open(paths: &[PathBuf], image_root: Option<&Path>) -> Result<Self, DataError> {
        let mut source = Self { files: Vec::new(), lines: Vec::new() };
        for path in paths {
            let io = DataError::io("read", path);
            let file = File::open(path).map_err(&io)?;
            source.find_lines(&file).map_err(&io)?;
            let folder = path.parent().unwrap_or(Path::new("."));
            let root = image_root.unwrap_or(folder).to_owned();
            source.files.push(LineFile { path: path.clone(), root, file: Mutex::new(file) });
        }
        Ok(source)
    }

    fn find_lines(&mut self, file: &File) -> std::io::Result<()> {
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let (mut start, mut number, mut line) = (0, 0, Vec::new());
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line)? as u64;
            if length == 0 {
                return Ok(());
            }
            number += 1;
            if !line.trim_ascii().is_empty() {
                self.lines.push(Line { file: self.files.len() as u32, number, start, length });
            }
            start += length;
        }
    }
}

impl Source for JsonLines {
    fn num_samples(&self) -> u64 {
        self.lines.len() as u64
    }

    fn read(&self, index: u64) -> Result<Sample, SampleError> {
        let broken = |reason| SampleError { place: self.place(index), reason };
        let line = &self.lines[index as usize];
        let file = &self.files[line.file as usize];
        if line.length > MAX_LINE {
            return Err(broken(format!("a line of {} bytes, more than {MAX_LINE}", line.length)));
        }
        let mut bytes = vec![0; line.length as usize];
        {
            let mut file = file.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(line.start))
                .and_then(|_| file.read_exact(&mut bytes))
                .map_err(|error| broken(error.to_string()))?;
        }
        parse(&bytes, &|name| find_file(name, &file.root)).map_err(broken)
    }

    fn place(&self, index: u64) -> String {
        let line = &self.lines[index as usize];
        at(&self.files[line.file as usize].path, format_args!("line {}", line.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::sample::Piece;

    #[test]
    fn lines_are_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl"));
        std::fs::write(&first, "{\"text\": \"one\"}\n\n{\"text\": \"two\"}").unwrap();
        std::fs::write(&second, "{\"text\": \"three\"}\r\nnonsense\n").unwrap();
        let source = JsonLines::open(&[first, second], None).unwrap();
        assert_eq!(source.num_samples(), 4);
        for (index, expected) in [(2, "three"), (0, "one"), (1, "two")] {
            assert_eq!(source.read(index).unwrap().pieces, [Piece::answer(expected)]);
        }
        assert!(source.place(1).ends_with("a.jsonl, line 3"));
        let error = source.read(3).unwrap_err();
        assert!(error.place.ends_with("b.jsonl, line 2"), "{error}");
    }
}
