//! Texts that may follow a prompt, as tokens.

use super::{ProcessOptions, Processor, ProcessorError, Segment, SequenceInputs};

/// A prompt and what may follow it.
#[derive(Debug, Clone)]
pub struct Continuations {
    /// The tokens that all continuations share.
    pub inputs: SequenceInputs,
    /// One list for each text; none is empty unless the text is.
    pub token_ids: Vec<Vec<u32>>,
}

impl Processor {
    /// Tokenizes prompt and continuation as one text, since a token may not end where the prompt ends. Where it does
    /// not, the prompt gives its last tokens away.
    ///
    /// # Errors
    /// As [`Processor::process`], and if `max_length` is set: what is cut off a prompt cannot be continued.
    pub fn continuations(
        &self,
        prompt: &[Segment],
        texts: &[String],
        options: &ProcessOptions,
    ) -> Result<Continuations, ProcessorError> {
        if let Some(max_length) = options.max_length {
            let reason = format!("expected none where a prompt is continued, got {max_length}");
            return Err(ProcessorError::Option { option: "max_length", reason });
        }
        let prompt_text = self.prompt_text(prompt, options)?;
        let mut inputs = self.process(&[prompt.to_vec()], options)?.swap_remove(0);
        let mut wholes = Vec::with_capacity(texts.len());
        let mut shared = inputs.token_ids.len();
        for text in texts {
            let whole = self.tokenize(&format!("{prompt_text}{text}"))?;
            let same = whole.iter().zip(&inputs.token_ids).take_while(|(a, b)| a == b).count();
            shared = shared.min(same);
            wholes.push(whole);
        }
        inputs.token_ids.truncate(shared);
        inputs.image_index.truncate(shared);
        let token_ids = wholes.into_iter().map(|mut whole| whole.split_off(shared)).collect();
        Ok(Continuations { inputs, token_ids })
    }
}
