//! Paths as terminals write them into a line when a file is dropped: bare, with escapes, quoted, or as a
//! `file://` address.

use std::path::PathBuf;

use url::Url;

/// A word at the start of a text, unquoted, and the bytes it takes there. `None` at a space, at the end, and where
/// a quote is not closed.
pub(super) fn first_word(text: &str) -> Option<(String, usize)> {
    let mut word = String::new();
    let mut quote = None;
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match (c, quote) {
            (_, Some(open)) if c == open => quote = None,
            ('\\', None | Some('"')) if has_escapes() => match characters.next() {
                Some((_, escaped)) => word.push(escaped),
                None => word.push('\\'),
            },
            (_, Some(_)) => word.push(c),
            ('\'' | '"', None) => quote = Some(c),
            (c, None) if c.is_whitespace() => return (at > 0).then_some((word, at)),
            (c, None) => word.push(c),
        }
    }
    (quote.is_none() && !text.is_empty()).then_some((word, text.len()))
}

/// The words of a text, or the text as it is where a quote is not closed.
pub(super) fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let Some((word, length)) = first_word(rest) else { return vec![text.trim().to_owned()] };
        words.push(word);
        rest = rest[length..].trim_start();
    }
    words
}

/// The local file that a word names: a path, a path from the home directory, or a `file://` address.
pub(super) fn as_path(word: &str) -> PathBuf {
    if word.starts_with("file://")
        && let Ok(url) = Url::parse(word)
        && let Ok(path) = url.to_file_path()
    {
        return path;
    }
    if let Some(below) = word.strip_prefix("~/")
        && let Some(home) = std::env::home_dir()
    {
        return home.join(below);
    }
    PathBuf::from(word)
}

/// On Windows a backslash separates directories.
fn has_escapes() -> bool {
    !cfg!(windows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn words_are_unquoted() {
        let rows: [(&str, &[&str]); 9] = [
            ("", &[]),
            ("a b", &["a", "b"]),
            (r"my\ dog.jpg  cat.jpg ", &["my dog.jpg", "cat.jpg"]),
            ("'my dog.jpg' x", &["my dog.jpg", "x"]),
            (r#""a \"b\".png""#, &[r#"a "b".png"#]),
            (r"'it'\''s.png'", &["it's.png"]),
            ("don't", &["don't"]),
            ("ends with\\", &["ends", "with\\"]),
            ("''", &[""]),
        ];
        for (line, expected) in rows {
            assert_eq!(words(line), expected, "{line:?}");
        }
        assert_eq!(first_word("a\u{a0}b"), Some(("a".to_owned(), 1)));
        assert_eq!(first_word(" a"), None);
    }

    #[test]
    #[cfg(unix)]
    fn words_name_files() {
        assert_eq!(as_path("a b.png"), PathBuf::from("a b.png"));
        assert_eq!(as_path("file:///tmp/my%20dog.png"), PathBuf::from("/tmp/my dog.png"));
        assert_eq!(as_path("file://other-host/x"), PathBuf::from("file://other-host/x"));
        let home = std::env::home_dir().unwrap();
        assert_eq!(as_path("~/x.png"), home.join("x.png"));
    }
}
