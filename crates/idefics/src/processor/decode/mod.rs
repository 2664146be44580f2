//! Encoded bytes to an RGB picture, as Pillow would open it and the reference would convert it.
//!
//! Reference: Pillow's format plugins, then transformers `image_transforms.py`, `convert_to_rgb` as IDEFICS uses
//! it: mode RGB stays as it is; every other mode becomes RGBA and is laid over white.
//! Surprising: the rules are Pillow's, not those of the formats. 16-bit grey clips at 255 instead of being
//! scaled, 16-bit colour keeps the high byte, `tRNS` of an RGB PNG is ignored, CMYK JPEGs are taken as inverted.
//! The format is read from the first bytes, never from a file's name. Only formats whose decoders are written in
//! Rust, and JPEG, are accepted; what a decoder says about a bad file is never repeated, only its category.

mod bmp;
mod gif;
mod jpeg;
mod orientation;
mod png;
mod webp;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
};

use super::error::ImageError;

/// A picture of 8-bit RGB samples with at least one pixel.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: usize,
    height: usize,
    data: Vec<u8>,
}

impl RgbImage {
    /// A picture from its samples `[height, width, 3]`, row-major.
    pub fn new(width: usize, height: usize, data: Vec<u8>) -> Result<Self, ImageError> {
        let expected = width.saturating_mul(height).saturating_mul(3);
        if expected == 0 || data.len() != expected {
            return Err(ImageError::RawSize { width, height, expected, got: data.len() });
        }
        Ok(Self { width, height, data })
    }

    /// As [`RgbImage::new`], for callers that computed `data` from the size.
    pub(super) fn from_parts(width: usize, height: usize, data: Vec<u8>) -> Self {
        debug_assert_eq!(data.len(), width * height * 3);
        Self { width, height, data }
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Samples `[height, width, 3]`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

impl fmt::Debug for RgbImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RgbImage")
            .field("width", &self.width)
            .field("height", &self.height)
            .finish_non_exhaustive()
    }
}

/// The formats that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ImageFormat {
    Jpeg,
    Png,
    WebP,
    Gif,
    Bmp,
}

impl ImageFormat {
    /// The accepted formats, for messages.
    pub const ACCEPTED: &'static str = "JPEG, PNG, WebP, GIF, BMP";

    /// The format that the first bytes announce.
    pub fn sniff(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(Self::Gif),
            [b'B', b'M', ..] => Some(Self::Bmp),
            _ => None,
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
        })
    }
}

/// How much a picture may ask for. Checked before pixels are decoded; decoding takes up to 12 bytes a pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Largest encoded size in bytes.
    pub max_bytes: usize,
    /// Largest number of pixels.
    pub max_pixels: u64,
    /// Most scans of a JPEG. Each scan walks over the whole picture, however few bytes it takes.
    pub max_jpeg_scans: usize,
}

impl Default for ImageLimits {
    /// 64 MiB, 100 million pixels, 100 scans.
    fn default() -> Self {
        Self { max_bytes: 64 << 20, max_pixels: 100_000_000, max_jpeg_scans: 100 }
    }
}

impl ImageLimits {
    /// The size as `usize`s, if the picture has pixels and not too many.
    fn check_size(&self, format: ImageFormat, width: u64, height: u64) -> Result<(usize, usize), ImageError> {
        if width == 0 || height == 0 {
            return Err(ImageError::NoPixels { format, width, height });
        }
        if width.saturating_mul(height) > self.max_pixels {
            return Err(ImageError::TooManyPixels { format, width, height, limit: self.max_pixels });
        }
        Ok((width as usize, height as usize))
    }
}

/// Whether the camera's note on which side is up is heeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExifOrientation {
    /// Take the pixels as stored, as the reference does.
    #[default]
    Ignore,
    /// Turn and mirror the picture as its EXIF data says.
    Apply,
}

/// Decodes a picture of any accepted format.
pub fn decode(
    bytes: &[u8],
    limits: &ImageLimits,
    orientation: ExifOrientation,
) -> Result<RgbImage, ImageError> {
    if bytes.is_empty() {
        return Err(ImageError::Empty);
    }
    if bytes.len() > limits.max_bytes {
        return Err(ImageError::TooManyBytes { limit: limits.max_bytes });
    }
    let format = ImageFormat::sniff(bytes).ok_or(ImageError::UnknownFormat)?;
    let read = || match format {
        ImageFormat::Jpeg => jpeg::decode(bytes, limits),
        ImageFormat::Png => png::decode(bytes, limits),
        ImageFormat::WebP => webp::decode(bytes, limits),
        ImageFormat::Gif => gif::decode(bytes, limits),
        ImageFormat::Bmp => bmp::decode(bytes, limits),
    };
    // The decoders are others' work, fed with strangers' files. None is known to panic; should one do it, that is
    // no reason to stop the program. Nothing of theirs outlives the closure.
    let decoded = catch_unwind(AssertUnwindSafe(read)).unwrap_or(Err(ImageError::Malformed(format)))?;
    Ok(match orientation {
        ExifOrientation::Ignore => decoded.image,
        ExifOrientation::Apply => orientation::apply(decoded.image, decoded.exif.as_deref()),
    })
}

/// What a format's decoder hands back.
struct Decoded {
    image: RgbImage,
    /// The EXIF block (a TIFF structure), if the file has one.
    exif: Option<Vec<u8>>,
}

/// A pixel over opaque white, rounded as Pillow's `alpha_composite` rounds (its shift form of a division by 255
/// equals this for all 65,536 pairs of sample and alpha).
fn over_white([r, g, b, a]: [u8; 4]) -> [u8; 3] {
    let alpha = u32::from(a);
    [r, g, b].map(|s| ((u32::from(s) * alpha + 255 * (255 - alpha) + 127) / 255) as u8)
}

/// A palette of RGBA colours with all 256 entries; indices beyond the file's palette are opaque black.
struct Palette([[u8; 3]; 256]);

impl Palette {
    /// `colours` holds RGB triples; `alpha` gives an entry's opacity.
    fn new(colours: &[u8], alpha: impl Fn(usize) -> u8) -> Self {
        let mut entries = [[0; 3]; 256];
        for (index, entry) in entries.iter_mut().enumerate() {
            let [r, g, b] = colours.as_chunks::<3>().0.get(index).copied().unwrap_or_default();
            *entry = over_white([r, g, b, alpha(index)]);
        }
        Self(entries)
    }

    fn colour(&self, index: u8) -> [u8; 3] {
        self.0[usize::from(index)]
    }
}

/// The category of an error of the `image` crate, without its words.
fn image_crate_error(format: ImageFormat, error: &image::ImageError) -> ImageError {
    match error {
        image::ImageError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated(format)
        }
        image::ImageError::Unsupported(_) => ImageError::Unsupported { format, what: "this variant" },
        _ => ImageError::Malformed(format),
    }
}

#[cfg(test)]
mod tests;
