//! Prompts in, model inputs out: token ids, pixels, and for each token the image it sees.
//!
//! Reference: transformers `IdeficsProcessor` with `IdeficsImageProcessorPil`.
//! `segments -> prompt string -> token ids [T]`, `pictures -> pixel values [3, height, width]`,
//! `token ids -> image index [T]`. No padding: [`Processor::process`] treats each prompt as if it were alone.
//! [`Processor::process_padded`] gives the same as the reference's padded tensors.

mod continuation;
pub mod decode;
pub mod error;
pub mod fetch;
mod image_index;
mod image_processor;
mod load;
mod padded;
mod prompt;
pub mod resize;
mod tokenizer;
mod types;

use std::sync::Arc;

pub use continuation::Continuations;
pub use decode::{ExifOrientation, ImageLimits, RgbImage};
pub use error::{FetchError, ImageError, ProcessorError, TokenizerError};
pub use fetch::FetchPolicy;
pub use image_processor::{ImageProcessor, Normalize};
pub use load::load_image;
pub use padded::{PaddedInputs, Padding, PaddingSide};
pub use prompt::{
    AddEndOfUtterance, END_OF_UTTERANCE, FAKE_TOKEN_AROUND_IMAGE, IMAGE_TOKEN, SpecialToken, SpecialTokens,
};
pub use tokenizer::{DecodeStream, SpecialTokenText, Tokenizer, id_bound_of};
pub use types::{ImageHash, ImageSource, PixelValues, Prompt, Segment, SequenceInputs};

use crate::files::ModelFiles;
use padded::Row;

/// Turns prompts into what the model takes, and token ids back into text.
#[derive(Debug, Clone)]
pub struct Processor {
    tokenizer: Arc<Tokenizer>,
    image_processor: ImageProcessor,
}

/// What [`Processor::process`] may do differently from its defaults, which are the reference's.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ProcessOptions {
    /// When `<end_of_utterance>` goes between neighbouring texts.
    pub add_end_of_utterance: AddEndOfUtterance,
    /// Whether each prompt ends with `</s>`.
    pub add_eos_token: bool,
    /// Most tokens of a prompt; what is over is cut off at the end.
    pub max_length: Option<usize>,
    /// Rows and columns of the pixel values, in place of the configured size.
    pub image_size: Option<(usize, usize)>,
    /// Whether EXIF orientation is heeded.
    pub orientation: ExifOrientation,
    /// How large pictures may be.
    pub limits: ImageLimits,
    /// What may be fetched.
    pub fetch: FetchPolicy,
}

/// The images of the images-and-text calling mode.
#[derive(Debug, Clone, PartialEq)]
pub enum ImagesPerText {
    /// One for each text, in front of it.
    One(Vec<ImageSource>),
    /// Several for each text, behind it.
    Several(Vec<Vec<ImageSource>>),
}

impl Processor {
    /// Loads the processor of a model in a directory or in memory: `preprocessor_config.json` and the tokenizer's
    /// files.
    pub fn from_pretrained(files: impl Into<ModelFiles>) -> Result<Self, ProcessorError> {
        let files = files.into();
        let image_processor = ImageProcessor::from_pretrained(&files)?;
        Ok(Self::new(Tokenizer::from_pretrained(&files)?, image_processor))
    }

    /// A processor from its parts.
    pub fn new(tokenizer: Tokenizer, image_processor: ImageProcessor) -> Self {
        Self { tokenizer: Arc::new(tokenizer), image_processor }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The image settings.
    pub fn image_processor(&self) -> &ImageProcessor {
        &self.image_processor
    }

    /// The tokens that have a meaning of their own.
    pub fn special_tokens(&self) -> &SpecialTokens {
        self.tokenizer.special_tokens()
    }

    /// The id of a token.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_id(token)
    }

    /// The ids of a text as it is, without `<s>`.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, ProcessorError> {
        Ok(self.tokenizer.encode(text)?)
    }

    /// The text of the ids.
    pub fn decode(&self, ids: &[u32], special: SpecialTokenText) -> Result<String, ProcessorError> {
        Ok(self.tokenizer.decode(ids, special)?)
    }

    /// The texts of several rows of ids.
    pub fn batch_decode<T: AsRef<[u32]>>(
        &self,
        rows: &[T],
        special: SpecialTokenText,
    ) -> Result<Vec<String>, ProcessorError> {
        rows.iter().map(|ids| self.decode(ids.as_ref(), special)).collect()
    }

    /// The string that a prompt is tokenized from.
    pub fn prompt_text(
        &self,
        prompt: &[Segment],
        options: &ProcessOptions,
    ) -> Result<String, ProcessorError> {
        let tokens = self.special_tokens();
        let present = tokens.end_of_utterance.as_ref().map(|t| t.text.as_str());
        let end_of_utterance = match options.add_end_of_utterance {
            AddEndOfUtterance::Auto => present,
            AddEndOfUtterance::Never => None,
            AddEndOfUtterance::Always => Some(present.ok_or_else(|| ProcessorError::Option {
                option: "add_end_of_utterance",
                reason: format!(
                    "the vocabulary has no `{END_OF_UTTERANCE}`: expected an instruct checkpoint"
                ),
            })?),
        };
        let eos = options.add_eos_token.then_some(tokens.eos.text.as_str());
        Ok(prompt::assemble(prompt, &tokens.bos.text, end_of_utterance, eos))
    }

    /// The model's inputs for each prompt.
    pub fn process(
        &self,
        prompts: &[Prompt],
        options: &ProcessOptions,
    ) -> Result<Vec<SequenceInputs>, ProcessorError> {
        let tokens = self.special_tokens();
        let sequence = |row: Row| {
            let Row { token_ids, mut images } = row;
            let image_index =
                image_index::image_index(&token_ids, tokens.image.id, tokens.eos.id, images.len());
            // Images whose tokens were cut off are not needed any more.
            images.truncate(token_ids.iter().filter(|&&id| id == tokens.image.id).count());
            SequenceInputs { token_ids, image_index, images }
        };
        Ok(self.rows(prompts, options)?.into_iter().map(sequence).collect())
    }

    /// The same as padded tensors, as the reference returns them.
    pub fn process_padded(
        &self,
        prompts: &[Prompt],
        options: &ProcessOptions,
        padding: Padding,
        side: PaddingSide,
    ) -> Result<PaddedInputs, ProcessorError> {
        let rows = self.rows(prompts, options)?;
        let size = options.image_size.or(self.image_processor.size).unwrap_or((224, 224));
        padded::pad(&rows, padding, side, self.special_tokens(), size)
    }

    fn rows(&self, prompts: &[Prompt], options: &ProcessOptions) -> Result<Vec<Row>, ProcessorError> {
        if options.max_length == Some(0) {
            return Err(ProcessorError::Option {
                option: "max_length",
                reason: "expected at least 1, got 0".to_owned(),
            });
        }
        let image_processor = self.sized_image_processor(options)?;
        let mut rows = Vec::with_capacity(prompts.len());
        for (index, prompt) in prompts.iter().enumerate() {
            // Text first: it is cheap, and may be refused.
            let mut token_ids = self.tokenize(&self.prompt_text(prompt, options)?)?;
            token_ids.truncate(options.max_length.unwrap_or(usize::MAX));
            let images = load_images(index, prompt, options, &image_processor)?;
            rows.push(Row { token_ids, images });
        }
        Ok(rows)
    }

    /// The image settings with the size that the options ask for.
    fn sized_image_processor(&self, options: &ProcessOptions) -> Result<ImageProcessor, ProcessorError> {
        let mut image_processor = self.image_processor.clone();
        if let Some((rows, columns)) = options.image_size {
            let size = image_processor::check_size(rows, columns)
                .map_err(|reason| ProcessorError::Option { option: "image_size", reason })?;
            image_processor.size = Some(size);
        }
        Ok(image_processor)
    }
}

/// The pictures of a prompt, as the vision tower takes them.
fn load_images(
    prompt_index: usize,
    prompt: &[Segment],
    options: &ProcessOptions,
    image_processor: &ImageProcessor,
) -> Result<Vec<Arc<PixelValues>>, ProcessorError> {
    let sources = prompt.iter().enumerate().filter_map(|(index, segment)| match segment {
        Segment::Image(source) => Some((index, source)),
        Segment::Text(_) => None,
    });
    sources
        .map(|(segment, source)| {
            let image = load_image(source, &options.limits, &options.fetch, options.orientation).map_err(
                |error| ProcessorError::Image {
                    prompt: prompt_index,
                    segment,
                    origin: load::origin(source),
                    source: error,
                },
            )?;
            Ok(Arc::new(image_processor.process(&image)))
        })
        .collect()
}

/// Prompts of the images-and-text calling mode: a single image goes in front of its text, several go behind it.
pub fn prompts_from_images_and_text(
    images: ImagesPerText,
    texts: Vec<String>,
) -> Result<Vec<Prompt>, ProcessorError> {
    let count = match &images {
        ImagesPerText::One(images) => images.len(),
        ImagesPerText::Several(lists) => lists.len(),
    };
    if count != texts.len() {
        return Err(ProcessorError::ImagesTextMismatch { texts: texts.len(), images: count });
    }
    let texts = texts.into_iter().map(Segment::Text);
    Ok(match images {
        ImagesPerText::One(images) => {
            images.into_iter().zip(texts).map(|(image, text)| vec![image.into(), text]).collect()
        }
        ImagesPerText::Several(lists) => lists
            .into_iter()
            .zip(texts)
            .map(|(list, text)| std::iter::once(text).chain(list.into_iter().map(Segment::Image)).collect())
            .collect(),
    })
}

#[cfg(test)]
mod tests;
