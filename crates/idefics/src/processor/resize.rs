//! Pillow's bicubic resampling of 8-bit RGB pictures, bit for bit.
//!
//! Reference: Pillow `src/libImaging/Resample.c` (`precompute_coeffs`, `normalize_coeffs_8bpc`,
//! `ImagingResampleHorizontal_8bpc`, `ImagingResampleVertical_8bpc`).
//! `[h, w, 3] -> [height, width, 3]`; the aspect ratio is not kept.
//! Surprising: the pass order shows in the result, because the picture between the passes is rounded to 8 bits.
//! Up to Pillow 12 the horizontal pass is always first; 13.0 changed that for some sizes. IDEFICS was trained and
//! published with the former, so that is the order here.

use rayon::prelude::*;

use super::decode::RgbImage;

/// Fractional bits of a coefficient: 32 minus 8 of the sample minus 2 of head room for overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Half-width of the bicubic kernel, in output pixels when shrinking.
const BICUBIC_SUPPORT: f64 = 2.0;

/// Resizes to exactly `width` x `height` pixels.
///
/// # Panics
///
/// If `width` or `height` is zero; an [`RgbImage`] itself always has pixels.
pub fn resize_bicubic(image: &RgbImage, width: usize, height: usize) -> RgbImage {
    assert!(width > 0 && height > 0, "the target size has pixels");
    // A pass over a side that already fits would be the identity; Pillow skips it, and so is exact there.
    let narrowed = (width != image.width()).then(|| horizontal_pass(image, width));
    let narrowed = narrowed.as_ref().unwrap_or(image);
    if height == image.height() { narrowed.clone() } else { vertical_pass(narrowed, height) }
}

fn horizontal_pass(image: &RgbImage, width: usize) -> RgbImage {
    let axis = Axis::new(image.width(), width);
    let mut out = vec![0u8; image.height() * width * 3];
    out.par_chunks_mut(width * 3).zip(image.data().par_chunks(image.width() * 3)).for_each(
        |(out_row, row)| {
            for (pixel, window) in out_row.chunks_exact_mut(3).zip(&axis.windows) {
                let taps = axis.taps(window);
                let mut sums = [1i32 << (PRECISION_BITS - 1); 3];
                for (source, &k) in row[window.first * 3..].chunks_exact(3).zip(taps) {
                    sums[0] += i32::from(source[0]) * k;
                    sums[1] += i32::from(source[1]) * k;
                    sums[2] += i32::from(source[2]) * k;
                }
                pixel.copy_from_slice(&sums.map(to_sample));
            }
        },
    );
    RgbImage::from_parts(width, image.height(), out)
}

fn vertical_pass(image: &RgbImage, height: usize) -> RgbImage {
    let axis = Axis::new(image.height(), height);
    let stride = image.width() * 3;
    let mut out = vec![0u8; height * stride];
    out.par_chunks_mut(stride).zip(&axis.windows).for_each(|(out_row, window)| {
        let mut sums = vec![1i32 << (PRECISION_BITS - 1); stride];
        let rows = image.data()[window.first * stride..].chunks_exact(stride);
        for (row, &k) in rows.zip(axis.taps(window)) {
            for (sum, &sample) in sums.iter_mut().zip(row) {
                *sum += i32::from(sample) * k;
            }
        }
        for (sample, sum) in out_row.iter_mut().zip(sums) {
            *sample = to_sample(sum);
        }
    });
    RgbImage::from_parts(image.width(), height, out)
}

fn to_sample(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// The weights of one direction: for each output position, which inputs count and how much.
struct Axis {
    windows: Vec<Window>,
    coefficients: Vec<i32>,
}

struct Window {
    /// First input position.
    first: usize,
    /// Range of its weights in `coefficients`.
    weights: std::ops::Range<usize>,
}

impl Axis {
    fn new(input: usize, output: usize) -> Self {
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = BICUBIC_SUPPORT * filter_scale;
        let inverse_scale = 1.0 / filter_scale;

        let mut windows = Vec::with_capacity(output);
        let mut coefficients = Vec::new();
        for position in 0..output {
            let center = (position as f64 + 0.5) * scale;
            // Casts to unsigned saturate at 0, which is the clamp of the reference.
            let first = (center - support + 0.5) as usize;
            let last = ((center + support + 0.5) as usize).min(input);
            let weights: Vec<f64> =
                (first..last).map(|i| bicubic((i as f64 - center + 0.5) * inverse_scale)).collect();
            let total: f64 = weights.iter().sum();
            let start = coefficients.len();
            coefficients.extend(weights.iter().map(|w| fixed_point(w / total)));
            windows.push(Window { first, weights: start..coefficients.len() });
        }
        Self { windows, coefficients }
    }

    fn taps(&self, window: &Window) -> &[i32] {
        &self.coefficients[window.weights.clone()]
    }
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn fixed_point(weight: f64) -> i32 {
    let scaled = weight * f64::from(1u32 << PRECISION_BITS);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The picture of the golden tables: `(7x + 13y + 29c + 5·((x·y) mod 11)) mod 256`.
    fn pattern(height: usize, width: usize) -> RgbImage {
        let mut data = Vec::new();
        for y in 0..height {
            for x in 0..width {
                for c in 0..3 {
                    data.push(((7 * x + 13 * y + 29 * c + 5 * ((x * y) % 11)) % 256) as u8);
                }
            }
        }
        RgbImage::new(width, height, data).unwrap()
    }

    fn channel(image: &RgbImage, c: usize) -> Vec<u8> {
        image.data().iter().skip(c).step_by(3).copied().collect()
    }

    // Pillow 12.0.0.
    #[test]
    fn small_pictures_equal_pillow() {
        let cases: [(usize, usize, [u8; 16]); 3] = [
            (5, 7, [5, 18, 31, 46, 23, 46, 75, 85, 43, 78, 90, 100, 63, 93, 99, 116]),
            (10, 6, [13, 30, 48, 64, 48, 82, 91, 105, 88, 115, 127, 135, 124, 150, 157, 163]),
            (3, 2, [0, 0, 5, 7, 7, 9, 16, 18, 17, 22, 30, 34, 25, 31, 40, 46]),
        ];
        for (h, w, expected) in cases {
            let got = resize_bicubic(&pattern(h, w), 4, 4);
            assert_eq!(channel(&got, 0), expected, "{h}x{w}");
        }
    }

    struct Golden {
        size: (usize, usize),
        sums: [u64; 3],
        weighted: u64,
        first_reds: [u8; 6],
        at_111_97: [u8; 3],
        at_223_223: [u8; 3],
    }

    #[test]
    fn pictures_at_224_equal_pillow() {
        let cases = [
            Golden {
                size: (480, 640),
                sums: [6_398_044, 6_398_846, 6_398_847],
                weighted: 571_556_287_216,
                first_reds: [18, 47, 72, 96, 99, 129],
                at_111_97: [216, 198, 54],
                at_223_223: [206, 192, 105],
            },
            Golden {
                size: (640, 360),
                sums: [6_398_944, 6_398_065, 6_397_765],
                weighted: 571_666_034_572,
                first_reds: [17, 36, 56, 69, 78, 96],
                at_111_97: [134, 163, 196],
                at_223_223: [71, 101, 130],
            },
            Golden {
                size: (100, 150),
                sums: [6_395_091, 6_395_272, 6_399_585],
                weighted: 571_097_694_071,
                first_reds: [0, 2, 6, 11, 16, 19],
                at_111_97: [98, 127, 156],
                at_223_223: [25, 54, 83],
            },
            Golden {
                size: (224, 224),
                sums: [6_391_420, 6_397_308, 6_397_564],
                weighted: 571_437_839_546,
                first_reds: [0, 7, 14, 21, 28, 35],
                at_111_97: [119, 148, 177],
                at_223_223: [153, 182, 211],
            },
        ];
        for case in cases {
            let (h, w) = case.size;
            let got = resize_bicubic(&pattern(h, w), 224, 224);
            for (c, expected) in case.sums.into_iter().enumerate() {
                let sum: u64 = channel(&got, c).iter().map(|&v| u64::from(v)).sum();
                assert_eq!(sum, expected, "{h}x{w}: sum of channel {c}");
            }
            let weighted: u64 =
                got.data().iter().enumerate().map(|(k, &v)| u64::from(v) * (k as u64 % 65521)).sum();
            assert_eq!(weighted, case.weighted, "{h}x{w}: weighted sum");
            assert_eq!(channel(&got, 0)[..6], case.first_reds, "{h}x{w}: row 0");
            let pixel = |y: usize, x: usize| &got.data()[(y * 224 + x) * 3..][..3];
            assert_eq!(pixel(111, 97), case.at_111_97, "{h}x{w}");
            assert_eq!(pixel(223, 223), case.at_223_223, "{h}x{w}");
        }
    }

    #[test]
    fn tiny_pictures_keep_their_colour() {
        for (h, w) in [(1, 1), (3, 1), (1, 3), (3, 5)] {
            let data = [10u8, 200, 30].repeat(h * w);
            let got = resize_bicubic(&RgbImage::new(w, h, data).unwrap(), 8, 6);
            assert_eq!((got.width(), got.height()), (8, 6));
            assert!(got.data().chunks(3).all(|p| p == [10, 200, 30]), "{h}x{w}");
        }
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| resize_bicubic(&pattern(301, 517), 64, 48))
        };
        assert_eq!(run(1), run(4));
    }
}
