//! What one row of a step needs of a sequence: its tokens, the pictures they see, its cache, and how much of it
//! was read.

use super::{LogitsOf, Row};
use crate::SequenceInputs;

#[derive(Debug, Clone)]
pub(crate) struct Lane<C> {
    /// None until the pictures are read, and while the sequence is out of memory's way.
    cache: Option<C>,
    /// Prompt and answer.
    token_ids: Vec<u32>,
    /// `[T]`, as `token_ids`.
    image_index: Vec<Option<u32>>,
    /// Tokens that the cache holds.
    fed: usize,
}

impl<C: Clone> Lane<C> {
    pub(crate) fn new(cache: C, inputs: &SequenceInputs) -> Self {
        Self { cache: Some(cache), ..Self::unloaded(inputs) }
    }

    /// A lane that has no cache yet.
    pub(crate) fn unloaded(inputs: &SequenceInputs) -> Self {
        Self {
            cache: None,
            token_ids: inputs.token_ids.clone(),
            image_index: inputs.image_index.clone(),
            fed: 0,
        }
    }

    /// Gives it a cache that holds its first `fed` tokens.
    pub(crate) fn load(&mut self, cache: C, fed: usize) {
        (self.cache, self.fed) = (Some(cache), fed);
    }

    /// Frees the cache; all tokens are to be read again.
    pub(crate) fn unload(&mut self) -> Option<C> {
        self.fed = 0;
        self.cache.take()
    }

    /// Takes back the last tokens that were fed, so that `fed` remain.
    pub(crate) fn take_back(&mut self, fed: usize, truncate: impl FnOnce(&mut C, usize)) {
        if let Some(cache) = &mut self.cache {
            truncate(cache, fed);
        }
        self.fed = fed;
    }

    pub(crate) fn is_loaded(&self) -> bool {
        self.cache.is_some()
    }

    pub(crate) fn image_index(&self) -> &[Option<u32>] {
        &self.image_index
    }

    pub(crate) fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    pub(crate) fn fed(&self) -> usize {
        self.fed
    }

    pub(crate) fn pending(&self) -> usize {
        self.token_ids.len() - self.fed
    }

    /// Adds a token. It sees the picture that the last token sees (the reference repeats the last row of
    /// `image_attention_mask`), even if that token is an `<image>`.
    pub(crate) fn push(&mut self, token_id: u32) {
        self.push_seeing(token_id, self.image_index.last().copied().flatten());
    }

    /// Adds a token that sees the given picture.
    pub(crate) fn push_seeing(&mut self, token_id: u32, image: Option<u32>) {
        self.token_ids.push(token_id);
        self.image_index.push(image);
    }

    /// The row that feeds the next `count` tokens, which then count as read.
    pub(crate) fn feed(&mut self, count: usize, logits: LogitsOf) -> Row<'_, C> {
        let range = self.fed..self.fed + count;
        self.fed = range.end;
        Row {
            cache: self.cache.as_mut().expect("only loaded lanes are fed"),
            token_ids: &self.token_ids[range.clone()],
            image_index: &self.image_index[range],
            logits,
        }
    }
}

/// The lanes of the next step: each continues the lane of the given index by a token. A cache moves where it is
/// used for the last time and is copied where it is used before. `retire` gets the lanes without a future.
pub(crate) fn branch<C: Clone>(
    lanes: Vec<Lane<C>>,
    next: &[(usize, u32)],
    mut retire: impl FnMut(Lane<C>),
) -> Vec<Lane<C>> {
    let mut uses = vec![0usize; lanes.len()];
    for &(parent, _) in next {
        uses[parent] += 1;
    }
    // Lanes without a future go first, so that they are not in memory beside the copies.
    let mut keep = |(lane, &uses): (Lane<C>, &usize)| {
        if uses > 0 {
            return Some(lane);
        }
        retire(lane);
        None
    };
    let mut lanes: Vec<_> = lanes.into_iter().zip(&uses).map(&mut keep).collect();
    let continue_lane = |&(parent, token_id): &(usize, u32)| {
        uses[parent] -= 1;
        let lane = if uses[parent] == 0 { lanes[parent].take() } else { lanes[parent].clone() };
        let mut lane = lane.expect("a lane stays until its last use");
        lane.push(token_id);
        lane
    };
    next.iter().map(continue_lane).collect()
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use super::*;

    /// Counts how often it was copied.
    #[derive(Debug)]
    struct Counted(Rc<Cell<usize>>);

    impl Clone for Counted {
        fn clone(&self) -> Self {
            self.0.set(self.0.get() + 1);
            Self(Rc::clone(&self.0))
        }
    }

    #[test]
    fn caches_are_copied_only_where_a_lane_branches() {
        let copies = Rc::new(Cell::new(0));
        let inputs = SequenceInputs { token_ids: vec![7], image_index: vec![Some(1)], images: Vec::new() };
        let lane = || Lane::new(Counted(Rc::clone(&copies)), &inputs);
        for (next, expected) in
            [(&[(0, 1), (1, 2), (2, 3)][..], 0), (&[(2, 1), (2, 2), (2, 3)], 2), (&[(1, 1)], 0), (&[], 0)]
        {
            copies.set(0);
            let mut retired = 0;
            let lanes = branch(vec![lane(), lane(), lane()], next, |_| retired += 1);
            assert_eq!(copies.get(), expected, "{next:?}");
            assert_eq!(retired, (0..3).filter(|lane| next.iter().all(|(parent, _)| parent != lane)).count());
            let tokens: Vec<_> = next.iter().map(|&(_, token)| vec![7, token]).collect();
            assert_eq!(lanes.iter().map(|lane| lane.token_ids.clone()).collect::<Vec<_>>(), tokens);
            assert!(lanes.iter().all(|lane| lane.image_index == [Some(1), Some(1)]));
        }
    }
}
