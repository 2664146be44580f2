//! JPEG through libjpeg-turbo's arithmetic (slow integer DCT, fancy upsampling), the one inside Pillow.
//!
//! Surprising: the library reports errors by unwinding (without the panic hook), so every call sits inside
//! `catch_unwind`; and at the end of the data it invents an end marker and goes on with grey, so the reader here
//! notes that the data ran out. Reference for the modes: Pillow `JpegImagePlugin.py`.

use std::{
    cell::Cell,
    io::{self, BufRead, Read},
    panic::{AssertUnwindSafe, catch_unwind},
};

use mozjpeg::{ColorSpace, Decompress, Marker};

use super::{Decoded, ImageFormat, ImageLimits, RgbImage};
use crate::processor::error::ImageError;

const FORMAT: ImageFormat = ImageFormat::Jpeg;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Decoded, ImageError> {
    let scans = count_scans(bytes);
    if scans > limits.max_jpeg_scans {
        return Err(ImageError::TooManyScans { got: scans, limit: limits.max_jpeg_scans });
    }
    let ran_out = Cell::new(false);
    let reader = WatchedReader { rest: bytes, ran_out: &ran_out };
    // Nothing outlives the closure but `ran_out`, a flag that is valid in any state.
    let result = catch_unwind(AssertUnwindSafe(|| read_pixels(reader, limits)));
    match result {
        // Size limits are told as such even when the file is cut short as well.
        Ok(Err(error @ (ImageError::TooManyPixels { .. } | ImageError::NoPixels { .. }))) => Err(error),
        _ if ran_out.get() => Err(ImageError::Truncated(FORMAT)),
        Ok(result) => result,
        Err(_) => Err(ImageError::Malformed(FORMAT)),
    }
}

fn read_pixels(reader: WatchedReader<'_>, limits: &ImageLimits) -> Result<Decoded, ImageError> {
    let malformed = |_: io::Error| ImageError::Malformed(FORMAT);
    let decoder =
        Decompress::builder().with_markers(&[Marker::APP(1)]).from_reader(reader).map_err(malformed)?;
    let (width, height) = limits.check_size(FORMAT, decoder.width() as u64, decoder.height() as u64)?;
    let exif = decoder.markers().find_map(|m| m.data.strip_prefix(b"Exif\0\0").map(<[u8]>::to_vec));

    let colours = match decoder.components().len() {
        1 => ColorSpace::JCS_GRAYSCALE,
        3 => ColorSpace::JCS_RGB,
        4 => ColorSpace::JCS_CMYK,
        _ => return Err(ImageError::Unsupported { format: FORMAT, what: "this number of components" }),
    };
    let mut started = decoder.to_colorspace(colours).map_err(malformed)?;
    let samples: Vec<u8> = started.read_scanlines().map_err(malformed)?;
    // Reads on to the end marker: Pillow calls a file without one truncated.
    started.finish().map_err(malformed)?;

    let data = match colours {
        ColorSpace::JCS_GRAYSCALE => samples.iter().flat_map(|&v| [v; 3]).collect(),
        ColorSpace::JCS_CMYK => samples.as_chunks().0.iter().flat_map(|&p| inverted_cmyk_to_rgb(p)).collect(),
        _ => samples,
    };
    let image = RgbImage::new(width, height, data).map_err(|_| ImageError::Malformed(FORMAT))?;
    Ok(Decoded { image, exif })
}

/// Pillow takes every four-component JPEG as Adobe writes them, inverted, and converts with
/// `k' − round(c·k' / 255)` for `k' = 255 − k` (`Convert.c`, `cmyk2rgb`).
fn inverted_cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let white = u32::from(k);
    [c, m, y].map(|ink| {
        let product = u32::from(255 - ink) * white + 128;
        let rounded = ((product >> 8) + product) >> 8;
        white.saturating_sub(rounded) as u8
    })
}

/// Counts the start-of-scan markers by walking the file's segments.
fn count_scans(bytes: &[u8]) -> usize {
    let mut scans = 0;
    let mut at = 0;
    while let Some(offset) = bytes[at..].iter().position(|&b| b == 0xff) {
        at += offset + 1;
        match bytes.get(at..) {
            // Fill bytes before a marker; a stuffed zero or a restart marker inside entropy-coded data.
            None | Some([] | [0xff | 0x00 | 0x01 | 0xd0..=0xd8, ..]) => {}
            Some([0xd9, ..]) => break,
            Some([marker, high, low, ..]) => {
                scans += usize::from(*marker == 0xda);
                at = (at + 1 + usize::from(u16::from_be_bytes([*high, *low]))).min(bytes.len());
            }
            Some(_) => break,
        }
    }
    scans
}

/// Hands out the bytes and notes when more are asked for than there are.
struct WatchedReader<'a> {
    rest: &'a [u8],
    ran_out: &'a Cell<bool>,
}

impl Read for WatchedReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.rest.read(buffer)
    }
}

impl BufRead for WatchedReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.rest.is_empty() {
            self.ran_out.set(true);
        }
        Ok(self.rest)
    }

    fn consume(&mut self, amount: usize) {
        self.rest = &self.rest[amount..];
    }
}
