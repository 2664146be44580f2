//! `idefics inspect --tokenize`: the tokenizer alone, line by line, for comparison with others.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    path::Path,
};

use anyhow::Context;
use idefics::{ModelFiles, processor::Tokenizer};

use crate::output;

/// Prints the ids of each line as a JSON array. A line ends at `\n` and nowhere else: other characters that break
/// lines are text. No token is put in front or behind.
pub(super) fn run(files: &ModelFiles, path: &Path) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::from_pretrained(files)?;
    let shown = path.display();
    let mut reader: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(BufReader::new(File::open(path).with_context(|| format!("cannot open {shown}"))?))
    };
    let mut line = Vec::new();
    for number in 1_usize.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).with_context(|| format!("cannot read {shown}"))? == 0 {
            break;
        }
        let bytes = line.strip_suffix(b"\n").unwrap_or(&line);
        let text = str::from_utf8(bytes).with_context(|| format!("{shown}, line {number}"))?;
        let ids = tokenizer.encode(text).with_context(|| format!("{shown}, line {number}"))?;
        output::print(&serde_json::to_string(&ids)?)?;
    }
    Ok(())
}
