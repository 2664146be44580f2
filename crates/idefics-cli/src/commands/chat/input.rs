//! Where lines come from: a person at a terminal, with editing and history, or a pipe.

use std::{
    io::{BufRead, StdinLock},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use rustyline::{
    Cmd, CompletionType, Config, Editor, EventHandler, Helper, KeyCode, KeyEvent, Modifiers,
    completion::{Completer, FilenameCompleter, Pair},
    error::ReadlineError,
    highlight::Highlighter,
    hint::Hinter,
    history::FileHistory,
    validate::{ValidationContext, ValidationResult, Validator},
};

use super::command::NAMES;

/// Most lines that are remembered.
const HISTORY_LINES: usize = 1000;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    Line(String),
    /// Ctrl-C at the prompt: the line is given up.
    Interrupted,
    End,
}

pub(super) enum LineSource {
    Terminal(Box<Terminal>),
    Pipe(StdinLock<'static>),
}

pub(super) struct Terminal {
    editor: Editor<ChatHelper, FileHistory>,
    history: Option<PathBuf>,
}

impl LineSource {
    /// Lines of a person; what was typed is kept in a file where one is named.
    pub(super) fn terminal(history: Option<&Path>) -> anyhow::Result<Self> {
        let config = Config::builder()
            .max_history_size(HISTORY_LINES)
            .context("history")?
            .history_ignore_space(true)
            .completion_type(CompletionType::List)
            .auto_add_history(true)
            .build();
        let mut editor = Editor::with_config(config).context("cannot use the terminal")?;
        editor.set_helper(Some(ChatHelper { files: FilenameCompleter::new() }));
        // Enter sends, as in every chat; Alt-Enter is a new line.
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), EventHandler::Simple(Cmd::Newline));
        if let Some(path) = history
            && path.exists()
        {
            editor.load_history(path).with_context(|| format!("cannot read {}", path.display()))?;
        }
        Ok(Self::Terminal(Box::new(Terminal { editor, history: history.map(Path::to_owned) })))
    }

    pub(super) fn pipe() -> Self {
        Self::Pipe(std::io::stdin().lock())
    }

    /// The next line, continuations joined.
    pub(super) fn read(&mut self, prompt: &str) -> anyhow::Result<Input> {
        match self {
            Self::Terminal(terminal) => match terminal.editor.readline(prompt) {
                Ok(line) => Ok(Input::Line(line.replace("\\\n", "\n"))),
                Err(ReadlineError::Interrupted) => Ok(Input::Interrupted),
                Err(ReadlineError::Eof) => Ok(Input::End),
                Err(error) => Err(error).context("cannot read from the terminal"),
            },
            Self::Pipe(stdin) => read_piped(stdin).context("cannot read stdin"),
        }
    }

    /// Writes the history, where it is kept.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        if let Self::Terminal(mut terminal) = self
            && let Some(path) = terminal.history
        {
            terminal
                .editor
                .save_history(&path)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// A line and those it goes on in, by a backslash at its end.
fn read_piped(reader: &mut impl BufRead) -> std::io::Result<Input> {
    let mut text = String::new();
    let mut is_any = false;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(if is_any { Input::Line(text) } else { Input::End });
        }
        is_any = true;
        let line = line.trim_end_matches('\n');
        let line = line.strip_suffix('\r').unwrap_or(line);
        let Some(start) = line.strip_suffix('\\') else {
            text += line;
            return Ok(Input::Line(text));
        };
        text += start;
        text.push('\n');
    }
}

/// Completion of commands and files; a backslash at the end goes on.
struct ChatHelper {
    files: FilenameCompleter,
}

impl Completer for ChatHelper {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        position: usize,
        ctx: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        if line.starts_with('/') && !line[..position].contains(char::is_whitespace) {
            let names = NAMES.iter().filter(|name| name.starts_with(&line[..position]));
            let pair = |name: &&str| Pair { display: (*name).to_owned(), replacement: format!("{name} ") };
            let found: Vec<Pair> = names.map(pair).collect();
            // A path begins with a slash too.
            if !found.is_empty() {
                return Ok((0, found));
            }
        }
        self.files.complete(line, position, ctx)
    }
}

impl Validator for ChatHelper {
    fn validate(&self, ctx: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if ctx.input().ends_with('\\') {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Hinter for ChatHelper {
    type Hint = String;
}

impl Highlighter for ChatHelper {}

impl Helper for ChatHelper {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn piped_lines_go_on_behind_a_backslash() {
        let mut text: &[u8] = b"one\r\ntwo\\\nthree\n\nlast\\";
        let mut lines = Vec::new();
        while let Input::Line(line) = read_piped(&mut text).unwrap() {
            lines.push(line);
        }
        assert_eq!(lines, ["one", "two\nthree", "", "last\n"]);
        assert!(read_piped(&mut &b"\xff\n"[..]).is_err(), "what is no text is an error");
    }
}
