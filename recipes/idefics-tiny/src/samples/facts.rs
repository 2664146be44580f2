//! Text without pictures: WordNet's definitions and examples, and simple facts about the things.

use rand::{Rng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

use super::{
    END, Maker, Sample,
    words::{NUMBERS, capital, pick, sentence},
};
use crate::{
    color::COLORS,
    concepts::{plural, with_article},
    things::Thing,
};

/// A text to learn language from; every word counts.
pub(super) fn text(maker: &Maker, rng: &mut ChaCha8Rng) -> Sample {
    let mut sample = Sample::default();
    match rng.random_range(0..10) {
        // Pages of a dictionary.
        0..4 => {
            let mut page = String::new();
            for _ in 0..rng.random_range(2..6) {
                let Some((words, gloss)) = maker.wordnet.glosses.choose(rng) else { break };
                let word = words.choose(rng).map_or("", String::as_str);
                page += &capital(word);
                page += ": ";
                page += &gloss.definition;
                page.push('.');
                for example in &gloss.examples {
                    page.push(' ');
                    page += &capital(example);
                    page.push('.');
                }
                page.push('\n');
            }
            sample.answer(page);
        }
        // What captions and answers are made of.
        4..8 => {
            for _ in 0..rng.random_range(6..18) {
                let (name, color) = (&maker.any(rng).name, COLORS.choose(rng).map_or("", |(name, _)| name));
                let line = match rng.random_range(0..7) {
                    0 => format!("This is {}.\n", with_article(name)),
                    1 => format!("Caption: {} on {} background.\n", with_article(name), with_article(color)),
                    2 => {
                        let count = rng.random_range(2..7);
                        format!("{} {}.\n", capital(NUMBERS[count]), plural(name))
                    }
                    3 => format!(
                        "{} and {}.\n",
                        capital(&with_article(name)),
                        with_article(&maker.any(rng).name)
                    ),
                    4 => format!("Question: What is this? Answer: {name}\n"),
                    _ => format!("User:What is this?{END}\nAssistant: {}{END}\n", sentence(name)),
                };
                sample.answer(line);
            }
        }
        _ => {
            for turn in 0..rng.random_range(1..5) {
                let (asked, told) = fact(maker, rng);
                let start = if turn == 0 { "" } else { "\n" };
                sample.answer(format!("{start}User: {asked}{END}\nAssistant: {told}{END}"));
            }
        }
    }
    sample
}

/// A dialogue on facts, without a picture.
pub(super) fn question(maker: &Maker, rng: &mut ChaCha8Rng) -> Sample {
    let mut sample = Sample::default();
    for turn in 0..rng.random_range(1..4) {
        let (asked, told) = fact(maker, rng);
        let start = if turn == 0 { "" } else { "\n" };
        sample.text(format!("{start}User: {asked}{END}\nAssistant:")).answer(format!(" {told}{END}"));
    }
    sample
}

fn fact(maker: &Maker, rng: &mut ChaCha8Rng) -> (String, String) {
    let known = |thing: &Thing| thing.kind.is_some();
    let mut thing = maker.any(rng);
    while !known(thing) {
        thing = maker.any(rng);
    }
    let (name, kind) = (&thing.name, thing.kind.unwrap_or_default());
    match rng.random_range(0..4) {
        0 => match &thing.definition {
            Some(definition) => (
                format!("{} {}?", pick(rng, &["What is", "Explain what is"]), with_article(name)),
                capital(&format!("{definition}.")),
            ),
            None => (format!("What is {}?", with_article(name)), sentence(kind)),
        },
        1 => (format!("What kind of thing is {}?", with_article(name)), sentence(kind)),
        2 => {
            let truth = rng.random_bool(0.5);
            let mut other = kind;
            while !truth && other == kind {
                other = maker.any(rng).kind.unwrap_or(kind);
            }
            let answer = if truth { "Yes.".to_owned() } else { format!("No, it is {}.", with_article(kind)) };
            (format!("Is {} {}?", with_article(name), with_article(other)), answer)
        }
        _ => (format!("What is the plural of {name}?"), capital(&format!("{}.", plural(name)))),
    }
}
