//! The conversation as it goes: messages, pictures that wait for one, commands.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use idefics::{
    Processor, Prompt, SequenceInputs,
    dialogue::Form,
    generate::FinishReason,
    processor::{ImageSource, ProcessOptions},
};

use super::{
    answer::Talker,
    command::{Command, HELP, Item, Line, SaveOptions, SettingsChange},
    conversation::{Conversation, Exchange, Part},
    picture::Picture,
    settings::Settings,
    transcript::{self, PicturesAs},
    view::{View, tell},
    words::as_path,
};
use crate::prompts::image_source;

/// Prompts to the model's inputs.
pub(super) struct Reader {
    pub(super) processor: Processor,
    pub(super) options: ProcessOptions,
}

pub(super) struct Session {
    talker: Talker,
    reader: Reader,
    form: Form,
    settings: Settings,
    view: View,
    conversation: Conversation,
    /// Pictures for the next message.
    pending: Vec<Arc<Picture>>,
    /// Files that this conversation was written to or read from, which it may write again.
    own_files: Vec<PathBuf>,
}

impl Reader {
    pub(super) fn process(&self, prompt: Prompt) -> anyhow::Result<SequenceInputs> {
        let inputs = self.processor.process(&[prompt], &self.options)?;
        inputs.into_iter().next().context("a prompt has inputs")
    }

    /// Tokens of a prompt, without reading its pictures.
    fn count_tokens(&self, prompt: &Prompt) -> anyhow::Result<usize> {
        let text = self.processor.prompt_text(prompt, &self.options)?;
        Ok(self.processor.tokenize(&text)?.len())
    }
}

impl Session {
    pub(super) fn new(talker: Talker, reader: Reader, form: Form, settings: Settings, view: View) -> Self {
        let (conversation, pending, own_files) = (Conversation::default(), Vec::new(), Vec::new());
        Self { talker, reader, form, settings, view, conversation, pending, own_files }
    }

    pub(super) fn view(&self) -> &View {
        &self.view
    }

    pub(super) fn greet(&self, model: &str) {
        let kind = match self.form {
            Form::Instruct => "",
            Form::Base => ", a base model: it continues texts and was not trained to answer",
        };
        self.view.note(&format!(
            "{model}{kind}\nDrop pictures into the line. /help lists the commands, Ctrl-D ends."
        ));
    }

    /// What stands before the line that is typed.
    pub(super) fn prompt(&self) -> String {
        match self.pending.len() {
            0 => "> ".to_owned(),
            1 => "[1 picture] > ".to_owned(),
            n => format!("[{n} pictures] > "),
        }
    }

    pub(super) fn take(&mut self, line: Line) -> anyhow::Result<()> {
        match line {
            Line::Empty => Ok(()),
            Line::Message(items) => self.say(items),
            Line::Command(command) => self.obey(command),
        }
    }

    fn obey(&mut self, command: Command) -> anyhow::Result<()> {
        match command {
            Command::Image(images) => self.add_pictures(&images),
            Command::Undo => self.undo(),
            Command::Retry => self.retry(),
            Command::Clear => {
                self.conversation.exchanges.clear();
                self.pending.clear();
                self.own_files.clear();
                self.view.note("a new conversation");
                Ok(())
            }
            Command::Show => self.show(),
            Command::Save { path, how } => self.save(&path, how),
            Command::Load(path) => self.load(&path),
            Command::Settings(change) => self.change_settings(change),
            Command::System(text) => {
                self.change_system(text);
                Ok(())
            }
            Command::Help => {
                tell(HELP);
                Ok(())
            }
            // Ends the loop that calls this.
            Command::Quit => Ok(()),
        }
    }

    /// Opens pictures for the next message: all of them, or none and an error.
    pub(super) fn add_pictures(&mut self, images: &[String]) -> anyhow::Result<()> {
        let source = |image: &String| match image_source(image) {
            ImageSource::Path(_) => ImageSource::Path(as_path(image)),
            other => other,
        };
        let opened: Vec<Picture> =
            images.iter().map(|image| self.open(source(image))).collect::<anyhow::Result<_>>()?;
        for picture in opened {
            self.view.picture(&picture)?;
            self.pending.push(Arc::new(picture));
        }
        Ok(())
    }

    fn open(&self, source: ImageSource) -> anyhow::Result<Picture> {
        Picture::open(source, self.reader.processor.image_processor(), &self.reader.options)
    }

    /// A message: pictures that wait come first, then its own words and pictures in their order.
    fn say(&mut self, items: Vec<Item>) -> anyhow::Result<()> {
        let has_words = items.iter().any(|item| matches!(item, Item::Text(_)));
        let mut said = Vec::with_capacity(items.len());
        for item in items {
            said.push(match item {
                Item::Text(text) => Part::Text(text),
                Item::Picture(path) => {
                    let picture = self.open(ImageSource::Path(path))?;
                    self.view.picture(&picture)?;
                    Part::Picture(Arc::new(picture))
                }
            });
        }
        if !has_words {
            // A dropped picture by itself waits for the words that go with it.
            self.pending.extend(said.into_iter().filter_map(|part| match part {
                Part::Picture(picture) => Some(picture),
                Part::Text(_) => None,
            }));
            return Ok(());
        }
        let mut question: Vec<Part> = self.pending.iter().cloned().map(Part::Picture).collect();
        question.extend(said);
        // Only what was answered is taken; after a failure the pictures still wait.
        let answer = self.ask(&question)?;
        self.pending.clear();
        self.conversation.exchanges.push(Exchange { question, answer });
        Ok(())
    }

    fn retry(&mut self) -> anyhow::Result<()> {
        let Some(last) = self.conversation.exchanges.pop() else { bail!("/retry: nothing was asked yet") };
        match self.ask(&last.question) {
            Ok(answer) => {
                self.conversation.exchanges.push(Exchange { answer, ..last });
                Ok(())
            }
            Err(error) => {
                self.conversation.exchanges.push(last);
                Err(error)
            }
        }
    }

    fn undo(&mut self) -> anyhow::Result<()> {
        if let Some(picture) = self.pending.pop() {
            tell(&format!("taken back: {}", picture.name()));
        } else if let Some(exchange) = self.conversation.exchanges.pop() {
            tell(&format!("taken back: {}", as_line(&exchange.question)));
        } else {
            bail!("/undo: there is nothing to take back");
        }
        Ok(())
    }

    /// The answer to `question` behind what was said so far, shown as it comes.
    fn ask(&self, question: &[Part]) -> anyhow::Result<String> {
        let (inputs, forgotten) = self.inputs(question)?;
        if forgotten > 0 {
            tell(&format!(
                "note: the conversation is longer than the model reads; it does not see the first {forgotten} of its {} exchanges",
                self.conversation.exchanges.len()
            ));
        }
        let spinner = self.view.reading(inputs.token_ids.len(), inputs.images.len());
        let answer = self.talker.answer(inputs, &self.settings.config, |text| {
            if !text.is_empty() {
                spinner.finish_and_clear();
                self.view.text(text)?;
            }
            Ok(())
        });
        spinner.finish_and_clear();
        let answer = answer?;
        self.view.text("\n")?;
        self.view.summary(&answer, self.talker.positions());
        let is_cancelled = matches!(answer.finish_reason, None | Some(FinishReason::Cancelled));
        if answer.text.is_empty() && is_cancelled {
            bail!("stopped before the answer began; the message is not part of the conversation");
        }
        Ok(answer.text)
    }

    /// The model's inputs, without as many exchanges from the beginning as do not fit.
    fn inputs(&self, question: &[Part]) -> anyhow::Result<(SequenceInputs, usize)> {
        let positions = self.talker.positions();
        // A quarter of the positions is kept for the answer, or what an answer takes at most.
        let reserve = self.settings.config.max_new_tokens.unwrap_or(positions).min(positions / 4).max(1);
        let mut forgotten = 0;
        loop {
            let prompt = self.conversation.prompt(self.form, forgotten, question);
            let tokens = self.reader.count_tokens(&prompt)?;
            if tokens + reserve <= positions {
                return Ok((self.reader.process(prompt)?, forgotten));
            }
            if forgotten == self.conversation.exchanges.len() {
                if tokens < positions {
                    return Ok((self.reader.process(prompt)?, forgotten));
                }
                bail!("the message is too long: it has {tokens} tokens, and the model reads {positions}");
            }
            forgotten += 1;
        }
    }

    fn show(&self) -> anyhow::Result<()> {
        if let Some(system) = &self.conversation.system {
            self.view.note(&format!("system: {system}"));
        }
        for exchange in &self.conversation.exchanges {
            for part in &exchange.question {
                match part {
                    Part::Text(text) => tell(&format!("> {text}")),
                    Part::Picture(picture) => self.view.picture(picture)?,
                }
            }
            self.view.text(&format!("{}\n", exchange.answer))?;
        }
        Ok(())
    }

    fn save(&mut self, path: &Path, how: SaveOptions) -> anyhow::Result<()> {
        let full = std::path::absolute(path)?;
        if !how.force && !self.own_files.contains(&full) && path.exists() {
            bail!("/save: {} is there already; --force writes over it", path.display());
        }
        if self.conversation.exchanges.is_empty() {
            bail!("/save: nothing was said yet");
        }
        let pictures = if how.embed { PicturesAs::Data } else { PicturesAs::Reference };
        transcript::save(&self.conversation, path, pictures, &self.reader.options)?;
        tell(&format!(
            "saved: {} exchanges and {} pictures in {}",
            self.conversation.exchanges.len(),
            self.conversation.pictures(),
            path.display()
        ));
        self.own_files.push(full);
        Ok(())
    }

    /// Goes on with a conversation from a file; the present one stays if that fails.
    pub(super) fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let conversation = transcript::load(path, |source| self.open(source))?;
        self.own_files = vec![std::path::absolute(path)?];
        self.conversation = conversation;
        self.pending.clear();
        if self.view.is_terminal() { self.show() } else { Ok(()) }
    }

    fn change_settings(&mut self, change: SettingsChange) -> anyhow::Result<()> {
        match change {
            SettingsChange::Show => {}
            SettingsChange::Set { name, value } => self.settings.set(&name, &value)?,
            SettingsChange::Reset(name) => self.settings.reset(name.as_deref())?,
        }
        tell(&self.settings.shown()?);
        for unused in self.settings.config.unused_options() {
            tell(&format!("note: {unused}"));
        }
        Ok(())
    }

    pub(super) fn set_system(&mut self, text: Option<String>) {
        self.conversation.system = text.filter(|text| !text.trim().is_empty());
    }

    fn change_system(&mut self, text: Option<String>) {
        match text.as_deref() {
            None => {}
            Some("none") => self.set_system(None),
            Some(_) => self.set_system(text),
        }
        tell(&match &self.conversation.system {
            Some(text) => format!("system: {text}"),
            None => "system: none".to_owned(),
        });
    }
}

/// A message in one line, for what is said about it.
fn as_line(question: &[Part]) -> String {
    let part = |part: &Part| match part {
        Part::Text(text) => text.clone(),
        Part::Picture(picture) => format!("[{}]", picture.name()),
    };
    question.iter().map(part).collect::<Vec<_>>().join(" ")
}
