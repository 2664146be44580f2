//! The tokens of a text that continues a prompt.

use anyhow::Context;
use idefics::{Processor, Prompt, SequenceInputs, processor::ProcessOptions};

/// A prompt and what may follow it.
pub(crate) struct Continuations {
    /// The tokens that all continuations share.
    pub(crate) inputs: SequenceInputs,
    /// One list for each text; none is empty.
    pub(crate) token_ids: Vec<Vec<u32>>,
}

/// Tokenizes prompt and continuation as one text, since a token may not end where the prompt ends. Where it does
/// not, the prompt gives its last tokens away.
pub(crate) fn continuations(
    processor: &Processor,
    options: &ProcessOptions,
    prompt: &Prompt,
    texts: &[String],
) -> anyhow::Result<Continuations> {
    let inputs = processor.process(std::slice::from_ref(prompt), options)?;
    let mut inputs = inputs.into_iter().next().context("a prompt has inputs")?;
    let prompt_text = processor.prompt_text(prompt, options)?;
    let mut wholes = Vec::with_capacity(texts.len());
    let mut shared = inputs.token_ids.len();
    for text in texts {
        let whole = processor.tokenize(&format!("{prompt_text}{text}"))?;
        let same = whole.iter().zip(&inputs.token_ids).take_while(|(a, b)| a == b).count();
        shared = shared.min(same);
        wholes.push(whole);
    }
    inputs.token_ids.truncate(shared);
    inputs.image_index.truncate(shared);
    let token_ids = wholes.into_iter().map(|mut whole| whole.split_off(shared)).collect();
    Ok(Continuations { inputs, token_ids })
}
