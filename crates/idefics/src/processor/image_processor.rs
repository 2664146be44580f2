//! An RGB picture to the numbers that the vision tower takes.
//!
//! Reference: transformers `image_processing_pil_idefics.py` (`IdeficsImageProcessorPil`), which keeps the
//! numerics of the published results: 8-bit bicubic resize to the exact size, then `x·rescale_factor` in float64
//! rounded to float32, then `(x − mean) / std` in float32. `[h, w, 3] u8 -> [3, height, width] f32`.
//! Switches (`do_resize`, `do_rescale`, `do_normalize`) are honoured; releases before 4.52 always rescaled.
//! As every sample is one of 256 values, the arithmetic is done once per value and channel.

use serde::Deserialize;

use super::{PixelValues, decode::RgbImage, error::ProcessorError, resize::resize_bicubic};
use crate::files::{ModelFiles, ReadError};

/// Larger than any file of settings.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Largest side that a configuration may ask for.
const MAX_IMAGE_SIDE: usize = 1 << 12;
/// Pillow's number for bicubic resampling.
const PIL_BICUBIC: u64 = 3;

/// The settings of `preprocessor_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessor {
    /// Rows and columns of the result; `None` keeps the picture's own (`do_resize: false`).
    pub size: Option<(usize, usize)>,
    /// What a sample is multiplied with; `None` leaves it (`do_rescale: false`).
    pub rescale_factor: Option<f64>,
    /// Mean and standard deviation by channel; `None` leaves the values (`do_normalize: false`).
    pub normalize: Option<Normalize>,
}

/// Mean and standard deviation of the rescaled samples, by channel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    /// Subtracted first.
    pub mean: [f32; 3],
    /// Divided by then.
    pub std: [f32; 3],
}

impl Default for ImageProcessor {
    /// 224 x 224 with CLIP's mean and deviation: the values of every published checkpoint.
    fn default() -> Self {
        Self { size: Some((224, 224)), rescale_factor: Some(1.0 / 255.0), normalize: Some(Normalize::CLIP) }
    }
}

impl ImageProcessor {
    /// Reads `preprocessor_config.json`. Unknown keys are tolerated, values that would change the result in a
    /// way that is not implemented are errors.
    pub fn from_pretrained(files: impl Into<ModelFiles>) -> Result<Self, ProcessorError> {
        const NAME: &str = "preprocessor_config.json";
        let files = files.into();
        let error = |reason| ProcessorError::PreprocessorConfig { path: files.path(NAME), reason };
        let json = files.read(NAME, MAX_FILE_BYTES).map_err(|e| {
            error(match e {
                ReadError::Io(e) => format!("cannot be read: {e}"),
                ReadError::NotAFile => "not a regular file".to_owned(),
                ReadError::TooLarge => format!("larger than {MAX_FILE_BYTES} bytes"),
            })
        })?;
        Self::from_json(json).map_err(error)
    }

    fn from_json(json: impl AsRef<[u8]>) -> Result<Self, String> {
        let config: PreprocessorConfig = serde_json::from_slice(json.as_ref()).map_err(|e| e.to_string())?;
        let default = Self::default();
        if let Some(n) = config.image_num_channels.filter(|&n| n != 3) {
            return Err(format!("image_num_channels: expected 3, got {n}"));
        }
        if let Some(n) = config.resample.filter(|&n| n != PIL_BICUBIC) {
            return Err(format!("resample: expected {PIL_BICUBIC} (bicubic), got {n}"));
        }
        // `image_size` is the older name and, as in the reference, wins over `size`.
        let size = match config.image_size.or(config.size) {
            None => default.size,
            Some(size) => Some(size.rows_and_columns()?),
        };
        let rescale_factor = config.rescale_factor.or(default.rescale_factor);
        let normalize = Normalize {
            mean: per_channel("image_mean", config.image_mean)?.unwrap_or(Normalize::CLIP.mean),
            std: per_channel("image_std", config.image_std)?.unwrap_or(Normalize::CLIP.std),
        };
        if normalize.std.contains(&0.0) {
            return Err("image_std: expected values other than 0".to_owned());
        }
        Ok(Self {
            size: size.filter(|_| config.do_resize.unwrap_or(true)),
            rescale_factor: rescale_factor.filter(|_| config.do_rescale.unwrap_or(true)),
            normalize: Some(normalize).filter(|_| config.do_normalize.unwrap_or(true)),
        })
    }

    /// The picture as the vision tower takes it.
    pub fn process(&self, image: &RgbImage) -> PixelValues {
        let resized = self.size.map(|(rows, columns)| resize_bicubic(image, columns, rows));
        let image = resized.as_ref().unwrap_or(image);
        let table = self.value_table();
        let mut data = Vec::with_capacity(image.data().len());
        for (channel, values) in table.iter().enumerate() {
            data.extend(
                image.data().iter().skip(channel).step_by(3).map(|&sample| values[usize::from(sample)]),
            );
        }
        PixelValues::new(data, image.height(), image.width())
    }

    /// What becomes of each 8-bit value, by channel.
    fn value_table(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|channel| {
            std::array::from_fn(|sample| {
                let value = (sample as f64 * self.rescale_factor.unwrap_or(1.0)) as f32;
                match self.normalize {
                    Some(Normalize { mean, std }) => (value - mean[channel]) / std[channel],
                    None => value,
                }
            })
        })
    }
}

impl Normalize {
    /// The values CLIP was trained with.
    #[expect(clippy::excessive_precision, reason = "as CLIP's configuration writes them")]
    pub const CLIP: Self = Self {
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
    };
}

#[derive(Deserialize)]
struct PreprocessorConfig {
    image_size: Option<Size>,
    size: Option<Size>,
    image_mean: Option<Vec<f32>>,
    image_std: Option<Vec<f32>>,
    image_num_channels: Option<u64>,
    resample: Option<u64>,
    rescale_factor: Option<f64>,
    do_resize: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "image size: expected a number or an object with `height` and `width`")]
enum Size {
    Side(usize),
    Sides { height: usize, width: usize },
}

impl Size {
    fn rows_and_columns(&self) -> Result<(usize, usize), String> {
        let (rows, columns) = match *self {
            Self::Side(side) => (side, side),
            Self::Sides { height, width } => (height, width),
        };
        check_size(rows, columns)
    }
}

/// Refuses sides of no pixels and sides that no vision tower takes.
pub(super) fn check_size(rows: usize, columns: usize) -> Result<(usize, usize), String> {
    let accepted = 1..=MAX_IMAGE_SIDE;
    if accepted.contains(&rows) && accepted.contains(&columns) {
        Ok((rows, columns))
    } else {
        Err(format!("image size: expected sides from 1 to {MAX_IMAGE_SIDE}, got {rows}x{columns}"))
    }
}

fn per_channel(key: &str, values: Option<Vec<f32>>) -> Result<Option<[f32; 3]>, String> {
    let Some(values) = values else { return Ok(None) };
    let got = values.len();
    values.try_into().map(Some).map_err(|_| format!("{key}: expected 3 values, got {got}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_pixel(samples: [u8; 3]) -> RgbImage {
        RgbImage::new(1, 1, samples.to_vec()).unwrap()
    }

    // Exact float32 values of the reference.
    #[test]
    #[expect(
        clippy::excessive_precision,
        clippy::unreadable_literal,
        reason = "as the reference prints them"
    )]
    fn normalisation_equals_the_reference() {
        let processor = ImageProcessor { size: None, ..ImageProcessor::default() };
        let cases: [(u8, [f32; 3]); 4] = [
            (0, [-1.79226255, -1.75209713, -1.48021984]),
            (255, [1.93033612, 2.0748837, 2.14589691]),
            (128, [0.0763361454, 0.168897316, 0.339948773]),
            (1, [-1.77766407, -1.73708928, -1.46599972]),
        ];
        for (sample, expected) in cases {
            assert_eq!(processor.process(&one_pixel([sample; 3])).data, expected, "{sample}");
        }
    }

    #[test]
    fn channels_come_first() {
        let processor = ImageProcessor { size: None, rescale_factor: None, normalize: None };
        let image = RgbImage::new(2, 1, vec![1, 2, 3, 4, 5, 6]).unwrap();
        let pixels = processor.process(&image);
        assert_eq!((pixels.height, pixels.width), (1, 2));
        assert_eq!(pixels.data, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }

    #[test]
    fn the_result_has_the_configured_size() {
        let processor = ImageProcessor::from_json(r#"{"image_size": 18}"#).unwrap();
        for (width, height) in [(1, 1), (400, 30), (5, 3), (18, 18)] {
            let image = RgbImage::new(width, height, vec![7; width * height * 3]).unwrap();
            let pixels = processor.process(&image);
            assert_eq!((pixels.height, pixels.width, pixels.data.len()), (18, 18, 3 * 18 * 18));
        }
    }

    #[test]
    fn configurations_are_read() {
        let published = r#"{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_num_channels": 3,
            "image_processor_type": "IdeficsImageProcessor", "image_size": 224,
            "image_std": [0.26862954, 0.26130258, 0.27577711], "processor_class": "IdeficsProcessor"}"#;
        assert_eq!(ImageProcessor::from_json(published).unwrap(), ImageProcessor::default());
        assert_eq!(ImageProcessor::from_json("{}").unwrap(), ImageProcessor::default());

        let size = |json| ImageProcessor::from_json(json).unwrap().size;
        assert_eq!(size(r#"{"size": {"height": 20, "width": 30}}"#), Some((20, 30)));
        assert_eq!(size(r#"{"size": {"height": 20, "width": 30}, "image_size": 9}"#), Some((9, 9)));
        assert_eq!(size(r#"{"do_resize": false}"#), None);

        let plain = ImageProcessor::from_json(r#"{"do_rescale": false, "do_normalize": false}"#).unwrap();
        assert_eq!((plain.rescale_factor, plain.normalize), (None, None));
        let factor = ImageProcessor::from_json(r#"{"rescale_factor": 0.5}"#).unwrap();
        assert_eq!(factor.rescale_factor, Some(0.5));
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let cases = [
            (r#"{"image_num_channels": 1}"#, "image_num_channels: expected 3, got 1"),
            (r#"{"resample": 2}"#, "resample: expected 3 (bicubic), got 2"),
            (r#"{"image_size": 0}"#, "image size: expected sides from 1 to 4096, got 0x0"),
            (
                r#"{"image_size": 99999999}"#,
                "image size: expected sides from 1 to 4096, got 99999999x99999999",
            ),
            (r#"{"image_mean": [0.5]}"#, "image_mean: expected 3 values, got 1"),
            (r#"{"image_std": [0.5, 0, 1]}"#, "image_std: expected values other than 0"),
        ];
        for (json, expected) in cases {
            assert_eq!(ImageProcessor::from_json(json).unwrap_err(), expected);
        }
        for json in [r#"{"image_size": "big"}"#, r#"{"size": {"shortest_edge": 224}}"#] {
            let error = ImageProcessor::from_json(json).unwrap_err();
            assert!(error.starts_with("image size: expected a number or an object"), "{error}");
        }
        assert!(ImageProcessor::from_json("[").is_err());
    }
}
