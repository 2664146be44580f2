//! Learning from the prompt: example pairs, then a picture to name. Half of the episodes use invented names, which
//! nothing but the examples can tell.

use anyhow::Result;
use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;

use super::{
    END, Maker, Sample, contrast,
    dialogue::{answer, user},
    single::variation,
    words::{capital, pick, sentence},
};
use crate::{concepts::with_article, scene::Scene};

/// A name that is no word: two or three syllables.
pub(crate) fn invented_name(rng: &mut ChaCha8Rng) -> String {
    const ONSETS: [&str; 16] =
        ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "bl"];
    const VOWELS: [&str; 5] = ["a", "e", "i", "o", "u"];
    const CODAS: [&str; 8] = ["", "", "", "x", "n", "p", "k", "m"];
    let syllables = rng.random_range(1..=2);
    let mut name = String::new();
    for _ in 0..syllables {
        name.push_str(pick(rng, &ONSETS));
        name.push_str(pick(rng, &VOWELS));
    }
    name.push_str(pick(rng, &CODAS));
    if name.len() < 3 { format!("{name}x") } else { name }
}

/// So many of them, no two the same.
fn invented_names(rng: &mut ChaCha8Rng, count: usize) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    while names.len() < count {
        let name = invented_name(rng);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// How an example reads: what stands before and after the picture, and after the name.
struct Form {
    before: &'static str,
    after: &'static str,
    end: &'static str,
}

const FORMS: [Form; 5] = [
    Form { before: "", after: "This is", end: ".\n" },
    Form { before: "Image:", after: "Caption:", end: ".\n" },
    Form { before: "", after: "Question: What is this? Answer:", end: ".\n" },
    Form { before: "User:", after: "Describe this image.\nAssistant:", end: ".\n" },
    Form {
        before: "User:",
        after: "What is this?<end_of_utterance>\nAssistant:",
        end: ".<end_of_utterance>\n",
    },
];

impl Form {
    /// The name as it follows; a sentence begins with it unless words stand before.
    fn name(&self, name: &str) -> String {
        if matches!(self.after, "This is" | "Caption:") { name.to_owned() } else { capital(name) }
    }
}

pub(super) fn episode(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let form = FORMS.choose(rng).unwrap_or(&FORMS[0]);
    debug_assert!(FORMS[4].end.contains(END));
    let invented = rng.random_bool(0.7);
    let candidates = rng.random_range(if invented { 2..=2 } else { 2..=4 });
    let things = maker.different(rng, candidates);
    let names: Vec<String> = things
        .iter()
        .map(|thing| if invented { format!("a {}", invented_name(rng)) } else { with_article(&thing.name) })
        .collect();
    // Invented names need an example each; after those any candidate may come, each time with an answer to learn.
    let mut order: Vec<usize> = (0..candidates).collect();
    order.shuffle(rng);
    let more = rng.random_range(1..=4);
    order.extend((0..more).map(|_| rng.random_range(0..candidates)));
    let mut sample = Sample::default();
    for (position, candidate) in order.into_iter().enumerate() {
        let variation = variation(rng);
        let scene = Maker::alone(rng, things[candidate], variation)?;
        let is_example = invented && position < candidates;
        let name = form.name(&names[candidate]);
        sample.text(form.before).picture(scene.jpeg).text(form.after);
        if is_example {
            sample.text(format!(" {name}{}", form.end));
        } else {
            sample.answer(format!(" {name}{}", form.end));
        }
    }
    Ok(sample)
}

/// Invented names bound to pictures, in both directions: the picture's name is asked for, and what a name's picture
/// shows. The second tells more by an answer, and cannot be found without the picture that the name stands behind.
pub(super) fn binding(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let form = if rng.random_bool(0.5) { &FORMS[0] } else { FORMS.choose(rng).unwrap_or(&FORMS[0]) };
    let candidates = if rng.random_bool(0.8) { 2 } else { 3 };
    let things = maker.different(rng, candidates);
    let names = invented_names(rng, candidates);
    let mut order: Vec<usize> = (0..candidates).collect();
    order.shuffle(rng);
    order.extend((0..rng.random_range(1..=4)).map(|_| rng.random_range(0..candidates)));
    let mut shown: Vec<Vec<Vec<u8>>> = vec![Vec::new(); candidates];
    let mut sample = Sample::default();
    for (position, &candidate) in order.iter().enumerate() {
        // The same picture again is the easiest to recognise, and where recognising starts.
        let again = shown[candidate].choose(rng).filter(|_| rng.random_bool(0.25)).cloned();
        let jpeg = match again {
            Some(jpeg) => jpeg,
            None => contrast::scene(rng, things[candidate])?.jpeg,
        };
        shown[candidate].push(jpeg.clone());
        let name = form.name(&format!("a {}", names[candidate]));
        sample.text(form.before).picture(jpeg).text(form.after);
        let told = format!(" {name}{}", form.end);
        if position < candidates {
            sample.text(told);
        } else {
            sample.answer(told);
        }
    }
    let mut asked: Vec<usize> = (0..candidates).collect();
    asked.shuffle(rng);
    asked.truncate(rng.random_range(0..=2));
    for candidate in asked {
        let (name, told) = (&names[candidate], sentence(&things[candidate].name));
        if form.before == "User:" {
            user(&mut sample, true);
            answer(&mut sample, &format!(" What is a {name}?"), &told);
        } else {
            sample.text(format!("Question: What is a {name}? Answer:")).answer(format!(" {told}\n"));
        }
    }
    Ok(sample)
}

/// How a series is drawn.
pub(super) struct Series {
    /// How many things there are: one number of these.
    candidates: &'static [usize],
    /// Fewest and most pictures besides the first of each.
    more: [usize; 2],
    /// Pictures of a thing to choose from.
    pictures: usize,
    /// How often it is one that was shown.
    again: f64,
    /// How often the form is the plainest.
    plain: f64,
}

/// As the tests ask, and somewhat more.
pub(super) const SERIES: Series =
    Series { candidates: &[2, 2, 2, 3, 4], more: [4, 8], pictures: 28, again: 0.2, plain: 0.5 };

/// More names, and pictures that are easier to recognise: where recognising starts. With two candidates a name that is
/// copied without looking is right half of the time, and that is where learning stayed.
pub(super) const EASY_SERIES: Series =
    Series { candidates: &[2, 3, 4, 5], more: [7, 10], pictures: 8, again: 0.45, plain: 0.6 };

/// Invented names: each is told with the first picture of its thing, and to be said with every other.
pub(super) fn series(maker: &Maker, rng: &mut ChaCha8Rng, rules: &Series) -> Result<Sample> {
    let form = if rng.random_bool(rules.plain) { &FORMS[0] } else { FORMS.choose(rng).unwrap_or(&FORMS[0]) };
    let candidates = rules.candidates.choose(rng).copied().unwrap_or(2);
    let things = maker.different(rng, candidates);
    let names = invented_names(rng, candidates);
    let mut order: Vec<usize> = (0..candidates).collect();
    let [fewest, most] = rules.more;
    order.extend((0..rng.random_range(fewest..=most)).map(|_| rng.random_range(0..candidates)));
    // Two examples at least come before anything is asked; the others where they fall.
    order[2..].shuffle(rng);
    let mut shown: Vec<Option<&Scene>> = vec![None; candidates];
    let mut sample = Sample::default();
    for which in order {
        let earlier = shown[which];
        let scene = match earlier.filter(|_| rng.random_bool(rules.again)) {
            Some(scene) => scene,
            None => maker.album()?.scene(rng, things[which], rules.pictures)?,
        };
        shown[which] = Some(scene);
        let told = format!(" {}{}", form.name(&format!("a {}", names[which])), form.end);
        sample.text(form.before).picture(scene.jpeg.clone()).text(form.after);
        if earlier.is_none() {
            sample.text(told);
        } else {
            sample.answer(told);
        }
    }
    Ok(sample)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn invented_names_are_short_and_many() {
        let rng = &mut ChaCha8Rng::seed_from_u64(0);
        let names: std::collections::BTreeSet<_> = (0..1000).map(|_| invented_name(rng)).collect();
        assert!(names.len() > 500);
        assert!(names.iter().all(|name| (3..=7).contains(&name.len())), "{names:?}");
    }
}
