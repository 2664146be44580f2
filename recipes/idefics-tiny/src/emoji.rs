//! Emoji designs as iconify packs them: SVG bodies by English name, with aliases and categories.

use std::collections::HashMap;

use anyhow::{Context, Result};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{archive, concepts::CATEGORIES, fetch, steps::Folders};

/// The design whose names and categories are those of the concepts.
pub(crate) const NAMING: &str = "noto";

/// The designs to learn from.
pub(crate) const TRAINING: [&str; 5] = ["noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat"];

/// The design to be tested on, and never learnt from.
pub(crate) const EVALUATION: &str = "emojione";

/// One design.
#[derive(Debug, Deserialize)]
pub(crate) struct Design {
    icons: HashMap<String, Icon>,
    #[serde(default)]
    aliases: HashMap<String, Alias>,
    #[serde(default = "default_side")]
    width: f32,
    #[serde(default = "default_side")]
    height: f32,
    #[serde(skip)]
    categories: HashMap<String, Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct Icon {
    body: String,
    width: Option<f32>,
    height: Option<f32>,
}

#[derive(Debug, Deserialize)]
struct Alias {
    parent: String,
}

#[derive(Debug, Default, Deserialize)]
struct Metadata {
    #[serde(default)]
    categories: HashMap<String, Vec<String>>,
}

fn default_side() -> f32 {
    16.0
}

impl Design {
    /// Reads the design `name` from its package.
    pub(crate) fn open(folders: &Folders, name: &str) -> Result<Self> {
        let path = fetch::package(&format!("@iconify-json/{name}"))?.path(folders);
        let files = archive::npm(&path, |file| file == "icons.json" || file == "metadata.json")?;
        let mut design: Self = parse(&files, "icons.json")?;
        design.categories = parse::<Metadata>(&files, "metadata.json")?.categories;
        Ok(design)
    }

    /// The SVG of the icon `key`, by its name or an alias.
    pub(crate) fn svg(&self, key: &str) -> Option<String> {
        let icon = self.icons.get(key).or_else(|| self.icons.get(&self.aliases.get(key)?.parent))?;
        let (width, height) = (icon.width.unwrap_or(self.width), icon.height.unwrap_or(self.height));
        Some(format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{}</svg>"#,
            icon.body
        ))
    }

    /// The icons of the object categories with their category.
    pub(crate) fn objects(&self) -> Vec<(String, String)> {
        let in_category = |category: &str| {
            let keys = self.categories.get(category).cloned().unwrap_or_default();
            keys.into_iter().map(|key| (key, category.to_owned())).collect::<Vec<_>>()
        };
        CATEGORIES.iter().flat_map(|category| in_category(category)).collect()
    }
}

fn parse<T: DeserializeOwned>(files: &HashMap<String, Vec<u8>>, name: &str) -> Result<T> {
    let bytes = files.get(name).with_context(|| format!("the package has no {name}"))?;
    serde_json::from_slice(bytes).with_context(|| name.to_owned())
}
