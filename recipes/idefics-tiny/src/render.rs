//! Pictures of all concepts in all designs, one PNG each, and the table of what they show.

use std::fs;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    clipart,
    concepts::{Concept, held_out, words},
    emoji::{Design, EVALUATION, NAMING, TRAINING},
    fetch::{Purpose, package},
    pixels,
    steps::Folders,
};

/// What the pictures show; `pictures/table.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Table {
    /// Things with pictures in several designs.
    pub(crate) concepts: Vec<Concept>,
    /// Drawings with one picture each.
    pub(crate) drawings: Vec<ClipArt>,
}

/// One drawing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ClipArt {
    pub(crate) file: String,
    pub(crate) folder: String,
    pub(crate) title: String,
    pub(crate) keywords: Vec<String>,
}

impl Table {
    pub(crate) fn read(folders: &Folders) -> Result<Self> {
        let path = folders.pictures().join("table.json");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))
    }
}

/// Draws everything.
pub(crate) fn render(folders: &Folders) -> Result<()> {
    let table = Table { concepts: render_emoji(folders)?, drawings: render_clipart(folders)? };
    let path = folders.pictures().join("table.json");
    fs::write(&path, serde_json::to_string_pretty(&table)?)?;
    eprintln!("render: {} concepts, {} drawings", table.concepts.len(), table.drawings.len());
    Ok(())
}

fn render_emoji(folders: &Folders) -> Result<Vec<Concept>> {
    let objects = Design::open(folders, NAMING)?.objects();
    let held_out = held_out();
    for key in &held_out {
        ensure!(objects.iter().any(|(object, _)| object == key), "held_out.txt: no concept is called {key}");
    }
    let mut concepts: Vec<Concept> = objects
        .into_iter()
        .map(|(key, category)| Concept { name: words(&key), key, category, designs: Vec::new() })
        .collect();
    for name in TRAINING.into_iter().chain([EVALUATION]) {
        let expected = if name == EVALUATION { Purpose::Evaluation } else { Purpose::Training };
        ensure!(package(&format!("@iconify-json/{name}"))?.purpose == expected, "{name} is not for this");
        let folder = folders.make(&format!("pictures/{name}"))?;
        let design = Design::open(folders, name)?;
        concepts.par_iter_mut().try_for_each(|concept| -> Result<()> {
            let Some(svg) = design.svg(&concept.key) else { return Ok(()) };
            let pixmap = pixels::rasterize(&svg).with_context(|| format!("{name}: {}", concept.key))?;
            pixels::write(&pixmap, &folder.join(format!("{}.png", concept.key)))?;
            concept.designs.push(name.to_owned());
            Ok(())
        })?;
    }
    Ok(concepts)
}

/// Drawings that cannot be drawn are left out: they are the work of many hands.
fn render_clipart(folders: &Folders) -> Result<Vec<ClipArt>> {
    let folder = folders.make("pictures/clipart")?;
    let drawings = clipart::drawings(folders)?;
    let rendered = drawings.into_par_iter().enumerate().map(|(index, drawing)| {
        // The renderer asserts about some broken paths.
        let pixmap = std::panic::catch_unwind(|| pixels::rasterize(&drawing.svg)).ok()?.ok()?;
        let file = format!("{index:04}.png");
        if let Err(error) = pixels::write(&pixmap, &folder.join(&file)) {
            return Some(Err(error));
        }
        let clipart::Drawing { folder, stem, title, keywords, .. } = drawing;
        let title = if title.is_empty() { stem } else { title };
        Some(Ok(ClipArt { file, folder, title, keywords }))
    });
    rendered.flatten_iter().collect()
}
