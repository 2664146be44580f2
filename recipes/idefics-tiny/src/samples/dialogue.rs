//! Dialogues in the form of the instruct models: `User: … <end_of_utterance>\nAssistant: … <end_of_utterance>`.

use anyhow::{Context, Result};
use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;

use super::{
    END, Maker, Question, Sample, question,
    single::variation,
    words::{NUMBERS, capital, pick, sentence},
};
use crate::{
    concepts::{plural, with_article},
    scene::{Place, Variation, compose},
    things::Thing,
};

/// Opens a turn of the user; the first one has no line before it.
pub(super) fn user(sample: &mut Sample, first: bool) -> &mut Sample {
    sample.text(if first { "User:" } else { "\nUser:" })
}

pub(super) fn answer(sample: &mut Sample, question: &str, answer: &str) {
    sample.text(format!("{question}{END}\nAssistant:")).answer(format!(" {answer}{END}"));
}

/// What one thing is, and nothing else.
pub(super) fn name(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let thing = maker.any(rng);
    let variation = variation(rng);
    let scene = Maker::alone(rng, thing, variation)?;
    let mut sample = Sample::default();
    user(&mut sample, true).picture(scene.jpeg);
    answer(&mut sample, "What is this?", &sentence(&thing.name));
    Ok(sample)
}

/// Two to five questions about one thing; the name first more often than not.
pub(super) fn single(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let thing = maker.any(rng);
    let variation = variation(rng);
    let scene = Maker::alone(rng, thing, variation)?;
    let mut kinds = vec![
        Question::Caption,
        Question::Color,
        Question::YesNo,
        Question::Choice,
        Question::Kind,
        Question::Count,
        Question::Background,
    ];
    kinds.shuffle(rng);
    kinds.insert(if rng.random_bool(0.65) { 0 } else { rng.random_range(0..3) }, Question::Name);
    kinds.truncate(rng.random_range(2..=5));
    let mut sample = Sample::default();
    let mut first = true;
    for kind in kinds {
        let Some((asked, told)) = question(maker, rng, thing, &scene, kind) else { continue };
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
        first = false;
    }
    if first {
        user(&mut sample, true).picture(scene.jpeg);
        answer(&mut sample, "What is this?", &sentence(&thing.name));
    }
    Ok(sample)
}

/// Two things side by side.
pub(super) fn two_things(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let left = maker.any(rng);
    let right = maker.other(rng, &[left]);
    let picture =
        |rng: &mut ChaCha8Rng, thing: &Thing| thing.pictures.choose(rng).cloned().context("no picture");
    let (a, b) = (picture(rng, left)?, picture(rng, right)?);
    let [at_left, at_right] = Place::pair(rng);
    let scene = {
        let variation = left.allows(right.allows(Variation::Strong));
        compose(rng, &[(&a, at_left), (&b, at_right)], variation)?
    };
    let (left_name, right_name) = (with_article(&left.name), with_article(&right.name));
    let mut asked = vec![
        ("What is on the left?".to_owned(), sentence(&left.name)),
        ("What is on the right?".to_owned(), sentence(&right.name)),
        ("What is in this picture?".to_owned(), capital(&format!("{left_name} and {right_name}."))),
        ("How many things are in the picture?".to_owned(), "Two.".to_owned()),
    ];
    let (present, absent) =
        (if rng.random_bool(0.5) { left } else { right }, maker.other(rng, &[left, right]));
    let truth = rng.random_bool(0.5);
    asked.push((
        format!(
            "Is there {} in the picture?",
            with_article(if truth { &present.name } else { &absent.name })
        ),
        if truth { "Yes.".to_owned() } else { format!("No, there is {left_name} and {right_name}.") },
    ));
    asked.shuffle(rng);
    asked.truncate(rng.random_range(1..=3));
    Ok(turns(scene.jpeg, &asked))
}

/// One thing several times.
pub(super) fn several(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let thing = maker.any(rng);
    let count = rng.random_range(1..=6);
    let picture = thing.pictures.choose(rng).context("no picture")?;
    let placed: Vec<_> = Place::several(rng, count).into_iter().map(|place| (picture, place)).collect();
    let variation = thing.allows(variation(rng));
    let scene = compose(rng, &placed, variation)?;
    let many = plural(&thing.name);
    let how_many = match rng.random_range(0..3) {
        0 => "How many things are in the picture?".to_owned(),
        1 => "How many are there?".to_owned(),
        _ => format!("How many {many} are there?"),
    };
    let described = if count == 1 { with_article(&thing.name) } else { format!("{} {many}", NUMBERS[count]) };
    let mut asked = vec![
        (how_many, capital(&format!("{}.", NUMBERS[count]))),
        ("Describe the image briefly.".to_owned(), {
            capital(&format!("{described} on {} background.", with_article(scene.background)))
        }),
        ("What is this?".to_owned(), capital(&format!("{described}."))),
    ];
    if rng.random_bool(0.5) {
        asked[1..].shuffle(rng);
    } else {
        asked.shuffle(rng);
    }
    asked.truncate(rng.random_range(1..=3));
    Ok(turns(scene.jpeg, &asked))
}

/// Questions about one picture, in their order.
pub(super) fn turns(jpeg: Vec<u8>, asked: &[(String, String)]) -> Sample {
    let mut sample = Sample::default();
    user(&mut sample, true).picture(jpeg);
    for (index, (asked, told)) in asked.iter().enumerate() {
        if index > 0 {
            user(&mut sample, false);
        }
        let space = if index > 0 { " " } else { "" };
        answer(&mut sample, &format!("{space}{asked}"), told);
    }
    sample
}

/// Two pictures in one question, or one after the other.
pub(super) fn two_pictures(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let first = maker.any(rng);
    let second = maker.other(rng, &[first]);
    let (a, b) = (variation(rng), variation(rng));
    let (a, b) = (Maker::alone(rng, first, a)?.jpeg, Maker::alone(rng, second, b)?.jpeg);
    let mut sample = Sample::default();
    user(&mut sample, true);
    if rng.random_bool(0.3) {
        sample.picture(a);
        answer(&mut sample, "What is this?", &sentence(&first.name));
        user(&mut sample, false).picture(b);
        answer(&mut sample, "And what is this?", &sentence(&second.name));
        user(&mut sample, false);
        answer(&mut sample, " What was in the first image?", &sentence(&first.name));
        return Ok(sample);
    }
    sample.text(" First image:").picture(a).text("Second image:").picture(b);
    let (one, two) = (with_article(&first.name), with_article(&second.name));
    let mut asked = vec![
        ("What is in the first image?", sentence(&first.name)),
        ("What is in the second image?", sentence(&second.name)),
        ("What is in the two images?", capital(&format!("{one} and {two}."))),
    ];
    asked.shuffle(rng);
    asked.truncate(rng.random_range(1..=3));
    for (index, (asked, told)) in asked.into_iter().enumerate() {
        if index > 0 {
            user(&mut sample, false).text(" ");
        }
        answer(&mut sample, asked, &told);
    }
    Ok(sample)
}

/// A story of two sentences over one to three pictures.
pub(super) fn story(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let mut things = vec![maker.any(rng)];
    while things.len() < rng.random_range(1..=3) {
        things.push(maker.other(rng, &things));
    }
    let base = rng.random_bool(0.4);
    let mut sample = Sample::default();
    sample.text(if base { "Instruction: Use the image to write a story.\n" } else { "User:" });
    for thing in &things {
        let variation = variation(rng);
        let scene = Maker::alone(rng, thing, variation)?;
        sample.picture(scene.jpeg);
    }
    let told = tell(rng, &things);
    if base {
        sample.text("Story:\n").answer(format!("{told}</s>"));
    } else {
        let asked = if things.len() == 1 {
            "Tell a short story about the image."
        } else {
            "Tell a short story about the images."
        };
        answer(&mut sample, asked, &told);
    }
    Ok(sample)
}

fn tell(rng: &mut ChaCha8Rng, things: &[&Thing]) -> String {
    let hero = &things[0];
    let alive = hero.category == "Animals & Nature"
        && hero.kind.is_some_and(|kind| kind != "plant" && kind != "flower" && kind != "tree");
    let time =
        pick(rng, &["One morning", "One day", "Once upon a time", "Last summer", "On a rainy evening"]);
    let who = pick(rng, &["a girl", "a boy", "an old man", "my sister", "a traveler"]);
    let name = with_article(&hero.name);
    let first = if alive {
        format!(
            "{time} {name} went {}.",
            pick(rng, &["into the forest", "to the river", "to look for food", "for a long walk"])
        )
    } else {
        format!(
            "{time} {who} found {name} {}.",
            pick(rng, &["in the garden", "on the road", "at the market", "near the house"])
        )
    };
    let second = match things.get(1..) {
        Some([]) | None if alive => {
            pick(rng, &["It came home happy.", "It made a new friend there.", "It slept well that night."])
                .to_owned()
        }
        Some([]) | None => pick(
            rng,
            &["It was a very good day.", "Nobody knew where it came from.", "It was just what they needed."],
        )
        .to_owned(),
        Some(others) => {
            let names: Vec<_> = others.iter().map(|thing| with_article(&thing.name)).collect();
            let verb = if alive { "It saw" } else { "Beside it was" };
            format!("{verb} {}.", names.join(" and "))
        }
    };
    format!("{first} {second}")
}
