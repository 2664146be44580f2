//! A fixed sample of a task as files: its pictures, and its prompts with the right answers as JSON lines, which
//! `idefics generate --prompts` reads too. The one in `fixtures/naming/` is what the tests measure the model on.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use idefics::{Segment, processor::ImageSource};
use serde::{Deserialize, Serialize};

use crate::evaluate::Item;

const PROMPTS: &str = "prompts.jsonl";

/// A prompt and what is right, as a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: Vec<Piece>,
    right: String,
}

/// A text, or the name of a picture's file in the same folder.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Piece {
    Text(String),
    Image(String),
}

/// Writes the items into a folder, whose earlier files of that kind are replaced.
pub(crate) fn write(folder: &Path, items: &[Item]) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "jpg") {
            fs::remove_file(path)?;
        }
    }
    let mut lines = String::new();
    for (number, item) in items.iter().enumerate() {
        ensure!(item.options.is_empty(), "a sample has no place for options to choose from");
        let mut pictures = 0;
        let mut piece = |segment: &Segment| -> Result<Piece> {
            Ok(match segment {
                Segment::Text(text) => Piece::Text(text.clone()),
                Segment::Image(ImageSource::Bytes(jpeg)) => {
                    let name = file_name(number, pictures, &item.right);
                    pictures += 1;
                    fs::write(folder.join(&name), jpeg).with_context(|| format!("writing {name}"))?;
                    Piece::Image(name)
                }
                Segment::Image(_) => bail!("a picture that is not in memory"),
            })
        };
        let prompt = item.prompt.iter().map(&mut piece).collect::<Result<_>>()?;
        lines += &serde_json::to_string(&Line { prompt, right: item.right.clone() })?;
        lines.push('\n');
    }
    Ok(fs::write(folder.join(PROMPTS), lines)?)
}

/// Such as `07-red-apple.jpg`; the second picture of a prompt has a number of its own.
fn file_name(item: usize, picture: usize, right: &str) -> String {
    let words = right.replace(|character: char| !character.is_ascii_alphanumeric(), "-");
    let more = if picture == 0 { String::new() } else { format!("-{}", picture + 1) };
    format!("{item:02}-{words}{more}.jpg")
}

/// Reads what [`write`] has written.
#[cfg(test)]
pub(crate) fn read(folder: &Path) -> Result<Vec<Item>> {
    let path = folder.join(PROMPTS);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let item = |line: &str| -> Result<Item> {
        let Line { prompt, right } = serde_json::from_str(line)?;
        let segment = |piece| -> Result<Segment> {
            Ok(match piece {
                Piece::Text(text) => Segment::Text(text),
                Piece::Image(name) => {
                    let jpeg = fs::read(folder.join(&name)).with_context(|| format!("reading {name}"))?;
                    Segment::Image(ImageSource::Bytes(jpeg.into()))
                }
            })
        };
        let prompt = prompt.into_iter().map(segment).collect::<Result<_>>()?;
        Ok(Item { prompt, right, options: Vec::new() })
    };
    text.lines().map(item).collect()
}
