//! Samples in JSON: segments, prompt and continuation, a plain text, or a chat.
//!
//! ```json
//! {"segments": [{"text": "A cat:"}, {"image": "cat.jpg"}, {"text": " Tom", "answer": true}]}
//! {"prompt": [{"image": "cat.jpg"}, {"text": "Question: ...? Answer:"}], "continuation": " Tom"}
//! {"text": "words alone"}
//! {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.jpg"},
//!                                            {"type": "text", "text": "Who is it?"}]},
//!               {"role": "assistant", "content": "Tom."}]}
//! ```
//!
//! Surprising: a chat becomes the dialogue that the instruct checkpoints were trained on (`User: …`,
//! `\nAssistant: …`, each turn ended by `<end_of_utterance>`), of which the answers are what follows
//! `Assistant:`, the end of the utterance included. Picture parts without a place take the next of the line's
//! `images`, as TRL writes it. Other fields may be there, such as an `id`; but none that another kind of line has,
//! nor one that names a picture which nothing would show.

use std::{path::Path, sync::Arc};

use idefics::processor::{END_OF_UTTERANCE, ImageSource};
use serde::{Deserialize, de::IgnoredAny};

use super::sample::{Piece, Role, Sample, SampleKind};

/// Finds the picture that a name in a sample means.
pub(super) type FindImage<'a> = &'a dyn Fn(&str) -> Result<ImageSource, String>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Segment {
    text: Option<String>,
    image: Option<String>,
    #[serde(default)]
    answer: bool,
}

#[derive(Deserialize)]
struct Line {
    segments: Option<Vec<Segment>>,
    prompt: Option<Vec<Segment>>,
    continuation: Option<String>,
    text: Option<String>,
    messages: Option<Vec<Message>>,
    images: Option<Vec<ImageName>>,
    image: Option<IgnoredAny>,
    image_path: Option<IgnoredAny>,
    image_url: Option<IgnoredAny>,
}

impl Line {
    /// The fields that are there and mean something, in the order of the documentation.
    fn fields(&self) -> Vec<&'static str> {
        let fields = [
            ("segments", self.segments.is_some()),
            ("prompt", self.prompt.is_some()),
            ("continuation", self.continuation.is_some()),
            ("text", self.text.is_some()),
            ("messages", self.messages.is_some()),
            ("images", self.images.is_some()),
            ("image", self.image.is_some()),
            ("image_path", self.image_path.is_some()),
            ("image_url", self.image_url.is_some()),
        ];
        fields.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect()
    }
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
    image: Option<ImageName>,
    path: Option<String>,
    url: Option<String>,
    image_url: Option<ImageName>,
}

/// A picture's name, bare or in an object.
#[derive(Deserialize)]
#[serde(untagged)]
enum ImageName {
    Bare(String),
    Path { path: String },
    Url { url: String },
}

impl ImageName {
    fn name(&self) -> &str {
        let (Self::Bare(name) | Self::Path { path: name } | Self::Url { url: name }) = self;
        name
    }
}

/// The sample of one JSON object.
pub(super) fn parse(json: &[u8], find: FindImage<'_>) -> Result<Sample, String> {
    let line: Line = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    match (line.fields().as_slice(), line) {
        (["segments"], Line { segments: Some(segments), .. }) => {
            let kind = if segments.iter().any(|segment| segment.answer) {
                SampleKind::Pair
            } else {
                SampleKind::Document
            };
            Ok(Sample { pieces: pieces(segments, find)?, kind })
        }
        (["prompt", "continuation"], Line { prompt: Some(prompt), continuation: Some(answer), .. }) => {
            let mut pieces = pieces(prompt, find)?;
            pieces.push(Piece::answer(answer));
            Ok(Sample { pieces, kind: SampleKind::Pair })
        }
        (["text"], Line { text: Some(text), .. }) => {
            Ok(Sample { pieces: vec![Piece::answer(text)], kind: SampleKind::Document })
        }
        (["messages"] | ["messages", "images"], Line { messages: Some(messages), images, .. }) => {
            let images = images.unwrap_or_default();
            Ok(Sample { pieces: dialogue(&messages, &images, find)?, kind: SampleKind::Pair })
        }
        (fields, _) => Err(not_one_kind(fields)),
    }
}

fn not_one_kind(fields: &[&str]) -> String {
    let kinds = "expected one of `segments`, `prompt` with `continuation`, `text`, `messages`";
    let got = fields.join("`, `");
    match fields {
        [] => kinds.to_owned(),
        [_] => format!("{kinds}, got `{got}` alone"),
        _ => format!("{kinds}, got `{got}` together: a picture has its place in `segments` or `prompt`"),
    }
}

fn pieces(segments: Vec<Segment>, find: FindImage<'_>) -> Result<Vec<Piece>, String> {
    let piece = |segment: Segment| match segment {
        Segment { text: Some(text), image: None, answer } => {
            Ok(Piece::Text { text, role: if answer { Role::Answer } else { Role::Context } })
        }
        Segment { text: None, image: Some(image), answer: false } => Ok(Piece::Image(find(&image)?)),
        _ => Err("a segment is either {\"text\": ..} or {\"image\": ..}".to_owned()),
    };
    segments.into_iter().map(piece).collect()
}

/// The turns of a chat, as the instruct checkpoints read them.
fn dialogue(messages: &[Message], images: &[ImageName], find: FindImage<'_>) -> Result<Vec<Piece>, String> {
    let mut images = images.iter();
    let mut pieces = Vec::new();
    for (index, Message { role, content }) in messages.iter().enumerate() {
        let start = if index == 0 { "" } else { "\n" };
        let (speaker, role) = match role.as_str() {
            "user" => ("User:", Role::Context),
            "assistant" => ("Assistant:", Role::Answer),
            // The published models know no such turn; its words stand before the first one.
            "system" if index == 0 => ("", Role::Context),
            other => return Err(format!("message {index}: expected role user or assistant, got `{other}`")),
        };
        pieces.push(Piece::context(format!("{start}{speaker}")));
        match content {
            Content::Text(text) => pieces.push(spoken(text, role)),
            Content::Parts(parts) => {
                for part in parts {
                    pieces.push(chat_part(part, role, &mut images, find)?);
                }
            }
        }
        pieces.push(Piece::Text { text: END_OF_UTTERANCE.to_owned(), role });
    }
    if images.next().is_some() {
        return Err("there are more `images` than parts for them".to_owned());
    }
    if !messages.iter().any(|message| message.role == "assistant") {
        return Err("there is no message of the assistant".to_owned());
    }
    Ok(pieces)
}

fn chat_part<'a>(
    part: &'a Part,
    role: Role,
    images: &mut impl Iterator<Item = &'a ImageName>,
    find: FindImage<'_>,
) -> Result<Piece, String> {
    match part.r#type.as_str() {
        "text" => Ok(spoken(part.text.as_deref().ok_or("a text part has no `text`")?, role)),
        "image" | "image_url" => {
            let own = part.image.as_ref().or(part.image_url.as_ref()).map(ImageName::name);
            let own = own.or(part.path.as_deref()).or(part.url.as_deref());
            let name = own.or_else(|| images.next().map(ImageName::name));
            Ok(Piece::Image(find(name.ok_or("an image part names no picture, and no `images` are left")?)?))
        }
        other => Err(format!("expected a part of type text or image, got `{other}`")),
    }
}

/// What a speaker says, behind one space.
fn spoken(text: &str, role: Role) -> Piece {
    Piece::Text { text: format!(" {}", text.trim()), role }
}

/// A picture named in a file: relative to `root`, a `data:` URI, or an address, which only `fetch` can open.
pub(super) fn find_file(name: &str, root: &Path) -> Result<ImageSource, String> {
    if name.starts_with("data:") {
        return Ok(ImageSource::DataUri(name.to_owned()));
    }
    if name.starts_with("http://") || name.starts_with("https://") {
        return Err("a picture of the network: expected a local file".to_owned());
    }
    let path = root.join(name);
    if path.is_file() { Ok(ImageSource::Path(path)) } else { Err(format!("no picture {name}")) }
}

/// A picture in memory.
pub(super) fn in_memory(bytes: Vec<u8>) -> ImageSource {
    ImageSource::Bytes(Arc::from(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces in one string: `@name` for a picture, `[..]` around answers.
    fn check(json: &str, expected: &str) {
        let find = |name: &str| match name {
            "missing" => Err("no picture missing".to_owned()),
            name => Ok(ImageSource::Url(name.to_owned())),
        };
        let got = match parse(json.as_bytes(), &find) {
            Err(error) => format!("error: {error}"),
            Ok(sample) => {
                let piece = |piece: &Piece| match piece {
                    Piece::Text { text, role: Role::Context } => text.clone(),
                    Piece::Text { text, role: Role::Answer } => format!("[{text}]"),
                    Piece::Image(ImageSource::Url(name)) => format!("@{name}"),
                    Piece::Image(other) => panic!("{other:?}"),
                };
                let pieces: String = sample.pieces.iter().map(piece).collect();
                format!("{:?} {pieces}", sample.kind)
            }
        };
        assert_eq!(got.replace(END_OF_UTTERANCE, "E"), expected, "{json}");
    }

    #[test]
    fn segments_prompts_and_texts() {
        check(r#"{"segments":[{"text":"a "},{"image":"x"},{"text":"b"}]}"#, "Document a @xb");
        check(r#"{"segments":[{"image":"x"},{"text":"b","answer":true}], "id": 3}"#, "Pair @x[b]");
        check(r#"{"prompt":[{"image":"x"},{"text":"Q:"}],"continuation":" b"}"#, "Pair @xQ:[ b]");
        check(r#"{"text":"words"}"#, "Document [words]");
    }

    #[test]
    fn chats_become_dialogues() {
        check(
            r#"{"messages":[{"role":"user","content":[{"type":"image","path":"x"},{"type":"text","text":"Who?"}]},
                {"role":"assistant","content":"Tom."},{"role":"user","content":"Sure?"},
                {"role":"assistant","content":[{"type":"text","text":"Yes."}]}]}"#,
            "Pair User:@x Who?E\nAssistant:[ Tom.][E]\nUser: Sure?E\nAssistant:[ Yes.][E]",
        );
        check(
            r#"{"images":["x",{"path":"y"}],"messages":[{"role":"user","content":[{"type":"image"},{"type":"image"}]},
                {"role":"assistant","content":"Two."}]}"#,
            "Pair User:@x@yE\nAssistant:[ Two.][E]",
        );
        check(
            r#"{"messages":[{"role":"system","content":"Be brief."},
                {"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]},
                {"role":"assistant","content":"ok"}]}"#,
            "Pair  Be brief.E\nUser:@xE\nAssistant:[ ok][E]",
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        check(r#"{"segments":[{"image":"missing"}]}"#, "error: no picture missing");
        check(
            r#"{"segments":[{"text":"a","image":"x"}]}"#,
            r#"error: a segment is either {"text": ..} or {"image": ..}"#,
        );
        check(
            r#"{"caption":"a"}"#,
            "error: expected one of `segments`, `prompt` with `continuation`, `text`, `messages`",
        );
        check(
            r#"{"messages":[{"role":"user","content":[{"type":"image"}]},{"role":"assistant","content":"x"}]}"#,
            "error: an image part names no picture, and no `images` are left",
        );
        check(
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
            "error: there is no message of the assistant",
        );
        check(
            r#"{"messages":[{"role":"tool","content":"a"}]}"#,
            "error: message 0: expected role user or assistant, got `tool`",
        );
        // A picture that nothing would show, or a second sample in one line.
        let kinds = "error: expected one of `segments`, `prompt` with `continuation`, `text`, `messages`";
        let together = |fields| {
            format!("{kinds}, got {fields} together: a picture has its place in `segments` or `prompt`")
        };
        check(r#"{"image":"x","text":"a"}"#, &together("`text`, `image`"));
        check(r#"{"images":["x"],"text":"a"}"#, &together("`text`, `images`"));
        check(r#"{"text":"a","segments":[{"image":"x"}]}"#, &together("`segments`, `text`"));
        check(r#"{"segments":[{"image":"x"}],"continuation":"a"}"#, &together("`segments`, `continuation`"));
        check(
            r#"{"messages":[],"prompt":[],"continuation":"a"}"#,
            &together("`prompt`, `continuation`, `messages`"),
        );
        check(
            r#"{"prompt":[],"continuation":"a","image_path":"x"}"#,
            &together("`prompt`, `continuation`, `image_path`"),
        );
        check(r#"{"prompt":[{"image":"x"}]}"#, &format!("{kinds}, got `prompt` alone"));
        check("nonsense", "error: expected ident at line 1 column 2");
    }
}
