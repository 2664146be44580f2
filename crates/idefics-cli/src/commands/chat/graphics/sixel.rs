//! Sixel: strips of six rows, one colour at a time.
//!
//! Source: the VT330/VT340 Programmer Reference Manual, volume 2, chapter 14. The palette is a fixed cube, which
//! every terminal with 256 registers holds; the error of a pixel goes on to its neighbours after Floyd and
//! Steinberg.

use std::fmt::Write;

use idefics::processor::RgbImage;

/// Levels of red, green and blue: 6·7·6 = 252 colours.
const LEVELS: [i32; 3] = [6, 7, 6];
const COLORS: usize = 6 * 7 * 6;
const STRIP: usize = 6;

/// The picture in its own size; ends with a new line.
pub(super) fn encode(image: &RgbImage) -> String {
    let indices = quantize(image);
    // Raster attributes: square pixels, the size. P2=1 leaves what is not drawn.
    let mut text = format!("\x1bP0;1q\"1;1;{};{}", image.width(), image.height());
    for register in used(&indices) {
        let percent = |channel: usize| level_of(register, channel) * 100 / (LEVELS[channel] - 1);
        add(&mut text, format_args!("#{register};2;{};{};{}", percent(0), percent(1), percent(2)));
    }
    for strip in indices.chunks(STRIP * image.width()) {
        for register in used(strip) {
            add(&mut text, format_args!("#{register}"));
            runs(&mut text, strip, image.width(), register);
            // Back to the start of the strip, for the next colour.
            text.push('$');
        }
        text.push('-');
    }
    text + "\x1b\\\n"
}

/// The registers that some pixels have, in their order.
fn used(indices: &[u8]) -> Vec<u8> {
    let mut is_used = [false; COLORS];
    for &index in indices {
        is_used[usize::from(index)] = true;
    }
    (0..COLORS as u8).filter(|&index| is_used[usize::from(index)]).collect()
}

/// The columns of a strip in one colour, repeated ones counted.
fn runs(text: &mut String, strip: &[u8], width: usize, register: u8) {
    let column = |x: usize| {
        let rows = strip.iter().skip(x).step_by(width).enumerate();
        rows.fold(0, |bits, (y, &index)| bits | (u8::from(index == register) << y))
    };
    let mut x = 0;
    while x < width {
        let bits = column(x);
        let length = (x..width).take_while(|&x| column(x) == bits).count();
        let character = char::from(b'?' + bits);
        if length > 3 {
            add(text, format_args!("!{length}{character}"));
        } else {
            text.extend(std::iter::repeat_n(character, length));
        }
        x += length;
    }
}

/// The register of each pixel, `[h, w, 3] -> [h, w]`.
fn quantize(image: &RgbImage) -> Vec<u8> {
    let width = image.width();
    let mut indices = Vec::with_capacity(width * image.height());
    // Errors that fall on this row and the next, in sixteenths, with a margin on both sides.
    let (mut here, mut below) = (vec![[0i32; 3]; width + 2], vec![[0i32; 3]; width + 2]);
    for row in image.data().chunks_exact(width * 3) {
        for (x, pixel) in row.chunks_exact(3).enumerate() {
            let mut register = 0;
            for channel in 0..3 {
                let wanted = (i32::from(pixel[channel]) + here[x + 1][channel] / 16).clamp(0, 255);
                let steps = LEVELS[channel] - 1;
                let level = (wanted * steps + 127) / 255;
                let error = wanted - level * 255 / steps;
                here[x + 2][channel] += 7 * error;
                below[x][channel] += 3 * error;
                below[x + 1][channel] += 5 * error;
                below[x + 2][channel] += error;
                register = register * LEVELS[channel] + level;
            }
            indices.push(register as u8);
        }
        std::mem::swap(&mut here, &mut below);
        below.fill([0; 3]);
    }
    indices
}

/// The level of a channel in a register.
fn level_of(register: u8, channel: usize) -> i32 {
    let behind: i32 = LEVELS[channel + 1..].iter().product();
    i32::from(register) / behind % LEVELS[channel]
}

fn add(text: &mut String, what: std::fmt::Arguments<'_>) {
    text.write_fmt(what).expect("a string takes all text");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads sixels back: rows of percentages.
    fn decode(text: &str) -> Vec<Vec<[u32; 3]>> {
        let body = text.strip_prefix("\x1bP0;1q").unwrap().strip_suffix("\x1b\\\n").unwrap();
        let numbers = |rest: &mut &str| {
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != ';').unwrap_or(rest.len());
            let (digits, behind) = rest.split_at(end);
            *rest = behind;
            digits.split(';').map(|digits| digits.parse().unwrap()).collect::<Vec<u32>>()
        };
        let mut rest = &body[1..];
        let size = numbers(&mut rest);
        let (width, height) = (size[2] as usize, size[3] as usize);
        let mut rows = vec![vec![[999; 3]; width]; height];
        let mut palette = vec![[0; 3]; 256];
        let (mut x, mut y, mut register) = (0, 0, 0);
        while let Some(c) = rest.chars().next() {
            rest = &rest[1..];
            let mut count = 1;
            let mut sixel = c;
            match c {
                '#' => {
                    let values = numbers(&mut rest);
                    register = values[0] as usize;
                    if let [_, 2, r, g, b] = values[..] {
                        palette[register] = [r, g, b];
                    }
                    continue;
                }
                '$' => {
                    x = 0;
                    continue;
                }
                '-' => {
                    (x, y) = (0, y + 6);
                    continue;
                }
                '!' => {
                    count = numbers(&mut rest)[0] as usize;
                    sixel = rest.chars().next().unwrap();
                    rest = &rest[1..];
                }
                _ => {}
            }
            for _ in 0..count {
                for bit in (0..6).filter(|bit| (sixel as u8 - b'?') >> bit & 1 == 1) {
                    assert_eq!(rows[y + bit][x], [999; 3], "a pixel is drawn once");
                    rows[y + bit][x] = palette[register];
                }
                x += 1;
            }
        }
        rows
    }

    #[test]
    fn what_is_drawn_is_the_picture() {
        // Colours of the cube are exact, so nothing is dithered.
        let colors: [[u8; 3]; 4] = [[255, 0, 0], [0, 255, 0], [51, 85, 102], [255, 255, 255]];
        let (width, height) = (9, 8);
        let pixel = |i: usize| colors[(i / 5) % 4];
        let image = RgbImage::new(width, height, (0..width * height).flat_map(pixel).collect()).unwrap();
        for (i, got) in decode(&encode(&image)).into_iter().flatten().enumerate() {
            assert_eq!(got, pixel(i).map(|sample| u32::from(sample) * 100 / 255), "pixel {i}");
        }
    }

    #[test]
    fn dithering_keeps_the_mean() {
        let image = RgbImage::new(32, 32, [70, 130, 180].repeat(32 * 32)).unwrap();
        let pixels = decode(&encode(&image));
        for (channel, expected) in [70.0, 130.0, 180.0].into_iter().enumerate() {
            let sum: u32 = pixels.iter().flatten().map(|pixel| pixel[channel]).sum();
            let mean = f64::from(sum) / 1024.0 * 2.55;
            assert!((mean - expected).abs() < 4.0, "channel {channel}: {mean}, expected {expected}");
        }
    }
}
