//! Questions that tell one thing from others, about pictures in many hands.
//!
//! A question of yes or no has little to teach: answered at once, it was learnt no better than guessing in thousands of
//! steps in which names came to 85 %. So its answer says first what it is.

use anyhow::{Context, Result};
use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;

use super::{
    Maker, Question, Sample,
    dialogue::{answer, turns},
    invented_name, question,
    single::{listed, options},
    words::{capital, pick, sentence},
};
use crate::{
    concepts::with_article,
    scene::{Place, Scene, Variation, compose},
    style::restyle,
    things::Thing,
};

/// A picture of one thing as somebody else would have drawn it; now and then as the file has it.
pub(super) fn scene(rng: &mut ChaCha8Rng, thing: &Thing) -> Result<Scene> {
    let picture = thing.pictures.choose(rng).context("a thing without a picture")?;
    let variation = if rng.random_bool(0.55) { Variation::None } else { Variation::Strong };
    let place = Place::alone(rng, variation);
    let same_colors = thing.allows(Variation::Strong) == Variation::SameColors;
    let variation = thing.allows(variation);
    if rng.random_bool(0.2) {
        return compose(rng, &[(picture, place)], variation);
    }
    let picture = restyle(rng, picture, same_colors)?;
    compose(rng, &[(&picture, place)], variation)
}

/// Several questions about one picture.
pub(super) fn contrast(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let thing = maker.any(rng);
    let scene = scene(rng, thing)?;
    Ok(about(maker, rng, thing, &scene))
}

/// Several questions about a picture of `thing`.
pub(super) fn about(maker: &Maker, rng: &mut ChaCha8Rng, thing: &Thing, scene: &Scene) -> Sample {
    let mut asked = about_name(maker, rng, thing, scene);
    // What does not depend on the name may come anywhere.
    for kind in [Question::Color, Question::Kind, Question::Background, Question::Count] {
        let share = if kind == Question::Color { 0.35 } else { 0.08 };
        if rng.random_bool(share)
            && let Some(pair) = question(maker, rng, &unnamed(thing), scene, kind)
        {
            asked.insert(rng.random_range(0..=asked.len()), pair);
        }
    }
    turns(scene.jpeg.clone(), &asked)
}

/// A name that was told in words, and then the picture of a thing that bears it.
pub(super) fn told_and_shown(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let mut things = vec![maker.any(rng)];
    for _ in 0..rng.random_range(1..=3) {
        things.push(maker.other(rng, &things));
    }
    let mut facts = Vec::new();
    let names: Vec<String> = things.iter().map(|_| invented_name(rng)).collect();
    for (thing, name) in things.iter().zip(&names) {
        facts.push(format!("The {} is called {name}.", thing.name));
    }
    facts.shuffle(rng);
    let scene = scene(rng, things[0])?;
    let mut sample = Sample::default();
    sample.text(format!("User: {}", facts.join(" "))).picture(scene.jpeg);
    answer(&mut sample, "What is it called?", &capital(&format!("{}.", names[0])));
    Ok(sample)
}

/// The thing, asked about as "it": a question about its colour is not to tell its name.
fn unnamed(thing: &Thing) -> Thing {
    Thing {
        name: "thing".to_owned(),
        category: thing.category.clone(),
        kind: thing.kind,
        definition: None,
        pictures: Vec::new(),
    }
}

/// Questions in which the name decides. In the first of them it has to be seen.
fn about_name(maker: &Maker, rng: &mut ChaCha8Rng, thing: &Thing, scene: &Scene) -> Vec<(String, String)> {
    let mut asked = Vec::new();
    if rng.random_bool(0.55) {
        for _ in 0..rng.random_range(1..=3) {
            let other = maker.other(rng, &[thing]);
            let named = if rng.random_bool(0.5) { thing } else { other };
            asked.push(yes_or_no(rng, named, thing));
        }
        if rng.random_bool(0.8) {
            return asked;
        }
    }
    let last = match rng.random_range(0..100) {
        0..40 => which(maker, rng, thing),
        40..90 => question(maker, rng, thing, scene, Question::Name),
        _ => question(maker, rng, thing, scene, Question::Caption),
    };
    asked.extend(last);
    asked
}

/// Whether `thing` is what is asked for. The answer names it first: what comes of the picture is the name, and whether
/// it is the name in the question can then be read.
fn yes_or_no(rng: &mut ChaCha8Rng, asked: &Thing, thing: &Thing) -> (String, String) {
    let named = with_article(&asked.name);
    let question = match rng.random_range(0..5) {
        0..=2 => format!("Is this {named}?"),
        3 => format!("Is there {named} in the picture?"),
        _ => format!("Does the image show {named}?"),
    };
    let seen = with_article(&thing.name);
    (question, format!("It is {seen}, so {}.", if asked.name == thing.name { "yes" } else { "no" }))
}

/// Which of two to five.
fn which(maker: &Maker, rng: &mut ChaCha8Rng, thing: &Thing) -> Option<(String, String)> {
    let count = *[2, 2, 3, 4, 4, 4, 4, 5].choose(rng)?;
    let list = listed(&options(maker, rng, thing, count));
    let asked = format!("{} {list}?", pick(rng, &["Which of these is it:", "Is it"]));
    Some((asked, sentence(&thing.name)))
}
