//! What the person sees: answers on stdout, everything else on stderr.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use idefics::generate::FinishReason;
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    answer::Answer,
    graphics::{Graphics, Screen, detect},
    picture::Picture,
};

pub(super) struct View {
    /// How pictures are shown and where; `None` where nobody looks.
    screen: Option<(Graphics, Screen)>,
    is_styled: bool,
    is_terminal: bool,
}

impl View {
    /// `graphics` is what was asked for in place of the best.
    pub(super) fn new(is_terminal: bool, graphics: Option<Graphics>) -> Self {
        let screen = (is_terminal || graphics.is_some()).then(|| detect(graphics));
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { screen, is_styled: is_terminal && io::stderr().is_terminal() && !no_color, is_terminal }
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// A message beside the conversation.
    pub(super) fn note(&self, text: &str) {
        let text = printable(text);
        if self.is_styled {
            eprintln!("\x1b[2m{text}\x1b[0m");
        } else if self.is_terminal {
            eprintln!("{text}");
        }
    }

    pub(super) fn error(&self, error: &anyhow::Error) {
        let text = printable(&format!("{error:#}"));
        if self.is_styled {
            eprintln!("\x1b[31merror:\x1b[0m {text}");
        } else {
            eprintln!("error: {text}");
        }
    }

    pub(super) fn picture(&self, picture: &Picture) -> io::Result<()> {
        if let Some((graphics, screen)) = &self.screen {
            let mut stdout = io::stdout().lock();
            stdout.write_all(graphics.render(&picture.thumbnail, screen).as_bytes())?;
            stdout.flush()?;
        }
        let (width, height) = picture.size;
        self.note(&format!("{} · {width} × {height}", picture.name()));
        Ok(())
    }

    /// A piece of an answer. At a terminal it cannot move the cursor or set a title.
    pub(super) fn text(&self, text: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        if self.is_terminal {
            stdout.write_all(printable(text).as_bytes())?;
        } else {
            stdout.write_all(text.as_bytes())?;
        }
        stdout.flush()
    }

    /// Shows that the model reads, until it writes.
    pub(super) fn reading(&self, tokens: usize, pictures: usize) -> ProgressBar {
        if !self.is_styled {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("{spinner:.dim} {msg:.dim} {elapsed:.dim}")
            .expect("the template is right");
        let spinner = ProgressBar::new_spinner().with_style(style);
        spinner.set_message(match pictures {
            0 => format!("reading {tokens} tokens"),
            1 => format!("reading {tokens} tokens and 1 picture"),
            pictures => format!("reading {tokens} tokens and {pictures} pictures"),
        });
        spinner.enable_steady_tick(Duration::from_millis(120));
        spinner
    }

    /// What an answer took, at a terminal.
    pub(super) fn summary(&self, answer: &Answer, positions: usize) {
        let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        let end = match answer.finish_reason {
            Some(FinishReason::EndToken(_) | FinishReason::StopString(_)) => "",
            Some(FinishReason::Length) => " · cut off at the longest length",
            Some(FinishReason::Time) => " · cut off at the longest time",
            Some(FinishReason::Cancelled) | None => " · stopped",
        };
        let (prefill, decode) = answer.seconds;
        let cached = match answer.cached_tokens {
            0 => String::new(),
            cached => format!(" · {cached} of {} tokens known", answer.prompt_tokens),
        };
        self.note(&format!(
            "{} tokens, {:.1}/s after {prefill:.1} s{end}{cached} · {} of {positions} positions used",
            answer.tokens,
            // The first token belongs to the prompt's time.
            rate(answer.tokens.saturating_sub(1), decode),
            answer.prompt_tokens + answer.tokens,
        ));
    }
}

/// Something that was asked for, or that must not be missed.
pub(super) fn tell(text: &str) {
    eprintln!("{}", printable(text));
}

/// A text without control characters, line ends and tabs aside.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|&c| !c.is_control() || c == '\n' || c == '\t').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_cannot_steer_the_terminal() {
        assert_eq!(printable("a\x1b]0;title\x07b\u{9b}2J\r\nc\td"), "a]0;titleb2J\nc\td");
    }
}
