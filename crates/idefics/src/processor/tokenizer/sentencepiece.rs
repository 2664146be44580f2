//! SentencePiece `tokenizer.model` files, as far as a BPE tokenizer needs them.
//!
//! The file is one protobuf message (`sentencepiece_model.proto`, `ModelProto`): the pieces with score and type,
//! then the trainer's settings. SentencePiece merges by score; the BPE here merges by a list. The list follows
//! from the pieces as in transformers `convert_slow_tokenizer.py` (`generate_merges`, `LlamaConverter`).
//! Surprising: like that converter, this ignores the model's own text normalisation.

use std::collections::HashMap;

use tokenizers::{AddedToken, models::bpe::BPE};

/// More than any vocabulary has; a file that claims more is not read further.
const MAX_PIECES: usize = 1 << 20;
/// Pieces are words. Every split of a piece is looked at, so a long one would cost its square.
const MAX_PIECE_BYTES: usize = 1024;
/// `TrainerSpec.ModelType.BPE`.
const MODEL_TYPE_BPE: u64 = 2;

/// A vocabulary entry.
#[derive(Debug, Clone, PartialEq)]
struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

impl Piece {
    // `ModelProto.SentencePiece.Type`
    const NORMAL: u64 = 1;
    const UNKNOWN: u64 = 2;
    const CONTROL: u64 = 3;
    const USER_DEFINED: u64 = 4;
}

/// The content of a `tokenizer.model`.
#[derive(Debug)]
pub(super) struct SentencePieceModel {
    pieces: Vec<Piece>,
}

impl SentencePieceModel {
    /// Reads the file; the error says what is wrong with it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut model_type = None;
        let mut message = Message(bytes);
        while let Some((field, value)) = message.next_field()? {
            match (field, value) {
                (1, Value::Bytes(piece)) => {
                    if pieces.len() == MAX_PIECES {
                        return Err(format!("more than {MAX_PIECES} pieces"));
                    }
                    let index = pieces.len();
                    pieces.push(parse_piece(piece).map_err(|e| format!("piece {index}: {e}"))?);
                }
                (2, Value::Bytes(trainer)) => model_type = parse_model_type(trainer)?,
                _ => {}
            }
        }
        if pieces.is_empty() {
            return Err("not a SentencePiece model: no pieces".to_owned());
        }
        match model_type {
            Some(MODEL_TYPE_BPE) => Ok(Self { pieces }),
            other => Err(format!(
                "model type: expected {MODEL_TYPE_BPE} (BPE), got {}",
                // The field's default in the message definition is 1, unigram.
                other.unwrap_or(1)
            )),
        }
    }

    /// The model with its merges.
    pub(super) fn bpe(&self) -> Result<BPE, String> {
        let mut ids = HashMap::with_capacity(self.pieces.len());
        for (id, piece) in self.pieces.iter().enumerate() {
            if ids.insert(piece.text.as_str(), id as u32).is_some() {
                return Err(format!("piece {id}: `{}` occurs twice", piece.text));
            }
        }
        let unknown = self
            .pieces
            .iter()
            .find(|p| p.kind == Piece::UNKNOWN)
            .ok_or_else(|| "no piece stands for unknown text".to_owned())?;
        let merges = merges(&self.pieces, &ids);
        let vocabulary: ahash::AHashMap<String, u32> =
            ids.into_iter().map(|(text, id)| (text.to_owned(), id)).collect();
        BPE::builder()
            .vocab_and_merges(vocabulary, merges)
            .unk_token(unknown.text.clone())
            .fuse_unk(true)
            .byte_fallback(true)
            .build()
            .map_err(|e| e.to_string())
    }

    /// Tokens that are cut out of a text before anything else: control tokens, and what the trainer's user defined.
    pub(super) fn added_tokens(&self) -> Vec<AddedToken> {
        let added = |piece: &Piece| match piece.kind {
            Piece::UNKNOWN | Piece::CONTROL => Some(AddedToken::from(piece.text.clone(), true)),
            Piece::USER_DEFINED => Some(AddedToken::from(piece.text.clone(), false).normalized(false)),
            _ => None,
        };
        self.pieces.iter().filter_map(added).collect()
    }
}

/// All ways to put a piece together from two others, best piece first.
fn merges(pieces: &[Piece], ids: &HashMap<&str, u32>) -> Vec<(String, String)> {
    struct Merge<'a> {
        left: &'a str,
        right: &'a str,
        score: f32,
        lengths: (usize, usize),
    }
    let mut all = Vec::new();
    for piece in pieces {
        let length = piece.text.chars().count();
        let mut splits: Vec<_> = piece
            .text
            .char_indices()
            .enumerate()
            .skip(1)
            .filter_map(|(chars, (at, _))| {
                let (left, right) = piece.text.split_at(at);
                let order = (*ids.get(left)?, *ids.get(right)?);
                Some((order, Merge { left, right, score: piece.score, lengths: (chars, length - chars) }))
            })
            .collect();
        splits.sort_by_key(|(order, _)| *order);
        all.extend(splits.into_iter().map(|(_, merge)| merge));
    }
    // A stable sort: what is equal here stays in the order of the pieces.
    all.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
    all.into_iter().map(|m| (m.left.to_owned(), m.right.to_owned())).collect()
}

fn parse_piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Piece::NORMAL };
    let mut message = Message(bytes);
    while let Some((field, value)) = message.next_field()? {
        match (field, value) {
            (1, Value::Bytes(text)) => {
                let text = std::str::from_utf8(text).map_err(|_| "not valid UTF-8")?;
                text.clone_into(&mut piece.text);
            }
            (2, Value::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Value::Varint(kind)) => piece.kind = kind,
            _ => {}
        }
    }
    if piece.text.is_empty() {
        return Err("empty".to_owned());
    }
    if piece.text.len() > MAX_PIECE_BYTES {
        return Err(format!("longer than {MAX_PIECE_BYTES} bytes"));
    }
    if !piece.score.is_finite() {
        return Err(format!("score {} is not finite", piece.score));
    }
    Ok(piece)
}

/// `TrainerSpec.model_type`.
fn parse_model_type(bytes: &[u8]) -> Result<Option<u64>, String> {
    let mut model_type = None;
    let mut message = Message(bytes);
    while let Some((field, value)) = message.next_field()? {
        if let (3, Value::Varint(value)) = (field, value) {
            model_type = Some(value);
        }
    }
    Ok(model_type)
}

/// The rest of a protobuf message.
struct Message<'a>(&'a [u8]);

enum Value<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

impl<'a> Message<'a> {
    fn next_field(&mut self) -> Result<Option<(u64, Value<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed64)?,
            2 => {
                let length = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
                Value::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Value::Fixed32(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            wire => return Err(format!("not a protobuf message: wire type {wire}")),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("not a protobuf message: number of more than 64 bits".to_owned())
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or("truncated")?;
        self.0 = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model file of the pieces, of the given model type.
    fn model_file(pieces: &[(&str, f32, u8)], model_type: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (text, score, kind) in pieces {
            let mut piece = vec![0x0a, text.len() as u8];
            piece.extend(text.as_bytes());
            piece.push(0x15);
            piece.extend(score.to_le_bytes());
            piece.extend([0x18, *kind]);
            bytes.extend([0x0a, piece.len() as u8]);
            bytes.extend(piece);
        }
        bytes.extend([0x12, 2, 0x18, model_type]);
        bytes
    }

    const PIECES: &[(&str, f32, u8)] = &[
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("abc", -2.0, 1),
        ("ab", -1.0, 1),
        ("bc", -0.5, 1),
        ("a", -3.0, 1),
        ("b", -4.0, 1),
        ("c", -5.0, 1),
        ("<x>", 0.0, 4),
    ];

    #[test]
    fn merges_follow_the_scores() {
        let model = SentencePieceModel::parse(&model_file(PIECES, 2)).unwrap();
        let ids = model.pieces.iter().enumerate().map(|(id, p)| (p.text.as_str(), id as u32)).collect();
        let expected = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")];
        let expected = expected.map(|(l, r)| (l.to_owned(), r.to_owned()));
        assert_eq!(merges(&model.pieces, &ids), expected);
        let added: Vec<_> = model.added_tokens().into_iter().map(|t| (t.content, t.special)).collect();
        assert_eq!(added, [("<unk>".to_owned(), true), ("<s>".to_owned(), true), ("<x>".to_owned(), false)]);
        assert!(model.bpe().is_ok());
    }

    #[test]
    fn hostile_files_are_errors() {
        let error = |bytes: &[u8]| SentencePieceModel::parse(bytes).unwrap_err();
        assert_eq!(error(b""), "not a SentencePiece model: no pieces");
        assert_eq!(error(b"{\"model\": 1}"), "not a protobuf message: wire type 3");
        assert_eq!(error(&[0xff; 20]), "not a protobuf message: number of more than 64 bits");
        assert_eq!(error(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f]), "truncated");
        assert_eq!(error(&model_file(PIECES, 1)), "model type: expected 2 (BPE), got 1");
        assert_eq!(error(&model_file(&[("", 0.0, 1)], 2)), "piece 0: empty");
        assert_eq!(error(&model_file(&[("a", f32::NAN, 1)], 2)), "piece 0: score NaN is not finite");
        assert_eq!(error(&[0x0a, 3, 0x0a, 1, 0xff]), "piece 0: not valid UTF-8");

        let twice = SentencePieceModel::parse(&model_file(&[("a", 0.0, 1), ("a", 0.0, 1)], 2)).unwrap();
        assert_eq!(twice.bpe().unwrap_err(), "piece 1: `a` occurs twice");
        let no_unknown = SentencePieceModel::parse(&model_file(&[("a", 0.0, 1)], 2)).unwrap();
        assert_eq!(no_unknown.bpe().unwrap_err(), "no piece stands for unknown text");

        let whole = model_file(PIECES, 2);
        for length in 0..whole.len() {
            assert!(SentencePieceModel::parse(&whole[..length]).is_err(), "cut to {length} bytes");
        }
    }
}
