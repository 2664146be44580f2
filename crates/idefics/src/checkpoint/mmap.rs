//! A file as bytes in memory, without reading it.
#![expect(unsafe_code, reason = "mapping a file is the one thing here that the compiler cannot check")]

use std::{fs::File, io, ops::Range, path::Path};

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::{Advice, UncheckedAdvice};

use super::weight::Storage;

/// A whole file, mapped for reading. Pages are read when they are touched and can be dropped again.
pub(super) struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a regular file.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // Asked before opening: that would wait at a pipe.
        if !path.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the map is read-only, and every bit pattern is a valid `u8`, `f32`,
        // `f16` or `bf16`. What remains is that no other process may change or shorten the file while the map
        // lives: numbers would change under a shared reference, or a read end in SIGBUS. Nothing on this side can
        // enforce that; `Checkpoint::open` documents it, and the hub cache never rewrites a file in place.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(map))
    }
}

impl Storage for MappedFile {
    #[cfg(unix)]
    fn release(&self, range: Range<usize>) {
        // SAFETY: the map is shared with the file and read-only, so a page that is dropped comes back with the
        // file's bytes: readers of this memory, also of neighbours on the same page, see no change.
        let released =
            unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        // It was only advice.
        drop(released);
    }

    #[cfg(unix)]
    fn fetch(&self, range: Range<usize>) {
        // The first starts reading in large pieces, the second waits and maps what came. Both are only advice.
        let _ = self.0.advise_range(Advice::WillNeed, range.start, range.len());
        #[cfg(target_os = "linux")]
        let _ = self.0.advise_range(Advice::PopulateRead, range.start, range.len());
    }

    #[cfg(target_os = "linux")]
    fn evict(&self, range: Range<usize>) {
        use rustix::{mm, param::page_size};
        // Whole pages inside the range: a neighbour on the same page may be wanted.
        let start = range.start.next_multiple_of(page_size());
        let end = range.end - range.end % page_size();
        if start < end {
            let address = self.0[start..end].as_ptr().cast_mut().cast();
            // SAFETY: the pages lie inside the map, which is shared with the file and read-only: what is paged out
            // comes back with the file's bytes.
            // It is only advice, which old kernels do not know.
            let _ = unsafe { mm::madvise(address, end - start, mm::Advice::LinuxPageOut) };
        }
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
