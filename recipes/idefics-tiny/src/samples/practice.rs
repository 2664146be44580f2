//! Questions that only the picture answers.
//!
//! A dialogue that names the thing first makes its later answers copies. Here a question about what the thing is comes
//! while no earlier turn has told it, and refusals do not tell it either, so that each answer has to be looked up.

use anyhow::Result;
use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;

use super::{
    END, Maker, Question, Sample,
    dialogue::{answer, user},
    episode::invented_name,
    question,
    single::variation,
    words::{capital, sentence},
};
/// How often each question comes up.
const SHARES: [(Question, u32); 8] = [
    (Question::Name, 5),
    (Question::YesNo, 6),
    (Question::Choice, 3),
    (Question::Caption, 2),
    (Question::Color, 4),
    (Question::Kind, 1),
    (Question::Count, 1),
    (Question::Background, 1),
];

/// One to five questions about one thing, in any order.
pub(super) fn practice(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let thing = maker.any(rng);
    let variation = variation(rng);
    let scene = Maker::alone(rng, thing, variation)?;
    let mut sample = Sample::default();
    let mut asked_before: Vec<Question> = Vec::new();
    let mut told_name = false;
    let turns = rng.random_range(1..=5);
    // Some draws come to nothing: a question that was asked, or has no answer here.
    for _ in 0..3 * turns {
        let kind = SHARES.choose_weighted(rng, |(_, share)| *share)?.0;
        let about_name = matches!(
            kind,
            Question::Name | Question::YesNo | Question::Choice | Question::Caption | Question::Kind
        );
        let seen = asked_before.contains(&kind) && kind != Question::YesNo;
        // Now and then all the same: answers of one dialogue are to agree.
        if seen || asked_before.len() == turns || (told_name && about_name && rng.random_bool(0.8)) {
            continue;
        }
        let Some((asked, mut told)) = question(maker, rng, thing, &scene, kind) else { continue };
        if told.starts_with("No, ") && rng.random_bool(0.8) {
            "No.".clone_into(&mut told);
        }
        let first = asked_before.is_empty();
        user(&mut sample, first);
        if first && rng.random_bool(0.7) {
            sample.picture(scene.jpeg.clone());
            answer(&mut sample, &asked, &told);
        } else if first {
            sample.text(format!(" {asked}")).picture(scene.jpeg.clone());
            answer(&mut sample, "", &told);
        } else {
            answer(&mut sample, &format!(" {asked}"), &told);
        }
        told_name |= (about_name && told != "No.") || asked.contains(&thing.name);
        asked_before.push(kind);
    }
    if asked_before.is_empty() {
        user(&mut sample, true).picture(scene.jpeg);
        answer(&mut sample, "What is this?", &sentence(&thing.name));
    }
    Ok(sample)
}

/// Names that were told, without a picture: what episodes need, finding a name in the prompt and repeating it exactly.
pub(super) fn told(maker: &Maker, rng: &mut ChaCha8Rng) -> Sample {
    let mut things = vec![maker.any(rng)];
    for _ in 0..rng.random_range(1..=4) {
        things.push(maker.other(rng, &things));
    }
    let names: Vec<String> = things.iter().map(|_| invented_name(rng)).collect();
    let mut pairs: Vec<_> = things.iter().map(|thing| thing.name.as_str()).zip(&names).collect();
    let facts: Vec<String> =
        pairs.iter().map(|(thing, name)| format!("The {thing} is called {name}.")).collect();
    let mut sample = Sample::default();
    sample.text(format!("User: {}", facts.join(" ")));
    pairs.shuffle(rng);
    pairs.truncate(rng.random_range(1..=3));
    for (index, (thing, name)) in pairs.into_iter().enumerate() {
        let (asked, told) = if rng.random_bool(0.3) {
            (format!("What is called {name}?"), capital(&format!("the {thing}.")))
        } else {
            (format!("What is the {thing} called?"), sentence(name))
        };
        if index > 0 {
            user(&mut sample, false);
        }
        sample.text(format!(" {asked}{END}\nAssistant:")).answer(format!(" {told}{END}"));
    }
    sample
}
