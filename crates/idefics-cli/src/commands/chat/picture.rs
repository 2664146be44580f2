//! A picture of a conversation: read once, when it is added.

use std::sync::Arc;

use anyhow::Context;
use idefics::{
    Segment,
    processor::{ImageProcessor, ImageSource, ProcessOptions, RgbImage, load_image, resize::resize_bicubic},
};
use url::Url;

/// Longest side of what is kept to be shown.
const THUMBNAIL_SIDE: usize = 480;

pub(super) struct Picture {
    /// Where it came from, which is what is saved.
    pub(super) source: ImageSource,
    /// The picture in the size that the model takes: resizing it again changes nothing, so it is decoded once and
    /// a long conversation keeps kilobytes of each.
    for_model: Arc<RgbImage>,
    /// The picture in its proportions, to be shown.
    pub(super) thumbnail: RgbImage,
    /// Columns and rows of the picture itself.
    pub(super) size: (usize, usize),
}

impl Picture {
    pub(super) fn open(
        source: ImageSource,
        processor: &ImageProcessor,
        options: &ProcessOptions,
    ) -> anyhow::Result<Self> {
        let image = load_image(&source, &options.limits, &options.fetch, options.orientation)
            .with_context(|| format!("picture {}", name_of(&source)))?;
        let size = (image.width(), image.height());
        let thumbnail = within(&image, THUMBNAIL_SIDE);
        let for_model = match processor.size {
            Some((rows, columns)) => Arc::new(resize_bicubic(&image, columns, rows)),
            None => image,
        };
        Ok(Self { source, for_model, thumbnail, size })
    }

    pub(super) fn segment(&self) -> Segment {
        Segment::Image(ImageSource::Rgb(self.for_model.clone()))
    }

    /// How it is called in messages.
    pub(super) fn name(&self) -> String {
        name_of(&self.source)
    }
}

/// Without the query of an address, which may hold a secret, and without a picture's data.
pub(super) fn name_of(source: &ImageSource) -> String {
    match source {
        ImageSource::Path(path) => path.display().to_string(),
        ImageSource::Url(address) => match Url::parse(address) {
            Ok(url) if url.has_host() => {
                format!("{}://{}{}", url.scheme(), url.host_str().unwrap_or_default(), url.path())
            }
            _ => "address".to_owned(),
        },
        ImageSource::DataUri(_) | ImageSource::Bytes(_) | ImageSource::Rgb(_) => "data URI".to_owned(),
    }
}

fn within(image: &RgbImage, side: usize) -> RgbImage {
    let longest = image.width().max(image.height());
    if longest <= side {
        return image.clone();
    }
    let scaled = |length: usize| (length * side / longest).max(1);
    resize_bicubic(image, scaled(image.width()), scaled(image.height()))
}

#[cfg(test)]
mod tests {
    use idefics::{Processor, processor::ExifOrientation};
    use idefics_testing::fixture;

    use super::*;

    #[test]
    fn what_is_kept_gives_the_model_the_same_numbers() {
        let processor = Processor::from_pretrained(fixture("tiny")).unwrap();
        let options = ProcessOptions::default();
        for name in ["444.jpg", "alpha.bmp", "one_wide.png"] {
            let source = ImageSource::Path(fixture(&format!("processor/{name}")));
            let picture = Picture::open(source.clone(), processor.image_processor(), &options).unwrap();
            let direct =
                load_image(&source, &options.limits, &options.fetch, ExifOrientation::Ignore).unwrap();
            let Segment::Image(ImageSource::Rgb(kept)) = picture.segment() else {
                panic!("a decoded picture")
            };
            let image_processor = processor.image_processor();
            assert_eq!(image_processor.process(&kept), image_processor.process(&direct), "{name}");
            assert_eq!(picture.size, (direct.width(), direct.height()));
        }
    }

    #[test]
    fn thumbnails_keep_proportions() {
        let image = RgbImage::new(1000, 10, vec![7; 30_000]).unwrap();
        let small = within(&image, 100);
        assert_eq!((small.width(), small.height()), (100, 1));
        assert_eq!(within(&small, 100), small);
    }
}
