//! One job over many pictures: which ones, in batches, with records that a rerun continues.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::{Map, Value};

use crate::{
    cancel,
    counter::Counter,
    output,
    prompts::{has_image_name, is_image_file, is_url},
};

/// How records of many pictures are written.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct RecordArgs {
    /// Write records to a file; a rerun continues where the file ends
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,

    /// How records are written [default: by the name of the file, else text]
    #[arg(long, value_enum)]
    format: Option<Format>,

    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,

    /// Pictures that are worked on together
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch_size: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Plain text
    Text,
    /// One JSON object a line
    Json,
    /// Comma-separated values with a head line
    Csv,
}

/// What was found out about a picture: named fields in their order, the first of which is the picture; and how it
/// reads as text.
pub(crate) struct Record {
    pub(crate) fields: Vec<(&'static str, Value)>,
    pub(crate) text: String,
}

/// What all records of a job have in common. By it a file of records is known as the job's own.
pub(crate) struct Job<'a> {
    /// Names of the fields of a record in their order.
    pub(crate) fields: &'a [&'a str],
    pub(crate) question: Option<&'a str>,
    /// Labels that are ranked, in any order; none if the job ranks none.
    pub(crate) labels: &'a [String],
}

impl Job<'_> {
    /// Refuses a file whose records have other fields, in any order.
    fn check_names<'n>(&self, names: impl Iterator<Item = &'n str>) -> anyhow::Result<()> {
        let mut got: Vec<&str> = names.collect();
        let mut expected = self.fields.to_vec();
        got.sort_unstable();
        expected.sort_unstable();
        if got != expected {
            bail!("expected records with {}, got {}", expected.join(", "), got.join(", "));
        }
        Ok(())
    }

    /// Refuses a file whose first record answers another question or ranks other labels.
    fn check_record(&self, record: &Map<String, Value>) -> anyhow::Result<()> {
        self.check_names(record.keys().map(String::as_str))?;
        if let Some(expected) = self.question {
            let got = record.get("question").and_then(Value::as_str).unwrap_or_default();
            if got != expected {
                bail!("expected answers to {expected:?}, got one to {got:?}");
            }
        }
        if !self.labels.is_empty() {
            let ranked = record.get("labels").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let mut got: Vec<&str> =
                ranked.iter().filter_map(|label| label.get("label").and_then(Value::as_str)).collect();
            let mut expected: Vec<&str> = self.labels.iter().map(String::as_str).collect();
            got.sort_unstable();
            expected.sort_unstable();
            if got != expected {
                bail!("expected the labels {}, got {}", expected.join(", "), got.join(", "));
            }
        }
        Ok(())
    }

    /// Refuses a head line of CSV that is not that of the job's records, and a first record of another job.
    fn check_csv(&self, head: &csv::ByteRecord, first: Option<&csv::ByteRecord>) -> anyhow::Result<()> {
        let text = |cell: &[u8]| String::from_utf8_lossy(cell).into_owned();
        let names: Vec<String> = head.iter().map(text).collect();
        if names != self.fields {
            bail!("expected the columns {}, got {}", self.fields.join(", "), names.join(", "));
        }
        let Some(first) = first else { return Ok(()) };
        let value = |(name, cell): (&String, String)| match name.as_str() {
            // The one field that is no text or number.
            "labels" => (name.clone(), serde_json::from_str(&cell).unwrap_or(Value::Null)),
            _ => (name.clone(), Value::String(cell)),
        };
        self.check_record(&names.iter().zip(first.iter().map(text)).map(value).collect())
    }
}

/// The pictures that the arguments name: files, addresses, and all image files of directories, by name.
pub(crate) fn expand(items: &[String]) -> anyhow::Result<Vec<String>> {
    let mut images = Vec::new();
    for item in items {
        let path = Path::new(item);
        if is_url(item) || !path.is_dir() {
            images.push(item.clone());
            continue;
        }
        let entries = fs::read_dir(path).with_context(|| format!("cannot list {item}"))?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {item}"))?.path();
            if has_image_name(&path) && is_image_file(&path) {
                found.push(path.display().to_string());
            }
        }
        if found.is_empty() {
            bail!("{item} has no image files");
        }
        found.sort();
        images.extend(found);
    }
    Ok(images)
}

/// Runs `work` over the pictures that have no record yet. It gets some pictures at a time and returns a record or
/// a failure for each; failures are told and leave no record, so that a rerun tries them again.
pub(crate) fn run(
    args: &RecordArgs,
    job: &Job<'_>,
    images: &[String],
    mut work: impl FnMut(&[String]) -> anyhow::Result<Vec<anyhow::Result<Record>>>,
) -> anyhow::Result<()> {
    if args.batch_size == 0 {
        bail!("--batch-size: expected at least 1, got 0");
    }
    let format = args.format();
    if args.output.is_some() && format == Format::Text {
        bail!("--output keeps records; choose --format json or csv");
    }
    let mut writer = Writer::open(args.output.as_deref(), format, job)?;
    let todo: Vec<String> = images.iter().filter(|image| !writer.done.contains(*image)).cloned().collect();
    if todo.len() < images.len() {
        eprintln!("{} of {} pictures are done already", images.len() - todo.len(), images.len());
    }
    cancel::on_interrupt()?;
    let mut counter = Counter::start(todo.len(), "pictures");
    let (mut done, mut failed) = (0, 0);
    for batch in todo.chunks(args.batch_size) {
        if cancel::is_requested() {
            break;
        }
        let records = work(batch)?;
        if cancel::is_requested() {
            // These answers were cut short.
            break;
        }
        for (image, record) in batch.iter().zip(records) {
            match record {
                Ok(record) => counter.aside(|| writer.write(&record, images.len() > 1))?,
                Err(error) => {
                    failed += 1;
                    counter.aside(|| eprintln!("error: {image}: {error:#}"));
                }
            }
        }
        writer.flush()?;
        done += batch.len();
        counter.advance(batch.len());
    }
    counter.finish();
    if done < todo.len() {
        bail!(cancel::Stopped { done, total: todo.len(), what: "pictures" });
    }
    if failed > 0 {
        bail!("{failed} of {} pictures failed", todo.len());
    }
    Ok(())
}

impl RecordArgs {
    fn format(&self) -> Format {
        let by_name = self.output.as_ref().map(|path| {
            if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv")) {
                Format::Csv
            } else {
                Format::Json
            }
        });
        let asked = if self.json { Some(Format::Json) } else { self.format };
        asked.or(by_name).unwrap_or(Format::Text)
    }
}

/// Writes records to a file or to stdout.
struct Writer {
    /// Without one, records go to stdout.
    file: Option<BufWriter<File>>,
    format: Format,
    /// Pictures that the file has already.
    done: HashSet<String>,
    /// Whether the head line of CSV is still to come.
    needs_head: bool,
}

impl Writer {
    fn open(path: Option<&Path>, format: Format, job: &Job<'_>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self { file: None, format, done: HashSet::new(), needs_head: true });
        };
        let context = || format!("cannot write {}", path.display());
        let mut file =
            OpenOptions::new().create(true).append(true).read(true).open(path).with_context(context)?;
        let done = continue_records(&mut file, path, format, job)?;
        let needs_head = file.metadata().with_context(context)?.len() == 0;
        Ok(Self { file: Some(BufWriter::new(file)), format, done, needs_head })
    }

    fn write(&mut self, record: &Record, names_image: bool) -> anyhow::Result<()> {
        let text = match self.format {
            Format::Text => {
                let image = record.fields.first().and_then(|(_, value)| value.as_str());
                let prefix = image.filter(|_| names_image).map(|image| format!("{image}\t"));
                format!("{}{}\n", prefix.unwrap_or_default(), record.text)
            }
            Format::Json => {
                let fields: Map<String, Value> =
                    record.fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
                format!("{}\n", Value::Object(fields))
            }
            Format::Csv => self.csv(record)?,
        };
        match &mut self.file {
            Some(file) => file.write_all(text.as_bytes()).context("cannot write a record"),
            None => output::print(&text).context("cannot write a record"),
        }
    }

    /// The record as CSV, behind the head line if it is the first.
    fn csv(&mut self, record: &Record) -> anyhow::Result<String> {
        let mut csv = csv::Writer::from_writer(Vec::new());
        if std::mem::take(&mut self.needs_head) {
            csv.write_record(record.fields.iter().map(|(name, _)| *name))?;
        }
        let cell = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        csv.write_record(record.fields.iter().map(|(_, value)| cell(value)))?;
        Ok(String::from_utf8(csv.into_inner().context("cannot write a record")?)?)
    }

    fn flush(&mut self) -> anyhow::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush).context("cannot write records")
    }
}

/// The pictures that a file of records has. A last record that was cut off is removed from it; a file that is not
/// of this job is left as it is.
fn continue_records(
    file: &mut File,
    path: &Path,
    format: Format,
    job: &Job<'_>,
) -> anyhow::Result<HashSet<String>> {
    let context = || format!("cannot continue {}", path.display());
    let foreign = || format!("{} has the records of another job; name another file", path.display());
    let bytes = fs::read(path).with_context(context)?;
    // CSV may have line ends inside a record, but a whole record ends with one as well; a record that was cut at
    // an inner one has an open quote, so the reader below sees its end at the end of the file.
    let mut done = HashSet::new();
    let mut end = 0;
    match format {
        Format::Csv => {
            let is_whole = |record: &[u8]| {
                record.ends_with(b"\n") && record.split(|&byte| byte == b'"').count() % 2 == 1
            };
            let mut reader =
                csv::ReaderBuilder::new().flexible(true).has_headers(false).from_reader(&bytes[..]);
            let mut record = csv::ByteRecord::new();
            let mut head = None;
            while reader.read_byte_record(&mut record).with_context(context)? {
                let next = (reader.position().byte() as usize).min(bytes.len());
                if !is_whole(&bytes[end..next]) {
                    break;
                }
                end = next;
                let Some(head) = &head else {
                    job.check_csv(&record, None).with_context(foreign)?;
                    head = Some(record.clone());
                    continue;
                };
                if done.is_empty() {
                    job.check_csv(head, Some(&record)).with_context(foreign)?;
                }
                if let Some(image) = record.get(0) {
                    done.insert(String::from_utf8_lossy(image).into_owned());
                }
            }
        }
        Format::Json | Format::Text => {
            for line in bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
                end += line.len();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let record: Map<String, Value> = serde_json::from_slice(line)
                    .with_context(|| format!("{} is no file of records", path.display()))?;
                if done.is_empty() {
                    job.check_record(&record).with_context(foreign)?;
                }
                if let Some(image) = record.get("image").and_then(Value::as_str) {
                    done.insert(image.to_owned());
                }
            }
        }
    }
    if end < bytes.len() {
        file.set_len(end as u64).with_context(context)?;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CAPTIONS: Job<'_> = Job { fields: &["image", "caption"], question: None, labels: &[] };

    fn record(image: &str, caption: &str) -> Record {
        Record {
            fields: vec![("image", json!(image)), ("caption", json!(caption))],
            text: caption.to_owned(),
        }
    }

    /// Writes two records, cuts bytes off, and continues.
    fn check(name: &str, format: Format, cut: usize, expected_done: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        let mut writer = Writer::open(Some(&path), format, &CAPTIONS).unwrap();
        writer.write(&record("a.png", "one, \"two\"\nthree"), true).unwrap();
        writer.write(&record("b.png", "four\nfive"), true).unwrap();
        writer.flush().unwrap();
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - cut]).unwrap();
        let mut writer = Writer::open(Some(&path), format, &CAPTIONS).unwrap();
        let mut done: Vec<_> = writer.done.iter().map(String::as_str).collect();
        done.sort_unstable();
        assert_eq!(done, expected_done, "{format:?} cut by {cut}");
        if !done.contains(&"b.png") {
            writer.write(&record("b.png", "four\nfive"), true).unwrap();
        }
        writer.flush().unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole, "{format:?} cut by {cut}: as if written at once");
    }

    #[test]
    fn a_rerun_continues_whole_records_and_mends_a_cut_one() {
        for (name, format) in [("r.jsonl", Format::Json), ("r.csv", Format::Csv)] {
            check(name, format, 0, &["a.png", "b.png"]);
            for cut in [1, 2, 7, 10] {
                check(name, format, cut, &["a.png"]);
            }
        }
    }

    #[test]
    fn a_file_of_another_job_is_told_apart_and_left_alone() {
        const FIELDS: [&str; 3] = ["image", "question", "labels"];
        let labels = ["cat".to_owned(), "polar bear".to_owned()];
        let others = ["cat".to_owned(), "dog".to_owned()];
        let job = |question, labels| Job { fields: &FIELDS, question: Some(question), labels };
        let ranked =
            json!([{"label": "polar bear", "probability": 0.7}, {"label": "cat", "probability": 0.3}]);
        let record = Record {
            fields: vec![("image", json!("a.png")), ("question", json!("Who?")), ("labels", ranked)],
            text: String::new(),
        };
        let dir = tempfile::tempdir().unwrap();
        for (name, format) in [("r.jsonl", Format::Json), ("r.csv", Format::Csv)] {
            let path = dir.path().join(name);
            let mut writer = Writer::open(Some(&path), format, &job("Who?", &labels)).unwrap();
            writer.write(&record, true).unwrap();
            writer.flush().unwrap();
            fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"b.png, cut off").unwrap();
            let before = fs::read(&path).unwrap();
            for (job, expected) in [
                (job("How many?", &labels), "\"Who?\""),
                (job("Who?", &others), "polar bear"),
                (job("Who?", &labels[..1]), "polar bear"),
                (CAPTIONS, "caption"),
            ] {
                let error = Writer::open(Some(&path), format, &job).err().expect("another job");
                let error = format!("{error:#}");
                assert!(error.contains(expected) && error.contains(name), "{error}");
                assert_eq!(fs::read(&path).unwrap(), before, "{format:?}");
            }
            let writer = Writer::open(Some(&path), format, &job("Who?", &labels)).unwrap();
            assert!(writer.done.contains("a.png"), "{format:?}");
        }
    }

    #[test]
    fn files_that_are_no_records_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.jsonl");
        fs::write(&path, "dear diary\n").unwrap();
        assert!(Writer::open(Some(&path), Format::Json, &CAPTIONS).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"dear diary\n");
    }

    #[test]
    fn directories_give_their_pictures_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.png", "a.JPG", "notes.txt"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        let item = dir.path().display().to_string();
        let images = expand(&[item.clone(), "https://host/x".to_owned(), "missing.png".to_owned()]).unwrap();
        let named = |name: &str| dir.path().join(name).display().to_string();
        assert_eq!(
            images,
            [named("a.JPG"), named("b.png"), "https://host/x".to_owned(), "missing.png".to_owned()]
        );
        let empty = tempfile::tempdir().unwrap();
        assert!(expand(&[empty.path().display().to_string()]).is_err());
    }
}
