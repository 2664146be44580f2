//! Terminals that take a picture whole: kitty's graphics protocol and iTerm2's inline images.
//!
//! Sources: <https://sw.kovidgoyal.net/kitty/graphics-protocol/>, <https://iterm2.com/documentation-images.html>.

use std::fmt::Write;

use base64::{Engine, engine::general_purpose::STANDARD};
use idefics::processor::RgbImage;

/// Most characters of data in one escape sequence of kitty.
const KITTY_CHUNK: usize = 4096;

/// Raw RGB (`f=24`) to be shown at once (`a=T`) over so many cells, without a reply (`q=2`), which would end up
/// among what is typed.
pub(super) fn kitty(image: &RgbImage, columns: usize, rows: usize) -> String {
    let data = STANDARD.encode(image.data());
    let mut text = String::with_capacity(data.len() + data.len() / 64 + 128);
    let mut rest = data.as_str();
    let mut head = format!("a=T,f=24,q=2,s={},v={},c={columns},r={rows},", image.width(), image.height());
    while !rest.is_empty() {
        // Base64 is ASCII, so any byte is the start of a character.
        let (chunk, behind) = rest.split_at(KITTY_CHUNK.min(rest.len()));
        let is_more = u8::from(!behind.is_empty());
        write!(text, "\x1b_G{head}m={is_more};{chunk}\x1b\\").expect("a string takes all text");
        head.clear();
        rest = behind;
    }
    text + "\n"
}

/// A PNG file over so many cells.
pub(super) fn iterm2(image: &RgbImage, columns: usize, rows: usize) -> String {
    let png = png_file(image);
    format!(
        "\x1b]1337;File=inline=1;size={};width={columns};height={rows};preserveAspectRatio=1:{}\x07\n",
        png.len(),
        STANDARD.encode(&png)
    )
}

fn png_file(image: &RgbImage) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, image.width() as u32, image.height() as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(image.data()));
    written.expect("a thumbnail of right size goes into memory");
    file
}

#[cfg(test)]
mod tests {
    use idefics::processor::{ExifOrientation, ImageLimits, decode::decode};

    use super::*;

    fn image() -> RgbImage {
        RgbImage::new(64, 48, (0..64 * 48 * 3).map(|i| (i * 7 % 251) as u8).collect()).unwrap()
    }

    #[test]
    fn kitty_gets_the_samples_in_chunks() {
        let image = image();
        let text = kitty(&image, 8, 3);
        assert!(text.starts_with("\x1b_Ga=T,f=24,q=2,s=64,v=48,c=8,r=3,m=1;"));
        let commands: Vec<&str> = text.trim_end().split("\x1b\\").filter(|text| !text.is_empty()).collect();
        let mut data = String::new();
        for (index, command) in commands.iter().enumerate() {
            let (control, chunk) = command.strip_prefix("\x1b_G").unwrap().split_once(';').unwrap();
            assert!(chunk.len() <= KITTY_CHUNK);
            assert_eq!(control.ends_with("m=0"), index + 1 == commands.len(), "{control}");
            data += chunk;
        }
        assert_eq!(STANDARD.decode(data).unwrap(), image.data());
    }

    #[test]
    fn iterm2_gets_a_file() {
        let image = image();
        let text = iterm2(&image, 8, 3);
        let (control, data) = text.trim_end_matches("\x07\n").split_once(':').unwrap();
        let file = STANDARD.decode(data).unwrap();
        assert_eq!(
            control,
            format!("\x1b]1337;File=inline=1;size={};width=8;height=3;preserveAspectRatio=1", file.len())
        );
        let back = decode(&file, &ImageLimits::default(), ExifOrientation::Ignore).unwrap();
        assert_eq!(back.data(), image.data());
    }
}
