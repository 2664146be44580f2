//! A random part of a picture, resized: the augmentation of the published fine-tuning recipes.
//!
//! Reference: torchvision `transforms.RandomResizedCrop.get_params`, with `scale=(0.9, 1.0)` in the recipes of
//! IDEFICS and torchvision's own ratio.

use idefics::processor::RgbImage;
use rand::Rng;
use serde::{Deserialize, Serialize};

/// How much of a picture is kept, and in which form.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandomResizedCrop {
    /// Share of the area.
    pub scale: [f64; 2],
    /// Width by height.
    pub ratio: [f64; 2],
}

impl Default for RandomResizedCrop {
    fn default() -> Self {
        Self { scale: [0.9, 1.0], ratio: [3.0 / 4.0, 4.0 / 3.0] }
    }
}

/// A part of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
}

impl RandomResizedCrop {
    /// Whether the numbers make sense.
    pub(crate) fn is_sound(&self) -> bool {
        let is_range = |[low, high]: [f64; 2]| 0.0 < low && low <= high && high.is_finite();
        is_range(self.scale) && self.scale[1] <= 1.0 && is_range(self.ratio)
    }

    /// A random part of the picture.
    pub(crate) fn crop(&self, image: &RgbImage, rng: &mut impl Rng) -> RgbImage {
        cut(image, self.region(image.width(), image.height(), rng))
    }

    fn region(&self, width: usize, height: usize, rng: &mut impl Rng) -> Region {
        let area = (width * height) as f64;
        let [low, high] = self.ratio.map(f64::ln);
        for _ in 0..10 {
            let target = area * rng.random_range(self.scale[0]..=self.scale[1]);
            let ratio = rng.random_range(low..=high).exp();
            let w = (target * ratio).sqrt().round_ties_even() as usize;
            let h = (target / ratio).sqrt().round_ties_even() as usize;
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                let top = rng.random_range(0..=height - h);
                let left = rng.random_range(0..=width - w);
                return Region { top, left, height: h, width: w };
            }
        }
        self.central(width, height)
    }

    /// The middle of the picture, in a ratio that is allowed.
    fn central(&self, width: usize, height: usize) -> Region {
        let ratio = width as f64 / height as f64;
        let round = |value: f64, most: usize| (value.round_ties_even() as usize).clamp(1, most);
        let (w, h) = if ratio < self.ratio[0] {
            (width, round(width as f64 / self.ratio[0], height))
        } else if ratio > self.ratio[1] {
            (round(height as f64 * self.ratio[1], width), height)
        } else {
            (width, height)
        };
        Region { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }
    }
}

fn cut(image: &RgbImage, region: Region) -> RgbImage {
    let stride = image.width() * 3;
    let rows = image.data().chunks_exact(stride).skip(region.top).take(region.height);
    let data =
        rows.flat_map(|row| &row[region.left * 3..(region.left + region.width) * 3]).copied().collect();
    RgbImage::new(region.width, region.height, data).expect("a region has pixels and lies in its picture")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::generator;

    #[test]
    fn regions_keep_the_rules() {
        let crop = RandomResizedCrop::default();
        for (width, height) in [(640, 480), (224, 224), (10, 1000), (1, 1), (3, 2)] {
            for draw in 0..200 {
                let region = crop.region(width, height, &mut generator(&[draw]));
                assert!(region.width > 0 && region.left + region.width <= width, "{region:?}");
                assert!(region.height > 0 && region.top + region.height <= height, "{region:?}");
                if width == 640 {
                    let share = (region.width * region.height) as f64 / (640.0 * 480.0);
                    assert!((0.895..=1.0).contains(&share), "{region:?}");
                    let ratio = region.width as f64 / region.height as f64;
                    assert!((0.74..1.35).contains(&ratio), "{region:?}");
                }
            }
        }
    }

    /// torchvision's fallback for a picture of 10 columns and 1000 rows: 10 / 0.75 = 13.3 rows.
    #[test]
    fn long_pictures_give_their_middle() {
        let region = RandomResizedCrop::default().central(10, 1000);
        assert_eq!(region, Region { top: 493, left: 0, height: 13, width: 10 });
    }

    #[test]
    fn the_right_pixels_are_cut() {
        let image = RgbImage::new(3, 2, (0..18).collect()).unwrap();
        let part = cut(&image, Region { top: 1, left: 1, height: 1, width: 2 });
        assert_eq!(part.data(), [12, 13, 14, 15, 16, 17]);
    }
}
