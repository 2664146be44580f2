//! Why a generation can be refused or fail.

/// What went wrong, where, and with which numbers.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// An option is out of range or contradicts another.
    #[error("generation option `{option}`: {problem}")]
    InvalidOption {
        /// The option, by its Hugging Face name.
        option: &'static str,
        /// What is wrong with it, with the value that was given.
        problem: String,
    },
    /// An option names a token that the model does not have.
    #[error(
        "generation option `{option}` names token {token_id}, but the vocabulary has {vocab_size} tokens"
    )]
    UnknownToken {
        /// The option, by its Hugging Face name.
        option: &'static str,
        /// The token.
        token_id: u32,
        /// Number of tokens in the vocabulary.
        vocab_size: usize,
    },
    /// A generation file is not what it should be.
    #[error("generation configuration: {0}")]
    Json(#[from] serde_json::Error),
    /// A prompt has no token to start from.
    #[error("prompt {request} has no tokens")]
    EmptyPrompt {
        /// Index of the prompt.
        request: usize,
    },
    /// The inputs of a prompt do not fit together.
    #[error("prompt {request} has {token_ids} tokens but {image_index} image indices")]
    ImageIndexLength {
        /// Index of the prompt.
        request: usize,
        /// Number of tokens.
        token_ids: usize,
        /// Number of image indices.
        image_index: usize,
    },
    /// The model has too few positions for the prompt.
    #[error(
        "prompt {request} has {prompt_tokens} tokens, the answer needs at least one more, and the model has {max_positions} positions"
    )]
    PromptTooLong {
        /// Index of the prompt.
        request: usize,
        /// Length of the prompt in tokens.
        prompt_tokens: usize,
        /// Longest sequence of the model.
        max_positions: usize,
    },
    /// `max_length` leaves nothing for the answer.
    #[error(
        "prompt {request} has {prompt_tokens} tokens, but `max_length` (prompt and answer together) is {max_length}; raise it or set `max_new_tokens`"
    )]
    NoRoom {
        /// Index of the prompt.
        request: usize,
        /// Length of the prompt in tokens.
        prompt_tokens: usize,
        /// The limit that was set.
        max_length: usize,
    },
    /// Stop strings are matched on text, and nothing was given that turns tokens into text.
    #[error("generation option `stop_strings` needs a decoder of tokens into text")]
    StopStringsNeedText,
    /// A text to score is too short or too long.
    #[error("text {request} to score: {problem}")]
    Score {
        /// Index of the text.
        request: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The model computed nonsense.
    #[error(
        "the model gave NaN or infinity as the score of token {token_id}; the weights may be damaged, see `remove_invalid_values`"
    )]
    NotFinite {
        /// The first such token.
        token_id: usize,
    },
    /// The options leave no token to choose.
    #[error("after {length} tokens every token of the vocabulary is ruled out by the generation options")]
    NoCandidate {
        /// Length of the sequence, prompt included.
        length: usize,
    },
    /// The model broke its contract.
    #[error("the model returned {got} logits for a row, expected {expected}")]
    LogitsShape {
        /// Rows asked for times vocabulary.
        expected: usize,
        /// Numbers returned.
        got: usize,
    },
    /// An error of a prompt that an iterator over events has handed out already.
    #[error("prompt {request} failed: {message}")]
    Told {
        /// Index of the prompt.
        request: usize,
        /// What the error said.
        message: String,
    },
    /// A token sees a picture that the prompt does not have.
    #[error("prompt {request} has a token that sees picture {index}, but it has {images} pictures")]
    UnknownImage {
        /// Index of the prompt.
        request: usize,
        /// Index of the picture.
        index: u32,
        /// Pictures of the prompt.
        images: usize,
    },
    /// A promise inside was broken, by the model or by a rule of the caller's.
    #[error("something that should never happen did: {message}")]
    Panicked {
        /// The words of the panic.
        message: String,
    },
    /// The model failed.
    #[error("the model failed")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl GenerateError {
    pub(crate) fn model(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Model(Box::new(error))
    }
}
