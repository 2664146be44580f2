//! Weights that do not all fit into memory: read ahead of the layer that needs them.
//!
//! A step walks through all layers in order, and the next step does it again. A page cache that drops what was used
//! longest ago would then have dropped every page just before it is read. So the first layers are let stay, as many as
//! fit, and the others pass through: while one computes the next is read, and the one before is let go of. The disk
//! reads only what does not fit, in large pieces.

use std::sync::mpsc::{Receiver, Sender, channel};

use crate::checkpoint::LinearWeight;

/// Brings the weights of each part of a step into memory before it runs.
pub(super) struct ReadAhead {
    reached: Sender<usize>,
}

/// The weights of one part of a step: a layer with the gated block before it, or the head.
pub(super) struct Part {
    pub(super) weights: Vec<LinearWeight>,
    pub(super) bytes: u64,
}

impl ReadAhead {
    /// Starts a thread that reads `parts`, of which the first ones stay in memory, up to `resident_bytes` of them.
    pub(super) fn start(parts: Vec<Part>, resident_bytes: u64) -> Self {
        let stay = resident(&parts, resident_bytes);
        let (reached, receiver) = channel();
        // It ends when the model does, which drops the sender.
        std::thread::spawn(move || follow(&receiver, &parts, stay));
        Self { reached }
    }

    /// Says that part `index` of a step begins.
    pub(super) fn reach(&self, index: usize) {
        // A thread that is gone only makes reading slow.
        let _ = self.reached.send(index);
    }
}

/// How many parts fit together, the first ones.
fn resident(parts: &[Part], bytes: u64) -> usize {
    let mut sum = 0;
    parts
        .iter()
        .take_while(|part| {
            sum += part.bytes;
            sum <= bytes
        })
        .count()
}

fn follow(reached: &Receiver<usize>, parts: &[Part], stay: usize) {
    while let Ok(index) = reached.recv() {
        let (next, done) = around(index, parts.len());
        if done >= stay {
            parts[done].weights.iter().for_each(LinearWeight::evict_pages);
        }
        // Also those that stay: they have to come once, and the system may have taken them.
        parts[next].weights.iter().for_each(LinearWeight::fetch_pages);
    }
}

/// The parts after and before one of `count`; behind the last comes the first, of the next step.
fn around(index: usize, count: usize) -> (usize, usize) {
    ((index + 1) % count, (index + count - 1) % count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_parts_stay_as_long_as_they_fit() {
        let parts: Vec<Part> = [10, 20, 30].map(|bytes| Part { weights: Vec::new(), bytes }).into();
        for (bytes, expected) in [(0, 0), (9, 0), (10, 1), (29, 1), (30, 2), (59, 2), (60, 3), (u64::MAX, 3)]
        {
            assert_eq!(resident(&parts, bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn behind_the_last_part_comes_the_first() {
        assert_eq!(around(0, 3), (1, 2));
        assert_eq!(around(2, 3), (0, 1));
        assert_eq!(around(0, 1), (0, 0));
    }
}
