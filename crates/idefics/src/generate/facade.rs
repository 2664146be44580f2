//! The calls of [`Idefics`] that write.

use std::ops::ControlFlow;

use super::{Decode, GenerateError, Generated, Generation, GenerationConfig, Request, Scheduler, generate};
use crate::{Idefics, SequenceInputs, processor::SpecialTokens};

impl Idefics {
    /// The options that the checkpoint proposes. With the special tokens of its processor the tokens of pictures
    /// are banned, and an instruct model's `<end_of_utterance>` ends an answer beside `</s>`, as it should.
    pub fn default_generation(
        &self,
        special: Option<&SpecialTokens>,
    ) -> Result<GenerationConfig, GenerateError> {
        let mut config = GenerationConfig::from_checkpoint(self.config(), self.generation_config())?;
        if let Some(special) = special {
            config.image_token_ids = vec![special.image.id, special.fake_token_around_image.id];
            let end_of_utterance = special.end_of_utterance.as_ref().map(|token| token.id);
            config.eos_token_ids.extend(end_of_utterance.filter(|id| !config.eos_token_ids.contains(id)));
        }
        Ok(config)
    }

    /// Answers all prompts with token ids.
    pub fn generate(
        &self,
        inputs: &[SequenceInputs],
        config: &GenerationConfig,
    ) -> Result<Vec<Generated>, GenerateError> {
        generate(self, None, inputs, config, |_| ControlFlow::Continue(()))
    }

    /// Answers all prompts with token ids and text. `decoder` is a [`Processor`](crate::processor::Processor) or
    /// its tokenizer.
    pub fn generate_text(
        &self,
        decoder: &dyn Decode,
        inputs: &[SequenceInputs],
        config: &GenerationConfig,
    ) -> Result<Vec<Generated>, GenerateError> {
        generate(self, Some(decoder), inputs, config, |_| ControlFlow::Continue(()))
    }

    /// The same, as an iterator over tokens and text as they come.
    pub fn stream<'a>(
        &'a self,
        decoder: &'a dyn Decode,
        inputs: &'a [SequenceInputs],
        config: &'a GenerationConfig,
    ) -> Result<Generation<'a, Self>, GenerateError> {
        let requests: Vec<_> = inputs.iter().map(|inputs| Request::new(inputs, config)).collect();
        Generation::new(self, Some(decoder), &requests, Scheduler::default())
    }
}
