//! Turning a picture upright by its EXIF orientation.

use image::metadata::Orientation;

use super::RgbImage;

/// The picture as its EXIF block says it should be seen; unchanged without a readable note.
pub(super) fn apply(image: RgbImage, exif: Option<&[u8]>) -> RgbImage {
    let orientation = exif.and_then(Orientation::from_exif_chunk).unwrap_or(Orientation::NoTransforms);
    if orientation == Orientation::NoTransforms {
        return image;
    }
    let (w, h) = (image.width(), image.height());
    let swapped = matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    );
    let (width, height) = if swapped { (h, w) } else { (w, h) };
    let mut data = Vec::with_capacity(image.data().len());
    for y in 0..height {
        for x in 0..width {
            // Where the pixel seen at (x, y) is stored.
            let (sx, sy) = match orientation {
                Orientation::NoTransforms => (x, y),
                Orientation::FlipHorizontal => (w - 1 - x, y),
                Orientation::Rotate180 => (w - 1 - x, h - 1 - y),
                Orientation::FlipVertical => (x, h - 1 - y),
                Orientation::Rotate90FlipH => (y, x),
                Orientation::Rotate90 => (y, h - 1 - x),
                Orientation::Rotate270FlipH => (w - 1 - y, h - 1 - x),
                Orientation::Rotate270 => (w - 1 - y, x),
            };
            data.extend_from_slice(&image.data()[(sy * w + sx) * 3..][..3]);
        }
    }
    RgbImage::from_parts(width, height, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A big-endian TIFF structure with the one entry.
    fn exif(orientation: u8) -> Vec<u8> {
        let mut tiff = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
        tiff.extend([orientation, 0, 0, 0, 0, 0, 0]);
        tiff
    }

    // Expected rows from Pillow's `ImageOps.exif_transpose` on the pixels 0 1 2 / 3 4 5.
    #[test]
    fn orientations_equal_pillow() {
        let stored: Vec<u8> = (0..6).flat_map(|v| [v; 3]).collect();
        let cases: [(u8, usize, [u8; 6]); 9] = [
            (0, 3, [0, 1, 2, 3, 4, 5]),
            (1, 3, [0, 1, 2, 3, 4, 5]),
            (2, 3, [2, 1, 0, 5, 4, 3]),
            (3, 3, [5, 4, 3, 2, 1, 0]),
            (4, 3, [3, 4, 5, 0, 1, 2]),
            (5, 2, [0, 3, 1, 4, 2, 5]),
            (6, 2, [3, 0, 4, 1, 5, 2]),
            (7, 2, [5, 2, 4, 1, 3, 0]),
            (8, 2, [2, 5, 1, 4, 0, 3]),
        ];
        for (orientation, width, expected) in cases {
            let image = RgbImage::new(3, 2, stored.clone()).unwrap();
            let got = apply(image, Some(&exif(orientation)));
            let values: Vec<u8> = got.data().iter().copied().step_by(3).collect();
            assert_eq!((got.width(), values.as_slice()), (width, &expected[..]), "orientation {orientation}");
        }
    }
}
