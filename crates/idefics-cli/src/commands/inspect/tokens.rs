//! The tokens beside the base vocabulary, as the tokenizer's files list them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use idefics::config::IdeficsConfig;
use serde::Deserialize;

/// Largest tokenizer file that is read.
const MAX_BYTES: u64 = 64 << 20;

/// The tokens without which no picture can stand in a prompt.
const NEEDED: [&str; 2] = ["<fake_token_around_image>", "<image>"];

/// Reads the added tokens with their ids and checks them against the configuration.
pub(super) fn read(directory: &Path, config: &IdeficsConfig) -> anyhow::Result<BTreeMap<String, u32>> {
    let (path, tokens) = added_tokens(directory)?;
    let path = path.display();
    let vocab = config.vocab_size + config.additional_vocab_size;
    if let Some((token, id)) = tokens.iter().find(|(_, id)| **id as usize >= vocab) {
        bail!("`{path}`: token `{}` has id {id}, but the model has {vocab} tokens", token.escape_debug());
    }
    if let Some(missing) = NEEDED.iter().find(|token| !tokens.contains_key(**token)) {
        bail!("`{path}` has no token `{missing}`: is this the tokenizer of an IDEFICS model");
    }
    Ok(tokens)
}

#[derive(Deserialize)]
struct TokenizerFile {
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

fn added_tokens(directory: &Path) -> anyhow::Result<(PathBuf, BTreeMap<String, u32>)> {
    let path = directory.join("tokenizer.json");
    if path.exists() {
        let file: TokenizerFile = read_json(&path)?;
        let tokens = file.added_tokens.into_iter().map(|token| (token.content, token.id)).collect();
        return Ok((path, tokens));
    }
    if !directory.join("tokenizer.model").exists() {
        bail!("`{}` has neither `tokenizer.json` nor `tokenizer.model`", directory.display());
    }
    let path = directory.join("added_tokens.json");
    let tokens = read_json(&path)?;
    Ok((path, tokens))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let shown = path.display();
    let length = fs::metadata(path).with_context(|| format!("cannot read `{shown}`"))?.len();
    if length > MAX_BYTES {
        bail!("`{shown}` has {length} bytes, at most {MAX_BYTES} are read");
    }
    let text = fs::read_to_string(path).with_context(|| format!("cannot read `{shown}`"))?;
    serde_json::from_str(&text).with_context(|| format!("`{shown}` is not a usable tokenizer file"))
}
