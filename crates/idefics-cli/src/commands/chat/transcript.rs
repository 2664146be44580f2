//! Conversations in files: one message a line, as JSON.
//!
//! ```json
//! {"role": "system", "content": [{"text": "Be brief."}]}
//! {"role": "user", "content": [{"image": "/home/me/dog.jpg"}, {"text": "Who is that?"}]}
//! {"role": "assistant", "content": [{"text": "Idefix."}]}
//! ```
//! A picture is a path, an address or a `data:` URI. Segments are those of `idefics generate --prompts`.

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    sync::Arc,
};

use anyhow::{Context, bail, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use idefics::processor::{
    ImageSource, ProcessOptions,
    decode::ImageFormat,
    fetch::{FetchPolicy, fetch},
};
use serde::{Deserialize, Serialize};

use super::{
    conversation::{Conversation, Exchange, Part},
    picture::{Picture, name_of},
};
use crate::prompts::image_source;

/// Largest file that is loaded.
const MAX_BYTES: u64 = 1 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    User,
    Assistant,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    role: Role,
    content: Vec<Content>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Content {
    Text(String),
    Image(String),
}

/// How pictures are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PicturesAs {
    /// Where they are.
    Reference,
    /// Themselves, as `data:` URIs.
    Data,
}

/// Writes a conversation, whole or not at all.
pub(super) fn save(
    conversation: &Conversation,
    path: &Path,
    pictures: PicturesAs,
    options: &ProcessOptions,
) -> anyhow::Result<()> {
    let text = to_lines(conversation, pictures, options)?;
    let directory = match path.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    };
    let cannot = || format!("cannot write {}", path.display());
    // Beside the file, so that it takes its place at once.
    let mut file = tempfile::NamedTempFile::new_in(directory).with_context(cannot)?;
    file.write_all(text.as_bytes()).with_context(cannot)?;
    file.persist(path).with_context(cannot)?;
    Ok(())
}

/// Reads a conversation: every line, every role, every picture.
pub(super) fn load(
    path: &Path,
    mut open: impl FnMut(ImageSource) -> anyhow::Result<Picture>,
) -> anyhow::Result<Conversation> {
    let text = read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut reader = Reader::default();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("{}, line {}", path.display(), index + 1);
        let message: Message = serde_json::from_str(line).with_context(place)?;
        reader.take(message, &mut open).with_context(place)?;
    }
    reader.finish().with_context(|| path.display().to_string())
}

fn read(path: &Path) -> anyhow::Result<String> {
    // Asked before it is opened: opening a pipe waits for its other end.
    let metadata = fs::metadata(path)?;
    ensure!(metadata.is_file(), "not a regular file");
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    ensure!(text.len() as u64 <= MAX_BYTES, "more than {MAX_BYTES} bytes, the limit");
    Ok(text)
}

/// Builds a conversation from messages in their order.
#[derive(Default)]
struct Reader {
    conversation: Conversation,
    /// A message that waits for its answer.
    question: Option<Vec<Part>>,
}

impl Reader {
    fn take(
        &mut self,
        message: Message,
        open: &mut impl FnMut(ImageSource) -> anyhow::Result<Picture>,
    ) -> anyhow::Result<()> {
        let is_start = self.question.is_none() && self.conversation.exchanges.is_empty();
        match message.role {
            Role::System if is_start && self.conversation.system.is_none() => {
                self.conversation.system = Some(only_text(message.content)?);
            }
            Role::System => bail!("a system message can only be the first"),
            Role::User => {
                ensure!(self.question.is_none(), "expected an assistant message, got a second user message");
                ensure!(!message.content.is_empty(), "the message is empty");
                let part = |content| match content {
                    Content::Text(text) => Ok(Part::Text(text)),
                    Content::Image(image) => Ok(Part::Picture(Arc::new(open(image_source(&image))?))),
                };
                self.question = Some(message.content.into_iter().map(part).collect::<anyhow::Result<_>>()?);
            }
            Role::Assistant => {
                let Some(question) = self.question.take() else {
                    bail!("expected a user message, got an assistant message");
                };
                let answer = only_text(message.content)?;
                self.conversation.exchanges.push(Exchange { question, answer });
            }
        }
        Ok(())
    }

    fn finish(self) -> anyhow::Result<Conversation> {
        ensure!(self.question.is_none(), "the last message has no answer");
        ensure!(
            !self.conversation.exchanges.is_empty() || self.conversation.system.is_some(),
            "there is no conversation in it"
        );
        Ok(self.conversation)
    }
}

fn only_text(content: Vec<Content>) -> anyhow::Result<String> {
    let text = |content| match content {
        Content::Text(text) => Ok(text),
        Content::Image(_) => bail!("only a user message can have pictures"),
    };
    Ok(content.into_iter().map(text).collect::<anyhow::Result<Vec<_>>>()?.join("\n"))
}

fn to_lines(
    conversation: &Conversation,
    pictures: PicturesAs,
    options: &ProcessOptions,
) -> anyhow::Result<String> {
    let mut lines = String::new();
    let mut push = |role, content| -> anyhow::Result<()> {
        lines += &serde_json::to_string(&Message { role, content })?;
        lines.push('\n');
        Ok(())
    };
    if let Some(system) = &conversation.system {
        push(Role::System, vec![Content::Text(system.clone())])?;
    }
    for exchange in &conversation.exchanges {
        let content = |part: &Part| match part {
            Part::Text(text) => Ok(Content::Text(text.clone())),
            Part::Picture(picture) => match pictures {
                PicturesAs::Reference => reference(&picture.source),
                PicturesAs::Data => data_uri(&picture.source, options),
            }
            .map(Content::Image),
        };
        push(Role::User, exchange.question.iter().map(content).collect::<anyhow::Result<_>>()?)?;
        push(Role::Assistant, vec![Content::Text(exchange.answer.clone())])?;
    }
    Ok(lines)
}

/// Where a picture is, from any directory.
fn reference(source: &ImageSource) -> anyhow::Result<String> {
    match source {
        ImageSource::Path(path) => {
            let path = std::path::absolute(path)?;
            let path = path.to_str().with_context(|| {
                format!("the path {} is no Unicode text; --embed writes the picture itself", path.display())
            })?;
            Ok(path.to_owned())
        }
        ImageSource::Url(text) | ImageSource::DataUri(text) => Ok(text.clone()),
        ImageSource::Bytes(_) | ImageSource::Rgb(_) => data_uri(source, &ProcessOptions::default()),
    }
}

/// The file of a picture as it is now, within the limits that held when it was added.
fn data_uri(source: &ImageSource, options: &ProcessOptions) -> anyhow::Result<String> {
    let limit = options.limits.max_bytes;
    let in_picture = || format!("picture {}", name_of(source));
    let bytes = match source {
        ImageSource::DataUri(uri) => return Ok(uri.clone()),
        ImageSource::Path(path) => {
            let mut bytes = Vec::new();
            let file = fs::File::open(path).with_context(in_picture)?;
            file.take(limit as u64 + 1).read_to_end(&mut bytes).with_context(in_picture)?;
            bytes
        }
        ImageSource::Url(address) => {
            let max_bytes = options.fetch.max_bytes.min(limit);
            fetch(address, &FetchPolicy { max_bytes, ..options.fetch.clone() }).with_context(in_picture)?
        }
        ImageSource::Bytes(bytes) => bytes.to_vec(),
        ImageSource::Rgb(_) => bail!("a decoded picture has no file"),
    };
    ensure!(bytes.len() <= limit, "picture {} has more than {limit} bytes by now", name_of(source));
    let format = ImageFormat::sniff(&bytes)
        .with_context(|| format!("picture {} is no image any more", name_of(source)))?;
    Ok(format!("data:{};base64,{}", media_type(format), STANDARD.encode(bytes)))
}

fn media_type(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Jpeg => "image/jpeg",
        ImageFormat::Png => "image/png",
        ImageFormat::WebP => "image/webp",
        ImageFormat::Gif => "image/gif",
        ImageFormat::Bmp => "image/bmp",
    }
}

#[cfg(test)]
mod tests {
    use idefics::processor::ImageProcessor;
    use idefics_testing::fixture;

    use super::*;

    fn open(source: ImageSource) -> anyhow::Result<Picture> {
        Picture::open(source, &ImageProcessor::default(), &ProcessOptions::default())
    }

    fn shown(conversation: &Conversation) -> Vec<String> {
        let part = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Picture(picture) => format!("{:?}", picture.size),
        };
        let exchange = |exchange: &Exchange| {
            let question: Vec<String> = exchange.question.iter().map(part).collect();
            [question, vec![exchange.answer.clone()]].concat()
        };
        let exchanges = conversation.exchanges.iter().flat_map(exchange);
        conversation.system.iter().cloned().chain(exchanges).collect()
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let picture = Picture::open(
            ImageSource::Path(fixture("processor/444.jpg")),
            &ImageProcessor::default(),
            &ProcessOptions::default(),
        );
        let question =
            vec![Part::Picture(Arc::new(picture.unwrap())), Part::Text("what\n\"is\" that?".into())];
        let conversation = Conversation {
            system: Some("Be brief.".to_owned()),
            exchanges: vec![
                Exchange { question, answer: "A dog.".to_owned() },
                Exchange { question: vec![Part::Text("thanks".into())], answer: String::new() },
            ],
        };
        for (pictures, written) in
            [(PicturesAs::Reference, "444.jpg"), (PicturesAs::Data, "data:image/jpeg;base64,")]
        {
            let path = dir.path().join(format!("{pictures:?}.jsonl"));
            save(&conversation, &path, pictures, &ProcessOptions::default()).unwrap();
            assert!(fs::read_to_string(&path).unwrap().contains(written));
            assert_eq!(shown(&load(&path, open).unwrap()), shown(&conversation), "{pictures:?}");
        }
        let nowhere = dir.path().join("missing/chat.jsonl");
        assert!(save(&conversation, &nowhere, PicturesAs::Reference, &ProcessOptions::default()).is_err());
    }

    #[test]
    fn every_mistake_in_a_file_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chat.jsonl");
        let user = r#"{"role": "user", "content": [{"text": "a"}]}"#;
        let assistant = r#"{"role": "assistant", "content": [{"text": "b"}]}"#;
        let image =
            |role: &str, image: &str| format!(r#"{{"role": "{role}", "content": [{{"image": "{image}"}}]}}"#);
        let rows = [
            (String::new(), "no conversation"),
            ("{".to_owned(), "line 1"),
            (format!("{user}\n"), "no answer"),
            (format!("{user}\n\n{user}"), "line 3: expected an assistant message"),
            (assistant.to_owned(), "line 1: expected a user message"),
            (
                format!("{user}\n{assistant}\n{{\"role\": \"system\", \"content\": []}}"),
                "line 3: a system message",
            ),
            (format!("{user}\n{}", image("assistant", "x.png")), "line 2: only a user message"),
            (image("user", "/no/such.png"), "line 1: picture /no/such.png: cannot read"),
            (image("user", "data:image/png;base64,AAAA"), "line 1: picture data URI: not an image"),
            (r#"{"role": "tool", "content": []}"#.to_owned(), "unknown variant `tool`"),
            (r#"{"role": "user", "content": [], "x": 1}"#.to_owned(), "unknown field `x`"),
            (r#"{"role": "user", "content": []}"#.to_owned(), "the message is empty"),
            (r#"{"role": "user", "content": [{"text": "a", "image": "b"}]}"#.to_owned(), "line 1"),
        ];
        for (text, expected) in rows {
            fs::write(&path, &text).unwrap();
            let error = load(&path, open).err().unwrap_or_else(|| panic!("{text}: loaded"));
            let error = format!("{error:#}");
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(load(dir.path(), open).is_err(), "a directory is no conversation");
    }
}
