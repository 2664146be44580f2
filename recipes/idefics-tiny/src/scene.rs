//! Pictures to learn from: things at other places, sizes and angles, in other light, on other backgrounds, and as
//! JPEG stores them, so that it is the thing and not the file that is learnt.

use anyhow::{Context, Result};
use rand::{Rng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use resvg::tiny_skia::{Color, FilterQuality, IntSize, Pixmap, PixmapPaint, PremultipliedColorU8, Transform};

use crate::color::{COLORS, dominant};

/// Side of a scene: what the model takes, so that nothing is lost between.
pub(crate) const SCENE_SIDE: u32 = 126;

/// How far a scene is from the drawing it is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variation {
    /// The thing in the middle of a white square, as files of icons have it.
    None,
    /// Everything that varies.
    Strong,
    /// Everything but the colours: for what is named after its own.
    SameColors,
}

/// A scene and what is true of it.
#[derive(Debug, Clone)]
pub(crate) struct Scene {
    pub(crate) jpeg: Vec<u8>,
    /// The main colour of each thing, if it has one: an index in [`COLORS`].
    pub(crate) colors: Vec<Option<usize>>,
    pub(crate) background: &'static str,
}

/// Where a thing goes: middle and side of its square, in parts of the scene's side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) x: f32,
    pub(crate) y: f32,
    pub(crate) side: f32,
}

impl Place {
    /// Alone in the picture.
    pub(crate) fn alone(rng: &mut ChaCha8Rng, variation: Variation) -> Self {
        if variation == Variation::None {
            return Self { x: 0.5, y: 0.5, side: rng.random_range(0.82..0.98) };
        }
        let side: f32 = rng.random_range(0.45..1.05);
        let slack = (1.0 - side).max(0.0) / 2.0 + 0.04;
        Self { x: 0.5 + rng.random_range(-slack..slack), y: 0.5 + rng.random_range(-slack..slack), side }
    }

    /// One beside the other.
    pub(crate) fn pair(rng: &mut ChaCha8Rng) -> [Self; 2] {
        [0.25, 0.75].map(|x| Self {
            x: x + rng.random_range(-0.03..0.03),
            y: 0.5 + rng.random_range(-0.18..0.18),
            side: rng.random_range(0.38..0.52),
        })
    }

    /// `count` of them, at most six, that do not cover each other.
    pub(crate) fn several(rng: &mut ChaCha8Rng, count: usize) -> Vec<Self> {
        let (columns, rows) = match count {
            1 => (1, 1),
            2 if rng.random_bool(0.5) => (2, 1),
            2..=4 => (2, 2),
            _ => (3, 2),
        };
        let mut cells: Vec<usize> = (0..columns * rows).collect();
        while cells.len() > count {
            cells.remove(rng.random_range(0..cells.len()));
        }
        let longest = columns.max(rows) as f32;
        let place = |cell: usize| Self {
            x: (0.5 + (cell % columns) as f32) / columns as f32 + rng.random_range(-0.03..0.03),
            y: (0.5 + (cell / columns) as f32) / rows as f32 + rng.random_range(-0.03..0.03),
            side: rng.random_range(0.72..0.98) / longest,
        };
        cells.into_iter().map(place).collect()
    }
}

/// Draws `things` at their places.
pub(crate) fn compose(
    rng: &mut ChaCha8Rng,
    things: &[(&Pixmap, Place)],
    variation: Variation,
) -> Result<Scene> {
    let (mut canvas, background) = background(rng, variation)?;
    // All copies of a thing look alike.
    let light = Light::draw(rng, variation);
    let mut colors = Vec::new();
    for (thing, place) in things {
        let thing = light.apply(thing)?;
        colors.push(dominant(&thing));
        draw(rng, &mut canvas, &thing, *place, variation)?;
    }
    let mut rgb: Vec<u8> =
        canvas.pixels().iter().flat_map(|pixel| [pixel.red(), pixel.green(), pixel.blue()]).collect();
    if variation != Variation::None && rng.random_bool(0.35) {
        add_noise(rng, &mut rgb);
    }
    let quality = if variation == Variation::None { 92.0 } else { rng.random_range(30.0..95.0) };
    Ok(Scene { jpeg: jpeg(&rgb, SCENE_SIDE, quality)?, colors, background })
}

/// A picture as JPEG; `rgb` is `[side, side, 3]`.
pub(crate) fn jpeg(rgb: &[u8], side: u32, quality: f32) -> Result<Vec<u8>> {
    let mut encoder = mozjpeg::Compress::new(mozjpeg::ColorSpace::JCS_RGB);
    encoder.set_size(side as usize, side as usize);
    encoder.set_quality(quality);
    // Smaller files are not worth the time here.
    encoder.set_fastest_defaults();
    let mut encoder = encoder.start_compress(Vec::new())?;
    encoder.write_scanlines(rgb)?;
    Ok(encoder.finish()?)
}

/// A change of all colours: turn of the hue, saturation, contrast, brightness.
struct Light {
    matrix: [[f32; 3]; 3],
    offset: f32,
}

impl Light {
    fn draw(rng: &mut ChaCha8Rng, variation: Variation) -> Self {
        if variation == Variation::None {
            return Self { matrix: [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], offset: 0.0 };
        }
        let angle: f32 = match rng.random_range(0..20) {
            0 if variation == Variation::Strong => rng.random_range(-3.1..3.1),
            0..=10 if variation == Variation::Strong => rng.random_range(-0.3..0.3),
            _ => 0.0,
        };
        let saturation: f32 = match rng.random_range(0..20) {
            0 if variation == Variation::Strong => 0.0,
            0..=10 => rng.random_range(0.6..1.3),
            _ => 1.0,
        };
        let contrast = rng.random_range(0.75..1.15);
        Self { matrix: hue_matrix(angle, saturation, contrast), offset: rng.random_range(-0.06..0.12) }
    }

    fn apply(&self, pixmap: &Pixmap) -> Result<Pixmap> {
        let mut changed = pixmap.clone();
        for pixel in changed.pixels_mut() {
            let color = pixel.demultiply();
            let rgb = [color.red(), color.green(), color.blue()].map(|channel| f32::from(channel) / 255.0);
            let alpha = f32::from(color.alpha()) / 255.0;
            let channel = |row: [f32; 3]| {
                let sum: f32 = row.iter().zip(rgb).map(|(weight, value)| weight * value).sum();
                ((sum + self.offset).clamp(0.0, 1.0) * alpha * 255.0).round() as u8
            };
            let [r, g, b] = self.matrix.map(channel);
            let alpha = color.alpha();
            *pixel = PremultipliedColorU8::from_rgba(r.min(alpha), g.min(alpha), b.min(alpha), alpha)
                .context("a colour above its alpha")?;
        }
        Ok(changed)
    }
}

/// Rotation around the grey axis, then saturation and contrast. The weights are those of luminance.
fn hue_matrix(angle: f32, saturation: f32, contrast: f32) -> [[f32; 3]; 3] {
    const LUMA: [f32; 3] = [0.213, 0.715, 0.072];
    const SINE: [[f32; 3]; 3] = [[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]];
    let (sin, cos) = angle.sin_cos();
    let mut matrix = [[0.0; 3]; 3];
    for row in 0..3 {
        for column in 0..3 {
            let identity = f32::from(u8::from(row == column));
            let turned = LUMA[column] + cos * (identity - LUMA[column]) + sin * SINE[row][column];
            matrix[row][column] = contrast * (LUMA[column] + saturation * (turned - LUMA[column]));
        }
    }
    matrix
}

fn draw(
    rng: &mut ChaCha8Rng,
    canvas: &mut Pixmap,
    thing: &Pixmap,
    place: Place,
    variation: Variation,
) -> Result<()> {
    let angle: f32 = if variation != Variation::None && rng.random_bool(0.7) {
        rng.random_range(-28.0..28.0)
    } else {
        0.0
    };
    let stretch: f32 = if variation == Variation::None { 1.0 } else { rng.random_range(0.88..1.14) };
    let wanted = place.side * SCENE_SIDE as f32;
    // Halved until less than a halving is left: sampling further apart would miss pixels.
    let mut source = thing.clone();
    while wanted < source.width() as f32 * 0.6 {
        source = halve(&source)?;
    }
    let scale = wanted / source.width() as f32;
    let half = source.width() as f32 / 2.0;
    let transform = Transform::from_translate(-half, -half)
        .post_scale(scale * stretch, scale / stretch)
        .post_rotate(angle)
        .post_translate(place.x * SCENE_SIDE as f32, place.y * SCENE_SIDE as f32);
    let paint = PixmapPaint { quality: FilterQuality::Bilinear, ..PixmapPaint::default() };
    canvas.draw_pixmap(0, 0, source.as_ref(), &paint, transform, None);
    Ok(())
}

/// Half the size, each pixel the mean of four.
fn halve(pixmap: &Pixmap) -> Result<Pixmap> {
    let (width, height) = (pixmap.width() / 2, pixmap.height() / 2);
    let stride = pixmap.width() as usize * 4;
    let data = pixmap.data();
    let mut half = Vec::with_capacity((width * height * 4) as usize);
    for y in 0..height as usize {
        for x in 0..width as usize {
            for channel in 0..4 {
                let first = 2 * y * stride + 8 * x + channel;
                let sum: u32 = [first, first + 4, first + stride, first + stride + 4]
                    .iter()
                    .map(|index| u32::from(data[*index]))
                    .sum();
                half.push(((sum + 2) / 4) as u8);
            }
        }
    }
    let size = IntSize::from_wh(width, height).context("nothing left to halve")?;
    Pixmap::from_vec(half, size).context("half a picture")
}

/// A background and what to call it.
fn background(rng: &mut ChaCha8Rng, variation: Variation) -> Result<(Pixmap, &'static str)> {
    let mut canvas = Pixmap::new(SCENE_SIDE, SCENE_SIDE).context("no memory for a picture")?;
    let white = Color::WHITE;
    if variation == Variation::None || rng.random_bool(0.2) {
        canvas.fill(white);
        return Ok((canvas, "white"));
    }
    let jitter = |rng: &mut ChaCha8Rng, rgb: [u8; 3]| {
        rgb.map(|channel| (f32::from(channel) + rng.random_range(-22.0..22.0)).clamp(0.0, 255.0))
    };
    let (name, first) = *COLORS.choose(rng).context("no colours")?;
    let (_, second) = *COLORS.choose(rng).context("no colours")?;
    let (first, second) = (jitter(rng, first), jitter(rng, second));
    let (angle, period) = (rng.random_range(0.0..6.3_f32), rng.random_range(6.0..40.0_f32));
    let (sin, cos) = angle.sin_cos();
    let blobs: Vec<[f32; 4]> = (0..rng.random_range(3..9))
        .map(|_| {
            let mut place = || rng.random_range(0.0..SCENE_SIDE as f32);
            [place(), place(), place() / 4.0 + 6.0, place() / SCENE_SIDE as f32]
        })
        .collect();
    let kind = rng.random_range(0..10);
    let mix = |x: f32, y: f32| -> f32 {
        let along = x * cos + y * sin;
        match kind {
            0..=5 => 0.0,
            6 | 7 => (along / SCENE_SIDE as f32 * 0.7 + 0.5).clamp(0.0, 1.0),
            8 => f32::from(u8::from((along / period).rem_euclid(2.0) < 1.0)),
            _ => {
                let inside = |[cx, cy, radius, strength]: &[f32; 4]| {
                    let distance = ((x - cx).powi(2) + (y - cy).powi(2)).sqrt() / radius;
                    strength * (1.4 - distance).clamp(0.0, 1.0)
                };
                blobs.iter().map(inside).sum::<f32>().min(1.0)
            }
        }
    };
    for (index, pixel) in canvas.pixels_mut().iter_mut().enumerate() {
        let (x, y) = (index as u32 % SCENE_SIDE, index as u32 / SCENE_SIDE);
        let share = mix(x as f32, y as f32);
        let [r, g, b] = [0, 1, 2].map(|c| (first[c] + share * (second[c] - first[c])).round() as u8);
        *pixel = PremultipliedColorU8::from_rgba(r, g, b, 255).context("an opaque colour")?;
    }
    let name = match kind {
        0..=5 => name,
        8 => "striped",
        _ => "colorful",
    };
    Ok((canvas, name))
}

fn add_noise(rng: &mut ChaCha8Rng, rgb: &mut [u8]) {
    let strength = rng.random_range(4.0..22.0_f32);
    for channel in rgb {
        let noise = (rng.random::<f32>() + rng.random::<f32>() - 1.0) * strength;
        *channel = (f32::from(*channel) + noise).clamp(0.0, 255.0) as u8;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn scenes_follow_from_their_seed_and_tell_the_truth() {
        let mut thing = Pixmap::new(128, 128).unwrap();
        thing.fill(Color::from_rgba8(220, 40, 40, 255));
        let scene = |seed, variation| {
            let rng = &mut ChaCha8Rng::seed_from_u64(seed);
            let place = Place::alone(rng, variation);
            compose(rng, &[(&thing, place)], variation).unwrap()
        };
        assert_eq!(scene(1, Variation::Strong).jpeg, scene(1, Variation::Strong).jpeg);
        assert_ne!(scene(1, Variation::Strong).jpeg, scene(2, Variation::Strong).jpeg);
        let plain = scene(3, Variation::None);
        assert_eq!(plain.colors, [Some(0)]);
        assert_eq!(plain.background, "white");
    }

    #[test]
    fn a_full_turn_of_the_hue_changes_nothing() {
        let matrix = hue_matrix(std::f32::consts::TAU, 1.0, 1.0);
        for (row, values) in matrix.iter().enumerate() {
            for (column, value) in values.iter().enumerate() {
                assert!((value - f32::from(u8::from(row == column))).abs() < 1e-4, "{matrix:?}");
            }
        }
    }
}
