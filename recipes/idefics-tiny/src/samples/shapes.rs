//! Easy-VQA: coloured shapes with questions, in the split that its authors published.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result};
use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;

use super::{END, Sample, words::capital};
use crate::{archive, fetch, steps::Folders, things::Part};

/// A picture with its questions and answers.
pub(crate) struct Shape {
    pub(crate) png: Vec<u8>,
    pub(crate) questions: Vec<(String, String)>,
}

/// All pictures of one half of the split.
pub(crate) struct Shapes(pub(crate) Vec<Shape>);

impl Shapes {
    pub(crate) fn open(folders: &Folders, part: Part) -> Result<Self> {
        let split = if part == Part::Training { "train" } else { "test" };
        let path = fetch::package("easy-vqa")?.path(folders);
        let root = format!("easy_vqa/data/{split}/");
        let mut files: HashMap<String, Vec<u8>> = archive::wheel(&path, |name| name.starts_with(&root))?;
        let questions =
            files.remove(&format!("{root}questions.json")).context("easy-vqa has no questions")?;
        let questions: Vec<(String, String, u32)> = serde_json::from_slice(&questions)?;
        let mut by_picture: BTreeMap<u32, Vec<(String, String)>> = BTreeMap::new();
        for (question, answer, picture) in questions {
            by_picture.entry(picture).or_default().push((question, answer));
        }
        let shape = |(number, questions)| -> Result<Shape> {
            let name = format!("{root}images/{number}.png");
            let png = files.remove(&name).with_context(|| format!("easy-vqa has no {name}"))?;
            Ok(Shape { png, questions })
        };
        Ok(Self(by_picture.into_iter().map(shape).collect::<Result<_>>()?))
    }

    /// Some questions about one picture, as a dialogue or as base models are asked.
    pub(super) fn sample(&self, rng: &mut ChaCha8Rng) -> Sample {
        let mut sample = Sample::default();
        let Some(shape) = self.0.choose(rng) else { return sample };
        let mut questions: Vec<_> = shape.questions.iter().collect();
        questions.shuffle(rng);
        questions.truncate(rng.random_range(1..=5));
        if rng.random_bool(0.3) {
            let (asked, told) = questions[0];
            sample.picture(shape.png.clone()).text(format!("Question: {} Answer:", capital(asked)));
            sample.answer(format!(" {told}\n"));
            return sample;
        }
        sample.text("User:").picture(shape.png.clone());
        for (index, (asked, told)) in questions.into_iter().enumerate() {
            let start = if index > 0 { "\nUser: " } else { "" };
            sample.text(format!("{start}{}{END}\nAssistant:", capital(asked)));
            sample.answer(format!(" {}.{END}", capital(told)));
        }
        sample
    }
}
