//! Log-probabilities in the shapes of this dialect.

use idefics::{generate::TokenLogprob, processor::Tokenizer};

use super::types::{ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TokenWithLogprob};

fn token(tokenizer: &Tokenizer, id: u32, logprob: f32) -> TokenWithLogprob {
    let bytes = tokenizer.token_bytes(id);
    TokenWithLogprob { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(logprob), bytes }
}

/// JSON has no infinity; a token that was ruled out is as unlikely as `f32` can say.
fn finite(logprob: f32) -> f32 {
    logprob.max(f32::MIN)
}

/// Of chat answers.
pub(super) fn chat(tokenizer: &Tokenizer, logprobs: &[TokenLogprob]) -> ChatLogprobs {
    let content = logprobs.iter().map(|it| ChatTokenLogprob {
        token: token(tokenizer, it.token_id, it.logprob),
        top_logprobs: it.top.iter().map(|&(id, logprob)| token(tokenizer, id, logprob)).collect(),
    });
    ChatLogprobs { content: content.collect(), refusal: None }
}

/// Of plain answers, whose first token begins at `offset`, counted in characters.
pub(super) fn completion(
    tokenizer: &Tokenizer,
    logprobs: &[TokenLogprob],
    offset: usize,
) -> CompletionLogprobs {
    let mut result = CompletionLogprobs::default();
    let mut offset = offset;
    for it in logprobs {
        let chosen = token(tokenizer, it.token_id, it.logprob);
        result.text_offset.push(offset);
        offset += chosen.token.chars().count();
        result.tokens.push(chosen.token);
        result.token_logprobs.push(chosen.logprob);
        let top = it.top.iter().map(|&(id, logprob)| token(tokenizer, id, logprob));
        result.top_logprobs.push(top.map(|it| (it.token, it.logprob)).collect());
    }
    result
}
