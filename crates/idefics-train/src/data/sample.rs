//! One sample, as a source gives it: texts and pictures in their order.

use idefics::processor::ImageSource;

/// Interleaved texts and pictures that are learned from together.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sample {
    /// In reading order.
    pub pieces: Vec<Piece>,
    /// Whether it may be cut.
    pub kind: SampleKind,
}

/// What may be done with a sample that is longer than a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SampleKind {
    /// It belongs together: a picture and its caption, a question and its answer. It is never cut.
    #[default]
    Pair,
    /// It is cut into windows.
    Document,
}

/// A part of a sample.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    /// Words. Neighbouring texts are one text.
    Text {
        /// As they are.
        text: String,
        /// What they are to a reader.
        role: Role,
    },
    /// A picture.
    Image(ImageSource),
}

/// Whether a text is given or to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Part of the question.
    Context,
    /// What the model should answer.
    Answer,
}

impl Piece {
    /// A text that is given.
    pub fn context(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), role: Role::Context }
    }

    /// A text that is to be written.
    pub fn answer(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), role: Role::Answer }
    }
}

/// Why a sample is skipped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct SampleError {
    /// File and line, or file and name.
    pub place: String,
    /// What is wrong, in one line.
    pub reason: String,
}
