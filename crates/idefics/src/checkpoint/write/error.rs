//! Why files could not be written.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why files could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A file that cannot be read or written.
    #[error("cannot {verb} `{path}`")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Somebody else's files stand where the output would.
    #[error("`{path}` is there already and not empty: name an empty or a new directory")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// The output would be the input.
    #[error("`{path}` is the model's own directory: name another one to write to")]
    SameDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// A path that ends in no name, such as `..`.
    #[error("`{path}` cannot be written to: the last part of the path must be a name")]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// Too little room on the disk.
    #[error("`{path}` needs {needed} more bytes, but its disk has {available} left")]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// Bytes still to be written.
        needed: u64,
        /// Bytes that can be.
        available: u64,
    },
    /// A configuration that is no JSON object.
    #[error("`{path}` is not a JSON object")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

impl WriteError {
    /// A file that cannot be read, with what the system says.
    pub fn cannot_read(path: &Path, source: io::Error) -> Self {
        io_error("read", path)(source)
    }

    /// A file that cannot be written, with what the system says.
    pub fn cannot_write(path: &Path, source: io::Error) -> Self {
        io_error("write", path)(source)
    }
}

/// Wraps what the system says about a file.
pub(crate) fn io_error(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WriteError {
    let path = path.to_owned();
    move |source| WriteError::Io { verb, path, source }
}
