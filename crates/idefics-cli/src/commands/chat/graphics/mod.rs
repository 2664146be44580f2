//! Pictures in a terminal: as pixels where it can, as coloured half blocks where it cannot.

mod blocks;
mod detect;
mod escapes;
mod sixel;

use clap::ValueEnum;
use idefics::processor::{RgbImage, resize::resize_bicubic};

pub(super) use detect::detect;

/// How pictures are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Graphics {
    /// The graphics protocol of kitty, which Ghostty and Konsole also speak
    Kitty,
    /// The inline images of iTerm2, which `WezTerm` also shows
    Iterm2,
    /// Sixel: foot, mlterm, xterm with `-ti vt340`, tmux
    Sixel,
    /// Two coloured pixels a character, in any terminal with colours
    Blocks,
    /// No pictures
    None,
}

/// What a terminal offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Screen {
    pub(super) columns: usize,
    pub(super) rows: usize,
    /// Pixels of a character, width and height.
    pub(super) cell: (usize, usize),
    pub(super) colors: Colors,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colors {
    /// 24 bits.
    True,
    /// The 6x6x6 cube of xterm's palette.
    Palette,
}

/// Most columns and rows of a picture: it is there to be recognised, not to fill the screen.
const MAX_COLUMNS: usize = 48;
const MAX_ROWS: usize = 14;

impl Graphics {
    /// The characters that show a picture; ends with a new line.
    pub(super) fn render(self, image: &RgbImage, screen: &Screen) -> String {
        let (columns, rows) = fit(image, screen);
        match self {
            Self::Kitty => escapes::kitty(image, columns, rows),
            Self::Iterm2 => escapes::iterm2(image, columns, rows),
            Self::Sixel => {
                let (width, height) = (columns * screen.cell.0, rows * screen.cell.1);
                sixel::encode(&resize_bicubic(image, width.max(1), height.max(1)))
            }
            Self::Blocks => blocks::render(&resize_bicubic(image, columns, 2 * rows), screen.colors),
            Self::None => String::new(),
        }
    }
}

/// Columns and rows of a picture, in its proportions as near as characters allow.
fn fit(image: &RgbImage, screen: &Screen) -> (usize, usize) {
    let (cell_width, cell_height) = (screen.cell.0.max(1) as f64, screen.cell.1.max(1) as f64);
    let (width, height) = (image.width() as f64 / cell_width, image.height() as f64 / cell_height);
    let max_columns = MAX_COLUMNS.min(screen.columns.saturating_sub(1)).max(1);
    let max_rows = MAX_ROWS.min(screen.rows.saturating_sub(3)).max(1);
    let scale = (max_columns as f64 / width).min(max_rows as f64 / height);
    let side = |length: f64, most: usize| ((length * scale).round() as usize).clamp(1, most);
    (side(width, max_columns), side(height, max_rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_keep_their_proportions_and_fit() {
        let image = |width, height| RgbImage::new(width, height, vec![0; width * height * 3]).unwrap();
        let screen = |columns, rows| Screen { columns, rows, cell: (10, 20), colors: Colors::True };
        // (picture, screen) -> (columns, rows), two columns as wide as a row is high
        let rows = [
            ((480, 480), (80, 24), (28, 14)),
            ((480, 120), (80, 24), (48, 6)),
            ((120, 480), (80, 24), (7, 14)),
            ((480, 480), (20, 24), (19, 10)),
            ((480, 480), (80, 8), (10, 5)),
            ((480, 1), (80, 24), (48, 1)),
            ((1, 480), (1, 1), (1, 1)),
        ];
        for ((width, height), (columns, lines), expected) in rows {
            assert_eq!(fit(&image(width, height), &screen(columns, lines)), expected, "{width}x{height}");
        }
    }
}
