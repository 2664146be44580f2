//! `idefics chat`: a conversation about pictures, in a terminal or through a pipe.

mod answer;
mod command;
mod conversation;
mod graphics;
mod input;
mod picture;
mod session;
mod settings;
mod transcript;
mod view;
mod words;

use std::{io::IsTerminal, path::PathBuf};

use anyhow::bail;
use idefics::{
    dialogue::{DIALOGUE_END_OF_UTTERANCE, Form},
    generate::GenerationConfig,
    processor::AddEndOfUtterance,
};

use self::{
    answer::Talker,
    command::{Command, DroppedFiles},
    graphics::Graphics,
    input::LineSource,
    session::Session,
    settings::Settings,
    view::View,
};
use crate::{
    cancel,
    model::{Loaded, ModelArgs},
    options::GenerationArgs,
};

/// Tokens of an answer where nothing else is said.
const ANSWER_TOKENS: usize = 512;

/// Talk with a model about pictures
///
/// Drop image files into the line or add them with `/image`; `/help` lists the commands. Without a terminal each
/// line of stdin is a message or a command, and the answers are written to stdout.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  idefics chat -m HuggingFaceM4/idefics-9b-instruct --image dog.jpg\n  \
    printf '/image dog.jpg\\nWho is that?\\n' | idefics chat -m HuggingFaceM4/idefics-9b-instruct")]
pub(crate) struct Args {
    /// A picture for the first message: a file or an address; may be given several times
    #[arg(long = "image", value_name = "PATH|URL")]
    images: Vec<String>,

    /// Text that stands before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Go on with a conversation that `/save` wrote
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,

    /// Keep what is typed in a file, over several chats
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,

    /// How pictures are shown [default: the best the terminal can]
    #[arg(long, value_enum, value_name = "HOW")]
    pictures: Option<Graphics>,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    generation: GenerationArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let is_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let mut loaded = args.model.load()?;
    if loaded.options.add_end_of_utterance == AddEndOfUtterance::Always {
        bail!("--add-end-of-utterance: a chat writes the ends of turns itself");
    }
    loaded.options.add_end_of_utterance = DIALOGUE_END_OF_UTTERANCE;
    let name = loaded.name.clone();
    let form = Form::of(&loaded.processor);
    let settings = Settings::new(generation(args, &loaded, form)?);
    cancel::on_interrupt()?;
    let view = View::new(is_terminal, args.pictures);
    let (talker, reader) = Talker::start(loaded)?;
    let mut session = Session::new(talker, reader, form, settings, view);
    if let Some(path) = &args.load {
        session.load(path)?;
    }
    // In place of the text that the loaded conversation has.
    if args.system.is_some() {
        session.set_system(args.system.clone());
    }
    session.add_pictures(&args.images)?;
    let (source, dropped) = if is_terminal {
        session.greet(&name);
        (LineSource::terminal(args.history.as_deref())?, DroppedFiles::AsPictures)
    } else {
        (LineSource::pipe(), DroppedFiles::AsText)
    };
    converse(session, source, dropped)
}

/// How answers are written at the start.
fn generation(args: &Args, loaded: &Loaded, form: Form) -> anyhow::Result<GenerationConfig> {
    let base = loaded.model.default_generation(Some(loaded.processor.special_tokens()))?;
    let base = GenerationConfig {
        max_new_tokens: Some(ANSWER_TOKENS),
        max_length: None,
        stop_strings: form.stop_strings().iter().map(ToString::to_string).collect(),
        trim_stop_strings: true,
        ..base
    };
    let config = args.generation.apply_beside_stops(base, &loaded.processor)?;
    if config.num_return_sequences != 1 {
        bail!("--num-return-sequences: a chat has one answer to a message");
    }
    Ok(config)
}

/// Line after line, until the end or `/quit`. At a terminal a mistake is told and the conversation goes on; so it
/// does in a pipe, but then the end is a failure.
fn converse(mut session: Session, mut source: LineSource, dropped: DroppedFiles) -> anyhow::Result<()> {
    let is_terminal = matches!(source, LineSource::Terminal(_));
    let mut failures = 0;
    loop {
        let line = match source.read(&session.prompt())? {
            input::Input::Line(line) => line,
            input::Input::Interrupted => continue,
            input::Input::End => break,
        };
        let outcome = command::parse(&line, dropped).and_then(|line| match line {
            command::Line::Command(Command::Quit) => Ok(ControlFlow::Quit),
            line => session.take(line).map(|()| ControlFlow::GoOn),
        });
        match outcome {
            Ok(ControlFlow::GoOn) => {}
            Ok(ControlFlow::Quit) => break,
            // Whoever read the answers is gone.
            Err(error) if is_broken_pipe(&error) => return Ok(()),
            Err(error) => {
                failures += 1;
                session.view().error(&error);
            }
        }
    }
    source.finish()?;
    if failures > 0 && !is_terminal {
        bail!("{failures} of the lines failed");
    }
    Ok(())
}

enum ControlFlow {
    GoOn,
    Quit,
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
