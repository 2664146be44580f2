//! Any bytes as a picture: an error, or as many samples as its size says.
#![no_main]

use idefics::processor::decode::{ExifOrientation, ImageLimits, decode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Small, so that a run spends its time on decoders and not on clearing memory.
    let limits = ImageLimits { max_pixels: 1 << 20, ..ImageLimits::default() };
    for orientation in [ExifOrientation::Ignore, ExifOrientation::Apply] {
        let Ok(image) = decode(bytes, &limits, orientation) else { return };
        assert!(image.width() > 0 && image.height() > 0);
        assert!(image.width() * image.height() <= 1 << 20);
        assert_eq!(image.data().len(), 3 * image.width() * image.height());
    }
});
