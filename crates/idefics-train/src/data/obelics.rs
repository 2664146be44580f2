//! OBELICS' parquet files: `images` and `texts`, lists of the same length of which one has a value at each place,
//! and `metadata`.
//!
//! Source: the data card of `HuggingFaceM4/OBELICS`. Pictures there are addresses; training opens local files
//! alone, so an address means the file of that name under `image_root`: the SHA-256 of the address in hex, as
//! downloaders of such lists call it, or the last part of its path. Lists of `{bytes, path}`, which Hugging Face's
//! `datasets` writes for embedded pictures, work without.
//! Row groups are the blocks of the shuffle: one is decoded at a time and kept.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use idefics::processor::ImageSource;
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::{Field, Row},
};

use super::{
    DataError, Source,
    json::{find_file, in_memory},
    sample::{Piece, Role, Sample, SampleError, SampleKind},
    source::at,
};

/// Parquet files.
pub(super) struct Obelics {
    groups: Vec<Group>,
    files: Vec<ParquetFile>,
    image_root: Option<PathBuf>,
    /// Row groups that were read last: one for each thread that reads ahead, about.
    recent: Mutex<Vec<(usize, Arc<Vec<Row>>)>>,
}

/// How many row groups are kept.
const KEPT_GROUPS: usize = 2;

struct ParquetFile {
    path: PathBuf,
    reader: Mutex<SerializedFileReader<File>>,
}

struct Group {
    file: usize,
    /// Its number in the file.
    index: usize,
    rows: u64,
    /// Number of its first sample.
    first: u64,
}

impl Obelics {
    pub(super) fn open(paths: &[PathBuf], image_root: Option<&Path>) -> Result<Self, DataError> {
        let (mut groups, mut files, mut first) = (Vec::new(), Vec::new(), 0);
        for path in paths {
            let bad = |reason: String| DataError::Table { path: path.clone(), reason };
            let file = File::open(path).map_err(DataError::io("read", path))?;
            let reader = SerializedFileReader::new(file).map_err(|error| bad(error.to_string()))?;
            let schema = reader.metadata().file_metadata().schema();
            let has = |name| schema.get_fields().iter().any(|field| field.name() == name);
            if !(has("images") && has("texts")) {
                return Err(bad("expected columns `images` and `texts`".to_owned()));
            }
            for index in 0..reader.num_row_groups() {
                let rows = u64::try_from(reader.metadata().row_group(index).num_rows()).unwrap_or(0);
                groups.push(Group { file: files.len(), index, rows, first });
                first += rows;
            }
            files.push(ParquetFile { path: path.clone(), reader: Mutex::new(reader) });
        }
        let image_root = image_root.map(Path::to_owned);
        Ok(Self { groups, files, image_root, recent: Mutex::default() })
    }

    /// The row group that holds a sample, and the sample's row in it.
    fn find(&self, index: u64) -> (usize, usize) {
        let group = self.groups.partition_point(|group| group.first + group.rows <= index);
        (group, (index - self.groups[group].first) as usize)
    }

    fn rows(&self, group: usize) -> Result<Arc<Vec<Row>>, String> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, rows)) = recent.iter().find(|(kept, _)| *kept == group) {
            return Ok(Arc::clone(rows));
        }
        let Group { file, index, .. } = self.groups[group];
        let reader = self.files[file].reader.lock().unwrap_or_else(PoisonError::into_inner);
        let rows: Vec<Row> = reader
            .get_row_group(index)
            .and_then(|group| group.get_row_iter(None)?.collect())
            .map_err(|error| error.to_string())?;
        let rows = Arc::new(rows);
        if recent.len() == KEPT_GROUPS {
            recent.remove(0);
        }
        recent.push((group, Arc::clone(&rows)));
        Ok(rows)
    }

    fn image(&self, field: &Field) -> Result<Option<ImageSource>, String> {
        match field {
            Field::Null => Ok(None),
            Field::Str(address) => Ok(Some(self.local(address)?)),
            Field::Bytes(bytes) => Ok(Some(in_memory(bytes.data().to_vec()))),
            Field::Group(row) => {
                let field =
                    |name: &str| row.get_column_iter().find(|(column, _)| *column == name).map(|(_, f)| f);
                match (field("bytes"), field("path")) {
                    (Some(Field::Bytes(bytes)), _) => Ok(Some(in_memory(bytes.data().to_vec()))),
                    (_, Some(Field::Str(path))) => Ok(Some(self.local(path)?)),
                    _ => Ok(None),
                }
            }
            _ => Err("expected pictures as texts or bytes".to_owned()),
        }
    }

    fn local(&self, name: &str) -> Result<ImageSource, String> {
        let root = self.image_root.as_deref();
        let Some(root) = root else {
            return Err(format!("{name}: `image_root` must say where pictures lie"));
        };
        if !name.contains("://") {
            return find_file(name, root);
        }
        let hash = sha256_hex(name);
        let last = name.split(['?', '#']).next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
        let candidates = [hash, last.to_owned()];
        candidates
            .iter()
            .filter(|name| !name.is_empty())
            .find_map(|name| find_file(name, root).ok())
            .ok_or_else(|| format!("no file for {name}"))
    }

    fn sample(&self, row: &Row) -> Result<Sample, String> {
        let list = |name: &str| {
            let field = row.get_column_iter().find(|(column, _)| *column == name).map(|(_, field)| field);
            match field {
                Some(Field::ListInternal(list)) => Ok(list.elements()),
                _ => Err(format!("`{name}` is no list")),
            }
        };
        let (images, texts) = (list("images")?, list("texts")?);
        if images.len() != texts.len() {
            return Err(format!("{} images, but {} texts: expected as many", images.len(), texts.len()));
        }
        let mut pieces = Vec::new();
        for (image, text) in images.iter().zip(texts) {
            if let Some(image) = self.image(image)? {
                pieces.push(Piece::Image(image));
            } else if let Field::Str(text) = text {
                if matches!(pieces.last(), Some(Piece::Text { .. })) {
                    pieces.push(Piece::Text { text: "\n\n".to_owned(), role: Role::Answer });
                }
                pieces.push(Piece::answer(text));
            }
        }
        Ok(Sample { pieces, kind: SampleKind::Document })
    }
}

fn sha256_hex(text: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref().iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"))
}

impl Source for Obelics {
    fn num_samples(&self) -> u64 {
        self.groups.iter().map(|group| group.rows).sum()
    }

    fn blocks(&self) -> Vec<u64> {
        self.groups.iter().map(|group| group.rows).collect()
    }

    fn read(&self, index: u64) -> Result<Sample, SampleError> {
        let (group, row) = self.find(index);
        let read = || {
            let rows = self.rows(group)?;
            self.sample(rows.get(row).ok_or("the row group is shorter than it says")?)
        };
        read().map_err(|reason| SampleError { place: self.place(index), reason })
    }

    fn place(&self, index: u64) -> String {
        let (group, row) = self.find(index);
        let group = &self.groups[group];
        at(&self.files[group.file].path, format_args!("row group {}, row {row}", group.index))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::{
        data_type::{ByteArray, ByteArrayType},
        file::writer::SerializedFileWriter,
        schema::parser::parse_message_type,
    };

    use super::*;

    /// Lists of a group of documents.
    type List = &'static [&'static [Option<&'static str>]];

    /// Two row groups of documents: `Some` text or picture at each place, as definition levels of nullable items.
    fn write(path: &Path) {
        let schema = "message schema {
            optional group images (LIST) { repeated group list { optional binary element (UTF8); } }
            optional group texts (LIST) { repeated group list { optional binary element (UTF8); } }
            optional binary metadata (UTF8);
        }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
        let groups: [(List, List); 2] = [
            (
                &[&[None, Some("a.jpg"), None], &[Some("https://host/x/b.jpg?s=1")]],
                &[&[Some("one"), None, Some("two")], &[None]],
            ),
            (&[&[None, None], &[Some("missing.jpg")]], &[&[Some("three"), Some("four")], &[None]]),
        ];
        for (images, texts) in groups {
            let mut group = writer.next_row_group().unwrap();
            for lists in [images, texts] {
                let mut column = group.next_column().unwrap().unwrap();
                let items = || lists.iter().flat_map(|list| list.iter());
                let values: Vec<ByteArray> = items().flatten().map(|text| ByteArray::from(*text)).collect();
                let definitions: Vec<i16> = items().map(|item| if item.is_some() { 3 } else { 2 }).collect();
                let repetitions: Vec<i16> =
                    lists.iter().flat_map(|list| (0..list.len()).map(|at| i16::from(at > 0))).collect();
                column
                    .typed::<ByteArrayType>()
                    .write_batch(&values, Some(&definitions), Some(&repetitions))
                    .unwrap();
                column.close().unwrap();
            }
            let mut column = group.next_column().unwrap().unwrap();
            let metadata = vec![ByteArray::from("[]"); images.len()];
            column
                .typed::<ByteArrayType>()
                .write_batch(&metadata, Some(&vec![1; images.len()]), None)
                .unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    #[test]
    fn documents_are_texts_and_pictures_in_turn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard.parquet");
        write(&path);
        for name in ["a.jpg", "b.jpg"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let source = Obelics::open(std::slice::from_ref(&path), Some(dir.path())).unwrap();
        assert_eq!((source.num_samples(), source.blocks()), (4, vec![2, 2]));
        let picture = |name: &str| Piece::Image(ImageSource::Path(dir.path().join(name)));
        let first = source.read(0).unwrap();
        assert_eq!(first.kind, SampleKind::Document);
        assert_eq!(first.pieces, [Piece::answer("one"), picture("a.jpg"), Piece::answer("two")]);
        assert_eq!(source.read(1).unwrap().pieces, [picture("b.jpg")], "an address means a local file");
        assert_eq!(
            source.read(2).unwrap().pieces,
            [Piece::answer("three"), Piece::answer("\n\n"), Piece::answer("four")]
        );
        let error = source.read(3).unwrap_err();
        assert!(error.place.ends_with("shard.parquet, row group 1, row 1"), "{error}");
        assert_eq!(error.reason, "no picture missing.jpg");
        let without = Obelics::open(&[path], None).unwrap();
        assert!(without.read(1).unwrap_err().reason.contains("image_root"));
    }

    #[test]
    fn other_tables_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        std::fs::write(&path, "PAR1 and nothing else PAR1").unwrap();
        assert!(Obelics::open(&[path], None).is_err());
    }
}
