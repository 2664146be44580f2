//! From the columns of a record to a sample: `<image>Question: {question} Answer:` and ` {answer}`.

use idefics::processor::{IMAGE_TOKEN, ImageSource};

use super::{
    DataError,
    sample::{Piece, Role, Sample, SampleKind},
};

/// A prompt and an answer with places for a picture and for columns.
#[derive(Debug, Clone)]
pub(super) struct Template {
    parts: Vec<(Role, Part)>,
}

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text(String),
    Column(String),
    Image,
}

impl Template {
    /// `{name}` stands for a column, `<image>` for the picture, `{{` and `}}` for braces.
    pub(super) fn parse(prompt: &str, answer: &str) -> Result<Self, DataError> {
        let mut parts = Vec::new();
        for (role, text) in [(Role::Context, prompt), (Role::Answer, answer)] {
            let bad = |reason| DataError::Template { template: text.to_owned(), reason };
            for (index, text) in text.split(IMAGE_TOKEN).enumerate() {
                if index > 0 {
                    parts.push((role, Part::Image));
                }
                columns(text, &mut |part| parts.push((role, part))).map_err(bad)?;
            }
        }
        Ok(Self { parts })
    }

    /// The sample of one record.
    pub(super) fn fill(
        &self,
        column: impl Fn(&str) -> Option<String>,
        image: impl Fn() -> Result<ImageSource, String>,
    ) -> Result<Sample, String> {
        let piece = |(role, part): &(Role, Part)| {
            let text = match part {
                Part::Image => return Ok(Piece::Image(image()?)),
                Part::Text(text) => text.clone(),
                Part::Column(name) => column(name).ok_or_else(|| format!("there is no {name}"))?,
            };
            Ok(Piece::Text { text, role: *role })
        };
        let pieces = self.parts.iter().map(piece).collect::<Result<_, String>>()?;
        Ok(Sample { pieces, kind: SampleKind::Pair })
    }

    /// The columns that it needs.
    pub(super) fn column_names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|(_, part)| match part {
            Part::Column(name) => Some(name.as_str()),
            _ => None,
        })
    }
}

fn columns(text: &str, push: &mut impl FnMut(Part)) -> Result<(), &'static str> {
    let mut words = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        words += &rest[..at];
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            words += brace;
            rest = after;
            continue;
        }
        if brace == "}" {
            return Err("a `}` without a `{` (write `}}` for a brace)");
        }
        let (name, after) = rest.split_once('}').ok_or("a `{` without a `}` (write `{{` for a brace)")?;
        if !words.is_empty() {
            push(Part::Text(std::mem::take(&mut words)));
        }
        push(Part::Column(name.trim().to_owned()));
        rest = after;
    }
    words += rest;
    if !words.is_empty() {
        push(Part::Text(words));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_and_pictures_take_their_places() {
        let template = Template::parse("<image>Question: {q} {{x}} Answer:", " {a}.").unwrap();
        assert_eq!(template.column_names().collect::<Vec<_>>(), ["q", "a"]);
        let image = || Ok(ImageSource::Url("x".to_owned()));
        let sample = template.fill(|name| Some(name.to_uppercase()), image).unwrap();
        let expected = [
            Piece::Image(ImageSource::Url("x".to_owned())),
            Piece::context("Question: "),
            Piece::context("Q"),
            Piece::context(" {x} Answer:"),
            Piece::answer(" "),
            Piece::answer("A"),
            Piece::answer("."),
        ];
        assert_eq!(sample.pieces, expected);
        assert_eq!(template.fill(|_| None, image).unwrap_err(), "there is no q");
    }

    #[test]
    fn braces_must_match() {
        for bad in ["{a", "a}", "{a}}"] {
            assert!(Template::parse(bad, "").is_err(), "{bad}");
        }
    }
}
