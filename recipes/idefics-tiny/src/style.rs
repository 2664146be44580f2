//! A thing as another hand would draw it: other proportions, lines, fills and shading.
//!
//! Five designs are few: without this, what is learnt is each drawing rather than what all of them have in common.

use anyhow::{Context, Result};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use resvg::tiny_skia::{IntSize, Pixmap};

/// Pixels `[side, side]` of premultiplied red, green, blue and alpha, 0 to 1.
struct Drawing {
    side: usize,
    pixels: Vec<[f32; 4]>,
}

/// Draws `thing` in a style of its own. Colours stay what they are called where `same_colors`.
pub(crate) fn restyle(rng: &mut ChaCha8Rng, thing: &Pixmap, same_colors: bool) -> Result<Pixmap> {
    let mut drawing = Drawing::read(thing);
    if rng.random_bool(0.8) {
        drawing = drawing.warped(rng);
    }
    if rng.random_bool(0.35) {
        let radius = rng.random_range(1..=3);
        for _ in 0..2 {
            drawing = drawing.smoothed(radius);
        }
    }
    if !same_colors && rng.random_bool(0.25) {
        drawing.posterize(rng);
    }
    if !same_colors && rng.random_bool(0.35) {
        drawing.curve(rng);
    }
    match rng.random_range(0..20) {
        0..=4 => drawing.trace(rng),
        5 if !same_colors => drawing.line_art(),
        _ => {}
    }
    if rng.random_bool(0.35) {
        drawing.shade(rng);
    }
    if rng.random_bool(0.35) {
        drawing = drawing.outlined(rng);
    }
    if rng.random_bool(0.2) {
        drawing.cover(rng);
    }
    drawing.write()
}

impl Drawing {
    fn read(pixmap: &Pixmap) -> Self {
        let pixels = pixmap.data().chunks_exact(4);
        let pixels = pixels.map(|pixel| [0, 1, 2, 3].map(|c| f32::from(pixel[c]) / 255.0)).collect();
        Self { side: pixmap.width() as usize, pixels }
    }

    fn write(&self) -> Result<Pixmap> {
        let mut data = Vec::with_capacity(4 * self.pixels.len());
        for [red, green, blue, alpha] in &self.pixels {
            let alpha = alpha.clamp(0.0, 1.0);
            // No channel of a premultiplied colour is above its alpha.
            let channel = |value: &f32| (value.clamp(0.0, alpha) * 255.0).round() as u8;
            data.extend([channel(red), channel(green), channel(blue), (alpha * 255.0).round() as u8]);
        }
        let size = IntSize::from_wh(self.side as u32, self.side as u32).context("an empty drawing")?;
        Pixmap::from_vec(data, size).context("a drawing that is not square")
    }

    fn at(&self, x: isize, y: isize) -> [f32; 4] {
        let inside = 0..self.side as isize;
        if inside.contains(&x) && inside.contains(&y) {
            self.pixels[y as usize * self.side + x as usize]
        } else {
            [0.0; 4]
        }
    }

    /// Between four pixels.
    fn sample(&self, x: f32, y: f32) -> [f32; 4] {
        let (left, top) = (x.floor(), y.floor());
        let (right_share, bottom_share) = (x - left, y - top);
        let (left, top) = (left as isize, top as isize);
        let corners = [
            (self.at(left, top), (1.0 - right_share) * (1.0 - bottom_share)),
            (self.at(left + 1, top), right_share * (1.0 - bottom_share)),
            (self.at(left, top + 1), (1.0 - right_share) * bottom_share),
            (self.at(left + 1, top + 1), right_share * bottom_share),
        ];
        [0, 1, 2, 3].map(|c| corners.iter().map(|(pixel, share)| pixel[c] * share).sum())
    }

    /// Each pixel by `f` of its place.
    fn map(&self, f: impl Fn(usize, usize) -> [f32; 4]) -> Self {
        let side = self.side;
        Self { side, pixels: (0..side * side).map(|index| f(index % side, index / side)).collect() }
    }

    /// Other proportions: moved along slow waves.
    fn warped(&self, rng: &mut ChaCha8Rng) -> Self {
        let side = self.side as f32;
        let strength = rng.random_range(0.01..0.045) * side;
        let waves: Vec<[f32; 5]> = (0..3)
            .map(|_| {
                let mut part = |range: std::ops::Range<f32>| rng.random_range(range);
                let turns = std::f32::consts::TAU / side;
                [
                    part(-1.6..1.6) * turns,
                    part(-1.6..1.6) * turns,
                    part(0.0..6.3),
                    part(-1.0..1.0) * strength,
                    part(-1.0..1.0) * strength,
                ]
            })
            .collect();
        self.map(|x, y| {
            let (x, y) = (x as f32, y as f32);
            let mut from = (x, y);
            for [along_x, along_y, phase, by_x, by_y] in &waves {
                let wave = (along_x * x + along_y * y + phase).sin();
                from = (from.0 + by_x * wave, from.1 + by_y * wave);
            }
            self.sample(from.0, from.1)
        })
    }

    /// Without fine lines: means of squares, by sums over rows and then columns.
    fn smoothed(&self, radius: usize) -> Self {
        let reach = radius as isize;
        let width = (2 * radius + 1) as f32;
        let mean = |of: &Self, x: usize, y: usize, (dx, dy): (isize, isize)| {
            let mut sum = [0.0; 4];
            for step in -reach..=reach {
                let pixel = of.at(x as isize + step * dx, y as isize + step * dy);
                sum = [0, 1, 2, 3].map(|c| sum[c] + pixel[c] / width);
            }
            sum
        };
        let rows = self.map(|x, y| mean(self, x, y, (1, 0)));
        let mut blurred = rows.map(|x, y| mean(&rows, x, y, (0, 1)));
        // The edge of the thing stays where it was and as sharp.
        for (pixel, was) in blurred.pixels.iter_mut().zip(&self.pixels) {
            let scale = if pixel[3] > 0.02 { was[3] / pixel[3] } else { 0.0 };
            *pixel = pixel.map(|value| value * scale);
        }
        blurred
    }

    /// Each colour by `f`, alpha as it is.
    fn recolor(&mut self, f: impl Fn(usize, usize, [f32; 3]) -> [f32; 3]) {
        let side = self.side;
        for (index, pixel) in self.pixels.iter_mut().enumerate() {
            let alpha = pixel[3];
            if alpha > 0.004 {
                let color = [0, 1, 2].map(|c| pixel[c] / alpha);
                let [red, green, blue] = f(index % side, index / side, color).map(|v| v.clamp(0.0, 1.0));
                *pixel = [red * alpha, green * alpha, blue * alpha, alpha];
            }
        }
    }

    /// Flat areas of few colours.
    fn posterize(&mut self, rng: &mut ChaCha8Rng) {
        let steps = rng.random_range(2..=5) as f32;
        self.recolor(|_, _, color| color.map(|value| (value * steps).round() / steps));
    }

    /// Each channel darker or lighter in its middle.
    fn curve(&mut self, rng: &mut ChaCha8Rng) {
        let common: f32 = rng.random_range(0.65..1.5);
        let powers = [0, 1, 2].map(|_| common * rng.random_range(0.85..1.18));
        self.recolor(|_, _, color| [0, 1, 2].map(|c| color[c].powf(powers[c])));
    }

    /// Light from one side, or a gloss.
    fn shade(&mut self, rng: &mut ChaCha8Rng) {
        let side = self.side as f32;
        let angle: f32 = rng.random_range(0.0..6.3);
        let (sin, cos) = angle.sin_cos();
        let strength = rng.random_range(0.1..0.35);
        let round = rng.random_bool(0.5);
        let (at_x, at_y) = (0.5 + 0.25 * cos, 0.5 + 0.25 * sin);
        self.recolor(|x, y, color| {
            let (x, y) = (x as f32 / side, y as f32 / side);
            let light = if round {
                0.5 - ((x - at_x).powi(2) + (y - at_y).powi(2)).sqrt()
            } else {
                (x - 0.5) * cos + (y - 0.5) * sin
            };
            color.map(|value| value + strength * light * 2.0 * if light > 0.0 { 1.0 - value } else { value })
        });
    }

    /// How much brightness changes at each pixel.
    fn edges(&self) -> Vec<f32> {
        let brightness = |x: isize, y: isize| {
            let [red, green, blue, alpha] = self.at(x, y);
            // Over white, so that the thing's own edge is one.
            0.3 * red + 0.6 * green + 0.1 * blue + (1.0 - alpha)
        };
        let side = self.side as isize;
        let change = |index: isize| {
            let (x, y) = (index % side, index / side);
            let across = brightness(x + 1, y) - brightness(x - 1, y);
            let down = brightness(x, y + 1) - brightness(x, y - 1);
            (across * across + down * down).sqrt()
        };
        (0..side * side).map(change).collect()
    }

    /// Dark lines where areas meet.
    fn trace(&mut self, rng: &mut ChaCha8Rng) {
        let edges = self.edges();
        let strength = rng.random_range(0.8..2.5);
        let side = self.side;
        self.recolor(|x, y, color| {
            let ink = (edges[y * side + x] * strength).min(0.9);
            color.map(|value| value * (1.0 - ink))
        });
    }

    /// Lines on paper.
    fn line_art(&mut self) {
        let edges = self.edges();
        let side = self.side;
        self.recolor(|x, y, _| [1.0 - (edges[y * side + x] * 2.5).min(1.0); 3]);
    }

    /// A line around the whole thing, dark more often than white.
    fn outlined(&self, rng: &mut ChaCha8Rng) -> Self {
        let radius = rng.random_range(1..=3_i32) as isize;
        let gray = if rng.random_bool(0.7) { rng.random_range(0.0..0.35) } else { 1.0 };
        let [red, green, blue] = [0, 1, 2].map(|_| (gray + rng.random_range(-0.1..0.1_f32)).clamp(0.0, 1.0));
        let line = [red, green, blue, 1.0];
        self.map(|x, y| {
            let inside = self.at(x as isize, y as isize);
            if inside[3] >= 1.0 {
                return inside;
            }
            let mut reached: f32 = 0.0;
            for dy in -radius..=radius {
                for dx in -radius..=radius {
                    if dx * dx + dy * dy <= radius * radius {
                        reached = reached.max(self.at(x as isize + dx, y as isize + dy)[3]);
                    }
                }
            }
            let behind = reached * (1.0 - inside[3]);
            [0, 1, 2, 3].map(|c| inside[c] + behind * line[c])
        })
    }

    /// A part that is not to be seen.
    fn cover(&mut self, rng: &mut ChaCha8Rng) {
        let side = self.side as f32;
        let [width, height] = [0, 1].map(|_| rng.random_range(0.15..0.4) * side);
        let (left, top) = (rng.random_range(0.0..side - width), rng.random_range(0.0..side - height));
        let side = self.side;
        for (index, pixel) in self.pixels.iter_mut().enumerate() {
            let (x, y) = ((index % side) as f32, (index / side) as f32);
            if (left..left + width).contains(&x) && (top..top + height).contains(&y) {
                *pixel = [0.0; 4];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use resvg::tiny_skia::{Color, PremultipliedColorU8};

    use super::*;

    fn square() -> Pixmap {
        let mut thing = Pixmap::new(64, 64).unwrap();
        let color: PremultipliedColorU8 = Color::from_rgba8(200, 40, 40, 255).premultiply().to_color_u8();
        for (index, pixel) in thing.pixels_mut().iter_mut().enumerate() {
            if (16..48).contains(&(index % 64)) && (16..48).contains(&(index / 64)) {
                *pixel = color;
            }
        }
        thing
    }

    #[test]
    fn a_style_follows_from_its_seed_and_leaves_something_to_see() {
        let thing = square();
        let drawn = |seed| restyle(&mut ChaCha8Rng::seed_from_u64(seed), &thing, false).unwrap();
        assert_eq!(drawn(1).data(), drawn(1).data());
        let mut different = 0;
        for seed in 0..50 {
            let drawn = drawn(seed);
            different += usize::from(drawn.data() != thing.data());
            let seen = drawn.pixels().iter().filter(|pixel| pixel.alpha() > 128).count();
            assert!((400..1800).contains(&seen), "seed {seed}: {seen} pixels");
        }
        assert!(different > 40);
    }

    #[test]
    fn reading_and_writing_change_nothing() {
        let thing = square();
        assert_eq!(Drawing::read(&thing).write().unwrap().data(), thing.data());
    }
}
