//! BMP. Reference: Pillow `BmpImagePlugin.py`.

use std::io::Cursor;

use image::{ImageDecoder, codecs::bmp::BmpDecoder};

use super::{Decoded, ImageFormat, ImageLimits, RgbImage, image_crate_error, over_white};
use crate::processor::error::ImageError;

const FORMAT: ImageFormat = ImageFormat::Bmp;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Decoded, ImageError> {
    let error = |e: image::ImageError| image_crate_error(FORMAT, &e);
    let decoder = BmpDecoder::new(Cursor::new(bytes)).map_err(error)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = limits.check_size(FORMAT, u64::from(width), u64::from(height))?;
    let has_alpha = decoder.color_type().has_alpha();
    let mut samples = vec![0; width * height * usize::from(decoder.color_type().bytes_per_pixel())];
    decoder.read_image(&mut samples).map_err(error)?;
    let mut data: Vec<u8> =
        if has_alpha { samples.as_chunks().0.iter().flat_map(|&p| over_white(p)).collect() } else { samples };
    if let Some(green_bits) = green_bits_of_16(bytes) {
        for pixel in data.as_chunks_mut::<3>().0 {
            *pixel =
                [rounded_down(pixel[0], 5), rounded_down(pixel[1], green_bits), rounded_down(pixel[2], 5)];
        }
    }
    let image = RgbImage::new(width, height, data).map_err(|_| ImageError::Malformed(FORMAT))?;
    Ok(Decoded { image, exif: None })
}

/// For a picture of 16 bits a pixel, the bits of its green samples.
fn green_bits_of_16(bytes: &[u8]) -> Option<u32> {
    let word = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    // Offsets: header length 14, bits a pixel 28 (two bytes), compression 30 (3 = bit fields), green mask 58.
    let header_length = word(14)?;
    if header_length < 40 || (word(28)? & 0xffff) != 16 {
        return None;
    }
    Some(if word(30)? == 3 { word(58)?.count_ones() } else { 5 })
}

/// Pillow widens a sample of few bits by `v·255 / max`, rounded down; the decoder here rounds to nearest.
fn rounded_down(sample: u8, bits: u32) -> u8 {
    let max = (1u32 << bits.clamp(1, 8)) - 1;
    let narrow = (u32::from(sample) * max + 127) / 255;
    (narrow * 255 / max) as u8
}
