//! The text model's tokenizer with IDEFICS's tokens behind its own.
//!
//! Reference: the files of the published checkpoints (`added_tokens.json`, flags of the tokens, `special_tokens_map`).
//! A tokenizer that has the tokens already is copied as it is.

use std::path::{Path, PathBuf};

use idefics::{
    checkpoint::{CheckpointWriter, WriteError},
    processor::{Tokenizer, TokenizerError, id_bound_of},
};
use serde_json::{Map, Value, json};

use super::{AddedTokens, InitError, read_json};

const IMAGE_TOKENS: [&str; 2] = ["<fake_token_around_image>", "<image>"];
const END_OF_UTTERANCE: &str = "<end_of_utterance>";
const FILES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

/// Ids of the tokens that a configuration names.
pub(super) struct SpecialIds {
    pub(super) bos: u32,
    pub(super) eos: u32,
    pub(super) pad: u32,
}

/// A tokenizer that is to be written.
pub(super) struct NewTokenizer {
    directory: PathBuf,
    /// Ids of the text model's own tokens end here, and those of IDEFICS's begin.
    base: u32,
    /// IDEFICS's tokens.
    added: Vec<String>,
    /// Whether they are in the files already.
    complete: bool,
    special: SpecialIds,
}

impl NewTokenizer {
    pub(super) fn open(directory: &Path, wanted: AddedTokens) -> Result<Self, InitError> {
        let bound = id_bound_of(directory)?;
        match Tokenizer::from_pretrained(directory) {
            Ok(tokenizer) => Self::complete(directory, bound, &tokenizer, wanted),
            Err(TokenizerError::MissingToken(token)) if IMAGE_TOKENS.contains(&token.as_str()) => {
                Self::with_tokens(directory, bound, wanted)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn complete(
        directory: &Path,
        bound: u32,
        tokenizer: &Tokenizer,
        wanted: AddedTokens,
    ) -> Result<Self, InitError> {
        let special = tokenizer.special_tokens();
        let mut added = vec![special.fake_token_around_image.clone(), special.image.clone()];
        added.extend(special.end_of_utterance.clone());
        let base = added.iter().map(|token| token.id).min().expect("there are two at least");
        let problem = |problem: String| InitError::AddedTokens { path: directory.to_owned(), problem };
        if (bound - base) as usize != added.len() {
            let count = bound - base;
            return Err(problem(format!(
                "{count} ids from {base} on, but {} tokens of IDEFICS",
                added.len()
            )));
        }
        if wanted == AddedTokens::Instruct && special.end_of_utterance.is_none() {
            return Err(problem(format!("it has `<image>`, but no `{END_OF_UTTERANCE}` to go with it")));
        }
        added.sort_by_key(|token| token.id);
        Ok(Self {
            directory: directory.to_owned(),
            base,
            added: added.into_iter().map(|token| token.text).collect(),
            complete: true,
            special: SpecialIds { bos: special.bos.id, eos: special.eos.id, pad: special.pad.id },
        })
    }

    fn with_tokens(directory: &Path, base: u32, wanted: AddedTokens) -> Result<Self, InitError> {
        let mut added = IMAGE_TOKENS.map(str::to_owned).to_vec();
        if wanted == AddedTokens::Instruct {
            added.push(END_OF_UTTERANCE.to_owned());
        }
        // The files are tried in a place of their own: what is written later is what was found sound here.
        let trial = tempfile::tempdir().map_err(|source| WriteError::cannot_write(directory, source))?;
        let mut new = Self {
            directory: directory.to_owned(),
            base,
            added,
            complete: false,
            special: SpecialIds { bos: 0, eos: 0, pad: 0 },
        };
        for (name, bytes) in new.files()? {
            let path = trial.path().join(name);
            std::fs::write(&path, bytes).map_err(|source| WriteError::cannot_write(&path, source))?;
        }
        let tokenizer = Tokenizer::from_pretrained(trial.path())?;
        for (token, id) in new.added.iter().zip(base..) {
            if tokenizer.token_id(token) != Some(id) {
                let problem = format!("`{token}` has id {:?}, expected {id}", tokenizer.token_id(token));
                return Err(InitError::AddedTokens { path: directory.to_owned(), problem });
            }
        }
        let special = tokenizer.special_tokens();
        new.special = SpecialIds { bos: special.bos.id, eos: special.eos.id, pad: special.pad.id };
        Ok(new)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Number of the text model's own ids.
    pub(super) fn base_tokens(&self) -> usize {
        self.base as usize
    }

    /// Number of IDEFICS's tokens.
    pub(super) fn added_tokens(&self) -> usize {
        self.added.len()
    }

    pub(super) fn special_ids(&self) -> &SpecialIds {
        &self.special
    }

    pub(super) fn write(&self, writer: &CheckpointWriter) -> Result<(), InitError> {
        for (name, bytes) in self.files()? {
            writer.write_file(name, &bytes)?;
        }
        Ok(())
    }

    /// All files by name.
    fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, InitError> {
        let mut files = Vec::new();
        for name in FILES {
            let path = self.directory.join(name);
            let is_there = path.is_file();
            if self.complete || name == "tokenizer.model" {
                if is_there {
                    let bytes =
                        std::fs::read(&path).map_err(|source| WriteError::cannot_read(&path, source))?;
                    files.push((name, bytes));
                }
                continue;
            }
            if name == "tokenizer.json" && !is_there {
                continue;
            }
            let mut object: Map<String, Value> = if is_there { read_json(&path)? } else { Map::new() };
            match name {
                "tokenizer.json" => self.extend_tokenizer(&mut object),
                "tokenizer_config.json" => self.extend_config(&mut object),
                "special_tokens_map.json" => self.extend_special_tokens(&mut object),
                _ => object.extend(self.with_ids().map(|(token, id)| (token.to_owned(), json!(id)))),
            }
            files.push((name, format!("{:#}\n", Value::Object(object)).into_bytes()));
        }
        Ok(files)
    }

    fn with_ids(&self) -> impl Iterator<Item = (&str, u32)> {
        self.added.iter().map(String::as_str).zip(self.base..)
    }

    fn extend_tokenizer(&self, file: &mut Map<String, Value>) {
        let tokens = file.entry("added_tokens").or_insert_with(|| json!([]));
        if let Value::Array(tokens) = tokens {
            tokens.extend(self.with_ids().map(|(token, id)| {
                let mut entry = Map::from_iter([("id".to_owned(), json!(id))]);
                entry.extend(flags(token));
                Value::Object(entry)
            }));
        }
    }

    fn extend_config(&self, file: &mut Map<String, Value>) {
        // Before any other choice: transformers 5 tokenizes LLaMA's kind otherwise unless it is asked not to.
        let is_llama =
            file.get("tokenizer_class").and_then(Value::as_str).is_none_or(|c| c.starts_with("Llama"));
        if is_llama {
            file.insert("legacy".to_owned(), json!(true));
            file.entry("tokenizer_class").or_insert_with(|| json!("LlamaTokenizer"));
        }
        file.insert("padding_side".to_owned(), json!("left"));
        if let Some(Value::Object(tokens)) = file.get_mut("added_tokens_decoder") {
            tokens.extend(self.with_ids().map(|(token, id)| (id.to_string(), Value::Object(flags(token)))));
        }
        self.extend_special_tokens(file);
    }

    fn extend_special_tokens(&self, file: &mut Map<String, Value>) {
        if file.get("pad_token").is_none_or(Value::is_null) {
            // As in the published files: the token that stands for nothing.
            for other in ["unk_token", "eos_token"] {
                if let Some(token) = file.get(other).filter(|token| !token.is_null()).cloned() {
                    file.insert("pad_token".to_owned(), token);
                    break;
                }
            }
        }
        let listed = file.entry("additional_special_tokens").or_insert_with(|| json!([]));
        match listed {
            Value::Array(listed) => listed.extend(self.added.iter().map(|token| json!(token))),
            other => *other = json!(self.added),
        }
    }
}

/// A token as tokenizer files describe it: found in any text, nothing around it taken along.
fn flags(token: &str) -> Map<String, Value> {
    let value = json!({
        "content": token,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": true,
    });
    match value {
        Value::Object(flags) => flags,
        _ => unreachable!("it was written as an object"),
    }
}
