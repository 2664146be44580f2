//! What generation needs of a model, so that its policies can be tested on a stub.

use crate::SequenceInputs;

/// Which positions of a row to turn into logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsOf {
    /// None: a chunk of a prompt that is not its last.
    Nothing,
    /// The last token only.
    Last,
    /// Every token of the row.
    All,
}

/// The tokens that one sequence feeds in one step. They continue what its cache already holds.
pub struct Row<'a, C> {
    /// What is remembered of the sequence; grows by the tokens of this row.
    pub cache: &'a mut C,
    /// Token ids `[T]`.
    pub token_ids: &'a [u32],
    /// The picture each token sees: `[T]`.
    pub image_index: &'a [Option<u32>],
    /// Which logits to return.
    pub logits: LogitsOf,
}

/// A model that reads sequences step by step. Rows of one step share nothing: a row's result is the same in
/// any batch.
pub trait StepModel {
    /// Everything remembered of one sequence: keys, values, image states. A clone is another beam.
    type Cache: Clone;
    /// Why a step can fail.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Number of logits per position, additional vocabulary included.
    fn vocab_size(&self) -> usize;

    /// Longest sequence in tokens, prompt and answer together.
    fn max_positions(&self) -> usize;

    /// Reads the pictures of a sequence and returns its empty cache.
    fn start(&self, inputs: &SequenceInputs) -> Result<Self::Cache, Self::Error>;

    /// Feeds all rows; returns for each row its logits `[n, vocab_size]`, row-major, `n` by [`LogitsOf`].
    fn step(&self, rows: &mut [Row<'_, Self::Cache>]) -> Result<Vec<Vec<f32>>, Self::Error>;
}
