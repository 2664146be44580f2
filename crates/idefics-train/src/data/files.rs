//! Folders of pictures with captions beside them, and tables that name pictures.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use idefics::processor::ImageSource;

use super::{
    DataError, Source,
    json::find_file,
    sample::{Sample, SampleError},
    source::at,
    template::Template,
};

/// Pictures that have a text of the same name, in folders and the folders in them.
pub(super) struct FolderSource {
    pictures: Vec<PathBuf>,
    template: Template,
}

impl FolderSource {
    pub(super) fn open(folders: &[PathBuf], template: Template) -> Result<Self, DataError> {
        let mut pictures = Vec::new();
        for folder in folders {
            gather(folder, &mut pictures)?;
        }
        pictures.sort();
        Ok(Self { pictures, template })
    }
}

fn gather(folder: &Path, pictures: &mut Vec<PathBuf>) -> Result<(), DataError> {
    for entry in fs::read_dir(folder).map_err(DataError::io("read", folder))? {
        let path = entry.map_err(DataError::io("read", folder))?.path();
        if path.is_dir() {
            gather(&path, pictures)?;
        } else if has_image_name(&path) && path.with_extension("txt").is_file() {
            pictures.push(path);
        }
    }
    Ok(())
}

/// Whether a file is called as pictures are.
pub(super) fn has_image_name(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    ["jpg", "jpeg", "png", "webp", "gif", "bmp"].iter().any(|known| extension == *known)
}

impl Source for FolderSource {
    fn num_samples(&self) -> u64 {
        self.pictures.len() as u64
    }

    fn read(&self, index: u64) -> Result<Sample, SampleError> {
        let broken = |reason| SampleError { place: self.place(index), reason };
        let picture = &self.pictures[index as usize];
        let caption = fs::read_to_string(picture.with_extension("txt"))
            .map_err(|error| broken(format!("its caption: {error}")))?;
        let column = |name: &str| (name == "caption").then(|| caption.trim().to_owned());
        self.template.fill(column, || Ok(ImageSource::Path(picture.clone()))).map_err(broken)
    }

    fn place(&self, index: u64) -> String {
        self.pictures[index as usize].display().to_string()
    }
}

/// Rows of CSV or TSV files with a header.
pub(super) struct TableSource {
    rows: Vec<Row>,
    template: Template,
    image_column: String,
}

struct Row {
    /// File and line.
    place: String,
    root: PathBuf,
    /// The columns that are needed.
    columns: BTreeMap<String, String>,
}

impl TableSource {
    pub(super) fn open(
        paths: &[PathBuf],
        image_root: Option<&Path>,
        image_column: &str,
        template: Template,
    ) -> Result<Self, DataError> {
        let needed: Vec<&str> = template.column_names().chain([image_column]).collect();
        let mut rows = Vec::new();
        for path in paths {
            let bad = |error: csv::Error| DataError::Table { path: path.clone(), reason: error.to_string() };
            let is_tsv = path.extension().is_some_and(|extension| extension == "tsv");
            let delimiter = if is_tsv { b'\t' } else { b',' };
            let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_path(path).map_err(bad)?;
            let header = reader.headers().map_err(bad)?.clone();
            let mut places = Vec::new();
            for name in &needed {
                let Some(place) = header.iter().position(|column| column.trim() == *name) else {
                    let reason = format!(
                        "expected a column `{name}`, got {}",
                        header.iter().collect::<Vec<_>>().join(", ")
                    );
                    return Err(DataError::Table { path: path.clone(), reason });
                };
                places.push(((*name).to_owned(), place));
            }
            let folder = path.parent().unwrap_or(Path::new("."));
            for record in reader.records() {
                let record = record.map_err(bad)?;
                let columns = places
                    .iter()
                    .map(|(name, place)| (name.clone(), record.get(*place).unwrap_or_default().to_owned()))
                    .collect();
                let line = record.position().map_or(0, csv::Position::line);
                let root = image_root.unwrap_or(folder).to_owned();
                rows.push(Row { place: at(path, format_args!("line {line}")), root, columns });
            }
        }
        Ok(Self { rows, template, image_column: image_column.to_owned() })
    }
}

impl Source for TableSource {
    fn num_samples(&self) -> u64 {
        self.rows.len() as u64
    }

    fn read(&self, index: u64) -> Result<Sample, SampleError> {
        let row = &self.rows[index as usize];
        let image = || find_file(&row.columns[&self.image_column], &row.root);
        self.template
            .fill(|name| row.columns.get(name).cloned(), image)
            .map_err(|reason| SampleError { place: row.place.clone(), reason })
    }

    fn place(&self, index: u64) -> String {
        self.rows[index as usize].place.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::sample::Piece;

    #[test]
    fn pictures_with_captions_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        for (name, content) in
            [("a.jpg", ""), ("a.txt", " a cat\n"), ("b.png", ""), ("inner/c.PNG", ""), ("inner/c.txt", "c")]
        {
            fs::write(dir.path().join(name), content).unwrap();
        }
        let template = Template::parse("<image>This is", " {caption}").unwrap();
        let source = FolderSource::open(&[dir.path().to_owned()], template).unwrap();
        assert_eq!(source.num_samples(), 2, "a picture without a caption is none");
        let expected = [
            Piece::Image(ImageSource::Path(dir.path().join("a.jpg"))),
            Piece::context("This is"),
            Piece::answer(" "),
            Piece::answer("a cat"),
        ];
        assert_eq!(source.read(0).unwrap().pieces, expected);
        assert!(source.place(1).ends_with("c.PNG"));
    }

    #[test]
    fn tables_name_pictures() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x.jpg"), "").unwrap();
        let table = dir.path().join("t.csv");
        fs::write(&table, "image,q,a\nx.jpg,\"who, then?\",Tom\nmissing.jpg,b,c\n").unwrap();
        let template = || Template::parse("<image>{q}", " {a}").unwrap();
        let source = TableSource::open(std::slice::from_ref(&table), None, "image", template()).unwrap();
        assert_eq!(source.num_samples(), 2);
        assert_eq!(source.read(0).unwrap().pieces[1], Piece::context("who, then?"));
        let error = source.read(1).unwrap_err();
        assert!(error.place.ends_with("t.csv, line 3"), "{error}");
        assert_eq!(error.reason, "no picture missing.jpg");
        let error = TableSource::open(&[table], None, "file", template()).err().unwrap().to_string();
        assert!(error.contains("expected a column `file`, got image, q, a"), "{error}");
    }
}
