//! The steps, their folders and their order.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::{evaluate, fetch, language, render, samples, train, vision};

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Step {
    /// Everything, in order; finished steps are skipped
    All,
    /// Download the packages
    Fetch,
    /// Pictures of all concepts
    Render,
    /// The vision tower in CLIP's layout
    Vision,
    /// Tokenizer and language model before training
    Language,
    /// What the stages of training read
    Samples,
    /// The two models joined
    Init,
    /// All stages of training
    Train,
    /// The model in few bits
    Quantize,
    /// The figures of the model card
    Eval,
}

impl Step {
    pub(crate) const ORDER: [Self; 9] = [
        Self::Fetch,
        Self::Render,
        Self::Vision,
        Self::Language,
        Self::Samples,
        Self::Init,
        Self::Train,
        Self::Quantize,
        Self::Eval,
    ];

    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Does the step, unless it is done and `again` is not asked for.
    pub(crate) fn run(self, folders: &Folders, options: &evaluate::Options, again: bool) -> Result<()> {
        let name = self.name();
        let done = folders.work.join(format!("{name}.done"));
        if done.exists() && !again {
            eprintln!("{name}: done before");
            return Ok(());
        }
        let start = Instant::now();
        match self {
            Self::All => Ok(()),
            Self::Fetch => fetch::fetch(folders),
            Self::Render => render::render(folders),
            Self::Vision => vision::vision(folders),
            Self::Language => language::language(folders),
            Self::Samples => samples::samples(folders),
            Self::Init => train::init(folders),
            Self::Train => train::train(folders),
            Self::Quantize => train::quantize(folders),
            Self::Eval => evaluate::evaluate(folders, options),
        }
        .with_context(|| format!("step {name}"))?;
        fs::write(&done, format!("{:.0} s\n", start.elapsed().as_secs_f64()))?;
        eprintln!("{name}: {:.0} s", start.elapsed().as_secs_f64());
        Ok(())
    }
}

/// Where each step writes.
#[derive(Debug, Clone)]
pub(crate) struct Folders {
    pub(crate) work: PathBuf,
}

impl Folders {
    pub(crate) fn new(work: &Path) -> Self {
        Self { work: work.to_owned() }
    }

    /// The folder `name`, made if it is not there.
    pub(crate) fn make(&self, name: &str) -> Result<PathBuf> {
        let folder = self.work.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(folder)
    }

    /// The folder `name`, not there any more, for what makes it itself.
    pub(crate) fn empty(&self, name: &str) -> Result<PathBuf> {
        let folder = self.work.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
        }
        Ok(folder)
    }

    pub(crate) fn packages(&self) -> PathBuf {
        self.work.join("fetch")
    }

    pub(crate) fn pictures(&self) -> PathBuf {
        self.work.join("pictures")
    }
}
