//! Half blocks: the upper half of a character in one colour, the lower in another.

use std::fmt::Write;

use idefics::processor::RgbImage;

use super::Colors;

/// A picture of an even number of rows, two rows a line.
pub(super) fn render(image: &RgbImage, colors: Colors) -> String {
    let mut text = String::new();
    let row_bytes = image.width() * 3;
    for rows in image.data().chunks(2 * row_bytes) {
        let (upper, lower) = rows.split_at(row_bytes);
        for (above, below) in upper.chunks_exact(3).zip(lower.chunks_exact(3)) {
            let (above, below) = (color(above, colors), color(below, colors));
            write!(text, "\x1b[38;{above};48;{below}m▀").expect("a string takes all text");
        }
        text += "\x1b[0m\n";
    }
    text
}

fn color(pixel: &[u8], colors: Colors) -> String {
    match colors {
        Colors::True => format!("2;{};{};{}", pixel[0], pixel[1], pixel[2]),
        Colors::Palette => {
            let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(cube_level);
            format!("5;{}", 16 + 36 * r + 6 * g + b)
        }
    }
}

/// The nearest of xterm's six levels 0, 95, 135, 175, 215, 255.
fn cube_level(sample: u8) -> usize {
    const LEVELS: [u8; 6] = [0, 95, 135, 175, 215, 255];
    let distance = |&index: &usize| LEVELS[index].abs_diff(sample);
    (0..LEVELS.len()).min_by_key(distance).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_rows_are_a_line() {
        let image = RgbImage::new(1, 2, vec![255, 0, 0, 0, 0, 255]).unwrap();
        assert_eq!(render(&image, Colors::True), "\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m\n");
        // Red is 16 + 36·5, blue 16 + 5.
        assert_eq!(render(&image, Colors::Palette), "\x1b[38;5;196;48;5;21m▀\x1b[0m\n");
    }

    #[test]
    fn levels_are_the_nearest() {
        for (sample, level) in [(0, 0), (47, 0), (48, 1), (95, 1), (116, 2), (235, 4), (236, 5), (255, 5)] {
            assert_eq!(cube_level(sample), level, "{sample}");
        }
    }
}
