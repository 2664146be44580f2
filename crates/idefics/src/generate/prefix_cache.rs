//! What finished requests remembered, for later prompts that begin the same: the next turn of a conversation, or
//! another question about the same pictures.
//!
//! Keys and values of a token depend on the tokens before it and on the pictures that these saw, so two prompts
//! share as far as tokens *and* contents of pictures agree; where in its prompt a picture stands does not matter.
//! Entries hold no pictures: those are in the [image cache](super::image_cache).

use super::request::Seen;

/// Entries, whatever the bytes: looking one up compares with all.
const MAX_ENTRIES: usize = 512;

pub(crate) struct PrefixCache<C> {
    entries: Vec<Entry<C>>,
    /// Most bytes of all entries.
    limit: usize,
    bytes: usize,
    clock: u64,
}

struct Entry<C> {
    seen: Vec<Seen>,
    cache: C,
    bytes: usize,
    last_used: u64,
}

/// The entry that agrees longest with a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    entry: usize,
    /// How far it agrees.
    pub(crate) tokens: usize,
}

impl<C> PrefixCache<C> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { entries: Vec::new(), limit, bytes: 0, clock: 0 }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Finds the entry that agrees longest with the beginning of `seen`, and marks it as used. Of equals the one
    /// used last.
    pub(crate) fn find(&mut self, seen: &[Seen]) -> Option<Found> {
        let found = (0..self.entries.len())
            .map(|entry| Found { entry, tokens: common(&self.entries[entry].seen, seen) })
            .max_by_key(|found| (found.tokens, self.entries[found.entry].last_used))
            .filter(|found| found.tokens > 0)?;
        self.clock += 1;
        self.entries[found.entry].last_used = self.clock;
        Some(found)
    }

    pub(crate) fn get(&self, found: Found) -> &C {
        &self.entries[found.entry].cache
    }

    /// Bytes of an entry that was found.
    pub(crate) fn bytes_of(&self, found: Found) -> usize {
        self.entries[found.entry].bytes
    }

    /// Takes the entry out.
    pub(crate) fn take(&mut self, found: Found) -> C {
        self.remove(found.entry).cache
    }

    /// Keeps what was remembered of `seen`. What it repeats of older entries replaces them.
    pub(crate) fn insert(&mut self, seen: Vec<Seen>, cache: C, bytes: usize) {
        if seen.is_empty() || bytes > self.limit {
            return;
        }
        self.clock += 1;
        if let Some(longer) = self.entries.iter_mut().find(|entry| entry.seen.starts_with(&seen)) {
            longer.last_used = self.clock;
            return;
        }
        for index in (0..self.entries.len()).rev() {
            if seen.starts_with(&self.entries[index].seen) {
                self.remove(index);
            }
        }
        self.bytes += bytes;
        self.entries.push(Entry { seen, cache, bytes, last_used: self.clock });
        while self.bytes > self.limit || self.entries.len() > MAX_ENTRIES {
            self.evict();
        }
    }

    /// Drops the entry that was used longest ago. False if there is none.
    pub(crate) fn evict(&mut self) -> bool {
        let oldest = (0..self.entries.len()).min_by_key(|&index| self.entries[index].last_used);
        oldest.map(|index| self.remove(index)).is_some()
    }

    fn remove(&mut self, index: usize) -> Entry<C> {
        let entry = self.entries.swap_remove(index);
        self.bytes -= entry.bytes;
        entry
    }
}

/// How many of the first elements agree.
fn common(a: &[Seen], b: &[Seen]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::PixelValues;

    fn seen(tokens: &[u32]) -> Vec<Seen> {
        tokens.iter().map(|&token| (token, None)).collect()
    }

    /// A cache of the given entries, each of a byte a token and named by its place.
    fn cache_of(limit: usize, entries: &[&[u32]]) -> PrefixCache<usize> {
        let mut cache = PrefixCache::new(limit);
        for (name, tokens) in entries.iter().enumerate() {
            cache.insert(seen(tokens), name, tokens.len());
        }
        cache
    }

    fn names(cache: &PrefixCache<usize>) -> Vec<usize> {
        let mut names: Vec<_> = cache.entries.iter().map(|entry| entry.cache).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_longest_agreement_is_found() {
        for (prompt, expected) in [
            (&[1, 2, 3, 4][..], Some((1, 3))),
            (&[1, 2], Some((2, 2))),
            (&[1, 5, 9], Some((2, 1))),
            (&[7, 8, 9, 9], Some((0, 3))),
            (&[2], None),
            (&[], None),
        ] {
            let mut cache = cache_of(99, &[&[7, 8, 9], &[1, 2, 3], &[1, 2, 9]]);
            let found = cache.find(&seen(prompt)).map(|found| (*cache.get(found), found.tokens));
            assert_eq!(found, expected, "{prompt:?}");
        }
    }

    #[test]
    fn the_content_of_pictures_counts() {
        let hash = |value: f32| Some(PixelValues::new(vec![value; 3], 1, 1).content_hash());
        let mut cache = PrefixCache::new(99);
        cache.insert(vec![(1, None), (2, hash(0.5)), (3, hash(0.5))], (), 3);
        for (prompt, expected) in [
            (vec![(1, None), (2, hash(0.5)), (3, hash(0.7))], 2),
            (vec![(1, None), (2, hash(0.5)), (3, None)], 2),
            (vec![(1, None), (2, hash(0.7))], 1),
        ] {
            assert_eq!(cache.find(&prompt).map(|found| found.tokens), Some(expected), "{prompt:?}");
        }
    }

    #[test]
    fn entries_replace_what_they_repeat() {
        let mut cache = cache_of(99, &[&[1, 2], &[5], &[1, 2, 3], &[1, 2, 3, 4]]);
        assert_eq!((names(&cache), cache.bytes()), (vec![1, 3], 5));
        cache.insert(seen(&[1, 2, 3]), 9, 3);
        assert_eq!((names(&cache), cache.bytes()), (vec![1, 3], 5), "the longer one serves as well");
    }

    #[test]
    fn the_longest_unused_entry_goes_first() {
        let mut cache = cache_of(6, &[&[1, 1], &[2, 2], &[3, 3]]);
        cache.find(&seen(&[1, 1]));
        cache.insert(seen(&[4, 4]), 3, 2);
        assert_eq!(names(&cache), [0, 2, 3]);
        let found = cache.find(&seen(&[3, 3, 3])).unwrap();
        assert_eq!((cache.bytes_of(found), cache.take(found), cache.bytes()), (2, 2, 4));
        cache.insert(seen(&[5; 7]), 4, 7);
        assert_eq!(names(&cache), [0, 3], "one too large to be kept drives nothing out");
        assert!(cache.evict() && cache.evict() && !cache.evict());
    }
}
