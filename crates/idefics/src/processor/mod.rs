//! Prompts in, model inputs out: token ids, pixels, and for each token the image it sees.

pub mod decode;
pub mod error;
pub mod resize;

use std::{path::PathBuf, sync::Arc};

/// One piece of a prompt. Only an image segment can name a file or an address; a text that looks like a URL
/// stays text.
#[derive(Debug, Clone, PartialEq)]
pub enum Segment {
    /// Words, taken as they are.
    Text(String),
    /// A picture.
    Image(ImageSource),
}

/// Where a picture comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageSource {
    /// A local file.
    Path(PathBuf),
    /// An `http` or `https` address.
    Url(String),
    /// A `data:` URI.
    DataUri(String),
    /// An encoded picture in memory.
    Bytes(Arc<[u8]>),
}

/// Interleaved segments, in the order they are read.
pub type Prompt = Vec<Segment>;

/// One picture as the vision tower takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct PixelValues {
    /// Normalised values `[3, height, width]`, row-major.
    pub data: Vec<f32>,
    /// Rows of the picture.
    pub height: usize,
    /// Columns of the picture.
    pub width: usize,
}

/// One prompt as the model takes it: no padding anywhere.
#[derive(Debug, Clone, Default)]
pub struct SequenceInputs {
    /// Token ids `[T]`.
    pub token_ids: Vec<u32>,
    /// For each token, the index into `images` of the picture it sees, if any: `[T]`.
    pub image_index: Vec<Option<u32>>,
    /// The pictures, in the order of the prompt: `[N]`.
    pub images: Vec<Arc<PixelValues>>,
}
