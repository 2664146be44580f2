//! The tokenizer of a checkpoint: `tokenizer.json`, or `tokenizer.model` where the former is missing.
//!
//! Reference: transformers' LLaMA tokenizers in their *legacy* form, the one all published IDEFICS results use:
//! special tokens are cut out of the text first, then every remaining piece that is not empty gets a `▁` in front
//! and `▁` for each space. So a text after a special token starts with a `▁` as well, and `"\n"` after
//! `<end_of_utterance>` becomes `▁` and a newline.
//! Surprising: what the files say about this differs between versions (`Metaspace` with "first" or "always",
//! `Prepend`, flags on the special tokens), and taken at their word some of them give other ids. A tokenizer that
//! is recognised as LLaMA's kind (BPE with byte fallback and a `▁`) is therefore always put into the legacy form;
//! any other is used as its file says.

mod detokenize;
mod files;
mod sentencepiece;

use std::{ops::Range, path::Path};

pub use detokenize::DecodeStream;

use super::{
    error::TokenizerError,
    prompt::{END_OF_UTTERANCE, FAKE_TOKEN_AROUND_IMAGE, IMAGE_TOKEN, SpecialToken, SpecialTokens},
};
use crate::files::ModelFiles;
use files::Loaded;

/// What becomes of special tokens when ids are turned into text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SpecialTokenText {
    /// They are left out.
    #[default]
    Skip,
    /// They are written as they are called, like `<s>`.
    Keep,
}

/// One more than the largest id of the tokenizer in a directory, which may belong to any model: nothing is expected
/// of its tokens.
pub fn id_bound_of(dir: &Path) -> Result<u32, TokenizerError> {
    Ok(id_bound(&files::load(&dir.into())?.tokenizer))
}

fn id_bound(tokenizer: &tokenizers::Tokenizer) -> u32 {
    tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id.saturating_add(1))
}

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    legacy_llama: bool,
    special_tokens: SpecialTokens,
    id_bound: u32,
}

impl Tokenizer {
    /// Loads the tokenizer of a model in a directory or in memory. `added_tokens.json`, `tokenizer_config.json` and
    /// `special_tokens_map.json` are heeded where they exist, and have to agree with the vocabulary.
    pub fn from_pretrained(files: impl Into<ModelFiles>) -> Result<Self, TokenizerError> {
        let Loaded { tokenizer: inner, legacy_llama, names } = files::load(&files.into())?;
        let find = |text: &str| inner.token_to_id(text).map(|id| SpecialToken { text: text.to_owned(), id });
        let need = |text: &str| find(text).ok_or_else(|| TokenizerError::MissingToken(text.to_owned()));
        let bos = need(names.bos.as_deref().unwrap_or("<s>"))?;
        let eos = need(names.eos.as_deref().unwrap_or("</s>"))?;
        let pad = match names.pad.or(names.unk) {
            Some(text) => need(&text)?,
            None => find("<unk>").unwrap_or_else(|| eos.clone()),
        };
        let special_tokens = SpecialTokens {
            bos,
            eos,
            pad,
            fake_token_around_image: need(FAKE_TOKEN_AROUND_IMAGE)?,
            image: need(IMAGE_TOKEN)?,
            end_of_utterance: find(END_OF_UTTERANCE),
        };
        let id_bound = id_bound(&inner);
        Ok(Self { inner, legacy_llama, special_tokens, id_bound })
    }

    /// The tokens that have a meaning of their own.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    /// Whether this is a tokenizer of LLaMA's kind, which is used in the legacy form whatever its file says.
    pub fn is_legacy_llama(&self) -> bool {
        self.legacy_llama
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// One more than the largest id: the rows that the model's embedding must have at least.
    pub fn id_bound(&self) -> u32 {
        self.id_bound
    }

    /// The id of a token.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The ids of a text. Nothing is put in front or behind: `<s>` counts if the text says so.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text as [`encode`](Self::encode) gives them, and which of its bytes each stands for.
    pub fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), TokenizerError> {
        let encoding = self.inner.encode(text, false).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }

    /// The text of the ids. Ids beyond the vocabulary have none.
    pub fn decode(&self, ids: &[u32], special: SpecialTokenText) -> Result<String, TokenizerError> {
        let skip = special == SpecialTokenText::Skip;
        self.inner.decode(ids, skip).map_err(|e| TokenizerError::Decode(e.to_string()))
    }

    /// The ids of a text and where each stands in it, in characters. A token that stands for nothing of the text,
    /// such as the `▁` in front, stands at an empty place.
    pub fn encode_with_places(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, TokenizerError> {
        let encoding =
            self.inner.encode_char_offsets(text, false).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        let places = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(places).collect())
    }

    /// What a token stands for in the midst of a text: its spaces are spaces, and a byte token is its byte, which
    /// may be a part of a character. Special tokens are spelled; ids beyond the vocabulary stand for nothing.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.visible_token(id, SpecialTokenText::Keep) else { return Vec::new() };
        if !self.legacy_llama {
            return token.into_bytes();
        }
        detokenize::byte_of(&token).map_or_else(|| token.replace('▁', " ").into_bytes(), |byte| vec![byte])
    }

    /// Whether a token is a special one.
    pub fn is_special_token(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        added.simple_id_to_token(id).is_some_and(|token| added.is_special_token(&token))
    }

    /// The token as the decoder sees it, or nothing if it has no text.
    fn visible_token(&self, id: u32, special: SpecialTokenText) -> Option<String> {
        let added = self.inner.get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| self.inner.id_to_token(id))?;
        (special == SpecialTokenText::Keep || !added.is_special_token(&token)).then_some(token)
    }
}

#[cfg(test)]
mod tests;
