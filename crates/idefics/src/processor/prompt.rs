//! A prompt's segments to the one string that is tokenized.
//!
//! Reference: transformers `processing_idefics.py`, `IdeficsProcessor.__call__`. Deviation: a text that looks like
//! a URL stays text, where the reference fetches it.
//! Surprising: neighbouring images share the token between them (`F I F I F`), spaces at the ends of a text are
//! lost but newlines stay, and `<end_of_utterance>` goes only between two texts that follow each other directly.

use super::Segment;

/// Stands on both sides of every image token.
pub const FAKE_TOKEN_AROUND_IMAGE: &str = "<fake_token_around_image>";
/// Stands for a picture.
pub const IMAGE_TOKEN: &str = "<image>";
/// Ends a turn of a dialogue; only instruct checkpoints have it.
pub const END_OF_UTTERANCE: &str = "<end_of_utterance>";

/// A token with a meaning of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// How it is written.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// The special tokens of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Starts every prompt, `<s>`.
    pub bos: SpecialToken,
    /// Ends a document, `</s>`.
    pub eos: SpecialToken,
    /// Fills rows of a padded batch, `<unk>` in the published checkpoints.
    pub pad: SpecialToken,
    /// [`FAKE_TOKEN_AROUND_IMAGE`].
    pub fake_token_around_image: SpecialToken,
    /// [`IMAGE_TOKEN`].
    pub image: SpecialToken,
    /// [`END_OF_UTTERANCE`], if the vocabulary has it.
    pub end_of_utterance: Option<SpecialToken>,
}

/// When `<end_of_utterance>` is put between two texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AddEndOfUtterance {
    /// If the vocabulary has the token, so with instruct checkpoints.
    #[default]
    Auto,
    /// Always; an error if the vocabulary lacks it.
    Always,
    /// Never.
    Never,
}

/// The prompt's string. `end_of_utterance` goes between neighbouring texts, `eos` to the end.
pub(super) fn assemble(
    prompt: &[Segment],
    bos: &str,
    end_of_utterance: Option<&str>,
    eos: Option<&str>,
) -> String {
    let mut text = bos.to_owned();
    let mut previous: Option<&Segment> = None;
    for segment in prompt {
        let last_was_image = matches!(previous, Some(Segment::Image(_)));
        match segment {
            Segment::Image(_) => {
                if !last_was_image {
                    text += FAKE_TOKEN_AROUND_IMAGE;
                }
                text += IMAGE_TOKEN;
                text += FAKE_TOKEN_AROUND_IMAGE;
            }
            Segment::Text(words) => {
                if matches!(previous, Some(Segment::Text(_))) {
                    text += end_of_utterance.unwrap_or_default();
                }
                text += words.trim_matches(' ');
            }
        }
        previous = Some(segment);
    }
    text + eos.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::processor::ImageSource;

    /// `@` is an image, everything else a text; in the result F, I and E are the tokens.
    fn check(items: &[&str], end_of_utterance: bool, eos: bool, expected: &str) {
        let prompt: Vec<Segment> = items
            .iter()
            .map(|&item| match item {
                "@" => Segment::Image(ImageSource::Bytes(Arc::from([]))),
                text => Segment::text(text),
            })
            .collect();
        let got =
            assemble(&prompt, "<s>", end_of_utterance.then_some(END_OF_UTTERANCE), eos.then_some("</s>"));
        let short = got
            .replace(FAKE_TOKEN_AROUND_IMAGE, "F")
            .replace(IMAGE_TOKEN, "I")
            .replace(END_OF_UTTERANCE, "E");
        assert_eq!(short, expected, "{items:?}");
    }

    #[test]
    fn prompts_are_assembled_as_in_the_reference() {
        check(&[], true, false, "<s>");
        check(&["User:", "@", "Describe.\n"], true, false, "<s>User:FIFDescribe.\n");
        check(&["@", "@"], true, false, "<s>FIFIF");
        check(&["@", "@", "@", "Question:"], true, false, "<s>FIFIFIFQuestion:");
        check(&["a", "b", "@", "c", "@", "d", "e"], true, false, "<s>aEbFIFcFIFdEe");
        check(&["a", "b"], false, false, "<s>ab");
        check(&["a", "b"], false, true, "<s>ab</s>");
        check(&["  a b  ", " \n c\n "], false, false, "<s>a b\n c\n");
        check(&["", "", "@", ""], true, false, "<s>EFIF");
    }

    #[test]
    fn text_that_looks_like_an_address_stays_text() {
        check(&["http://a.b/c.jpg", "https://x"], false, false, "<s>http://a.b/c.jpghttps://x");
    }
}
