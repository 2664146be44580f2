//! Pictures that come again, so that training keeps what a frozen tower makes of them and spends its time on what
//! reads it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{Maker, Question, Sample, contrast, dialogue, facts, practice, question, single};
use crate::{
    scene::Scene,
    things::{Thing, Things},
};

/// Seed of the album's pictures.
const SEED: u64 = 8;
/// Pictures of a thing that several designs have, and of any other one.
const MANY: usize = 44;
const FEW: usize = 3;

/// Some pictures of each thing, by its name.
pub(super) struct Album(BTreeMap<String, Vec<Scene>>);

impl Album {
    pub(super) fn draw(things: &Things) -> Result<Self> {
        let page = |(number, thing): (usize, &Thing)| -> Result<(String, Vec<Scene>)> {
            let mut rng = ChaCha8Rng::seed_from_u64(SEED);
            rng.set_stream(number as u64);
            let count = if thing.pictures.len() >= 3 { MANY } else { FEW };
            let scenes = (0..count).map(|_| contrast::scene(&mut rng, thing)).collect::<Result<_>>()?;
            Ok((thing.name.clone(), scenes))
        };
        Ok(Self(things.all.par_iter().enumerate().map(page).collect::<Result<_>>()?))
    }

    /// One of the first `count` pictures of a thing.
    pub(super) fn scene(&self, rng: &mut ChaCha8Rng, thing: &Thing, count: usize) -> Result<&Scene> {
        let page = self.0.get(&thing.name).and_then(|page| page[..page.len().min(count)].choose(rng));
        page.with_context(|| format!("no picture of {} in the album", thing.name))
    }
}

/// A picture of the album and what it shows, mostly asked for in one short question.
pub(super) fn single(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    let thing = maker.rather_common(rng);
    let scene = maker.album()?.scene(rng, thing, MANY)?;
    match rng.random_range(0..100) {
        0..58 => {
            let asked = question(maker, rng, thing, scene, Question::Name);
            Ok(dialogue::turns(scene.jpeg.clone(), asked.as_slice()))
        }
        58..90 => Ok(contrast::about(maker, rng, thing, scene)),
        _ => Ok(single::base(maker, rng, thing, scene)),
    }
}

/// Everything that is not a picture of one thing, so that it is not forgotten.
pub(super) fn other(maker: &Maker, rng: &mut ChaCha8Rng) -> Result<Sample> {
    match rng.random_range(0..100) {
        0..40 => Ok(maker.shapes.sample(rng)),
        40..65 => dialogue::several(maker, rng),
        65..82 => dialogue::two_things(maker, rng),
        82..88 => dialogue::two_pictures(maker, rng),
        88..94 => dialogue::story(maker, rng),
        94..98 => Ok(practice::told(maker, rng)),
        _ => Ok(facts::question(maker, rng)),
    }
}
