//! The shards that `idefics train` reads: `WebDataset` tar files with a JSON of segments and its pictures a sample.
//!
//! Each sample follows from the seed and its number alone, so shards can be written in any order and again.

mod album;
mod contrast;
mod dialogue;
mod episode;
mod facts;
mod practice;
mod shapes;
mod single;
mod words;

use std::{
    fs::{self, File},
    io::BufWriter,
    path::Path,
    sync::OnceLock,
};

use anyhow::{Context, Result};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use crate::{
    scene::{Place, Scene, Variation, compose},
    steps::Folders,
    things::{Part, Thing, Things},
    wordnet::WordNet,
};
use album::Album;
use shapes::Shapes;

pub(crate) use episode::invented_name;
pub(crate) use shapes::Shape;
pub(crate) use single::{Question, choice, question};
pub(crate) use words::{NUMBERS, sentence};

/// What ends a turn of a dialogue.
pub(crate) const END: &str = "<end_of_utterance>";

/// Samples in a shard.
const SHARD: usize = 2000;

/// One sample: segments in their order.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    segments: Vec<Segment>,
    pictures: Vec<Vec<u8>>,
}

/// A segment as `idefics train` reads it.
#[derive(Debug, Serialize, PartialEq, Eq)]
#[serde(untagged)]
enum Segment {
    Text {
        text: String,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        answer: bool,
    },
    Image {
        image: String,
    },
}

impl Sample {
    /// Words that are given.
    pub(crate) fn text(&mut self, text: impl Into<String>) -> &mut Self {
        self.push(text.into(), false)
    }

    /// Words that are to be learnt.
    pub(crate) fn answer(&mut self, text: impl Into<String>) -> &mut Self {
        self.push(text.into(), true)
    }

    fn push(&mut self, text: String, answer: bool) -> &mut Self {
        if let Some(Segment::Text { text: last, answer: kind }) = self.segments.last_mut()
            && *kind == answer
        {
            last.push_str(&text);
        } else {
            self.segments.push(Segment::Text { text, answer });
        }
        self
    }

    pub(crate) fn picture(&mut self, jpeg: Vec<u8>) -> &mut Self {
        self.segments.push(Segment::Image { image: format!("{}.jpg", self.pictures.len()) });
        self.pictures.push(jpeg);
        self
    }
}

/// What samples are made of.
pub(crate) struct Maker {
    pub(crate) things: Things,
    /// Concepts that a name is drawn from; those with several designs come more often.
    weighted: Vec<usize>,
    /// Those with several designs.
    common: Vec<usize>,
    shapes: Shapes,
    wordnet: WordNet,
    album: OnceLock<Album>,
}

impl Maker {
    pub(crate) fn open(folders: &Folders, part: Part) -> Result<Self> {
        let wordnet = WordNet::open(folders)?;
        let things = Things::load(folders, &wordnet, part)?;
        let is_common = |thing: &Thing| thing.pictures.len() >= 3;
        let weight = |thing: &Thing| if is_common(thing) { 4 } else { 1 };
        let common = (0..things.all.len()).filter(|index| is_common(&things.all[*index])).collect();
        let weighted = things.all.iter().enumerate().flat_map(|(index, thing)| vec![index; weight(thing)]);
        let weighted = weighted.collect();
        Ok(Self {
            things,
            weighted,
            common,
            shapes: Shapes::open(folders, part)?,
            wordnet,
            album: OnceLock::new(),
        })
    }

    /// The pictures of coloured shapes.
    pub(crate) fn shapes(&self) -> &[Shape] {
        &self.shapes.0
    }

    /// Pictures that come again.
    fn album(&self) -> Result<&Album> {
        self.album.get().context("the album was not drawn")
    }

    /// Draws the album if it is not there. Not while samples are made: each thread would draw one of its own.
    fn draw_album(&self) -> Result<()> {
        if self.album.get().is_none() {
            let drawn = Album::draw(&self.things)?;
            self.album.get_or_init(|| drawn);
        }
        Ok(())
    }

    /// Any thing.
    pub(crate) fn any(&self, rng: &mut ChaCha8Rng) -> &Thing {
        let index = self.weighted.choose(rng).copied().unwrap_or_default();
        &self.things.all[index]
    }

    /// A thing that several designs have.
    pub(crate) fn common(&self, rng: &mut ChaCha8Rng) -> &Thing {
        let index = self.common.choose(rng).copied().unwrap_or_default();
        &self.things.all[index]
    }

    /// Any thing, those that several designs have most of the time.
    fn rather_common(&self, rng: &mut ChaCha8Rng) -> &Thing {
        if rng.random_bool(0.7) { self.common(rng) } else { self.any(rng) }
    }

    /// So many things, no two the same.
    fn different(&self, rng: &mut ChaCha8Rng, count: usize) -> Vec<&Thing> {
        let mut things = vec![self.any(rng)];
        while things.len() < count {
            things.push(self.other(rng, &things));
        }
        things
    }

    /// Another thing, half of the time of the same category.
    pub(crate) fn other(&self, rng: &mut ChaCha8Rng, than: &[&Thing]) -> &Thing {
        loop {
            let category = than.first().filter(|_| rng.random_bool(0.5)).map(|thing| &thing.category);
            let same = category.and_then(|category| self.things.by_category.get(category)?.choose(rng));
            let found = same.map_or_else(|| self.any(rng), |index| &self.things.all[*index]);
            // Names that contain each other ("moon", "full moon") would make a question without an answer.
            if than.iter().all(|thing| !found.name.contains(&thing.name) && !thing.name.contains(&found.name))
            {
                return found;
            }
        }
    }

    /// One thing in a picture of its own.
    pub(crate) fn alone(rng: &mut ChaCha8Rng, thing: &Thing, variation: Variation) -> Result<Scene> {
        let picture = thing.pictures.choose(rng).context("a thing without a picture")?;
        let place = Place::alone(rng, variation);
        let variation = thing.allows(variation);
        compose(rng, &[(picture, place)], variation)
    }

    /// A prompt of the base models about any thing.
    fn base(&self, rng: &mut ChaCha8Rng) -> Result<Sample> {
        let thing = self.any(rng);
        let variation = single::variation(rng);
        let scene = Self::alone(rng, thing, variation)?;
        Ok(single::base(self, rng, thing, &scene))
    }

    /// The texts of a sample.
    pub(crate) fn texts(&self, kind: Kind, number: u64) -> Result<Vec<String>> {
        let sample = self.sample(kind, 0, number)?;
        let text = |segment| if let Segment::Text { text, .. } = segment { Some(text) } else { None };
        Ok(sample.segments.into_iter().filter_map(text).collect())
    }

    /// The sample of this number.
    fn sample(&self, kind: Kind, seed: u64, number: u64) -> Result<Sample> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number);
        let rng = &mut rng;
        match kind {
            Kind::Text => Ok(facts::text(self, rng)),
            // Names come first: among other tokens the few that need the picture are lost.
            Kind::Naming => dialogue::name(self, rng),
            Kind::Joint => self.joint(rng),
            Kind::Practice => self.practice(rng),
            Kind::Contrast => self.contrast(rng),
            Kind::Reading => self.reading(rng),
            Kind::Album => match rng.random_range(0..100) {
                0..87 => album::single(self, rng),
                _ => album::other(self, rng),
            },
            Kind::Series => episode::series(self, rng, &episode::SERIES),
            Kind::EasySeries => episode::series(self, rng, &episode::EASY_SERIES),
        }
    }

    /// Every skill.
    fn joint(&self, rng: &mut ChaCha8Rng) -> Result<Sample> {
        match rng.random_range(0..100) {
            0..42 => dialogue::single(self, rng),
            42..52 => self.base(rng),
            52..57 => dialogue::two_things(self, rng),
            57..65 => dialogue::several(self, rng),
            65..69 => dialogue::two_pictures(self, rng),
            69..84 => episode::episode(self, rng),
            84..93 => Ok(self.shapes.sample(rng)),
            93..95 => dialogue::story(self, rng),
            _ => Ok(facts::question(self, rng)),
        }
    }

    /// Every skill again. An episode takes four pictures, so that few of them are many pictures.
    fn practice(&self, rng: &mut ChaCha8Rng) -> Result<Sample> {
        match rng.random_range(0..100) {
            0..58 => practice::practice(self, rng),
            58..66 => self.base(rng),
            66..70 => dialogue::two_things(self, rng),
            70..76 => dialogue::several(self, rng),
            76..79 => dialogue::two_pictures(self, rng),
            79..87 => episode::episode(self, rng),
            87..91 => Ok(self.shapes.sample(rng)),
            91..92 => dialogue::story(self, rng),
            92..98 => Ok(practice::told(self, rng)),
            _ => Ok(facts::question(self, rng)),
        }
    }

    /// Every skill once more.
    fn contrast(&self, rng: &mut ChaCha8Rng) -> Result<Sample> {
        match rng.random_range(0..100) {
            0..72 => contrast::contrast(self, rng),
            72..77 => self.base(rng),
            77..79 => dialogue::two_things(self, rng),
            79..82 => dialogue::several(self, rng),
            82..83 => dialogue::two_pictures(self, rng),
            83..91 => episode::binding(self, rng),
            91..92 => episode::episode(self, rng),
            92..94 => Ok(self.shapes.sample(rng)),
            94..96 => contrast::told_and_shown(self, rng),
            96..98 => Ok(practice::told(self, rng)),
            98..99 => dialogue::story(self, rng),
            _ => Ok(facts::question(self, rng)),
        }
    }

    /// Mostly one picture and what it shows: a sample of several pictures costs as much as several of one.
    fn reading(&self, rng: &mut ChaCha8Rng) -> Result<Sample> {
        match rng.random_range(0..100) {
            0..80 => {
                let thing = self.rather_common(rng);
                let scene = contrast::scene(rng, thing)?;
                Ok(contrast::about(self, rng, thing, &scene))
            }
            80..85 => self.base(rng),
            85..87 => dialogue::two_things(self, rng),
            87..89 => dialogue::several(self, rng),
            89..90 => dialogue::two_pictures(self, rng),
            90..91 => episode::binding(self, rng),
            91..92 => episode::episode(self, rng),
            92..97 => Ok(self.shapes.sample(rng)),
            97..98 => Ok(practice::told(self, rng)),
            98..99 => dialogue::story(self, rng),
            _ => Ok(facts::question(self, rng)),
        }
    }
}

/// The sets that the stages of training read.
pub(crate) const PLANS: [Plan; 9] = [
    Plan { name: "text", kind: Kind::Text, samples: 60_000, seed: 1 },
    Plan { name: "names", kind: Kind::Naming, samples: 60_000, seed: 2 },
    Plan { name: "joint", kind: Kind::Joint, samples: 60_000, seed: 3 },
    Plan { name: "practice", kind: Kind::Practice, samples: 80_000, seed: 4 },
    Plan { name: "contrast", kind: Kind::Contrast, samples: 30_000, seed: 6 },
    Plan { name: "reading", kind: Kind::Reading, samples: 120_000, seed: 7 },
    Plan { name: "album", kind: Kind::Album, samples: 240_000, seed: 9 },
    Plan { name: "series", kind: Kind::Series, samples: 60_000, seed: 10 },
    Plan { name: "easy-series", kind: Kind::EasySeries, samples: 40_000, seed: 11 },
];

/// Writes all sets.
pub(crate) fn samples(folders: &Folders) -> Result<()> {
    let maker = Maker::open(folders, Part::Training)?;
    PLANS.iter().try_for_each(|plan| {
        eprintln!("samples: {} of {}", plan.samples, plan.name);
        write(folders, &maker, plan)
    })
}

/// What a set of shards is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The language model alone.
    Text,
    /// Pictures of one thing, and its name.
    Naming,
    /// Every skill.
    Joint,
    /// Every skill, most of it questions that only the picture answers.
    Practice,
    /// Every skill, most of it telling one thing from others, in many hands.
    Contrast,
    /// The same with hardly a sample of several pictures, and more of things that several designs have.
    Reading,
    /// Pictures that come again, mostly with one short question.
    Album,
    /// The same pictures, several in a sample, with invented names.
    Series,
    /// The same with more names and fewer pictures of a thing, many of them the same again.
    EasySeries,
}

impl Kind {
    fn shows_album(self) -> bool {
        matches!(self, Self::Album | Self::Series | Self::EasySeries)
    }
}

/// One set of shards.
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) samples: usize,
    pub(crate) seed: u64,
}

/// Writes the shards of `plan` that are not there.
fn write(folders: &Folders, maker: &Maker, plan: &Plan) -> Result<()> {
    let folder = folders.make(&format!("samples/{}", plan.name))?;
    let path = |shard: usize| folder.join(format!("{shard:05}.tar"));
    let missing: Vec<usize> =
        (0..plan.samples.div_ceil(SHARD)).filter(|shard| !path(*shard).exists()).collect();
    if !missing.is_empty() && plan.kind.shows_album() {
        maker.draw_album()?;
    }
    missing.into_par_iter().try_for_each(|shard| {
        let path = path(shard);
        let numbers = (shard * SHARD)..((shard + 1) * SHARD).min(plan.samples);
        write_shard(&path, numbers.map(|number| maker.sample(plan.kind, plan.seed, number as u64)))
            .with_context(|| format!("writing {}", path.display()))
    })
}

fn write_shard(path: &Path, samples: impl Iterator<Item = Result<Sample>>) -> Result<()> {
    let partial = path.with_extension("part");
    let mut tar = tar::Builder::new(BufWriter::new(File::create(&partial)?));
    for (number, sample) in samples.enumerate() {
        let Sample { segments, pictures } = sample?;
        let json = serde_json::to_vec(&serde_json::json!({ "segments": segments }))?;
        append(&mut tar, &format!("{number:05}.json"), &json)?;
        for (index, picture) in pictures.iter().enumerate() {
            append(&mut tar, &format!("{number:05}.{index}.jpg"), picture)?;
        }
    }
    tar.into_inner()?.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(&partial, path)?;
    Ok(())
}

fn append(tar: &mut tar::Builder<BufWriter<File>>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    Ok(tar.append_data(&mut header, name, bytes)?)
}
