//! Pictures and words to inputs, off the async threads unless it is a few words, a bounded number at a time.
//!
//! A client that goes away while its pictures are fetched or decoded costs at most the one that is in hand: the
//! flag is looked at between pictures.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use idefics::{
    Prompt, Segment, SequenceInputs,
    processor::{AddEndOfUtterance, FetchPolicy, ImageSource, ProcessOptions, load_image},
};

use crate::{
    error::{ApiError, Kind},
    options::Limits,
    service::Service,
    state::App,
};

/// Words that are made tokens of at once, in some 100 µs.
const INLINE_BYTES: usize = 2048;

/// A prompt to be processed.
pub(crate) struct Wanted {
    pub(crate) prompt: Prompt,
    pub(crate) end_of_utterance: AddEndOfUtterance,
    /// A longer prompt is refused before its pictures are looked at.
    pub(crate) max_tokens: usize,
}

impl Wanted {
    /// However many tokens there are.
    pub(crate) fn unbounded(self) -> Self {
        Self { max_tokens: usize::MAX, ..self }
    }

    /// Whether it takes no longer than handing it to another thread would.
    fn is_short_text(&self) -> bool {
        let bytes = |segment: &Segment| match segment {
            Segment::Text(text) => Some(text.len()),
            Segment::Image(_) => None,
        };
        self.prompt.iter().map(bytes).sum::<Option<usize>>().is_some_and(|bytes| bytes <= INLINE_BYTES)
    }
}

/// What an `image_url` of a request may be: an address or a `data:` URI. Files are out of reach.
pub(crate) fn source(url: String, param: &str) -> Result<ImageSource, ApiError> {
    let starts_with =
        |scheme: &str| url.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
    if starts_with("data:") {
        Ok(ImageSource::DataUri(url))
    } else if starts_with("http://") || starts_with("https://") {
        Ok(ImageSource::Url(url))
    } else {
        Err(ApiError::field(param, "expected an `http`, `https` or `data:` address")
            .code("invalid_image_url"))
    }
}

/// Refuses too many pictures.
pub(crate) fn check_count(prompt: &Prompt, limits: &Limits) -> Result<(), ApiError> {
    let got = prompt.iter().filter(|segment| matches!(segment, Segment::Image(_))).count();
    if got > limits.images {
        let limit = limits.images;
        return Err(ApiError::new(Kind::TooLarge, format!("{got} pictures, at most {limit} are allowed"))
            .code("too_many_images"));
    }
    Ok(())
}

/// Refuses words that cannot fit, however they are made tokens: of millions of bytes that alone takes seconds.
pub(crate) fn check_bytes(service: &Service, prompt: &Prompt, max_tokens: usize) -> Result<(), ApiError> {
    let bytes = |segment: &Segment| match segment {
        Segment::Text(text) => text.len(),
        Segment::Image(_) => 0,
    };
    let got: usize = prompt.iter().map(bytes).sum();
    let limit = max_tokens.saturating_mul(service.longest_token);
    if got <= limit {
        return Ok(());
    }
    let message = format!(
        "the prompt has {got} bytes of words, and the model's context of {max_tokens} tokens has room for {limit} at most"
    );
    Err(ApiError::new(Kind::Invalid, message).code("context_length_exceeded"))
}

/// The model's inputs for a prompt.
pub(crate) async fn process(
    app: &Arc<App>,
    service: &Arc<Service>,
    wanted: Wanted,
) -> Result<SequenceInputs, ApiError> {
    check_count(&wanted.prompt, &app.options.limits)?;
    check_bytes(service, &wanted.prompt, wanted.max_tokens)?;
    if let Some(Segment::Image(ImageSource::Url(_))) =
        wanted.prompt.iter().find(|segment| matches!(segment, Segment::Image(ImageSource::Url(_))))
        && !app.options.fetch.enabled
    {
        return Err(ApiError::new(
            Kind::Invalid,
            "this server fetches no pictures; send them as `data:` URIs",
        )
        .code("remote_images_disabled"));
    }
    if wanted.is_short_text() {
        return process_now(app, service, wanted, &AtomicBool::new(true));
    }
    let is_wanted = Arc::new(AtomicBool::new(true));
    let _unwanted_on_drop = Unwanted(is_wanted.clone());
    let (service, state) = (service.clone(), app.clone());
    aside(app, move || process_now(&state, &service, wanted, &is_wanted)).await
}

/// Does work off the async threads, a bounded number at a time.
pub(crate) async fn aside<T: Send + 'static>(
    app: &App,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let permit = app.media.clone().acquire_owned().await.expect("the semaphore is never closed");
    let work = move || {
        // The permit ends with the work, not with the wait for it: work that nobody waits for still counts.
        let _permit = permit;
        work()
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(ApiError::panicked()))
}

/// Clears the flag when the one who waits goes away.
struct Unwanted(Arc<AtomicBool>);

impl Drop for Unwanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn process_now(
    app: &App,
    service: &Service,
    wanted: Wanted,
    is_wanted: &AtomicBool,
) -> Result<SequenceInputs, ApiError> {
    let options = ProcessOptions {
        add_end_of_utterance: wanted.end_of_utterance,
        // Whatever is still to be loaded below has been loaded already.
        fetch: FetchPolicy::disabled(),
        orientation: app.options.orientation,
        limits: app.options.limits.image,
        ..ProcessOptions::default()
    };
    let processor = service.processor();
    if wanted.prompt.iter().any(|segment| matches!(segment, Segment::Image(_))) {
        // One that cannot fit is refused before its pictures are decoded.
        let text = processor.prompt_text(&wanted.prompt, &options)?;
        check_length(processor.tokenize(&text)?.len(), wanted.max_tokens)?;
    }
    let mut prompt = Prompt::with_capacity(wanted.prompt.len());
    let mut index = 0;
    for segment in wanted.prompt {
        if !is_wanted.load(Ordering::Relaxed) {
            return Err(ApiError::new(Kind::Timeout, "the client went away"));
        }
        prompt.push(match segment {
            Segment::Image(source) => {
                let image = load_image(&source, &options.limits, &app.options.fetch, options.orientation)
                    .map_err(|error| {
                        let error = ApiError::from(error);
                        ApiError { message: format!("picture {index}: {}", error.message), ..error }
                    })?;
                index += 1;
                Segment::Image(ImageSource::Rgb(image))
            }
            text @ Segment::Text(_) => text,
        });
    }
    let inputs = processor.process(&[prompt], &options)?.pop().expect("one prompt gives one sequence");
    check_length(inputs.token_ids.len(), wanted.max_tokens)?;
    Ok(inputs)
}

fn check_length(tokens: usize, limit: usize) -> Result<(), ApiError> {
    if tokens < limit {
        return Ok(());
    }
    let message = format!(
        "the prompt has {tokens} tokens, the answer needs at least one more, and the model's context is {limit} tokens"
    );
    Err(ApiError::new(Kind::Invalid, message).code("context_length_exceeded"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_data_are_taken() {
        for (url, expected) in [
            ("data:image/png;base64,AA==", true),
            ("DATA:,x", true),
            ("http://h/i", true),
            ("HTTPS://h/i", true),
            ("file:///etc/passwd", false),
            ("/etc/passwd", false),
            ("ftp://h/i", false),
            ("iVBORw0KGgo=", false),
            ("", false),
            ("dat\u{e4}", false),
        ] {
            let result = source(url.to_owned(), "x");
            assert_eq!(result.is_ok(), expected, "{url}");
            assert!(expected || !result.unwrap_err().message.contains("passwd"), "nothing is repeated");
        }
    }
}
