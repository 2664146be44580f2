//! Where the files of a model are: in a directory, or in memory from the start of the program.

use std::{
    borrow::Cow,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use ring::digest::{Context, SHA256};

/// The files of a model, by the names that a checkpoint directory gives them.
///
/// Made of whatever names a path, so that a directory can be given as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFiles {
    /// Those of a directory.
    Directory(PathBuf),
    /// Those that are a part of the program.
    Memory(MemoryFiles),
}

/// Files that are a part of the program, as `include_bytes!` makes them. They are used where they are: weights are
/// not copied, if the bytes of `model.safetensors` are aligned for their numbers (8 bytes will do).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryFiles {
    /// What the model is called, in messages too.
    pub name: &'static str,
    /// Name and bytes of each file.
    pub files: &'static [(&'static str, &'static [u8])],
}

impl MemoryFiles {
    /// The bytes of a file.
    pub fn get(&self, name: &str) -> Option<&'static [u8]> {
        self.files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| *bytes)
    }
}

/// The SHA-256 of a file, in hexadecimal digits.
pub(crate) fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(context.finish().as_ref())),
            length => context.update(&buffer[..length]),
        }
    }
}

/// Bytes in hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// Why a file could not be read as a whole.
#[derive(Debug)]
pub(crate) enum ReadError {
    Io(io::Error),
    /// A directory, a pipe or a device.
    NotAFile,
    /// It has more bytes than any real one.
    TooLarge,
}

impl ReadError {
    /// Whether there is no such file.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl ModelFiles {
    /// The path of a file, as messages name it; it exists only in a directory.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Directory(directory) => directory.join(name),
            Self::Memory(memory) => Path::new(memory.name).join(name),
        }
    }

    /// The directory, or for files in memory the name, as messages have it.
    pub fn name(&self) -> &Path {
        match self {
            Self::Directory(directory) => directory,
            Self::Memory(memory) => Path::new(memory.name),
        }
    }

    /// The directory, if they lie in one.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Self::Directory(directory) => Some(directory),
            Self::Memory(_) => None,
        }
    }

    /// Whether there is something of that name.
    pub(crate) fn contains(&self, name: &str) -> bool {
        match self {
            Self::Directory(directory) => directory.join(name).exists(),
            Self::Memory(memory) => memory.get(name).is_some(),
        }
    }

    /// The bytes of a file that may not be longer than `limit`.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Cow<'static, [u8]>, ReadError> {
        match self {
            Self::Directory(directory) => read_file(&directory.join(name), limit).map(Cow::Owned),
            Self::Memory(memory) => match memory.get(name) {
                None => Err(ReadError::Io(io::ErrorKind::NotFound.into())),
                Some(bytes) if bytes.len() as u64 > limit => Err(ReadError::TooLarge),
                Some(bytes) => Ok(Cow::Borrowed(bytes)),
            },
        }
    }
}

fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, ReadError> {
    // Opening a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(ReadError::NotAFile);
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(ReadError::TooLarge) } else { Ok(bytes) }
}

impl<P: AsRef<Path>> From<P> for ModelFiles {
    fn from(directory: P) -> Self {
        Self::Directory(directory.as_ref().to_owned())
    }
}

impl From<MemoryFiles> for ModelFiles {
    fn from(files: MemoryFiles) -> Self {
        Self::Memory(files)
    }
}

impl From<&Self> for ModelFiles {
    fn from(files: &Self) -> Self {
        files.clone()
    }
}
