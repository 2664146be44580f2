//! What generation needs of a model, so that its policies can be tested on a stub.

use crate::{SequenceInputs, processor::PixelValues};

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
/// any batch, in any chunks, and behind any way its cache came to be.
pub trait StepModel {
    /// One picture that was read: what a cache needs to look at it. A clone is shared, not copied.
    type Image: Clone;
    /// What is remembered of one sequence: keys, values, its pictures. A clone is another branch.
    type Cache: Clone;
    /// Why a step can fail.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Number of logits per position, additional vocabulary included.
    fn vocab_size(&self) -> usize;

    /// Longest sequence in tokens, prompt and answer together.
    fn max_positions(&self) -> usize;

    /// Reads pictures.
    fn encode_images(&self, images: &[&PixelValues]) -> Result<Vec<Self::Image>, Self::Error>;

    /// The empty cache of a sequence with these pictures.
    fn new_cache(&self, images: Vec<Self::Image>) -> Self::Cache;

    /// Forgets all but the first `tokens` tokens; also what a step that failed half-way left behind them.
    fn truncate(&self, cache: &mut Self::Cache, tokens: usize);

    /// A copy of the first `tokens` tokens.
    fn copy_prefix(&self, cache: &Self::Cache, tokens: usize) -> Self::Cache {
        let mut copy = cache.clone();
        self.truncate(&mut copy, tokens);
        copy
    }

    /// Gives a cache other pictures. What it remembers of its tokens stays.
    fn set_images(&self, cache: &mut Self::Cache, images: Vec<Self::Image>);

    /// Bytes that a cache of so many tokens takes, pictures not counted.
    fn cache_bytes(&self, tokens: usize) -> usize;

    /// Bytes that a picture takes once it is read.
    fn image_bytes(&self, image: &PixelValues) -> usize;

    /// Bytes of the weights, which want to stay in memory beside all caches.
    fn weight_bytes(&self) -> usize;

    /// Feeds all rows; returns for each row its logits `[n, vocab_size]`, row-major, `n` by [`LogitsOf`]. After an
    /// error caches may have grown in part; [`truncate`](Self::truncate) puts them right.
    fn step(&self, rows: &mut [Row<'_, Self::Cache>]) -> Result<Vec<Vec<f32>>, Self::Error>;

    /// Reads the pictures of a sequence and returns its empty cache.
    fn start(&self, inputs: &SequenceInputs) -> Result<Self::Cache, Self::Error> {
        let images: Vec<&PixelValues> = inputs.images.iter().map(AsRef::as_ref).collect();
        Ok(self.new_cache(self.encode_images(&images)?))
    }
}
