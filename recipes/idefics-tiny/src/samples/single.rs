//! Questions about a picture of one thing, and the prompts of base models.

use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{
    Maker, Sample,
    words::{capital, is, pick, sentence},
};
use crate::{
    color::COLORS,
    concepts::with_article,
    scene::{Scene, Variation},
    things::Thing,
};

/// What can be asked about a picture of one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question {
    Name,
    Caption,
    Color,
    YesNo,
    Choice,
    Kind,
    Count,
    Background,
}

/// A question with its answer; none where the picture does not tell.
pub(crate) fn question(
    maker: &Maker,
    rng: &mut ChaCha8Rng,
    thing: &Thing,
    scene: &Scene,
    kind: Question,
) -> Option<(String, String)> {
    let name = &thing.name;
    Some(match kind {
        Question::Name => {
            let wordings = [
                "What is this?",
                "What is in this picture?",
                "What is in this image?",
                "What do you see?",
                "What does the picture show?",
                "Name the thing in the picture.",
                "What is represented in this image?",
            ];
            (pick(rng, &wordings).to_owned(), sentence(name))
        }
        Question::Caption => {
            let wordings = [
                "Describe the image briefly.",
                "Describe this image.",
                "Describe the picture.",
                "Write a caption for this image.",
            ];
            let caption = format!("{} on {} background.", with_article(name), with_article(scene.background));
            (pick(rng, &wordings).to_owned(), capital(&caption))
        }
        Question::Color => {
            let color = COLORS[scene.colors.first().copied().flatten()?].0;
            let wording = match rng.random_range(0..4) {
                0 => "What color is it?".to_owned(),
                1 => "What colour is the thing in the picture?".to_owned(),
                2 => format!("What colour {} the {name}?", is(name)),
                _ => format!("What color {} the {name}?", is(name)),
            };
            (wording, capital(&format!("{color}.")))
        }
        Question::YesNo => {
            let other = maker.other(rng, &[thing]);
            let truth = rng.random_bool(0.5);
            let asked = with_article(if truth { name } else { &other.name });
            let wording = match rng.random_range(0..3) {
                0 => format!("Is this {asked}?"),
                1 => format!("Is there {asked} in the picture?"),
                _ => format!("Does the image show {asked}?"),
            };
            (wording, if truth { "Yes.".to_owned() } else { format!("No, it is {}.", with_article(name)) })
        }
        Question::Choice => (choice(maker, rng, thing).0, sentence(name)),
        Question::Kind => {
            let kind = thing.kind?;
            (pick(rng, &["What kind of thing is it?", "What category is it?"]).to_owned(), sentence(kind))
        }
        Question::Count => (
            pick(rng, &["How many things are in the picture?", "How many are there?"]).to_owned(),
            "One.".to_owned(),
        ),
        Question::Background => (
            pick(rng, &["What color is the background?", "What is the background like?"]).to_owned(),
            capital(&format!("{}.", scene.background)),
        ),
    })
}

/// Which of four it is, and the four.
pub(crate) fn choice<'a>(
    maker: &'a Maker,
    rng: &mut ChaCha8Rng,
    thing: &'a Thing,
) -> (String, Vec<&'a Thing>) {
    let options = options(maker, rng, thing, 4);
    let wording = if rng.random_range(0..2) == 0 { "Which of these is it:" } else { "Is it" };
    (format!("{wording} {}?", listed(&options)), options)
}

/// The thing among others, in any order.
pub(super) fn options<'a>(
    maker: &'a Maker,
    rng: &mut ChaCha8Rng,
    thing: &'a Thing,
    count: usize,
) -> Vec<&'a Thing> {
    let mut options = vec![thing];
    while options.len() < count {
        options.push(maker.other(rng, &options));
    }
    options.shuffle(rng);
    options
}

/// "a dog, a cat or scissors".
pub(super) fn listed(options: &[&Thing]) -> String {
    let names: Vec<String> = options.iter().map(|option| with_article(&option.name)).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, first)) => format!("{} or {last}", first.join(", ")),
        None => String::new(),
    }
}

/// Half plain, half not: a model must know a thing as files show it, and as anything else does.
pub(super) fn variation(rng: &mut ChaCha8Rng) -> Variation {
    if rng.random_bool(0.5) { Variation::None } else { Variation::Strong }
}

/// The prompts of the task guide and of the evaluations of the base models.
pub(super) fn base(maker: &Maker, rng: &mut ChaCha8Rng, thing: &Thing, scene: &Scene) -> Sample {
    let jpeg = scene.jpeg.clone();
    let name = with_article(&thing.name);
    let mut sample = Sample::default();
    match rng.random_range(0..6) {
        0 => {
            sample.picture(jpeg).text("This is an image of").answer(format!(" {name}.</s>"));
        }
        1 => {
            sample.picture(jpeg).text("a photo of").answer(format!(" {name}.</s>"));
        }
        2 => {
            sample.text("Image:").picture(jpeg).text("Caption:").answer(format!(" {name}.\n"));
        }
        3 => {
            let options = options(maker, rng, thing, 4);
            let names: Vec<_> = options.iter().map(|option| option.name.as_str()).collect();
            let list = names.join(", ");
            sample
                .text(format!(
                    "Instruction: Classify the following image into a single category from the following list: {list}.\n"
                ))
                .picture(jpeg)
                .text("Category:")
                .answer(format!(" {}\n", thing.name));
        }
        _ => {
            let kinds = [Question::Name, Question::Color, Question::YesNo, Question::Kind, Question::Count];
            let kind = kinds[rng.random_range(0..kinds.len())];
            let asked = question(maker, rng, thing, scene, kind);
            let (asked, answer) = match asked {
                Some(asked) => asked,
                None => ("What is this?".to_owned(), sentence(&thing.name)),
            };
            // Base models answer in a word.
            let answer = answer.split(',').next().unwrap_or_default().trim_end_matches('.').to_lowercase();
            let answer = answer.strip_prefix("a ").or(answer.strip_prefix("an ")).unwrap_or(&answer);
            let start = pick(
                rng,
                &[
                    "Instruction: Provide an answer to the question. Use the image to answer.\n",
                    "Instruction: provide an answer to the question. Use the image to answer.\nImage:",
                    "",
                ],
            );
            sample.text(start).picture(jpeg);
            sample.text(format!("Question: {asked} Answer:")).answer(format!(" {answer}\n"));
        }
    }
    sample
}
