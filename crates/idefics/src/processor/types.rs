//! What goes into the processor and what comes out.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use super::decode::RgbImage;

/// One piece of a prompt. Only an image segment can name a file or an address; a text that looks like a URL
/// stays text.
#[derive(Debug, Clone, PartialEq)]
pub enum Segment {
    /// Words, taken as they are.
    Text(String),
    /// A picture.
    Image(ImageSource),
}

impl Segment {
    /// A text segment.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }
}

impl From<ImageSource> for Segment {
    fn from(source: ImageSource) -> Self {
        Self::Image(source)
    }
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
    /// A picture that is decoded already.
    Rgb(Arc<RgbImage>),
}

/// Interleaved segments, in the order they are read.
pub type Prompt = Vec<Segment>;

/// One picture as the vision tower takes it. Not to be changed once made: its hash is that of the first data.
#[derive(Debug, Clone)]
pub struct PixelValues {
    /// Normalised values `[3, height, width]`, row-major.
    pub data: Vec<f32>,
    /// Rows of the picture.
    pub height: usize,
    /// Columns of the picture.
    pub width: usize,
    hash: ImageHash,
}

impl PixelValues {
    /// A picture from its normalised values `[3, height, width]`.
    ///
    /// # Panics
    ///
    /// If `data` does not have `3 · height · width` values.
    pub fn new(data: Vec<f32>, height: usize, width: usize) -> Self {
        assert_eq!(data.len(), 3 * height * width, "pixel values of a {height}x{width} picture");
        let hash = ImageHash::of(&data, height, width);
        Self { data, height, width, hash }
    }

    /// A name for the content: equal pictures have equal hashes, within one process.
    pub fn content_hash(&self) -> ImageHash {
        self.hash
    }
}

impl PartialEq for PixelValues {
    fn eq(&self, other: &Self) -> bool {
        (self.height, self.width) == (other.height, other.width) && self.data == other.data
    }
}

/// 128 bits that stand for a picture's content, to recognise one that was seen before.
///
/// `SipHash` under keys drawn when the process starts, so nobody who only supplies pictures can make two collide.
/// For the same reason the value means nothing in another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageHash(u128);

impl ImageHash {
    fn of(data: &[f32], height: usize, width: usize) -> Self {
        static KEYS: OnceLock<[RandomState; 2]> = OnceLock::new();
        let keys = KEYS.get_or_init(|| [RandomState::new(), RandomState::new()]);
        let [high, low] = keys.each_ref().map(|key| {
            let mut hasher = key.build_hasher();
            hasher.write_usize(height);
            hasher.write_usize(width);
            for pair in data.chunks(2) {
                let bits = pair.iter().fold(0, |bits, v| (bits << 32) | u64::from(v.to_bits()));
                hasher.write_u64(bits);
            }
            hasher.finish()
        });
        Self((u128::from(high) << 64) | u128::from(low))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_follows_the_content() {
        let hash = |data: Vec<f32>, h, w| PixelValues::new(data, h, w).content_hash();
        let reference = hash(vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 1, 2);
        assert_eq!(reference, hash(vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 1, 2));
        assert_ne!(reference, hash(vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.5], 1, 2));
        assert_ne!(reference, hash(vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 2, 1), "the shape counts");
        assert_ne!(hash(vec![0.0; 3], 1, 1), hash(vec![-0.0; 3], 1, 1), "bits are compared");
    }
}
