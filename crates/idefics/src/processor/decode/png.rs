//! PNG by Pillow's modes. Reference: Pillow `PngImagePlugin.py` and `Convert.c`.
//!
//! Grey becomes L (or I;16, whose values above 255 clip), colour RGB, both with the high byte of 16-bit samples.
//! A `tRNS` value of a grey picture is compared in its low byte with the 8-bit sample, whatever the bit depth;
//! that of a colour picture is ignored, because the reference leaves mode RGB alone. Of an animated PNG the still
//! picture is read.

use std::io::Cursor;

use ::png::{BitDepth, ColorType, Decoder, DecodingError, Limits, Transformations};

use super::{Decoded, ImageFormat, ImageLimits, Palette, RgbImage, over_white};
use crate::processor::error::ImageError;

const FORMAT: ImageFormat = ImageFormat::Png;
/// Memory for the decoder's own buffers and for ancillary chunks.
const WORKING_BYTES: usize = 64 << 20;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Decoded, ImageError> {
    let mut decoder = Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(Transformations::IDENTITY);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let header = decoder.read_header_info().map_err(|e| category(&e))?;
    let (width, height) = limits.check_size(FORMAT, u64::from(header.width), u64::from(header.height))?;
    let row_bytes = header.raw_row_length();
    decoder.set_limits(Limits { bytes: WORKING_BYTES.saturating_add(row_bytes.saturating_mul(2)) });

    let mut reader = decoder.read_info().map_err(|e| category(&e))?;
    let length = reader.output_buffer_size().ok_or(ImageError::Malformed(FORMAT))?;
    let mut raw = vec![0; length];
    let frame = reader.next_frame(&mut raw).map_err(|e| category(&e))?;
    if (frame.width as usize, frame.height as usize) != (width, height) {
        return Err(ImageError::Malformed(FORMAT));
    }
    // EXIF may follow the pixels. What else follows them does not matter, nor do errors in it.
    let _ = reader.finish();

    let info = reader.info();
    let samples = Samples { raw: &raw, row_bytes: frame.line_size, width, bit_depth: info.bit_depth };
    let data = match info.color_type {
        ColorType::Grayscale => samples.grey(info.trns.as_deref()),
        ColorType::Rgb => samples.bytes::<3>().flatten().collect(),
        ColorType::GrayscaleAlpha => {
            samples.bytes::<2>().flat_map(|[v, a]| over_white([v, v, v, a])).collect()
        }
        ColorType::Rgba => samples.bytes::<4>().flat_map(over_white).collect(),
        ColorType::Indexed => samples.indexed(info.palette.as_deref(), info.trns.as_deref()),
    };
    let image = RgbImage::new(width, height, data).map_err(|_| ImageError::Malformed(FORMAT))?;
    Ok(Decoded { image, exif: info.exif_metadata.as_deref().map(<[u8]>::to_vec) })
}

/// Undone filters, still packed: rows of `row_bytes` bytes, the last byte of a row partly unused below 8 bits.
struct Samples<'a> {
    raw: &'a [u8],
    row_bytes: usize,
    width: usize,
    bit_depth: BitDepth,
}

impl Samples<'_> {
    fn grey(&self, trns: Option<&[u8]>) -> Vec<u8> {
        // The last byte is the low one: below 16 bits the decoder keeps no other.
        let transparent = trns.and_then(|t| t.last().copied());
        let scale = match self.bit_depth {
            BitDepth::One => 255,
            BitDepth::Two => 85,
            BitDepth::Four => 17,
            BitDepth::Eight | BitDepth::Sixteen => 1,
        };
        let pixel = |v: u8| if transparent == Some(v) { [255; 3] } else { [v; 3] };
        match self.bit_depth {
            BitDepth::Sixteen => {
                let (words, _) = self.raw.as_chunks::<2>();
                words.iter().flat_map(|&w| pixel(u16::from_be_bytes(w).min(255) as u8)).collect()
            }
            _ => self.packed().flat_map(|v| pixel(v * scale)).collect(),
        }
    }

    fn indexed(&self, palette: Option<&[u8]>, trns: Option<&[u8]>) -> Vec<u8> {
        let trns = trns.unwrap_or_default();
        let palette = Palette::new(palette.unwrap_or_default(), |i| trns.get(i).copied().unwrap_or(255));
        self.packed().flat_map(|index| palette.colour(index)).collect()
    }

    /// Pixels of `N` samples, of 16-bit samples the high bytes.
    fn bytes<const N: usize>(&self) -> impl Iterator<Item = [u8; N]> {
        let step = if self.bit_depth == BitDepth::Sixteen { 2 } else { 1 };
        self.raw.chunks_exact(N * step).map(move |pixel| std::array::from_fn(|i| pixel[i * step]))
    }

    /// Single samples of 8 bits or less, unscaled.
    fn packed(&self) -> impl Iterator<Item = u8> {
        let bits = (self.bit_depth as usize).min(8);
        let per_byte = 8 / bits;
        let mask = (0xff_u16 >> (8 - bits)) as u8;
        self.raw.chunks_exact(self.row_bytes).flat_map(move |row| {
            (0..self.width).map(move |x| {
                let shift = 8 - bits * (x % per_byte + 1);
                (row[x / per_byte] >> shift) & mask
            })
        })
    }
}

fn category(error: &DecodingError) -> ImageError {
    match error {
        DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated(FORMAT)
        }
        DecodingError::LimitsExceeded => {
            ImageError::Unsupported { format: FORMAT, what: "ancillary data of this size" }
        }
        _ => ImageError::Malformed(FORMAT),
    }
}
