//! What goes into a generation: a prompt, how to answer it, and a way to stop.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{CustomProcessor, GenerateError, GenerationConfig, StepModel, config::Lengths};
use crate::{SequenceInputs, processor::ImageHash};

/// One prompt and how to answer it.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Tokens and pictures.
    pub inputs: &'a SequenceInputs,
    /// How to answer.
    pub config: &'a GenerationConfig,
    /// A rule of the caller's own.
    pub custom: Option<CustomProcessor<'a>>,
    /// When set to true, the answer ends before its next token.
    pub cancel: Option<&'a AtomicBool>,
}

/// A request that was checked, with all that it needs to run.
pub(crate) struct Job<'a> {
    /// Index of the prompt, for events and messages.
    pub(crate) index: usize,
    pub(crate) inputs: Cow<'a, SequenceInputs>,
    pub(crate) config: Cow<'a, GenerationConfig>,
    pub(crate) custom: Option<OwnedRule<'a>>,
    pub(crate) cancel: CancelFlag<'a>,
    pub(crate) lengths: Lengths,
}

/// A rule of the caller's own.
pub(crate) type OwnedRule<'a> = Box<dyn Fn(&[u32], &mut [f32]) + Sync + 'a>;

/// Who may say that an answer is not wanted any more.
pub(crate) enum CancelFlag<'a> {
    Never,
    Borrowed(&'a AtomicBool),
    Shared(Arc<AtomicBool>),
}

/// A token and the picture it sees: two prompts with equal beginnings of these have equal keys and values there.
pub(crate) type Seen = (u32, Option<ImageHash>);

impl<'a> Request<'a> {
    /// A plain request.
    pub fn new(inputs: &'a SequenceInputs, config: &'a GenerationConfig) -> Self {
        Self { inputs, config, custom: None, cancel: None }
    }

    /// Refuses what `model` cannot answer. `index` is the prompt's in messages.
    pub fn check(&self, model: &impl StepModel, index: usize) -> Result<Lengths, GenerateError> {
        self.config.validate()?;
        self.config.validate_vocabulary(model.vocab_size())?;
        let (token_ids, image_index) = (self.inputs.token_ids.len(), self.inputs.image_index.len());
        if token_ids != image_index {
            return Err(GenerateError::ImageIndexLength { request: index, token_ids, image_index });
        }
        self.config.lengths(index, token_ids, model.max_positions())
    }

    pub(crate) fn into_job(self, index: usize, lengths: Lengths) -> Job<'a> {
        Job {
            index,
            inputs: Cow::Borrowed(self.inputs),
            config: Cow::Borrowed(self.config),
            custom: self.custom.map(|rule| -> OwnedRule<'a> { Box::new(rule) }),
            cancel: self.cancel.map_or(CancelFlag::Never, CancelFlag::Borrowed),
            lengths,
        }
    }
}

impl CancelFlag<'_> {
    pub(crate) fn is_set(&self) -> bool {
        match self {
            Self::Never => false,
            Self::Borrowed(flag) => flag.load(Ordering::Relaxed),
            Self::Shared(flag) => flag.load(Ordering::Relaxed),
        }
    }
}

/// Sequences that a request needs at a time.
pub(crate) fn width(config: &GenerationConfig) -> usize {
    config.num_beams.max(config.num_return_sequences)
}

/// Each token with the content of the picture it sees.
pub(crate) fn seen(inputs: &SequenceInputs, token_ids: &[u32], image_index: &[Option<u32>]) -> Vec<Seen> {
    let content = |index: u32| inputs.images.get(index as usize).map(|image| image.content_hash());
    token_ids.iter().zip(image_index).map(|(&token, image)| (token, image.and_then(content))).collect()
}
