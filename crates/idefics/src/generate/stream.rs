//! Tokens to text, one at a time.
//!
//! A character may span several byte tokens, and whether a token begins with a space depends on the one before
//! it. So each new piece is the difference of two decodings of the latest tokens, the first without the new
//! ones; it is held back while it ends inside a character. The same idea serves in text-generation-inference
//! (`decode_token`). Where stop strings are trimmed, text that may turn out to be the start of one is held back
//! as well.

use super::{
    GenerationConfig,
    stopping::{StopMatch, StopStrings},
};
use crate::processor::{Processor, SpecialTokenText, Tokenizer};

/// Turns token ids into text.
pub trait Decode {
    /// The text of a whole sequence of tokens, special ones left out or spelled.
    fn decode(&self, token_ids: &[u32], skip_special: bool) -> String;

    /// Whether a token is one of those that `skip_special` leaves out.
    fn is_special(&self, token_id: u32) -> bool {
        self.decode(&[token_id], true).is_empty() && !self.decode(&[token_id], false).is_empty()
    }
}

impl Decode for Tokenizer {
    fn decode(&self, token_ids: &[u32], skip_special: bool) -> String {
        let special = if skip_special { SpecialTokenText::Skip } else { SpecialTokenText::Keep };
        // No decoder of the published tokenizers fails on ids; one that does shows it in the text.
        self.decode(token_ids, special).unwrap_or_else(|_| char::REPLACEMENT_CHARACTER.to_string())
    }

    fn is_special(&self, token_id: u32) -> bool {
        // Asked for every token of every prompt; decoding each would cost more than the sampling.
        self.is_special_token(token_id)
    }
}

impl Decode for Processor {
    fn decode(&self, token_ids: &[u32], skip_special: bool) -> String {
        Decode::decode(self.tokenizer().as_ref(), token_ids, skip_special)
    }

    fn is_special(&self, token_id: u32) -> bool {
        self.tokenizer().is_special_token(token_id)
    }
}

/// The text of one sequence as it grows.
pub(crate) struct TextStream<'a> {
    decoder: &'a dyn Decode,
    skip_special: bool,
    trim: bool,
    stops: StopStrings,
    /// Ordinary tokens, those of the prompt included, which give the first piece its context.
    token_ids: Vec<u32>,
    /// Start of the tokens that are decoded together with the next ones.
    context: usize,
    /// End of the tokens whose text is out.
    read: usize,
    /// The text with special tokens spelled, where stop strings are looked for; begins with an end of the prompt.
    raw: String,
    /// The text of the answer as it is returned.
    visible: String,
    pieces: Vec<Piece>,
    /// Bytes of `visible` that were handed out.
    emitted: usize,
}

/// Where a piece of text ends in either form.
struct Piece {
    raw_end: usize,
    visible_end: usize,
}

/// What a token added.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NewText {
    pub(crate) text: String,
    /// Index of the stop string that is now complete.
    pub(crate) stop: Option<usize>,
}

impl<'a> TextStream<'a> {
    pub(crate) fn new(decoder: &'a dyn Decode, config: &GenerationConfig, prompt: &[u32]) -> Self {
        let stops = StopStrings::new(&config.stop_strings);
        let mut raw = String::new();
        if !stops.is_empty() {
            let text = decoder.decode(prompt, false);
            raw.push_str(&text[text.floor_char_boundary(text.len().saturating_sub(stops.max_len()))..]);
        }
        let token_ids: Vec<u32> = prompt.iter().copied().filter(|&id| !decoder.is_special(id)).collect();
        let start = Piece { raw_end: raw.len(), visible_end: 0 };
        Self {
            decoder,
            skip_special: config.skip_special_tokens,
            trim: config.trim_stop_strings,
            stops,
            context: 0,
            read: token_ids.len(),
            token_ids,
            raw,
            visible: String::new(),
            pieces: vec![start],
            emitted: 0,
        }
    }

    /// Takes a token and returns the text that is certain by now.
    pub(crate) fn push(&mut self, token_id: u32) -> NewText {
        let searched = self.raw.len();
        if self.decoder.is_special(token_id) {
            self.decode_pending(Pending::Flush);
            let text = self.decoder.decode(&[token_id], false);
            let visible = if self.skip_special { "" } else { &text };
            self.append(&text, visible);
        } else {
            self.token_ids.push(token_id);
            self.decode_pending(Pending::WholeCharacters);
        }
        let stop = self.stops.find(&self.raw, searched);
        let end = match stop {
            Some(StopMatch { start, .. }) if self.trim => {
                self.visible.truncate(self.visible_at(start));
                self.visible.len()
            }
            None if self.trim => self.visible_at(self.raw.len() - self.stops.possible_start(&self.raw)),
            _ => self.visible.len(),
        };
        NewText { text: self.emit(end), stop: stop.map(|found| found.index) }
    }

    /// What was still held back. Nothing, where a stop string ended the text.
    pub(crate) fn finish(&mut self, reason: super::FinishReason) -> String {
        if !matches!(reason, super::FinishReason::StopString(_)) {
            self.decode_pending(Pending::Flush);
        }
        self.emit(self.visible.len())
    }

    /// The whole answer.
    pub(crate) fn into_text(self) -> String {
        self.visible
    }

    fn decode_pending(&mut self, pending: Pending) {
        if self.read == self.token_ids.len() {
            return;
        }
        let before = self.decoder.decode(&self.token_ids[self.context..self.read], true);
        let with_new = self.decoder.decode(&self.token_ids[self.context..], true);
        let new = match with_new.strip_prefix(&before) {
            Some(new) => new.to_owned(),
            // A cut character spoils the decoding of whole ones before it, since a run of byte tokens is decoded
            // as one.
            None => self.decoder.decode(&self.token_ids[self.read..], true),
        };
        let is_cut = new.ends_with(char::REPLACEMENT_CHARACTER) || !with_new.starts_with(&before);
        if new.is_empty() || (is_cut && pending == Pending::WholeCharacters) {
            return;
        }
        self.context = self.read;
        self.read = self.token_ids.len();
        self.append(&new, &new);
    }

    fn append(&mut self, raw: &str, visible: &str) {
        self.raw.push_str(raw);
        self.visible.push_str(visible);
        self.pieces.push(Piece { raw_end: self.raw.len(), visible_end: self.visible.len() });
    }

    /// The place in the visible text of a place in the raw one.
    fn visible_at(&self, raw: usize) -> usize {
        let next = self.pieces.partition_point(|piece| piece.raw_end <= raw);
        let Some(before) = next.checked_sub(1).map(|index| &self.pieces[index]) else { return 0 };
        let Some(piece) = self.pieces.get(next) else { return self.visible.len() };
        let is_same = piece.raw_end - before.raw_end == piece.visible_end - before.visible_end;
        before.visible_end + if is_same { raw - before.raw_end } else { 0 }
    }

    fn emit(&mut self, end: usize) -> String {
        let start = self.emitted.min(end);
        self.emitted = self.emitted.max(end);
        self.visible[start..end].to_owned()
    }
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Pending {
    /// Leave a cut character for later.
    WholeCharacters,
    /// Nothing more will come.
    Flush,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{
        FinishReason,
        stub::{ByteTokenizer, END_OF_UTTERANCE},
    };

    /// Streams `answer` behind `prompt`, one byte a token, `|` being a special token; returns the pieces and the
    /// stop string that was met.
    fn stream(
        prompt: &str,
        answer: &[u8],
        config: &GenerationConfig,
    ) -> (Vec<String>, Option<usize>, String) {
        let prompt: Vec<u32> = prompt.bytes().map(u32::from).collect();
        let mut stream = TextStream::new(&ByteTokenizer, config, &prompt);
        let mut pieces = Vec::new();
        let mut reason = FinishReason::Length;
        for &byte in answer {
            let token_id = if byte == b'|' { END_OF_UTTERANCE } else { u32::from(byte) };
            let new = stream.push(token_id);
            pieces.push(new.text);
            if let Some(index) = new.stop {
                reason = FinishReason::StopString(index);
                break;
            }
        }
        pieces.push(stream.finish(reason));
        let text = stream.into_text();
        assert_eq!(pieces.concat(), text, "the pieces are the text");
        let stop = if let FinishReason::StopString(index) = reason { Some(index) } else { None };
        (pieces, stop, text)
    }

    fn with_stops(stops: &[&str], trim_stop_strings: bool) -> GenerationConfig {
        let stop_strings = stops.iter().map(ToString::to_string).collect();
        GenerationConfig { stop_strings, trim_stop_strings, ..Default::default() }
    }

    #[test]
    fn characters_are_never_split() {
        let (pieces, _, text) = stream("", "aé€😀".as_bytes(), &GenerationConfig::default());
        assert_eq!(text, "aé€😀");
        assert_eq!(pieces, ["a", "", "é", "", "", "€", "", "", "", "😀", ""]);
    }

    #[test]
    fn cut_and_invalid_bytes_become_replacement_characters_in_the_end() {
        let (pieces, _, text) = stream("", b"ok\xe2\x82", &GenerationConfig::default());
        assert_eq!(pieces[..4], ["o", "k", "", ""]);
        assert_eq!(text, "ok\u{fffd}\u{fffd}");
        let (_, _, text) = stream("", b"\xffab", &GenerationConfig::default());
        assert_eq!(text, "\u{fffd}ab");
        // The run of bytes after a whole character is cut: what was out stays, the rest is replaced.
        let (_, _, text) = stream(
            "",
            "é".bytes().chain([0xe2]).collect::<Vec<_>>().as_slice(),
            &GenerationConfig::default(),
        );
        assert_eq!(text, "é\u{fffd}");
    }

    #[test]
    fn leading_space_depends_on_the_prompt() {
        // The stub drops one leading space of a whole text, as the tokenizer of LLaMA does.
        assert_eq!(stream("Assistant:", b" Two", &GenerationConfig::default()).2, " Two");
        assert_eq!(stream("", b" Two", &GenerationConfig::default()).2, "Two");
    }

    #[test]
    fn special_tokens_are_skipped_or_spelled() {
        assert_eq!(stream("p", b"yes|no", &GenerationConfig::default()).2, "yesno");
        let config = GenerationConfig { skip_special_tokens: false, ..Default::default() };
        assert_eq!(stream("p", b"yes|no", &config).2, "yes<end_of_utterance>no");
    }

    #[test]
    fn stop_strings_end_the_text() {
        // (stops, trim, prompt, answer) -> (text, index)
        let rows = [
            (&["\nUser:"][..], true, "p", "hi\nUser: x", "hi", Some(0)),
            (&["\nUser:"], false, "p", "hi\nUser: x", "hi\nUser:", Some(0)),
            (&["\nUser:"], true, "p", "hi\nUsed", "hi\nUsed", None),
            (&["xyz", "lo"], true, "p", "hello", "hel", Some(1)),
            // Begun in the prompt: there is nothing to trim before it.
            (&[":\n"], true, "Answer:", "\nhi", "", Some(0)),
            // A special token has a spelling to match, though it is not in the text.
            (&["<end_of_utterance>"], true, "p", "hi|no", "hi", Some(0)),
            (&["i<end_of_utterance>"], true, "p", "hi|no", "h", Some(0)),
            (&["é"], true, "p", "café!", "caf", Some(0)),
        ];
        for (stops, trim, prompt, answer, expected, index) in rows {
            let (_, stop, text) = stream(prompt, answer.as_bytes(), &with_stops(stops, trim));
            assert_eq!((text.as_str(), stop), (expected, index), "{stops:?} trim {trim} in {answer:?}");
        }
    }

    #[test]
    fn possible_stop_string_is_held_back_only_where_it_is_trimmed() {
        let (pieces, _, _) = stream("p", b"a\nUs!", &with_stops(&["\nUser:"], true));
        assert_eq!(pieces, ["a", "", "", "", "\nUs!", ""]);
        let (pieces, _, _) = stream("p", b"a\nUs!", &with_stops(&["\nUser:"], false));
        assert_eq!(pieces, ["a", "\n", "U", "s", "!", ""]);
        let (pieces, _, text) = stream("p", b"a\nUs", &with_stops(&["\nUser:"], true));
        assert_eq!((pieces[4].as_str(), text.as_str()), ("\nUs", "a\nUs"), "the end frees what was held");
    }
}
