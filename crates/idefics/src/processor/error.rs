//! What can go wrong between a prompt and the model's inputs.
//!
//! Errors say where (which prompt, which segment), what was expected and what was found. They never carry text
//! written by an image decoder or by a remote server: both are under the control of whoever made the picture.

use std::{io, path::PathBuf};

use super::decode::ImageFormat;

/// Any failure of the [`Processor`](super::Processor).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessorError {
    /// A picture of a prompt could not be taken in.
    #[error("prompt {prompt}, segment {segment} ({origin})")]
    Image {
        /// Index of the prompt, from 0.
        prompt: usize,
        /// Index of the segment in its prompt, from 0.
        segment: usize,
        /// The kind of source, with the path or address where there is one.
        origin: String,
        /// What was wrong with it.
        #[source]
        source: ImageError,
    },
    /// The tokenizer could not be loaded or could not do what was asked.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// `preprocessor_config.json` is missing, unreadable or asks for something impossible.
    #[error("{}: {reason}", path.display())]
    PreprocessorConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the accepted values.
        reason: String,
    },
    /// Rows of different lengths were asked for as one tensor without padding.
    #[error(
        "rows have different lengths ({shortest} to {longest} tokens): choose a padding that makes them equal"
    )]
    RaggedBatch {
        /// Tokens of the shortest row.
        shortest: usize,
        /// Tokens of the longest row.
        longest: usize,
    },
    /// An option has a value that cannot be honoured.
    #[error("option `{option}`: {reason}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// Expected and got.
        reason: String,
    },
    /// The images-and-text calling mode got lists that do not belong together.
    #[error("images and text must pair up: {texts} texts, {images} images or lists of images")]
    ImagesTextMismatch {
        /// Number of texts.
        texts: usize,
        /// Number of images or image lists.
        images: usize,
    },
}

/// A picture that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Not a single byte.
    #[error("image is empty (zero bytes)")]
    Empty,
    /// The encoded picture is larger than allowed.
    #[error("image has more than {limit} bytes, the limit")]
    TooManyBytes {
        /// The limit in bytes.
        limit: usize,
    },
    /// The first bytes belong to none of the accepted formats.
    #[error("not an image in an accepted format (accepted: {})", ImageFormat::ACCEPTED)]
    UnknownFormat,
    /// The picture would decode to more pixels than allowed.
    #[error("{format} image of {width}x{height} pixels exceeds the limit of {limit} pixels")]
    TooManyPixels {
        /// Format of the picture.
        format: ImageFormat,
        /// Columns.
        width: u64,
        /// Rows.
        height: u64,
        /// The limit in pixels.
        limit: u64,
    },
    /// A side of zero pixels.
    #[error("{format} image has no pixels ({width}x{height})")]
    NoPixels {
        /// Format of the picture.
        format: ImageFormat,
        /// Columns.
        width: u64,
        /// Rows.
        height: u64,
    },
    /// A JPEG of very many scans, a way to keep a decoder busy for hours.
    #[error("JPEG image has {got} scans, the limit is {limit}")]
    TooManyScans {
        /// Scans in the file.
        got: usize,
        /// The limit.
        limit: usize,
    },
    /// The data ends before the picture does.
    #[error("{0} image is truncated")]
    Truncated(ImageFormat),
    /// The data breaks the rules of its format.
    #[error("{0} image is malformed")]
    Malformed(ImageFormat),
    /// A variant of the format that is not read.
    #[error("{format} image: {what} is not supported")]
    Unsupported {
        /// Format of the picture.
        format: ImageFormat,
        /// The variant.
        what: &'static str,
    },
    /// Raw pixels whose number does not fit their size.
    #[error("raw RGB image of {width}x{height} pixels: expected {expected} bytes, got {got}")]
    RawSize {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
        /// Bytes that the size asks for.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// The file cannot be read.
    #[error("cannot read the image file")]
    File(#[source] io::Error),
    /// A directory, pipe or device where a picture was expected.
    #[error("not a regular file")]
    NotAFile,
    /// The address could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The `data:` URI cannot be read.
    #[error("data URI {0}")]
    DataUri(&'static str),
}

/// A remote picture that was refused or did not come.
///
/// Carries no byte of the answer's body, and of the address only what names the host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Fetching is switched off.
    #[error("fetching remote images is disabled")]
    Disabled,
    /// Not an address at all.
    #[error("not a valid URL")]
    BadUrl,
    /// Neither `http` nor `https`.
    #[error("scheme `{0}` is refused (accepted: http, https)")]
    Scheme(String),
    /// User name or password inside the address.
    #[error("URL with credentials is refused")]
    Credentials,
    /// A port that the policy does not allow.
    #[error("port {0} is refused (accepted: 80, 443)")]
    Port(u16),
    /// The host is, or resolves to, an address that is not public.
    #[error("host `{0}` has an address that is not public")]
    PrivateAddress(String),
    /// The name does not resolve.
    #[error("host `{0}` not found")]
    HostNotFound(String),
    /// No connection, or a broken one.
    #[error("connection to `{0}` failed")]
    Connection(String),
    /// A redirect without a usable target.
    #[error("host `{0}` sent a redirect without a usable location")]
    BadRedirect(String),
    /// More redirects than allowed.
    #[error("more than {0} redirects")]
    TooManyRedirects(usize),
    /// An answer other than success.
    #[error("host `{host}` answered with status {status}")]
    Status {
        /// Who answered.
        host: String,
        /// The HTTP status.
        status: u16,
    },
    /// The time budget ran out.
    #[error("not finished within {0} seconds")]
    Timeout(f64),
    /// The body is larger than the byte budget.
    #[error("body has more than {0} bytes, the limit")]
    TooManyBytes(usize),
}

/// A tokenizer that cannot be loaded or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// Neither `tokenizer.json` nor `tokenizer.model` is there.
    #[error("{}: found neither tokenizer.json nor tokenizer.model", .0.display())]
    Missing(PathBuf),
    /// A file that cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file with the wrong content.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A token that IDEFICS prompts need is not in the vocabulary.
    #[error("tokenizer has no token `{0}`: not a tokenizer of an IDEFICS checkpoint")]
    MissingToken(String),
    /// Two files disagree about the id of a token.
    #[error("token `{token}`: {file} says id {expected}, the tokenizer says {got}")]
    IdMismatch {
        /// The token.
        token: String,
        /// The file that lists it.
        file: &'static str,
        /// The id in that file.
        expected: u64,
        /// The id in the tokenizer.
        got: u32,
    },
    /// Encoding failed.
    #[error("cannot tokenize the text: {0}")]
    Encode(String),
    /// Decoding failed.
    #[error("cannot decode the token ids: {0}")]
    Decode(String),
}
