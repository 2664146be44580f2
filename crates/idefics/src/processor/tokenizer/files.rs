//! The files a tokenizer is spread over.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

use super::sentencepiece::SentencePieceModel;
use crate::{
    files::{ModelFiles, ReadError},
    processor::error::TokenizerError,
};

/// Larger than any tokenizer file.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// SentencePiece's stand-in for a space.
const META_SPACE: &str = "▁";

/// A tokenizer and what the other files say about it.
pub(super) struct Loaded {
    pub(super) tokenizer: Tokenizer,
    pub(super) legacy_llama: bool,
    pub(super) names: SpecialNames,
}

/// Which tokens play the usual parts, where a file says so.
#[derive(Default)]
pub(super) struct SpecialNames {
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    pub(super) unk: Option<String>,
    pub(super) pad: Option<String>,
}

pub(super) fn load(files: &ModelFiles) -> Result<Loaded, TokenizerError> {
    let config: TokenizerConfig = read_json(files, "tokenizer_config.json")?.unwrap_or_default();
    let map: TokenizerConfig = read_json(files, "special_tokens_map.json")?.unwrap_or_default();
    let added: BTreeMap<String, u64> = read_json(files, "added_tokens.json")?.unwrap_or_default();

    let malformed = |name| move |reason| TokenizerError::Malformed { path: files.path(name), reason };
    let (mut tokenizer, legacy_llama) = if let Some(file) = read_json(files, "tokenizer.json")? {
        from_json(file).map_err(malformed("tokenizer.json"))?
    } else {
        let bytes = read(files, "tokenizer.model")?
            .ok_or_else(|| TokenizerError::Missing(files.name().to_owned()))?;
        (from_sentencepiece(&bytes).map_err(malformed("tokenizer.model"))?, true)
    };

    let mut listed: Vec<Listed> = Vec::new();
    for (id, token) in config.added_tokens_decoder {
        let id = id.parse().map_err(|_| TokenizerError::Malformed {
            path: files.path("tokenizer_config.json"),
            reason: format!("added_tokens_decoder: expected a number as key, got `{id}`"),
        })?;
        listed.push(Listed { token: token.into_added_token(), id, file: "tokenizer_config.json" });
    }
    for (text, id) in added {
        listed.push(Listed { token: AddedToken::from(text, true), id, file: "added_tokens.json" });
    }
    add_listed(&mut tokenizer, listed)?;

    let names = SpecialNames {
        bos: map.bos_token.or(config.bos_token).map(TokenName::text),
        eos: map.eos_token.or(config.eos_token).map(TokenName::text),
        unk: map.unk_token.or(config.unk_token).map(TokenName::text),
        pad: map.pad_token.or(config.pad_token).map(TokenName::text),
    };
    Ok(Loaded { tokenizer, legacy_llama, names })
}

/// A token with the id that a file beside the vocabulary gives it.
struct Listed {
    token: AddedToken,
    id: u64,
    file: &'static str,
}

/// Adds the listed tokens that the tokenizer lacks, and checks the ids of all.
fn add_listed(tokenizer: &mut Tokenizer, mut listed: Vec<Listed>) -> Result<(), TokenizerError> {
    listed.sort_by_key(|l| l.id);
    for Listed { token, id, file } in listed {
        let text = token.content.clone();
        if tokenizer.token_to_id(&text).is_none() {
            tokenizer.add_tokens([token]).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        }
        let got = tokenizer.token_to_id(&text).ok_or_else(|| TokenizerError::MissingToken(text.clone()))?;
        if u64::from(got) != id {
            return Err(TokenizerError::IdMismatch { token: text, file, expected: id, got });
        }
    }
    Ok(())
}

/// A `tokenizer.json`, in the legacy form if it is of LLaMA's kind.
fn from_json(mut file: Value) -> Result<(Tokenizer, bool), String> {
    if !file.is_object() || !file["model"].is_object() {
        return Err("expected an object with a `model`".to_owned());
    }
    let legacy_llama = is_llama(&file["model"]);
    // Padding and cutting are the processor's work; dropout would make ids random.
    file["truncation"] = Value::Null;
    file["padding"] = Value::Null;
    if file["model"].get("dropout").is_some() {
        file["model"]["dropout"] = Value::Null;
    }
    if legacy_llama {
        file["normalizer"] = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": META_SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE},
        ]});
        file["pre_tokenizer"] = Value::Null;
        file["post_processor"] = Value::Null;
        file["decoder"] = legacy_decoder();
        // A normalised special token would only be found after the `▁` was put in front of the text.
        for token in file["added_tokens"].as_array_mut().into_iter().flatten() {
            if token.is_object() {
                token["normalized"] = Value::Bool(false);
            }
        }
    }
    let bytes = serde_json::to_vec(&file).map_err(|e| e.to_string())?;
    // The library is not written for hostile files; a panic inside it is no reason to stop the program.
    let tokenizer = catch_unwind(AssertUnwindSafe(|| Tokenizer::from_bytes(&bytes)))
        .map_err(|_| "not a usable tokenizer".to_owned())?
        .map_err(|e| e.to_string())?;
    Ok((tokenizer, legacy_llama))
}

fn is_llama(model: &Value) -> bool {
    let vocabulary = &model["vocab"];
    model.get("type").and_then(Value::as_str).is_none_or(|t| t == "BPE")
        && model["byte_fallback"] == Value::Bool(true)
        && vocabulary.get(META_SPACE).is_some()
        && vocabulary.get("<0x0A>").is_some()
}

/// `▁` to space, byte tokens to characters, one leading space dropped.
fn legacy_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": META_SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]})
}

fn from_sentencepiece(bytes: &[u8]) -> Result<Tokenizer, String> {
    use tokenizers::{
        DecoderWrapper, NormalizerWrapper,
        normalizers::{Prepend, Replace, Sequence},
    };
    let model = SentencePieceModel::parse(bytes)?;
    let mut tokenizer = Tokenizer::new(model.bpe()?);
    let to_meta_space = Replace::new(" ", META_SPACE).map_err(|e| e.to_string())?;
    let normalizer: NormalizerWrapper =
        Sequence::new(vec![Prepend::new(META_SPACE.to_owned()).into(), to_meta_space.into()]).into();
    let decoder: DecoderWrapper = serde_json::from_value(legacy_decoder()).map_err(|e| e.to_string())?;
    tokenizer.with_normalizer(Some(normalizer)).map_err(|e| e.to_string())?;
    tokenizer.with_decoder(Some(decoder));
    tokenizer.add_tokens(model.added_tokens()).map_err(|e| e.to_string())?;
    Ok(tokenizer)
}

/// What is read of `tokenizer_config.json`, and of `special_tokens_map.json`, which has some of the same keys.
#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenizerConfig {
    added_tokens_decoder: BTreeMap<String, AddedTokenEntry>,
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    unk_token: Option<TokenName>,
    pad_token: Option<TokenName>,
}

/// A token's text, alone or with its flags.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Token { content: String },
}

impl TokenName {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

/// A token of `added_tokens_decoder`.
#[derive(Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "the flags of the file")]
struct AddedTokenEntry {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    special: bool,
}

impl AddedTokenEntry {
    fn into_added_token(self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .single_word(self.single_word)
            .normalized(false)
    }
}

/// The file as JSON, or nothing if there is none.
fn read_json<T: DeserializeOwned>(files: &ModelFiles, name: &str) -> Result<Option<T>, TokenizerError> {
    let malformed =
        |e: serde_json::Error| TokenizerError::Malformed { path: files.path(name), reason: e.to_string() };
    read(files, name)?.map(|bytes| serde_json::from_slice(&bytes).map_err(malformed)).transpose()
}

/// The file's bytes, or nothing if there is none.
fn read(files: &ModelFiles, name: &str) -> Result<Option<Cow<'static, [u8]>>, TokenizerError> {
    let path = || files.path(name);
    match files.read(name, MAX_FILE_BYTES) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.is_missing() => Ok(None),
        Err(ReadError::Io(source)) => Err(TokenizerError::Read { path: path(), source }),
        Err(ReadError::NotAFile) => {
            Err(TokenizerError::Malformed { path: path(), reason: "not a regular file".to_owned() })
        }
        Err(ReadError::TooLarge) => Err(TokenizerError::Malformed {
            path: path(),
            reason: format!("larger than {MAX_FILE_BYTES} bytes"),
        }),
    }
}
