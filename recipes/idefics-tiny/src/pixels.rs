//! Pictures of things with transparency, and their files.

use std::{fs::File, io::BufWriter, path::Path};

use anyhow::{Context, Result, ensure};
use resvg::{
    tiny_skia::{Pixmap, Transform},
    usvg::{Options, Tree},
};

/// Side of the pictures of single things; the largest that a scene shows them.
pub(crate) const SIDE: u32 = 128;

/// Draws an SVG so that its visible part fills the square but for a margin.
///
/// Bounds in the file are not to be trusted, clipped parts count there, so it is drawn twice: once to see where
/// something is.
///
/// # Errors
/// If the text is not SVG or shows nothing.
pub(crate) fn rasterize(svg: &str) -> Result<Pixmap> {
    let tree = Tree::from_str(svg, &Options::default())?;
    let whole = tree.root().abs_layer_bounding_box();
    let first = draw(&tree, (whole.x(), whole.y(), whole.width(), whole.height()))?;
    let (x, y, width, height) = visible(&first.pixmap).context("nothing to see")?;
    let back = |pixel: u32, offset: f32| (pixel as f32 - offset) / first.scale;
    let seen = (
        back(x, first.offset.0),
        back(y, first.offset.1),
        width as f32 / first.scale,
        height as f32 / first.scale,
    );
    let second = draw(&tree, seen)?;
    let covered = second.pixmap.pixels().iter().filter(|pixel| pixel.alpha() > 32).count();
    ensure!(covered * 200 > second.pixmap.pixels().len(), "next to nothing to see");
    Ok(second.pixmap)
}

struct Drawn {
    pixmap: Pixmap,
    scale: f32,
    offset: (f32, f32),
}

/// Draws the part `(x, y, width, height)` of a tree into the middle of the square.
fn draw(tree: &Tree, (x, y, width, height): (f32, f32, f32, f32)) -> Result<Drawn> {
    let extent = width.max(height);
    ensure!(extent.is_finite() && extent > 0.0, "nothing to see");
    let scale = (SIDE as f32 - 4.0) / extent;
    let offset = |start: f32, length: f32| SIDE as f32 / 2.0 - (start + length / 2.0) * scale;
    let offset = (offset(x, width), offset(y, height));
    let mut pixmap = Pixmap::new(SIDE, SIDE).context("no memory for a picture")?;
    let transform = Transform::from_row(scale, 0.0, 0.0, scale, offset.0, offset.1);
    resvg::render(tree, transform, &mut pixmap.as_mut());
    Ok(Drawn { pixmap, scale, offset })
}

/// The smallest rectangle `(x, y, width, height)` with everything that can be seen.
fn visible(pixmap: &Pixmap) -> Option<(u32, u32, u32, u32)> {
    let seen = pixmap.pixels().iter().enumerate().filter(|(_, pixel)| pixel.alpha() > 8);
    let bounds = seen.fold(None, |bounds: Option<(u32, u32, u32, u32)>, (index, _)| {
        let (x, y) = (index as u32 % SIDE, index as u32 / SIDE);
        let (left, top, right, bottom) = bounds.unwrap_or((x, y, x, y));
        Some((left.min(x), top.min(y), right.max(x), bottom.max(y)))
    });
    bounds.map(|(left, top, right, bottom)| (left, top, right - left + 1, bottom - top + 1))
}

/// Writes a picture as PNG with straight alpha.
pub(crate) fn write(pixmap: &Pixmap, path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), pixmap.width(), pixmap.height());
    encoder.set_color(png::ColorType::Rgba);
    let straight: Vec<u8> = pixmap
        .pixels()
        .iter()
        .flat_map(|pixel| {
            let color = pixel.demultiply();
            [color.red(), color.green(), color.blue(), color.alpha()]
        })
        .collect();
    encoder.write_header()?.write_image_data(&straight)?;
    Ok(())
}

/// Reads what [`write`] wrote.
pub(crate) fn read(path: &Path) -> Result<Pixmap> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Pixmap::decode_png(&bytes).with_context(|| format!("reading {}", path.display()))
}

/// A picture in the middle of a white square `[side, side, 3]`, as files of icons have it.
pub(crate) fn on_white(pixmap: &Pixmap, side: u32) -> Vec<u8> {
    let (width, height) = (pixmap.width(), pixmap.height());
    let mut rgb = vec![255; (side * side * 3) as usize];
    for y in 0..side {
        for x in 0..side {
            let (source_x, source_y) = (x * width / side, y * height / side);
            let pixel = pixmap.pixels()[(source_y * width + source_x) as usize];
            let white = 255 - pixel.alpha();
            let target = ((y * side + x) * 3) as usize;
            // Premultiplied, so the sum stays below 256.
            for (offset, channel) in [pixel.red(), pixel.green(), pixel.blue()].into_iter().enumerate() {
                rgb[target + offset] = channel + white;
            }
        }
    }
    rgb
}
