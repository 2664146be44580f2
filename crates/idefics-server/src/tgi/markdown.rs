//! Pictures inside words: `![](ADDRESS)`, by the rule of text-generation-inference, `!\[\]\([^\)]*\)`.

use idefics::{Prompt, Segment};

use crate::{error::ApiError, media};

const START: &str = "![](";

/// Words and pictures in their order. A picture that is never closed stays words, as with the reference's pattern.
pub(super) fn parse(inputs: &str) -> Result<Prompt, ApiError> {
    let mut prompt = Prompt::new();
    let mut rest = inputs;
    while let Some(start) = rest.find(START) {
        let address = &rest[start + START.len()..];
        let Some(end) = address.find(')') else { break };
        push_words(&mut prompt, &rest[..start]);
        prompt.push(Segment::Image(media::source(address[..end].to_owned(), "inputs")?));
        rest = &address[end + 1..];
    }
    push_words(&mut prompt, rest);
    Ok(prompt)
}

fn push_words(prompt: &mut Prompt, words: &str) {
    if !words.is_empty() {
        prompt.push(Segment::text(words));
    }
}

#[cfg(test)]
mod tests {
    use idefics::processor::ImageSource;

    use super::*;

    #[test]
    fn pictures_are_cut_out_in_order() {
        for (inputs, expected) in [
            ("no picture", "no picture"),
            ("User:![](http://h/a.png)Hi", "User:|<http://h/a.png>|Hi"),
            ("![](data:,x)![](https://h)", "<data:,x>|<https://h>"),
            ("![alt](http://h/a.png)", "![alt](http://h/a.png)"),
            ("a ![](http://open", "a ![](http://open"),
            ("![](http://h/a(1).png)", "<http://h/a(1>|.png)"),
            ("", ""),
        ] {
            let shown: Vec<_> = parse(inputs)
                .unwrap()
                .into_iter()
                .map(|segment| match segment {
                    Segment::Text(text) => text,
                    Segment::Image(ImageSource::Url(url) | ImageSource::DataUri(url)) => format!("<{url}>"),
                    Segment::Image(_) => "?".to_owned(),
                })
                .collect();
            assert_eq!(shown.join("|"), expected);
        }
        assert!(parse("![](/etc/passwd)").is_err());
        assert!(parse("![]()").is_err());
    }
}
