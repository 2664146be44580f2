//! Prompts on the command line and in JSON lines.

use std::{ffi::OsString, io::BufRead, path::Path};

use anyhow::{Context, bail};
use clap::{Arg, ArgAction, ArgMatches, Command, Error, builder::ValueParser};
use idefics::{
    Prompt, Segment,
    processor::{ImageSource, decode::ImageFormat},
};
use serde::Deserialize;

/// Texts and pictures in the order in which they stand on the command line.
#[derive(Debug, Clone, Default)]
pub(crate) struct PromptItems(pub(crate) Prompt);

/// How an argument becomes a segment.
type ToSegment = fn(&str) -> Segment;

/// What is where in the arguments: plain items, which are guessed, and those that leave no doubt.
const KINDS: [(&str, ToSegment); 3] = [
    ("items", guess),
    ("image", |item| Segment::Image(image_source(item))),
    ("text", |item| Segment::Text(item.to_owned())),
];

impl clap::Args for PromptItems {
    fn augment_args(command: Command) -> Command {
        let parser = || ValueParser::string();
        command
            .arg(
                Arg::new("items").value_name("ITEM").num_args(0..).value_parser(parser()).help(
                    "Texts and pictures in their order; a picture is an existing image file, an http(s) URL or a data: URI",
                ),
            )
            .arg(
                Arg::new("image")
                    .long("image")
                    .value_name("X")
                    .action(ArgAction::Append)
                    .value_parser(parser())
                    .help("A picture, without a doubt: a file, a URL or a data: URI"),
            )
            .arg(
                Arg::new("text")
                    .long("text")
                    .value_name("X")
                    .action(ArgAction::Append)
                    .value_parser(parser())
                    .allow_hyphen_values(true)
                    .help("A text, without a doubt"),
            )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for PromptItems {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let mut placed = Vec::new();
        for (id, segment) in KINDS {
            let values = matches.get_many::<String>(id).unwrap_or_default();
            let indices = matches.indices_of(id).into_iter().flatten();
            placed.extend(indices.zip(values).map(|(index, value)| (index, segment(value))));
        }
        placed.sort_by_key(|(index, _)| *index);
        Ok(Self(placed.into_iter().map(|(_, segment)| segment).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A picture if the item names one that is there, else a text.
fn guess(item: &str) -> Segment {
    if is_url(item) || is_data_uri(item) || is_image_file(Path::new(item)) {
        Segment::Image(image_source(item))
    } else {
        Segment::Text(item.to_owned())
    }
}

/// What a string that is meant as a picture refers to.
pub(crate) fn image_source(item: &str) -> ImageSource {
    if is_url(item) {
        ImageSource::Url(item.to_owned())
    } else if is_data_uri(item) {
        ImageSource::DataUri(item.to_owned())
    } else {
        ImageSource::Path(item.into())
    }
}

pub(crate) fn is_url(item: &str) -> bool {
    let has_scheme = item.starts_with("http://") || item.starts_with("https://");
    // A sentence that begins with an address is a text.
    has_scheme && !item.contains(char::is_whitespace)
}

fn is_data_uri(item: &str) -> bool {
    let header = item.strip_prefix("data:").and_then(|rest| rest.split_once(','));
    header.is_some_and(|(header, _)| !header.contains(char::is_whitespace))
}

/// Whether a file is there that has an image's name or content. A broken picture is still meant as one.
pub(crate) fn is_image_file(path: &Path) -> bool {
    path.is_file() && (has_image_name(path) || has_image_content(path))
}

pub(crate) fn has_image_name(path: &Path) -> bool {
    let extension = path.extension().map(OsString::from).unwrap_or_default().to_ascii_lowercase();
    ["jpg", "jpeg", "png", "webp", "gif", "bmp"].iter().any(|known| extension == *known)
}

fn has_image_content(path: &Path) -> bool {
    use std::io::Read;
    let mut start = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(64).read_to_end(&mut start));
    read.is_ok() && ImageFormat::sniff(&start).is_some()
}

/// One segment of a prompt in JSON: `{"text": ..}` or `{"image": ..}`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum JsonSegment {
    Text(String),
    Image(String),
}

/// A list of segments as they stand in JSON.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(transparent)]
pub(crate) struct JsonPrompt(Vec<JsonSegment>);

impl From<JsonPrompt> for Prompt {
    fn from(prompt: JsonPrompt) -> Self {
        let segment = |segment| match segment {
            JsonSegment::Text(text) => Segment::Text(text),
            JsonSegment::Image(image) => Segment::Image(image_source(&image)),
        };
        prompt.0.into_iter().map(segment).collect()
    }
}

/// The lines of a file of JSON, or of stdin for `-`, each with its number. Empty lines are passed over.
pub(crate) fn json_lines<T: serde::de::DeserializeOwned>(
    path: &Path,
) -> anyhow::Result<Vec<(usize, anyhow::Result<T>)>> {
    let reader: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Box::new(std::io::BufReader::new(file))
    };
    let mut values = Vec::new();
    for (index, line) in reader.lines().enumerate() {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        if !line.trim().is_empty() {
            let value = serde_json::from_str(&line);
            values
                .push((index + 1, value.with_context(|| format!("{}, line {}", path.display(), index + 1))));
        }
    }
    if values.is_empty() {
        bail!("{} has no lines", path.display());
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        items: PromptItems,
        #[arg(long)]
        other: Option<String>,
    }

    fn parse(args: &[&str]) -> Prompt {
        let line =
            Line::try_parse_from(std::iter::once(&"idefics").chain(args)).expect("the test's own line");
        assert_eq!(line.other.is_some(), args.contains(&"--other"));
        line.items.0
    }

    #[test]
    fn items_keep_their_order_and_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let broken = dir.path().join("empty.PNG");
        std::fs::write(&broken, "").unwrap();
        let nameless = dir.path().join("picture");
        std::fs::write(&nameless, b"GIF89a and more").unwrap();
        let notes = dir.path().join("notes.txt");
        std::fs::write(&notes, "words").unwrap();
        let [broken, nameless, notes] = [broken, nameless, notes].map(|path| path.display().to_string());
        let text = |text: &str| Segment::text(text);
        let image = |source| Segment::Image(source);
        let url = "https://host/a.png";
        assert_eq!(
            parse(&["User:", &broken, "--text", url, "--other", "x", &nameless, "--image", &notes, &notes]),
            [
                text("User:"),
                image(ImageSource::Path(broken.clone().into())),
                text(url),
                image(ImageSource::Path(nameless.clone().into())),
                image(ImageSource::Path(notes.clone().into())),
                text(&notes),
            ]
        );
        assert_eq!(
            parse(&[url, "http://host is down", "data:image/png;base64,AA==", "data: a, b", "missing.png"]),
            [
                image(ImageSource::Url(url.to_owned())),
                text("http://host is down"),
                image(ImageSource::DataUri("data:image/png;base64,AA==".to_owned())),
                text("data: a, b"),
                text("missing.png"),
            ]
        );
    }

    #[test]
    fn segments_in_json_are_typed() {
        let prompt: JsonPrompt =
            serde_json::from_str(r#"[{"text": "http://x"}, {"image": "a.png"}]"#).unwrap();
        let prompt = Prompt::from(prompt);
        assert_eq!(prompt, [Segment::text("http://x"), Segment::Image(ImageSource::Path("a.png".into()))]);
        for bad in [r#"[{"txt": "a"}]"#, r#"[{"text": "a", "image": "b"}]"#, r#"["a"]"#, r#"[{"image": 1}]"#]
        {
            assert!(serde_json::from_str::<JsonPrompt>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn json_lines_name_the_bad_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[1]\n\n[2\n").unwrap();
        let lines = json_lines::<Vec<u32>>(file.path()).unwrap();
        assert_eq!(lines[0].1.as_ref().unwrap(), &[1]);
        let (number, error) = (lines[1].0, lines[1].1.as_ref().unwrap_err());
        assert_eq!(number, 3);
        assert!(format!("{error:#}").contains("line 3"));
        assert!(json_lines::<u32>(Path::new("/no/such/file")).is_err());
    }
}
