//! Where the files of a model come from: a directory, the hub, or the program itself.

use std::{env, path::Path};

use anyhow::{Context, bail};
use idefics::{MemoryFiles, ModelFiles, checkpoint::hub};

use crate::progress::DownloadProgress;

/// Names a model where the command line does not.
const VARIABLE: &str = "IDEFICS_MODEL";

/// A published model, for messages that say how to name one.
const PUBLISHED: &str = "HuggingFaceM4/idefics-9b-instruct";

/// A model that is to be used.
#[derive(Debug)]
pub(crate) struct Source {
    /// As the command line has it, or what the built-in model is called.
    pub(crate) name: String,
    /// Its files.
    pub(crate) files: ModelFiles,
    /// Whether nobody asked for it.
    is_default: bool,
}

impl Source {
    /// The model of that name, else that of the environment, else the one that is a part of the program.
    pub(crate) fn find(name: Option<&str>) -> anyhow::Result<Self> {
        let variable = env::var(VARIABLE).ok().filter(|name| !name.is_empty());
        let Some(name) = name.map(str::to_owned).or(variable) else {
            let files = built_in().with_context(|| {
                format!("no model: this program was built without its own, so name one, such as {PUBLISHED}")
            })?;
            return Ok(Self { name: files.name.to_owned(), files: files.into(), is_default: true });
        };
        Ok(Self { files: files_of(&name)?, name, is_default: false })
    }

    /// What a person should know who named no model: that this one is a toy, and how to name another. `how` is what
    /// stands before the name.
    pub(crate) fn note(&self, how: &str) -> Option<String> {
        let name = &self.name;
        self.is_default.then(|| {
            format!(
                "no model named: this is the built-in toy {name} (names, colours and counts of simple pictures); \
                 a real model: {how} {PUBLISHED}"
            )
        })
    }

    /// As [`find`](Self::find), and says on stderr if the small model is used.
    pub(crate) fn find_and_tell(name: Option<&str>, how: &str) -> anyhow::Result<Self> {
        let source = Self::find(name)?;
        if let Some(note) = source.note(how) {
            eprintln!("{note}");
        }
        Ok(source)
    }
}

/// The files of a model given as a directory, as the name of the built-in one, or as an id of the hub, from where it
/// is downloaded on first use.
pub(crate) fn files_of(name: &str) -> anyhow::Result<ModelFiles> {
    if name == idefics_default_model::NAME && !Path::new(name).is_dir() {
        let Some(files) = built_in() else { bail!("model {name}: this program was built without it") };
        return Ok(files.into());
    }
    let directory =
        hub::resolve(name, &mut DownloadProgress::default()).with_context(|| format!("model {name}"))?;
    Ok(directory.into())
}

/// The model that is a part of the program.
fn built_in() -> Option<MemoryFiles> {
    let files = MemoryFiles { name: idefics_default_model::NAME, files: idefics_default_model::FILES };
    (!files.files.is_empty()).then_some(files)
}
