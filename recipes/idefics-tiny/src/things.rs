//! What can be shown and said: the concepts with their pictures in memory, and what kind of thing each is.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use resvg::tiny_skia::Pixmap;

use crate::{
    color::COLORS,
    concepts::{Concept, held_out},
    emoji::{EVALUATION, TRAINING},
    pixels,
    render::Table,
    scene::Variation,
    steps::Folders,
    wordnet::WordNet,
};

/// Kinds that a question can ask for, by category of the concepts: the nearest in WordNet is taken, and one of
/// another category is a wrong sense of the word.
const KINDS: [(&str, &[&str]); 5] = [
    ("Animals & Nature", &["bird", "fish", "insect", "reptile", "flower", "tree", "plant", "animal"]),
    (
        "Food & Drink",
        &["fruit", "edible fruit", "vegetable", "beverage", "alcohol", "sweet", "dish", "food", "container"],
    ),
    (
        "Objects",
        &[
            "musical instrument",
            "clothing",
            "footwear",
            "tool",
            "weapon",
            "furniture",
            "container",
            "machine",
            "electronic equipment",
            "jewelry",
            "writing implement",
            "document",
            "instrument",
            "device",
        ],
    ),
    ("Activities", &["ball", "game", "sport", "toy", "clothing", "device", "game equipment", "award"]),
    (
        "Travel & Places",
        &[
            "vehicle",
            "aircraft",
            "ship",
            "boat",
            "train",
            "building",
            "structure",
            "celestial body",
            "clock time",
        ],
    ),
];

/// A concept with its pictures.
pub(crate) struct Thing {
    pub(crate) name: String,
    pub(crate) category: String,
    /// Such as "animal".
    pub(crate) kind: Option<&'static str>,
    /// A short definition.
    pub(crate) definition: Option<String>,
    pub(crate) pictures: Vec<Pixmap>,
}

impl Thing {
    /// How much may vary so that the name stays true: a green apple must not become a red one.
    pub(crate) fn allows(&self, variation: Variation) -> Variation {
        let is_color = |word: &str| COLORS.iter().any(|(color, _)| *color == word);
        match variation {
            Variation::Strong if self.name.split(' ').any(is_color) => Variation::SameColors,
            other => other,
        }
    }
}

/// Everything to make samples from.
pub(crate) struct Things {
    pub(crate) all: Vec<Thing>,
    /// Indices by category.
    pub(crate) by_category: BTreeMap<String, Vec<usize>>,
}

/// Which pictures to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// What may be learnt from: the training designs and clip art of concepts that are not held out.
    Training,
    /// The design to be tested on, without held-out concepts.
    Evaluation,
    /// The held-out concepts, in all training designs.
    HeldOut,
}

impl Things {
    pub(crate) fn load(folders: &Folders, wordnet: &WordNet, part: Part) -> Result<Self> {
        let table = Table::read(folders)?;
        let held_out = held_out();
        let is_held_out = |concept: &Concept| held_out.contains(&concept.key);
        let designs: &[&str] = if part == Part::Evaluation { &[EVALUATION] } else { &TRAINING };
        let chosen = table.concepts.iter().filter(|concept| is_held_out(concept) == (part == Part::HeldOut));
        let chosen: Vec<&Concept> = chosen.collect();
        let mut all: Vec<Thing> = chosen
            .into_par_iter()
            .map(|concept| load_concept(folders, wordnet, concept, designs))
            .collect::<Result<_>>()?;
        all.retain(|thing| !thing.pictures.is_empty());
        if part == Part::Training {
            add_clipart(folders, wordnet, &table, &held_out, &mut all)?;
        }
        let mut by_category: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, thing) in all.iter().enumerate() {
            by_category.entry(thing.category.clone()).or_default().push(index);
        }
        ensure!(!all.is_empty(), "no pictures: run `render` first");
        Ok(Self { all, by_category })
    }
}

fn load_concept(folders: &Folders, wordnet: &WordNet, concept: &Concept, designs: &[&str]) -> Result<Thing> {
    let designs = concept.designs.iter().filter(|design| designs.contains(&design.as_str()));
    let path = |design: &String| folders.pictures().join(design).join(format!("{}.png", concept.key));
    let pictures = designs.map(|design| pixels::read(&path(design))).collect::<Result<_>>()?;
    Ok(describe(wordnet, concept.name.clone(), concept.category.clone(), pictures))
}

fn describe(wordnet: &WordNet, name: String, category: String, pictures: Vec<Pixmap>) -> Thing {
    let kinds = KINDS.iter().find(|(of, _)| *of == category).map_or(&[][..], |(_, kinds)| kinds);
    let kind = wordnet.kind(&name, kinds).map(|kind| match kind {
        "edible fruit" => "fruit",
        "beverage" | "alcohol" => "drink",
        "electronic equipment" => "device",
        "clock time" => "time",
        kind => kind,
    });
    // A definition fits if the noun is of a kind that its category has: the sense is then most likely the right one.
    let definition = kind.and_then(|_| wordnet.definition(&name)).map(str::to_owned);
    let definition = definition.filter(|definition| definition.len() < 90 && !definition.contains('('));
    Thing { name, category, kind, definition, pictures }
}

/// Clip art joins the concept that its title names, or becomes one of its own if the title is a noun.
fn add_clipart(
    folders: &Folders,
    wordnet: &WordNet,
    table: &Table,
    held_out: &BTreeSet<String>,
    all: &mut Vec<Thing>,
) -> Result<()> {
    let mut by_name: HashMap<String, usize> =
        all.iter().enumerate().map(|(index, thing)| (thing.name.to_lowercase(), index)).collect();
    let forbidden: BTreeSet<String> = held_out.iter().map(|key| key.replace('-', " ")).collect();
    for drawing in &table.drawings {
        let title = clean(&drawing.title);
        let shows_held_out = |text: &str| {
            forbidden
                .iter()
                .any(|name| format!(" {text} ").contains(&format!(" {name} ")) || text == format!("{name}s"))
        };
        if shows_held_out(&title) || drawing.keywords.iter().any(|word| shows_held_out(&clean(word))) {
            continue;
        }
        let words: Vec<&str> = title.split(' ').collect();
        let known = by_name.get(&title).or_else(|| by_name.get(words[words.len() - 1])).copied();
        let index = match known {
            Some(index) => index,
            None if words.len() <= 2 && title.len() > 2 && wordnet.is_noun(&title) => {
                let category = match drawing.folder.as_str() {
                    "animals" | "plants" => "Animals & Nature",
                    "food" => "Food & Drink",
                    "transportation" | "buildings" | "geography" => "Travel & Places",
                    "recreation" => "Activities",
                    _ => "Objects",
                };
                all.push(describe(wordnet, title.clone(), category.to_owned(), Vec::new()));
                by_name.insert(title.clone(), all.len() - 1);
                all.len() - 1
            }
            None => continue,
        };
        let path = folders.pictures().join("clipart").join(&drawing.file);
        all[index].pictures.push(pixels::read(&path).with_context(|| drawing.title.clone())?);
    }
    Ok(())
}

/// A title without numbers, authors' marks and punctuation.
fn clean(title: &str) -> String {
    let words = title.split(|character: char| !character.is_ascii_alphabetic() && character != '\'');
    let dull =
        ["a", "the", "an", "of", "clipart", "clip", "art", "icon", "svg", "small", "bw", "color", "colour"];
    let words: Vec<&str> = words.filter(|word| !word.is_empty() && !dull.contains(word)).collect();
    words.join(" ").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_lose_what_is_not_a_name() {
        assert_eq!(clean("a red_rose-01 clipart"), "red rose");
        assert_eq!(clean("the cat"), "cat");
    }
}
