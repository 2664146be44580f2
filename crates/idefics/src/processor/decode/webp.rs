//! WebP, of an animation the first frame.

use std::io::Cursor;

use image::{ImageDecoder, codecs::webp::WebPDecoder};

use super::{Decoded, ImageFormat, ImageLimits, RgbImage, image_crate_error, over_white};
use crate::processor::error::ImageError;

const FORMAT: ImageFormat = ImageFormat::WebP;

pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<Decoded, ImageError> {
    let error = |e: image::ImageError| image_crate_error(FORMAT, &e);
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(error)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = limits.check_size(FORMAT, u64::from(width), u64::from(height))?;
    let exif = decoder.exif_metadata().ok().flatten();
    let has_alpha = decoder.color_type().has_alpha();
    let mut samples = vec![0; width * height * usize::from(decoder.color_type().bytes_per_pixel())];
    decoder.read_image(&mut samples).map_err(error)?;
    let data =
        if has_alpha { samples.as_chunks().0.iter().flat_map(|&p| over_white(p)).collect() } else { samples };
    let image = RgbImage::new(width, height, data).map_err(|_| ImageError::Malformed(FORMAT))?;
    Ok(Decoded { image, exif })
}
