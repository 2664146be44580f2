//! What colour something has, computed from its pixels.

use resvg::tiny_skia::Pixmap;

/// The colours that have a name here.
pub(crate) const COLORS: [(&str, [u8; 3]); 11] = [
    ("red", [220, 40, 40]),
    ("orange", [250, 145, 35]),
    ("yellow", [250, 220, 50]),
    ("green", [60, 160, 60]),
    ("blue", [50, 110, 220]),
    ("purple", [140, 70, 190]),
    ("pink", [245, 150, 190]),
    ("brown", [130, 80, 45]),
    ("black", [20, 20, 22]),
    ("white", [250, 250, 250]),
    ("gray", [140, 143, 146]),
];

/// The index in [`COLORS`] of the name that people give to a colour.
pub(crate) fn name([red, green, blue]: [u8; 3]) -> usize {
    let [r, g, b] = [red, green, blue].map(|channel| f32::from(channel) / 255.0);
    let value = r.max(g).max(b);
    let chroma = value - r.min(g).min(b);
    let saturation = if value > 0.0 { chroma / value } else { 0.0 };
    if value < 0.2 {
        return 8;
    }
    if saturation < 0.14 || chroma < 0.08 {
        return if value > 0.86 {
            9
        } else if value < 0.27 {
            8
        } else {
            10
        };
    }
    let hue = 60.0
        * if value == r {
            ((g - b) / chroma).rem_euclid(6.0)
        } else if value == g {
            (b - r) / chroma + 2.0
        } else {
            (r - g) / chroma + 4.0
        };
    match hue {
        hue if !(14.0..340.0).contains(&hue) => {
            if saturation < 0.55 && value > 0.75 {
                6
            } else if value < 0.45 && saturation < 0.6 {
                7
            } else {
                0
            }
        }
        hue if hue < 42.0 => {
            if value < 0.72 || saturation < 0.45 {
                7
            } else {
                1
            }
        }
        hue if hue < 68.0 => {
            if value < 0.55 {
                7
            } else {
                2
            }
        }
        hue if hue < 172.0 => 3,
        hue if hue < 256.0 => 4,
        hue if hue < 296.0 => 5,
        _ => 6,
    }
}

/// The colour that most of a picture's visible part has, if there is one: an index in [`COLORS`].
pub(crate) fn dominant(pixmap: &Pixmap) -> Option<usize> {
    let mut counts = [0_u32; COLORS.len()];
    for pixel in pixmap.pixels().iter().filter(|pixel| pixel.alpha() > 128) {
        let color = pixel.demultiply();
        counts[name([color.red(), color.green(), color.blue()])] += 1;
    }
    let total: u32 = counts.iter().sum();
    let (index, &most) = counts.iter().enumerate().max_by_key(|(_, count)| **count)?;
    (most * 100 > total * 60).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_named_color_has_its_own_name() {
        for (index, (color, rgb)) in COLORS.into_iter().enumerate() {
            assert_eq!(COLORS[name(rgb)].0, color, "{index}");
        }
    }
}
