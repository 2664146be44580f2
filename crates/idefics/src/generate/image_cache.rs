//! Pictures that were read, by their content: those that running requests look at, and as many of the others as
//! there is room for, the latest used first.
//!
//! The cache belongs to one model, so the content of a picture is all of its key. A picture is in it from the
//! moment a request that shows it is admitted: what is wanted counts as taken.

use std::collections::{HashMap, HashSet};

use crate::processor::ImageHash;

pub(crate) struct ImageCache<I> {
    slots: HashMap<ImageHash, Slot<I>>,
    /// Most bytes of pictures that nobody uses.
    idle_limit: usize,
    pinned_bytes: usize,
    idle_bytes: usize,
    clock: u64,
}

struct Slot<I> {
    /// None until it is read.
    image: Option<I>,
    bytes: usize,
    /// Requests that show it.
    users: usize,
    last_used: u64,
}

impl<I: Clone> ImageCache<I> {
    pub(crate) fn new(idle_limit: usize) -> Self {
        Self { slots: HashMap::new(), idle_limit, pinned_bytes: 0, idle_bytes: 0, clock: 0 }
    }

    /// Bytes that somebody uses or is about to.
    pub(crate) fn pinned_bytes(&self) -> usize {
        self.pinned_bytes
    }

    /// Bytes that are only kept for later.
    pub(crate) fn idle_bytes(&self) -> usize {
        self.idle_bytes
    }

    /// Bytes that would be pinned if a request with these pictures started.
    pub(crate) fn new_bytes(&self, pictures: &[(ImageHash, usize)]) -> usize {
        let mut counted = HashSet::new();
        let is_new = |hash: &ImageHash| self.slots.get(hash).is_none_or(|slot| slot.users == 0);
        pictures
            .iter()
            .filter(|(hash, _)| is_new(hash) && counted.insert(*hash))
            .map(|(_, bytes)| bytes)
            .sum()
    }

    /// Says that a request shows the picture. True if it is there already or wanted by another.
    pub(crate) fn pin(&mut self, hash: ImageHash, bytes: usize) -> bool {
        let mut is_known = true;
        let slot = self.slots.entry(hash).or_insert_with(|| {
            is_known = false;
            Slot { image: None, bytes, users: 0, last_used: 0 }
        });
        if slot.users == 0 {
            self.pinned_bytes += slot.bytes;
            if is_known {
                self.idle_bytes -= slot.bytes;
            }
        }
        slot.users += 1;
        is_known
    }

    /// Says that a request does not show the picture any more.
    pub(crate) fn unpin(&mut self, hash: ImageHash) {
        self.clock += 1;
        let Some(slot) = self.slots.get_mut(&hash) else { return };
        slot.users -= 1;
        slot.last_used = self.clock;
        if slot.users > 0 {
            return;
        }
        self.pinned_bytes -= slot.bytes;
        if slot.image.is_none() {
            self.slots.remove(&hash);
            return;
        }
        self.idle_bytes += slot.bytes;
        while self.idle_bytes > self.idle_limit && self.evict() {}
    }

    pub(crate) fn get(&self, hash: ImageHash) -> Option<&I> {
        self.slots.get(&hash)?.image.as_ref()
    }

    /// Keeps a picture that was read. One that nobody wants any more is dropped.
    pub(crate) fn insert(&mut self, hash: ImageHash, image: I) {
        if let Some(slot) = self.slots.get_mut(&hash) {
            slot.image = Some(image);
        }
    }

    /// Drops the picture that nobody has used for the longest time. False if there is none.
    pub(crate) fn evict(&mut self) -> bool {
        let idle = self.slots.iter().filter(|(_, slot)| slot.users == 0);
        let Some(hash) = idle.min_by_key(|(_, slot)| slot.last_used).map(|(hash, _)| *hash) else {
            return false;
        };
        if let Some(slot) = self.slots.remove(&hash) {
            self.idle_bytes -= slot.bytes;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::PixelValues;

    fn hash(value: u8) -> ImageHash {
        PixelValues::new(vec![f32::from(value); 3], 1, 1).content_hash()
    }

    fn read(cache: &mut ImageCache<u8>, value: u8) {
        cache.pin(hash(value), 10);
        cache.insert(hash(value), value);
        cache.unpin(hash(value));
    }

    fn bytes(cache: &ImageCache<u8>) -> (usize, usize) {
        (cache.pinned_bytes(), cache.idle_bytes())
    }

    #[test]
    fn what_is_wanted_counts_once_and_what_is_used_stays() {
        let mut cache = ImageCache::new(0);
        assert_eq!(cache.new_bytes(&[(hash(1), 10), (hash(1), 10), (hash(2), 10)]), 20);
        assert!(!cache.pin(hash(1), 10), "new");
        assert!(cache.pin(hash(1), 10), "wanted by another");
        assert_eq!((bytes(&cache), cache.get(hash(1))), ((10, 0), None));
        assert_eq!(cache.new_bytes(&[(hash(1), 10)]), 0);
        cache.insert(hash(1), 7);
        cache.unpin(hash(1));
        assert!(!cache.evict(), "one still uses it");
        assert_eq!(cache.get(hash(1)), Some(&7));
        cache.unpin(hash(1));
        assert_eq!((bytes(&cache), cache.get(hash(1))), ((0, 0), None), "no room to keep it");
        cache.pin(hash(1), 10);
        cache.unpin(hash(1));
        assert_eq!((bytes(&cache), cache.slots.len()), ((0, 0), 0), "never read, nothing to keep");
        cache.insert(hash(1), 7);
        assert_eq!(cache.get(hash(1)), None, "nobody wants it");
    }

    #[test]
    fn pictures_out_of_use_are_kept_the_latest_first() {
        let mut cache = ImageCache::new(20);
        for value in [1, 2] {
            read(&mut cache, value);
        }
        assert!(cache.pin(hash(1), 10), "kept");
        assert_eq!(bytes(&cache), (10, 10));
        cache.unpin(hash(1));
        read(&mut cache, 3);
        assert_eq!(bytes(&cache), (0, 20));
        let kept: Vec<_> = [1, 2, 3].map(|value| cache.get(hash(value)).copied()).into();
        assert_eq!(kept, [Some(1), None, Some(3)]);
        assert!(cache.evict() && cache.evict() && !cache.evict());
        assert_eq!(bytes(&cache), (0, 0));
    }
}
