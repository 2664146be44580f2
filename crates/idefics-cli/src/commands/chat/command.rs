//! What a line means: a command, or a message of words and pictures.

use std::path::{Path, PathBuf};

use anyhow::bail;

use super::words::{as_path, first_word, words};
use crate::prompts::is_image_file;

/// A line of the conversation.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Line {
    Empty,
    Command(Command),
    /// What is said, in its order.
    Message(Vec<Item>),
}

/// A piece of a message as it was typed.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Item {
    Text(String),
    /// An image file that was dropped into the line.
    Picture(PathBuf),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Command {
    /// Pictures for the next message: paths and addresses.
    Image(Vec<String>),
    Undo,
    Retry,
    Clear,
    Show,
    Save {
        path: PathBuf,
        how: SaveOptions,
    },
    Load(PathBuf),
    Settings(SettingsChange),
    /// Without a text: show it.
    System(Option<String>),
    Help,
    Quit,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct SaveOptions {
    /// Write the pictures themselves, not where they are.
    pub(super) embed: bool,
    /// Replace a file that this conversation has not written.
    pub(super) force: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum SettingsChange {
    Show,
    Set {
        name: String,
        value: String,
    },
    /// Back to what held at the start; all of them without a name.
    Reset(Option<String>),
}

/// Whether words of a message that name image files are taken as pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DroppedFiles {
    /// On a terminal, where a person drops them.
    AsPictures,
    /// From a pipe: nobody has looked at the text, so it opens no file.
    AsText,
}

/// What `/help` says.
pub(super) const HELP: &str = "\
  /image PATH|URL ..      add pictures to the next message; a dropped image file does the same
  /retry                  answer the last message again
  /undo                   take back the last picture, or the last message and its answer
  /clear                  begin a new conversation
  /show                   show the conversation again
  /save FILE              write the conversation; --embed: with its pictures, --force: over another file
  /load FILE              go on with a written conversation
  /system [TEXT|none]     show, set or remove the text that stands before the conversation
  /settings               show how answers are written
  /settings NAME VALUE    change one, such as temperature 0.7, max_new_tokens 100; VALUE default: as it was
  /settings reset         all as they were
  /help, /quit

A backslash at the end of a line continues it. Ctrl-C stops an answer, Ctrl-D ends the chat.";

/// Names for completion and for messages.
pub(super) const NAMES: [&str; 11] = [
    "/clear",
    "/help",
    "/image",
    "/load",
    "/quit",
    "/retry",
    "/save",
    "/settings",
    "/show",
    "/system",
    "/undo",
];

/// Reads a line. A line that begins with a slash is a command, unless that slash begins the path of a picture.
pub(super) fn parse(line: &str, dropped: DroppedFiles) -> anyhow::Result<Line> {
    if line.trim().is_empty() {
        return Ok(Line::Empty);
    }
    if line.starts_with('/') && !(dropped == DroppedFiles::AsPictures && begins_with_picture(line)) {
        return parse_command(line).map(Line::Command);
    }
    let items = match dropped {
        DroppedFiles::AsPictures => split_message(line),
        DroppedFiles::AsText => vec![Item::Text(line.trim().to_owned())],
    };
    Ok(Line::Message(items))
}

fn parse_command(line: &str) -> anyhow::Result<Command> {
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    let alone = |command: Command| {
        if rest.is_empty() { Ok(command) } else { bail!("{name} takes nothing behind it, got {rest:?}") }
    };
    match name {
        "/image" | "/picture" => {
            if rest.is_empty() {
                bail!("/image: which one? Give a path or an address");
            }
            // A whole path with spaces may be typed as it is.
            let images = if as_path(rest).is_file() { vec![rest.to_owned()] } else { words(rest) };
            Ok(Command::Image(images))
        }
        "/undo" => alone(Command::Undo),
        "/retry" => alone(Command::Retry),
        "/clear" | "/new" => alone(Command::Clear),
        "/show" => alone(Command::Show),
        "/save" => parse_save(rest),
        "/load" => match words(rest).as_slice() {
            [path] => Ok(Command::Load(as_path(path))),
            other => bail!("/load: expected one file, got {}", other.len()),
        },
        "/settings" | "/set" => parse_settings(rest).map(Command::Settings),
        "/system" => Ok(Command::System((!rest.is_empty()).then(|| rest.to_owned()))),
        "/help" | "/?" => alone(Command::Help),
        "/quit" | "/exit" | "/q" => alone(Command::Quit),
        _ => bail!(
            "{name} is no command; /help lists them, and a space before the slash makes the line a message"
        ),
    }
}

fn parse_save(rest: &str) -> anyhow::Result<Command> {
    let mut how = SaveOptions::default();
    let mut paths = Vec::new();
    for word in words(rest) {
        match word.as_str() {
            "--embed" => how.embed = true,
            "--force" => how.force = true,
            flag if flag.starts_with("--") => bail!("/save: expected --embed or --force, got {flag}"),
            path => paths.push(as_path(path)),
        }
    }
    match <[PathBuf; 1]>::try_from(paths) {
        Ok([path]) => Ok(Command::Save { path, how }),
        Err(paths) => bail!("/save: expected one file, got {}", paths.len()),
    }
}

fn parse_settings(rest: &str) -> anyhow::Result<SettingsChange> {
    let (name, value) = rest.split_once(|c: char| c.is_whitespace() || c == '=').unwrap_or((rest, ""));
    let (name, value) = (name.trim(), value.trim_start_matches(['=', ' ']).trim());
    Ok(match (name, value) {
        ("", _) => SettingsChange::Show,
        ("reset", "") => SettingsChange::Reset(None),
        (_, "") => bail!("/settings {name}: to which value?"),
        (_, "default") => SettingsChange::Reset(Some(name.to_owned())),
        _ => SettingsChange::Set { name: name.to_owned(), value: value.to_owned() },
    })
}

fn begins_with_picture(line: &str) -> bool {
    first_word(line).is_some_and(|(word, _)| is_image_file(&as_path(&word)))
}

/// Words and pictures of a message, in their order. Words stay as they were typed.
fn split_message(line: &str) -> Vec<Item> {
    let mut items = Vec::new();
    let mut text_start = 0;
    let mut at = 0;
    while at < line.len() {
        let rest = &line[at..];
        let space = rest.len() - rest.trim_start().len();
        if space > 0 {
            at += space;
            continue;
        }
        if let Some((word, length)) = first_word(rest)
            && let path = as_path(&word)
            && may_be_path(&word)
            && is_image_file(&path)
        {
            push_text(&mut items, &line[text_start..at]);
            items.push(Item::Picture(path));
            at += length;
            text_start = at;
        } else {
            at += rest.find(char::is_whitespace).unwrap_or(rest.len());
        }
    }
    push_text(&mut items, &line[text_start..]);
    items
}

/// Keeps the disk out of it for plain words.
fn may_be_path(word: &str) -> bool {
    word.contains(['/', '.', std::path::MAIN_SEPARATOR]) || Path::new(word).extension().is_some()
}

fn push_text(items: &mut Vec<Item>, text: &str) {
    let text = text.trim();
    if !text.is_empty() {
        items.push(Item::Text(text.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &str) -> Command {
        match parse(line, DroppedFiles::AsText).unwrap_or_else(|error| panic!("{line}: {error}")) {
            Line::Command(command) => command,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn commands_are_read() {
        let set = |name: &str, value: &str| {
            Command::Settings(SettingsChange::Set { name: name.into(), value: value.into() })
        };
        let save =
            |embed, force| Command::Save { path: "a b.jsonl".into(), how: SaveOptions { embed, force } };
        let rows = [
            ("/image a.png", Command::Image(vec!["a.png".into()])),
            (
                "/image  'a b.png'  https://h/x.png ",
                Command::Image(vec!["a b.png".into(), "https://h/x.png".into()]),
            ),
            ("/undo", Command::Undo),
            ("/retry ", Command::Retry),
            ("/clear", Command::Clear),
            ("/new", Command::Clear),
            ("/show", Command::Show),
            ("/save 'a b.jsonl'", save(false, false)),
            ("/save --embed 'a b.jsonl' --force", save(true, true)),
            ("/load chat.jsonl", Command::Load("chat.jsonl".into())),
            ("/settings", Command::Settings(SettingsChange::Show)),
            ("/settings temperature 0.7", set("temperature", "0.7")),
            ("/settings temperature=0.7", set("temperature", "0.7")),
            ("/settings temperature = 0.7", set("temperature", "0.7")),
            ("/settings stop_strings [\"a b\"]", set("stop_strings", "[\"a b\"]")),
            ("/settings top_p default", Command::Settings(SettingsChange::Reset(Some("top_p".into())))),
            ("/settings reset", Command::Settings(SettingsChange::Reset(None))),
            ("/system", Command::System(None)),
            ("/system  Be brief. ", Command::System(Some("Be brief.".into()))),
            ("/help", Command::Help),
            ("/quit", Command::Quit),
            ("/exit", Command::Quit),
        ];
        for (line, expected) in rows {
            assert_eq!(command(line), expected, "{line}");
        }
        for name in NAMES {
            assert!(HELP.contains(name), "{name} is not in the help");
        }
    }

    #[test]
    fn mistakes_are_told() {
        let rows = [
            ("/imge a.png", "/imge is no command"),
            ("/image", "which one"),
            ("/undo 2", "takes nothing"),
            ("/save", "one file, got 0"),
            ("/save a b", "one file, got 2"),
            ("/save --embd a", "--embd"),
            ("/load", "one file, got 0"),
            ("/settings temperature", "which value"),
            ("/", "is no command"),
        ];
        for (line, expected) in rows {
            let error = parse(line, DroppedFiles::AsText).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    #[cfg(unix)]
    fn dropped_files_are_pictures_where_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, b"GIF89a").unwrap();
            path
        };
        let (dog, spaced) = (file("dog.gif"), file("my cat.gif"));
        let text = |text: &str| Item::Text(text.to_owned());
        let (d, s) = (dog.display(), spaced.display().to_string());
        let picture = |path: &PathBuf| Item::Picture(path.clone());
        let rows = [
            (format!("{d}"), vec![picture(&dog)]),
            (format!("{d} who is that?"), vec![picture(&dog), text("who is that?")]),
            (
                format!("is {d} as old as '{s}'?"),
                vec![text("is"), picture(&dog), text(&format!("as old as '{s}'?"))],
            ),
            (
                format!("don't mix {} with {d} ", s.replace(' ', "\\ ")),
                vec![text("don't mix"), picture(&spaced), text("with"), picture(&dog)],
            ),
            (format!("file://{} there", s.replace(' ', "%20")), vec![picture(&spaced), text("there")]),
            ("  two  words/ and ./missing.png ".to_owned(), vec![text("two  words/ and ./missing.png")]),
            ("https://host/a.png".to_owned(), vec![text("https://host/a.png")]),
        ];
        for (line, expected) in rows {
            assert_eq!(parse(&line, DroppedFiles::AsPictures).unwrap(), Line::Message(expected), "{line}");
        }
        let piped = parse(&format!("see {d}"), DroppedFiles::AsText).unwrap();
        assert_eq!(piped, Line::Message(vec![text(&format!("see {d}"))]), "a pipe opens no file");
        assert_eq!(parse(" \t", DroppedFiles::AsPictures).unwrap(), Line::Empty);
        assert_eq!(parse(" /undo", DroppedFiles::AsPictures).unwrap(), Line::Message(vec![text("/undo")]));
    }
}
