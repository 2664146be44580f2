//! Token ids to text, one at a time.
//!
//! What a stream hands out, put together, is what decoding all ids at once gives. Two things stand in the way:
//! a character may be spread over several tokens, and the decoder of LLaMA tokenizers drops one leading space of
//! the whole text. Surprising: in a run of byte tokens one bad byte turns the *whole run* into replacement
//! characters (`tokenizers` `ByteFallback`), so a run is held back until a token of another kind ends it.

use std::sync::Arc;

use super::{SpecialTokenText, Tokenizer};
use crate::processor::error::TokenizerError;

/// Text that comes out token by token and never splits a character.
#[derive(Debug)]
pub struct DecodeStream {
    tokenizer: Arc<Tokenizer>,
    special: SpecialTokenText,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The decoder of [`Tokenizer::is_legacy_llama`] tokenizers, known step by step.
    Llama {
        /// Bytes of the byte tokens since the last other token.
        bytes: Vec<u8>,
        /// Whether no text has come out yet: a space that starts the text is dropped.
        at_start: bool,
    },
    /// Any other decoder, asked again for the last few tokens at each step.
    Other {
        ids: Vec<u32>,
        /// Where the window starts that is decoded.
        from: usize,
        /// The ids before this one have been handed out.
        until: usize,
    },
}

impl DecodeStream {
    /// A stream at the start of a text.
    pub fn new(tokenizer: Arc<Tokenizer>, special: SpecialTokenText) -> Self {
        let state = if tokenizer.is_legacy_llama() {
            State::Llama { bytes: Vec::new(), at_start: true }
        } else {
            State::Other { ids: Vec::new(), from: 0, until: 0 }
        };
        Self { tokenizer, special, state }
    }

    /// A stream that goes on after `prompt`, whose text has been handed out already.
    pub fn after(
        tokenizer: Arc<Tokenizer>,
        special: SpecialTokenText,
        prompt: &[u32],
    ) -> Result<Self, TokenizerError> {
        let mut stream = Self::new(tokenizer, special);
        for &id in prompt {
            stream.push(id)?;
        }
        Ok(stream)
    }

    /// Takes the next token and gives the text that is certain by now, often none.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        match &mut self.state {
            State::Llama { bytes, at_start } => {
                let Some(token) = self.tokenizer.visible_token(id, self.special) else {
                    return Ok(String::new());
                };
                if let Some(byte) = byte_of(&token) {
                    bytes.push(byte);
                    return Ok(String::new());
                }
                let text = take_bytes(bytes) + &token.replace('▁', " ");
                Ok(without_leading_space(text, at_start))
            }
            State::Other { ids, from, until } => {
                ids.push(id);
                let known = self.tokenizer.decode(&ids[*from..*until], self.special)?;
                let text = self.tokenizer.decode(&ids[*from..], self.special)?;
                // A replacement character at the end may yet become a character.
                let Some(new) =
                    text.strip_prefix(&known).filter(|t| !t.is_empty() && !t.ends_with('\u{fffd}'))
                else {
                    return Ok(String::new());
                };
                let new = new.to_owned();
                (*from, *until) = (*until, ids.len());
                Ok(new)
            }
        }
    }

    /// Ends the stream and gives the text that was held back.
    pub fn finish(mut self) -> Result<String, TokenizerError> {
        match &mut self.state {
            State::Llama { bytes, at_start } => Ok(without_leading_space(take_bytes(bytes), at_start)),
            State::Other { ids, from, until } => {
                let known = self.tokenizer.decode(&ids[*from..*until], self.special)?;
                let text = self.tokenizer.decode(&ids[*from..], self.special)?;
                Ok(text.strip_prefix(&known).unwrap_or_default().to_owned())
            }
        }
    }
}

fn without_leading_space(text: String, at_start: &mut bool) -> String {
    if text.is_empty() || !std::mem::take(at_start) {
        return text;
    }
    text.strip_prefix(' ').map(str::to_owned).unwrap_or(text)
}

/// The byte that a token like `<0x0A>` stands for.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

fn take_bytes(bytes: &mut Vec<u8>) -> String {
    let count = bytes.len();
    String::from_utf8(std::mem::take(bytes)).unwrap_or_else(|_| "\u{fffd}".repeat(count))
}
