//! The processor's output as the reference shapes it: one tensor for all prompts, filled up with pads.
//!
//! Reference: transformers `processing_idefics.py`, end of `IdeficsProcessor.__call__`. The model here needs none
//! of this; it is for comparing, and for code that was written for those tensors.
//! Surprising: the mask is made on the padded ids and knows only the largest number of images in the batch, so an
//! image token without a picture may point to one of zeros that belongs to no one.

use std::sync::Arc;

use super::{
    PixelValues,
    error::ProcessorError,
    image_index::{image_index, one_hot},
    prompt::SpecialTokens,
};

/// How rows are made equally long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Padding {
    /// Up to the longest row.
    #[default]
    Longest,
    /// Up to this many tokens; longer rows stay as they are.
    MaxLength(usize),
    /// Not at all: an error if the rows differ.
    None,
}

/// On which side the pads go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PaddingSide {
    /// In front, as the LLaMA tokenizers do.
    #[default]
    Left,
    /// Behind.
    Right,
}

/// Prompts as tensors, in C order. `B` prompts, `S` tokens, `N` images.
#[derive(Debug, Clone, PartialEq)]
pub struct PaddedInputs {
    /// Number of prompts, `B`.
    pub batch: usize,
    /// Tokens of a row, `S`.
    pub length: usize,
    /// Images of a row, `N`, at least 1.
    pub num_images: usize,
    /// Rows and columns of an image.
    pub image_size: (usize, usize),
    /// Token ids `[B, S]`.
    pub input_ids: Vec<u32>,
    /// 1 for tokens, 0 for pads: `[B, S]`.
    pub attention_mask: Vec<u8>,
    /// Pictures, zeros where a row has fewer than `N`: `[B, N, 3, height, width]`.
    pub pixel_values: Vec<f32>,
    /// 1 where a token sees an image: `[B, S, N]`.
    pub image_attention_mask: Vec<u8>,
}

/// One prompt before the batch is formed.
pub(super) struct Row {
    pub(super) token_ids: Vec<u32>,
    /// All images of the prompt, those whose tokens were cut off too.
    pub(super) images: Vec<Arc<PixelValues>>,
}

pub(super) fn pad(
    rows: &[Row],
    padding: Padding,
    side: PaddingSide,
    tokens: &SpecialTokens,
    default_image_size: (usize, usize),
) -> Result<PaddedInputs, ProcessorError> {
    let longest = rows.iter().map(|r| r.token_ids.len()).max().unwrap_or(0);
    let length = match padding {
        Padding::Longest | Padding::None => longest,
        Padding::MaxLength(length) => length.max(longest),
    };
    let shortest = match padding {
        Padding::Longest => longest,
        Padding::None => rows.iter().map(|r| r.token_ids.len()).min().unwrap_or(0),
        // Shorter rows are filled up; rows longer than asked for keep all from being equal.
        Padding::MaxLength(asked) => rows.iter().map(|r| r.token_ids.len().max(asked)).min().unwrap_or(0),
    };
    if shortest != longest.max(shortest) {
        return Err(ProcessorError::RaggedBatch { shortest, longest });
    }
    let most_images = rows.iter().map(|r| r.images.len()).max().unwrap_or(0);
    let num_images = most_images.max(1);
    let image_size = common_size(rows, default_image_size)?;

    let mut padded = PaddedInputs {
        batch: rows.len(),
        length,
        num_images,
        image_size,
        input_ids: Vec::with_capacity(rows.len() * length),
        attention_mask: Vec::with_capacity(rows.len() * length),
        pixel_values: vec![0.0; rows.len() * num_images * 3 * image_size.0 * image_size.1],
        image_attention_mask: Vec::with_capacity(rows.len() * length * num_images),
    };
    let row_values = num_images * 3 * image_size.0 * image_size.1;
    for (index, row) in rows.iter().enumerate() {
        let pads = length - row.token_ids.len();
        let (front, behind) = match side {
            PaddingSide::Left => (pads, 0),
            PaddingSide::Right => (0, pads),
        };
        let mut ids = vec![tokens.pad.id; front];
        ids.extend(&row.token_ids);
        ids.resize(length, tokens.pad.id);
        padded.attention_mask.extend(vec![0; front]);
        padded.attention_mask.extend(vec![1; row.token_ids.len()]);
        padded.attention_mask.extend(vec![0; behind]);
        // Without any image in the batch nothing sees anything.
        let seen = image_index(&ids, tokens.image.id, tokens.eos.id, most_images);
        padded.image_attention_mask.extend(one_hot(&seen, num_images));
        let image_tokens = row.token_ids.iter().filter(|&&id| id == tokens.image.id).count();
        let slots =
            padded.pixel_values[index * row_values..][..row_values].chunks_exact_mut(row_values / num_images);
        for (slot, image) in slots.zip(row.images.iter().take(image_tokens)) {
            slot.copy_from_slice(&image.data);
        }
        padded.input_ids.append(&mut ids);
    }
    Ok(padded)
}

/// The size of all images, which has to be one for a single tensor.
fn common_size(rows: &[Row], default: (usize, usize)) -> Result<(usize, usize), ProcessorError> {
    let mut sizes = rows.iter().flat_map(|r| &r.images).map(|image| (image.height, image.width));
    let Some(first) = sizes.next() else { return Ok(default) };
    match sizes.find(|&size| size != first) {
        None => Ok(first),
        Some(other) => Err(ProcessorError::Option {
            option: "do_resize",
            reason: format!(
                "images of one batch need one size, got {}x{} and {}x{}",
                first.0, first.1, other.0, other.1
            ),
        }),
    }
}
