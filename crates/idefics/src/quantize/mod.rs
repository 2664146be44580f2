//! Packing the weights of linear layers into few bits: in memory while a model is loaded, or into a directory.
//!
//! Linear layers alone are packed, and by default those of the text model and the gated blocks alone: heads,
//! embeddings, norms and gates stay in their type, as does the way from pixels to latents, which is a fourteenth
//! of the parameters. NF4 (QLoRA, Dettmers et al., 2023) is written as bitsandbytes serialises it, so that
//! transformers loads the directory; Q8 is this project's own.

mod error;
mod files;
mod pack;
mod plan;
mod state;
mod verify;
mod write;

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

pub use error::QuantizeError;
pub use write::{Quantizer, Summary};

use crate::checkpoint::{Part, Weights};

/// How elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Format {
    /// 4 bits, a 32-bit scale for 64 elements: 4.5 bits an element.
    #[serde(rename = "nf4")]
    Nf4,
    /// 4 bits, an 8-bit scale for 64 elements: 4.13 bits an element.
    #[serde(rename = "nf4+dq")]
    Nf4DoubleQuant,
    /// 8 bits, a 32-bit scale for 64 elements of a row: 8.5 bits an element.
    #[serde(rename = "q8")]
    Q8,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nf4 => "nf4",
            Self::Nf4DoubleQuant => "nf4+dq",
            Self::Q8 => "q8",
        })
    }
}

/// A word that names no format.
#[derive(Debug, thiserror::Error)]
#[error("expected `nf4`, `nf4+dq` or `q8`, got `{0}`")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(word: &str) -> Result<Self, UnknownFormat> {
        [Self::Nf4, Self::Nf4DoubleQuant, Self::Q8]
            .into_iter()
            .find(|format| format.to_string() == word)
            .ok_or_else(|| UnknownFormat(word.to_owned()))
    }
}

/// What is packed, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// How elements are stored.
    pub format: Format,
    /// Whose linear layers.
    pub parts: BTreeSet<Part>,
}

impl Recipe {
    /// The linear layers of the text model and of the gated blocks.
    pub fn new(format: Format) -> Self {
        Self { format, parts: BTreeSet::from([Part::Text, Part::Cross]) }
    }

    /// The format for a tensor of this name, if it is to be packed.
    fn format_of(&self, name: &str) -> Option<Format> {
        Part::of_linear(name).filter(|part| self.parts.contains(part)).map(|_| self.format)
    }
}

/// Packs weights in memory, one tensor at a time. What was dense is let go of, so a mapped file's pages can be
/// dropped.
pub fn quantize_weights(weights: &mut Weights, recipe: &Recipe) -> Result<(), QuantizeError> {
    if let Some((_, weight)) = weights.iter_packed().next() {
        return Err(QuantizeError::AlreadyQuantized { format: weight.format_name().to_owned() });
    }
    let names: Vec<String> = weights.iter().map(|(name, _)| name.to_owned()).collect();
    let mut chosen = names.iter().filter_map(|name| Some((name, recipe.format_of(name)?))).peekable();
    if chosen.peek().is_none() {
        return Err(QuantizeError::NothingChosen { parts: error::list(&recipe.parts) });
    }
    for (name, format) in chosen {
        let weight = weights.take(name)?;
        weights.insert_packed(name, pack::pack(name, &weight, format)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
