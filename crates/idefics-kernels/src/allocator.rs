//! The allocator of the programs: mimalloc, and for work that asks for it the system's for large blocks.
//!
//! The system's hands the megabytes of each layer back, and pages that come again are zeroed: a quarter of the time of
//! the vision tower. mimalloc keeps freed memory for a while ([`keep_freed_blocks`]). But what a step of training frees
//! in one size it needs again in others: blocks of 64 KiB pieces, kept apart by their size, leave a fifth of its memory
//! unused. glibc's, told to keep all it has, fills the gaps ([`pack_large_blocks`]).

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU8, Ordering},
};

use mimalloc::MiMalloc;

/// Bytes from which a block is large.
const LARGE: usize = 1 << 16;

/// Nobody has asked for a large block yet.
const UNDECIDED: u8 = 0;
const MIMALLOC: u8 = 1;
const SYSTEM: u8 = 2;

/// Whose large blocks are, which never changes once there is one.
static LARGE_BLOCKS: AtomicU8 = AtomicU8::new(UNDECIDED);

/// The allocator, for `#[global_allocator]`.
pub struct Allocator;

/// mimalloc's `purge_delay`, which its bindings have no name for.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Milliseconds that freed memory is kept: longer than a picture's way through the tower, which with mimalloc's own
/// second spent a twentieth of its time on pages that had been handed back.
const KEPT_MS: std::ffi::c_long = 10_000;

/// Keeps freed memory for ten seconds before the system gets it back, or as long as `MIMALLOC_PURGE_DELAY` says. To be
/// called at the start of a program, while it has one thread.
pub fn keep_freed_blocks() {
    // SAFETY: it sets a number of the allocator, which no other thread reads meanwhile.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, KEPT_MS) };
}

/// Lets the system's allocator have large blocks, and keep them all until the process ends: for long work whose
/// memory comes and goes in other sizes. Where the C library is not glibc nothing changes.
///
/// To be called before anything large is allocated, at the start of a program; returns whether it was in time.
pub fn pack_large_blocks() -> bool {
    let in_time = decide(SYSTEM) == SYSTEM;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if in_time {
        // No mapping for a block of its own, none handed back from the heap's end, one heap for all threads. An
        // allocator in glibc's place may know none of that, and does what it does.
        for (option, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, -1), (libc::M_ARENA_MAX, 1)] {
            // SAFETY: it sets numbers of the allocator under its own lock.
            unsafe { libc::mallopt(option, value) };
        }
    }
    in_time
}

/// Decides for `owner` if nobody has decided; returns what holds.
fn decide(owner: u8) -> u8 {
    let owner = if cfg!(all(target_os = "linux", target_env = "gnu")) { owner } else { MIMALLOC };
    match LARGE_BLOCKS.compare_exchange(UNDECIDED, owner, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => owner,
        Err(held) => held,
    }
}

/// Whether a block of that size is the system's.
#[inline]
fn is_of_system(size: usize) -> bool {
    size >= LARGE
        && match LARGE_BLOCKS.load(Ordering::Relaxed) {
            UNDECIDED => decide(MIMALLOC) == SYSTEM,
            owner => owner == SYSTEM,
        }
}

// SAFETY: a block's size says whose it is, since the owner of large ones is decided before there is one and stays;
// both owners keep the contract.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on.
        unsafe { if is_of_system(layout.size()) { System.alloc(layout) } else { MiMalloc.alloc(layout) } }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on.
        unsafe {
            if is_of_system(layout.size()) {
                System.alloc_zeroed(layout)
            } else {
                MiMalloc.alloc_zeroed(layout)
            }
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the owner.
        unsafe {
            if is_of_system(layout.size()) {
                System.dealloc(block, layout);
            } else {
                MiMalloc.dealloc(block, layout);
            }
        }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: passed on to the owner of both, or a new block with the old one's bytes, as the trait's own.
        unsafe {
            match (is_of_system(layout.size()), is_of_system(new_size)) {
                (true, true) => System.realloc(block, layout, new_size),
                (false, false) => MiMalloc.realloc(block, layout, new_size),
                _ => {
                    let new = self.alloc(Layout::from_size_align_unchecked(new_size, layout.align()));
                    if !new.is_null() {
                        new.copy_from_nonoverlapping(block, layout.size().min(new_size));
                        self.dealloc(block, layout);
                    }
                    new
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of the option is written here alone, so that another mimalloc could give it to another.
    #[test]
    fn the_option_is_the_one_that_was_a_second() {
        // SAFETY: a number is read; one test sets it.
        unsafe {
            assert_eq!(libmimalloc_sys::mi_option_get(PURGE_DELAY), 1000);
            keep_freed_blocks();
            assert_eq!(libmimalloc_sys::mi_option_get(PURGE_DELAY), KEPT_MS);
        }
    }

    /// Blocks of all sizes around the bound keep their bytes wherever they go. The tests' own allocator is another,
    /// so that this one is asked here alone.
    #[test]
    fn blocks_keep_their_bytes_across_owners() {
        assert!(pack_large_blocks() || !cfg!(target_env = "gnu"));
        assert!(pack_large_blocks() || !cfg!(target_env = "gnu"), "asking twice is no harm");
        let sizes = [1, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE, 100];
        for align in [1, 16, 64, 4096] {
            let of = |size| Layout::from_size_align(size, align).unwrap();
            // SAFETY: layouts are not empty, bytes are written before they are read, blocks freed once.
            unsafe {
                let mut size = sizes[0];
                let mut block = Allocator.alloc_zeroed(of(size));
                assert_eq!(*block, 0);
                for &new in &sizes[1..] {
                    block.write_bytes(7, size);
                    block = Allocator.realloc(block, of(size), new);
                    assert!(!block.is_null() && block.addr() % align == 0);
                    let kept = std::slice::from_raw_parts(block, size.min(new));
                    assert!(kept.iter().all(|byte| *byte == 7), "{size} to {new} bytes");
                    size = new;
                }
                Allocator.dealloc(block, of(size));
            }
        }
    }
}
