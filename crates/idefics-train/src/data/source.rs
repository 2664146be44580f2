//! Where samples come from: files that are read at any place, so that any order can be asked for.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    DataError,
    files::{FolderSource, TableSource},
    jsonl::JsonLines,
    obelics::Obelics,
    sample::{Sample, SampleError},
    template::Template,
    webdataset::WebDataset,
};

/// Samples by number.
pub trait Source: Send + Sync {
    /// How many there are.
    fn num_samples(&self) -> u64;

    /// Runs of samples that are cheap to read together; their lengths add up to the number of samples. They are
    /// shuffled, and the samples in each.
    fn blocks(&self) -> Vec<u64> {
        vec![self.num_samples()]
    }

    /// Sample `index`. Pictures are named or lent encoded; nothing is decoded here.
    fn read(&self, index: u64) -> Result<Sample, SampleError>;

    /// How messages call the sample.
    fn place(&self, index: u64) -> String;
}

/// How data lies on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// JSON lines: segments, prompt and continuation, plain texts, chats.
    Jsonl,
    /// Folders of pictures with a `.txt` of the same name beside each.
    Images,
    /// CSV or TSV with a column that names pictures.
    Csv,
    /// Parquet with OBELICS' columns `images`, `texts`, `metadata`.
    Obelics,
    /// Tar files of WebDataset.
    WebDataset,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Jsonl => "jsonl",
            Self::Images => "images",
            Self::Csv => "csv",
            Self::Obelics => "obelics",
            Self::WebDataset => "webdataset",
        })
    }
}

/// One entry of the mixture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// How it lies on disk.
    pub format: Format,
    /// Files or folders; `*` stands for anything in a file's name.
    pub path: Paths,
    /// Where names of pictures begin; the folder of the file that names them if nothing is said.
    pub image_root: Option<PathBuf>,
    /// Share of the samples, among the weights of all sources; the number of samples if nothing is said.
    pub weight: Option<f64>,
    /// Whether samples are shuffled.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// What is put before a caption, with `<image>` where the picture goes and `{column}` for other columns; the
    /// picture alone if nothing is said.
    pub prompt: Option<String>,
    /// What is to be written, `{caption}` or any other column; the caption if nothing is said.
    pub answer: Option<String>,
    /// The column of pictures in a table; `image` if nothing is said.
    pub image_column: Option<String>,
}

/// One path or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Paths {
    /// A single one.
    One(PathBuf),
    /// A list.
    Many(Vec<PathBuf>),
}

fn yes() -> bool {
    true
}

impl SourceConfig {
    /// A source with nothing said but where it is.
    pub fn new(format: Format, path: impl Into<PathBuf>) -> Self {
        Self {
            format,
            path: Paths::One(path.into()),
            image_root: None,
            weight: None,
            shuffle: true,
            prompt: None,
            answer: None,
            image_column: None,
        }
    }

    /// Opens it; `base` is where relative paths begin.
    pub fn open(&self, base: &Path) -> Result<Arc<dyn Source>, DataError> {
        self.check_keys()?;
        let paths = self.paths(base)?;
        let root = self.image_root.as_ref().map(|root| base.join(root));
        let or = |given: &Option<String>, default: &str| given.clone().unwrap_or_else(|| default.to_owned());
        let template = Template::parse(&or(&self.prompt, "<image>"), &or(&self.answer, "{caption}"))?;
        let source: Arc<dyn Source> = match self.format {
            Format::Jsonl => Arc::new(JsonLines::open(&paths, root.as_deref())?),
            Format::Images => Arc::new(FolderSource::open(&paths, template)?),
            Format::Csv => {
                let column = or(&self.image_column, "image");
                Arc::new(TableSource::open(&paths, root.as_deref(), &column, template)?)
            }
            Format::Obelics => Arc::new(Obelics::open(&paths, root.as_deref())?),
            Format::WebDataset => Arc::new(WebDataset::open(&paths, template)?),
        };
        if source.num_samples() == 0 {
            return Err(DataError::Empty { path: paths[0].clone() });
        }
        Ok(source)
    }

    /// Refuses what the format does not read: whoever wrote it expects something of it.
    fn check_keys(&self) -> Result<(), DataError> {
        use Format::{Csv, Images, Jsonl, Obelics, WebDataset};
        let keys: [(_, _, &[Format]); 4] = [
            ("prompt", self.prompt.is_some(), &[Images, Csv, WebDataset]),
            ("answer", self.answer.is_some(), &[Images, Csv, WebDataset]),
            ("image_column", self.image_column.is_some(), &[Csv]),
            ("image_root", self.image_root.is_some(), &[Jsonl, Csv, Obelics]),
        ];
        let unread =
            keys.into_iter().find(|(_, is_given, readers)| *is_given && !readers.contains(&self.format));
        match unread {
            Some((key, _, readers)) => {
                Err(DataError::UnreadKey { key, format: self.format, readers: names(readers) })
            }
            None => Ok(()),
        }
    }

    /// The files and folders that are meant, in the order of their names.
    fn paths(&self, base: &Path) -> Result<Vec<PathBuf>, DataError> {
        let given = match &self.path {
            Paths::One(path) => std::slice::from_ref(path),
            Paths::Many(paths) => paths,
        };
        let mut found = Vec::new();
        for path in given {
            let path = base.join(path);
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.contains('*') {
                found.push(path);
                continue;
            }
            let folder = path.parent().unwrap_or(Path::new(".")).to_owned();
            let entries = fs::read_dir(&folder).map_err(DataError::io("read", &folder))?;
            let mut matching: Vec<PathBuf> = entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| matches(&name, &path.file_name().unwrap_or_default().to_string_lossy()))
                .collect();
            matching.sort();
            if matching.is_empty() {
                return Err(DataError::NoFiles { pattern: path });
            }
            found.extend(matching);
        }
        match found.iter().find(|path| !path.exists()) {
            Some(missing) => Err(DataError::NoFiles { pattern: missing.clone() }),
            None if found.is_empty() => Err(DataError::NoFiles { pattern: base.to_owned() }),
            None => Ok(found),
        }
    }
}

/// Formats as the configuration calls them.
fn names(formats: &[Format]) -> String {
    formats.iter().map(Format::to_string).collect::<Vec<_>>().join(", ")
}

/// Whether a name fits a pattern in which `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            (0..=name.len()).filter(|&at| name.is_char_boundary(at)).any(|at| matches(rest, &name[at..]))
        }),
    }
}

/// A name for an error of a file that has places of its own.
pub(super) fn at(path: &Path, what: impl std::fmt::Display) -> String {
    format!("{}, {what}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, name, expected) in [
            ("a*.tar", "a-001.tar", true),
            ("a*.tar", "a.tar", true),
            ("a*.tar", "b.tar", false),
            ("*", "anything", true),
            ("a*b*c", "axbxc", true),
            ("a*b*c", "axxc", false),
            ("*é*", "caé1", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn keys_that_a_format_does_not_read_are_refused() {
        let text = || Some("{caption}".to_owned());
        let check = |source: SourceConfig, expected: &str| {
            let error = source.open(Path::new("nowhere")).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        };
        let new = |format| SourceConfig::new(format, "x");
        check(
            SourceConfig { answer: text(), ..new(Format::Jsonl) },
            "data: the format jsonl does not read `answer`: expected it with images, csv, webdataset",
        );
        check(SourceConfig { prompt: text(), ..new(Format::Obelics) }, "obelics does not read `prompt`");
        let image_root = Some(PathBuf::from("pictures"));
        check(
            SourceConfig { image_root: image_root.clone(), ..new(Format::Images) },
            "the format images does not read `image_root`: expected it with jsonl, csv, obelics",
        );
        check(SourceConfig { image_root, ..new(Format::WebDataset) }, "does not read `image_root`");
        check(SourceConfig { image_column: text(), ..new(Format::Images) }, "expected it with csv");
        // What is read is not refused; here the file is missing.
        check(SourceConfig { image_column: text(), ..new(Format::Csv) }, "no such file");
    }

    #[test]
    fn files_that_are_not_there_are_named() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["missing.jsonl", "*.jsonl"] {
            let error = SourceConfig::new(Format::Jsonl, name).open(dir.path()).err().unwrap();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
