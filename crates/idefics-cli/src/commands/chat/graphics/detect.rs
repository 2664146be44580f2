//! What the terminal can show.
//!
//! Names of terminals are in the environment, also over ssh; that one draws sixels it says itself when it is asked
//! for its attributes (DA1, where 4 is sixel graphics). Surprising: under tmux the environment names the outer
//! terminal, whose own protocols tmux does not pass on, so there only the question counts.

use std::time::Duration;

use super::{Colors, Graphics, Screen};

/// How long a terminal may take to answer. Those that never do cost this once.
const PATIENCE: Duration = Duration::from_millis(250);
/// What a character measures where the terminal does not say.
const USUAL_CELL: (usize, usize) = (10, 20);

/// What the terminal on stdin and stdout offers, and the best way to show pictures there.
/// The terminal is asked nothing where the way is `chosen`.
pub(in super::super) fn detect(chosen: Option<Graphics>) -> (Graphics, Screen) {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let screen = screen(colors(&variable));
    let graphics = chosen.or_else(|| by_environment(&variable)).unwrap_or_else(|| {
        if ask(PATIENCE).is_some_and(|reply| has_sixel(&reply)) { Graphics::Sixel } else { Graphics::Blocks }
    });
    (graphics, screen)
}

/// Where the environment leaves no question.
fn by_environment(variable: &dyn Fn(&str) -> String) -> Option<Graphics> {
    let (term, program) = (variable("TERM"), variable("TERM_PROGRAM"));
    let is_set = |name| !variable(name).is_empty();
    if term.is_empty() || term == "dumb" || is_set("NO_COLOR") {
        return Some(Graphics::None);
    }
    if is_set("TMUX") || term.starts_with("screen") || term.starts_with("tmux") {
        return None;
    }
    if term.contains("kitty") || term.contains("ghostty") || is_set("KITTY_WINDOW_ID") || program == "ghostty"
    {
        return Some(Graphics::Kitty);
    }
    let speaks_iterm2 = ["iTerm.app", "WezTerm", "mintty"].contains(&program.as_str());
    if speaks_iterm2 || variable("LC_TERMINAL") == "iTerm2" {
        return Some(Graphics::Iterm2);
    }
    // The console of Linux and Apple's Terminal have no pictures, and print questions they do not know.
    (term == "linux" || program == "Apple_Terminal").then_some(Graphics::Blocks)
}

fn colors(variable: &dyn Fn(&str) -> String) -> Colors {
    match variable("COLORTERM").as_str() {
        "truecolor" | "24bit" => Colors::True,
        _ => Colors::Palette,
    }
}

/// Whether a reply to DA1, `ESC [ ? 62 ; 4 ; 22 c`, has attribute 4.
fn has_sixel(reply: &[u8]) -> bool {
    let reply = String::from_utf8_lossy(reply);
    let Some((_, attributes)) = reply.rsplit_once("\x1b[?") else { return false };
    attributes.strip_suffix('c').is_some_and(|attributes| attributes.split(';').skip(1).any(|it| it == "4"))
}

#[cfg(unix)]
fn screen(colors: Colors) -> Screen {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok();
    let (columns, rows) = match size {
        Some(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => (80, 24),
    };
    let cell = match size {
        Some(size) if size.ws_xpixel > 0 && size.ws_ypixel > 0 => {
            (usize::from(size.ws_xpixel) / columns, usize::from(size.ws_ypixel) / rows)
        }
        _ => USUAL_CELL,
    };
    Screen { columns, rows, cell, colors }
}

#[cfg(not(unix))]
fn screen(colors: Colors) -> Screen {
    Screen { columns: 80, rows: 24, cell: USUAL_CELL, colors }
}

/// Asks the terminal for its attributes.
#[cfg(unix)]
fn ask(patience: Duration) -> Option<Vec<u8>> {
    use std::io::Write;

    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

    let stdin = std::io::stdin();
    let usual = tcgetattr(&stdin).ok()?;
    let mut raw = usual.clone();
    raw.make_raw();
    // What is typed already is not a reply, and would be lost.
    if is_readable(&stdin, Duration::ZERO) {
        return None;
    }
    tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
    let mut stdout = std::io::stdout();
    let is_asked = stdout.write_all(b"\x1b[c").and_then(|()| stdout.flush()).is_ok();
    let reply = if is_asked { read_reply(&stdin, patience) } else { None };
    tcsetattr(&stdin, OptionalActions::Now, &usual).ok()?;
    reply
}

#[cfg(not(unix))]
fn ask(_patience: Duration) -> Option<Vec<u8>> {
    None
}

/// Bytes up to the `c` that ends a reply.
#[cfg(unix)]
fn read_reply(stdin: &std::io::Stdin, patience: Duration) -> Option<Vec<u8>> {
    let deadline = std::time::Instant::now() + patience;
    let mut reply = Vec::new();
    while reply.len() < 128 {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if !is_readable(stdin, left) {
            return None;
        }
        let mut byte = [0];
        // Not by `Stdin`, which would take more than the reply into its buffer.
        if rustix::io::read(stdin, &mut byte).ok()? == 0 {
            return None;
        }
        reply.push(byte[0]);
        if byte[0] == b'c' {
            return Some(reply);
        }
    }
    None
}

#[cfg(unix)]
fn is_readable(stdin: &std::io::Stdin, wait: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    let Ok(wait) = Timespec::try_from(wait) else { return false };
    let mut descriptors = [PollFd::new(stdin, PollFlags::IN)];
    poll(&mut descriptors, Some(&wait)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_the_terminal() {
        type Variables = &'static [(&'static str, &'static str)];
        let rows: [(Variables, Option<Graphics>); 11] = [
            (&[("TERM", "xterm-kitty")], Some(Graphics::Kitty)),
            (&[("TERM", "xterm-ghostty")], Some(Graphics::Kitty)),
            (&[("TERM", "xterm-256color"), ("TERM_PROGRAM", "iTerm.app")], Some(Graphics::Iterm2)),
            (&[("TERM", "xterm-256color"), ("LC_TERMINAL", "iTerm2")], Some(Graphics::Iterm2)),
            (&[("TERM", "xterm-256color"), ("TERM_PROGRAM", "WezTerm")], Some(Graphics::Iterm2)),
            (&[("TERM", "xterm-256color")], None),
            (&[("TERM", "tmux-256color"), ("LC_TERMINAL", "iTerm2")], None),
            (&[("TERM", "xterm-kitty"), ("TMUX", "/tmp/x")], None),
            (&[("TERM", "xterm-kitty"), ("NO_COLOR", "1")], Some(Graphics::None)),
            (&[("TERM", "linux")], Some(Graphics::Blocks)),
            (&[], Some(Graphics::None)),
        ];
        for (variables, expected) in rows {
            let variable = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned()).unwrap_or_default()
            };
            assert_eq!(by_environment(&variable), expected, "{variables:?}");
        }
    }

    #[test]
    fn attribute_four_is_sixel() {
        for (reply, expected) in [
            ("\x1b[?62;4;22c", true),
            ("\x1b[?62;22;4c", true),
            ("\x1b[?4c", false),
            ("\x1b[?62;14;44c", false),
            ("\x1b[?64;4", false),
            ("c", false),
        ] {
            assert_eq!(has_sixel(reply.as_bytes()), expected, "{reply:?}");
        }
    }
}
