//! WebDataset: tar files in which the files of one sample stand together and share their name up to the first dot.
//!
//! `000.jpg`, `000.txt`: a picture with its caption, put into the template. `000.json` with `segments`, `prompt`,
//! `messages` or `text` is a sample of its own kind, whose pictures are named by their endings (`"image": "1.jpg"`
//! is `000.1.jpg`), so that a `text`, which names none, has no picture beside it; any other `000.json` has columns for
//! the template.
//! Headers are read once, when the shard is opened; contents when a sample is asked for.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde_json::Value;

use super::{
    DataError, Source,
    files::has_image_name,
    json::{in_memory, parse},
    sample::{Sample, SampleError},
    source::at,
    template::Template,
};

/// Largest file of a sample, in bytes.
const MAX_FILE: u64 = 256 << 20;

/// Shards.
pub(super) struct WebDataset {
    shards: Vec<Shard>,
    samples: Vec<Entry>,
    template: Template,
}

struct Shard {
    path: PathBuf,
    file: Mutex<File>,
    samples: u64,
}

/// The files of one sample.
struct Entry {
    shard: u32,
    key: String,
    /// First byte and number of bytes, by ending.
    files: BTreeMap<String, (u64, u64)>,
}

impl Entry {
    /// The ending of its first picture.
    fn picture(&self) -> Option<&str> {
        let is_picture = |ending: &&String| has_image_name(Path::new(&format!("x.{ending}")));
        self.files.keys().find(is_picture).map(String::as_str)
    }
}

impl WebDataset {
    pub(super) fn open(paths: &[PathBuf], template: Template) -> Result<Self, DataError> {
        let mut source = Self { shards: Vec::new(), samples: Vec::new(), template };
        for path in paths {
            source.add_shard(path).map_err(DataError::io("read", path))?;
        }
        Ok(source)
    }

    fn add_shard(&mut self, path: &Path) -> std::io::Result<()> {
        let file = File::open(path)?;
        let before = self.samples.len();
        let shard = self.shards.len() as u32;
        let mut archive = tar::Archive::new(BufReader::new(&file));
        for entry in archive.entries_with_seek()? {
            let entry = entry?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name = entry.path()?.to_string_lossy().replace('\\', "/");
            let (folder, file_name) = name.rsplit_once('/').map_or(("", name.as_str()), |(a, b)| (a, b));
            let Some((stem, ending)) = file_name.split_once('.') else { continue };
            if stem.is_empty() {
                continue;
            }
            let key = if folder.is_empty() { stem.to_owned() } else { format!("{folder}/{stem}") };
            let place = (entry.raw_file_position(), entry.size());
            let is_new = self.samples[before..].last().is_none_or(|last| last.key != key);
            if is_new {
                self.samples.push(Entry { shard, key, files: BTreeMap::new() });
            }
            if let Some(last) = self.samples.last_mut() {
                last.files.insert(ending.to_lowercase(), place);
            }
        }
        let samples = (self.samples.len() - before) as u64;
        self.shards.push(Shard { path: path.to_owned(), file: Mutex::new(file), samples });
        Ok(())
    }

    fn read_file(&self, entry: &Entry, ending: &str) -> Result<Vec<u8>, String> {
        let (start, length) =
            *entry.files.get(&ending.to_lowercase()).ok_or_else(|| format!("there is no .{ending}"))?;
        if length > MAX_FILE {
            return Err(format!(".{ending} has {length} bytes, more than {MAX_FILE}"));
        }
        let mut bytes = vec![0; length as usize];
        let mut file = self.shards[entry.shard as usize].file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(start))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|error| format!(".{ending}: {error}"))?;
        Ok(bytes)
    }

    fn sample(&self, entry: &Entry) -> Result<Sample, String> {
        let mut columns = BTreeMap::new();
        if entry.files.contains_key("json") {
            let json = self.read_file(entry, "json")?;
            let fields: BTreeMap<String, Value> =
                serde_json::from_slice(&json).map_err(|error| format!(".json: {error}"))?;
            if let (true, Some(ending)) = (fields.contains_key("text"), entry.picture()) {
                return Err(format!(
                    "`text` in .json shows no picture, got .{ending} beside it: expected `segments` or `prompt` that \
                     name it, or `caption` for the template"
                ));
            }
            if ["segments", "prompt", "messages", "text"].iter().any(|field| fields.contains_key(*field)) {
                let find = |name: &str| Ok(in_memory(self.read_file(entry, name)?));
                return parse(&json, &find);
            }
            for (name, value) in fields {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                columns.insert(name, text);
            }
        }
        if entry.files.contains_key("txt") {
            let text = String::from_utf8(self.read_file(entry, "txt")?)
                .map_err(|_| ".txt is not UTF-8".to_owned())?;
            columns.insert("caption".to_owned(), text.trim().to_owned());
        }
        let image = || {
            let ending = entry.picture().ok_or("there is no picture")?;
            Ok(in_memory(self.read_file(entry, ending)?))
        };
        self.template.fill(|name| columns.get(name).cloned(), image)
    }
}

impl Source for WebDataset {
    fn num_samples(&self) -> u64 {
        self.samples.len() as u64
    }

    fn blocks(&self) -> Vec<u64> {
        self.shards.iter().map(|shard| shard.samples).collect()
    }

    fn read(&self, index: u64) -> Result<Sample, SampleError> {
        let place = || self.place(index);
        self.sample(&self.samples[index as usize]).map_err(|reason| SampleError { place: place(), reason })
    }

    fn place(&self, index: u64) -> String {
        let entry = &self.samples[index as usize];
        at(&self.shards[entry.shard as usize].path, &entry.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::sample::Piece;

    #[test]
    fn files_of_a_sample_belong_together() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard.tar");
        let mut builder = tar::Builder::new(File::create(&path).unwrap());
        let files: [(&str, &str); 9] = [
            ("a/000.jpg", "picture 0"),
            ("a/000.txt", "a cat\n"),
            ("a/001.1.png", "picture 1"),
            ("a/001.json", r#"{"prompt": [{"image": "1.png"}, {"text": "Q:"}], "continuation": " A"}"#),
            ("a/002.json", r#"{"caption": "no picture"}"#),
            ("a/003.jpg", "picture 3"),
            ("a/003.json", r#"{"caption": "from json", "size": 3}"#),
            ("a/004.jpg", "picture 4"),
            ("a/004.json", r#"{"text": "about the picture"}"#),
        ];
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        builder.finish().unwrap();
        let template = Template::parse("<image>", "{caption}").unwrap();
        let source = WebDataset::open(&[path], template).unwrap();
        assert_eq!((source.num_samples(), source.blocks()), (5, vec![5]));
        let picture = |bytes: &str| Piece::Image(in_memory(bytes.as_bytes().to_vec()));
        assert_eq!(source.read(0).unwrap().pieces, [picture("picture 0"), Piece::answer("a cat")]);
        assert_eq!(
            source.read(1).unwrap().pieces,
            [picture("picture 1"), Piece::context("Q:"), Piece::answer(" A")]
        );
        assert_eq!(source.read(2).unwrap_err().reason, "there is no picture");
        assert_eq!(source.read(3).unwrap().pieces, [picture("picture 3"), Piece::answer("from json")]);
        assert!(source.place(3).ends_with("shard.tar, a/003"));
        let error = source.read(4).unwrap_err().reason;
        assert!(error.starts_with("`text` in .json shows no picture, got .jpg beside it"), "{error}");
    }
}
