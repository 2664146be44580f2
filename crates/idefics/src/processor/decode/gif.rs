//! The first frame of a GIF. Reference: Pillow `GifImagePlugin.py`.
//!
//! Surprising: the part of the screen that the frame leaves free is the transparent colour if the frame has one,
//! and colour 0 otherwise, not the background colour; a frame that hangs over the screen enlarges it. A file
//! without any palette is refused, where Pillow would guess grey.

use std::{io::Cursor, num::NonZeroU64};

use ::gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use super::{Decoded, ImageFormat, ImageLimits, Palette, RgbImage};
use crate::processor::error::ImageError;

const FORMAT: ImageFormat = ImageFormat::Gif;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Decoded, ImageError> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.allow_unknown_blocks(true);
    // One byte a pixel; the size itself is checked below, before anything of that size is allocated.
    options.set_memory_limit(
        NonZeroU64::new(limits.max_pixels).map_or(MemoryLimit::Unlimited, MemoryLimit::Bytes),
    );
    let mut decoder = options.read_info(Cursor::new(bytes)).map_err(|e| category(&e))?;
    let (screen_width, screen_height) = (usize::from(decoder.width()), usize::from(decoder.height()));

    let frame = decoder.next_frame_info().map_err(|e| category(&e))?.ok_or(ImageError::Truncated(FORMAT))?;
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (frame_width, frame_height) = (usize::from(frame.width), usize::from(frame.height));
    let transparent = frame.transparent;
    let width = screen_width.max(left + frame_width);
    let height = screen_height.max(top + frame_height);
    limits.check_size(FORMAT, width as u64, height as u64)?;

    let mut indices = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut indices).map_err(|e| category(&e))?;

    let colours = decoder.palette().map_err(|e| category(&e))?;
    let palette = Palette::new(colours, |i| if transparent.map(usize::from) == Some(i) { 0 } else { 255 });
    let mut data = palette.colour(transparent.unwrap_or(0)).repeat(width * height);
    if frame_width > 0 {
        for (y, row) in indices.chunks_exact(frame_width).take(frame_height).enumerate() {
            let out = &mut data[((top + y) * width + left) * 3..][..frame_width * 3];
            for (pixel, &index) in out.as_chunks_mut::<3>().0.iter_mut().zip(row) {
                *pixel = palette.colour(index);
            }
        }
    }
    Ok(Decoded { image: RgbImage::from_parts(width, height, data), exif: None })
}

fn category(error: &DecodingError) -> ImageError {
    match error {
        DecodingError::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated(FORMAT)
        }
        _ => ImageError::Malformed(FORMAT),
    }
}
