//! What is counted, for those who watch: totals since the start, and what is alive now.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::{FinishReason, Generated};

/// A snapshot. Totals only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests that wait for a place, preempted ones included.
    pub waiting: usize,
    /// Requests that run.
    pub running: usize,
    /// Their sequences, beams and return sequences counted.
    pub sequences: usize,
    /// Bytes of keys, values and pictures of running requests.
    pub cache_bytes: usize,
    /// Bytes of pictures, used or kept.
    pub image_bytes: usize,
    /// Bytes that are only kept for later requests.
    pub kept_bytes: usize,
    /// Limit on `cache_bytes` and `kept_bytes` together.
    pub cache_limit: usize,
    /// Total of requests that were taken.
    pub accepted: u64,
    /// Total of requests that were refused.
    pub rejected: u64,
    /// Total of requests that were answered.
    pub finished: u64,
    /// Total of requests that were cancelled.
    pub cancelled: u64,
    /// Total of requests that failed.
    pub failed: u64,
    /// Total of steps of the model.
    pub steps: u64,
    /// Total of rows in these steps: over `steps`, the mean batch.
    pub rows: u64,
    /// Total of tokens that were read: of prompts, of answers, and of preempted requests again.
    pub tokens_read: u64,
    /// Total of prompt tokens of the requests that ended, reused ones included.
    pub prompt_tokens: u64,
    /// Total of tokens that requests wrote that ended.
    pub generated_tokens: u64,
    /// Total of tokens that needed not be read, since an earlier request had.
    pub reused_tokens: u64,
    /// Total of pictures that were read.
    pub images_encoded: u64,
    /// Total of pictures that needed not be read.
    pub images_reused: u64,
    /// Total of times that a request had to make room for older ones.
    pub preemptions: u64,
}

/// Where the counting happens.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    queued: AtomicUsize,
    waiting: AtomicUsize,
    running: AtomicUsize,
    sequences: AtomicUsize,
    cache_bytes: AtomicUsize,
    image_bytes: AtomicUsize,
    kept_bytes: AtomicUsize,
    accepted: AtomicU64,
    rejected: AtomicU64,
    finished: AtomicU64,
    cancelled: AtomicU64,
    failed: AtomicU64,
    steps: AtomicU64,
    rows: AtomicU64,
    tokens_read: AtomicU64,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    reused_tokens: AtomicU64,
    images_encoded: AtomicU64,
    images_reused: AtomicU64,
    preemptions: AtomicU64,
    pace: Mutex<Pace>,
}

/// How fast requests leave the queue.
#[derive(Debug, Default)]
struct Pace {
    last: Option<Instant>,
    /// Mean time between two, the latest weighing most.
    interval: Option<Duration>,
}

impl Counters {
    pub(crate) fn snapshot(&self, cache_limit: usize) -> Stats {
        Stats {
            waiting: self.waiting.load(Relaxed).max(self.queued.load(Relaxed)),
            running: self.running.load(Relaxed),
            sequences: self.sequences.load(Relaxed),
            cache_bytes: self.cache_bytes.load(Relaxed),
            image_bytes: self.image_bytes.load(Relaxed),
            kept_bytes: self.kept_bytes.load(Relaxed),
            cache_limit,
            accepted: self.accepted.load(Relaxed),
            rejected: self.rejected.load(Relaxed),
            finished: self.finished.load(Relaxed),
            cancelled: self.cancelled.load(Relaxed),
            failed: self.failed.load(Relaxed),
            steps: self.steps.load(Relaxed),
            rows: self.rows.load(Relaxed),
            tokens_read: self.tokens_read.load(Relaxed),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
            reused_tokens: self.reused_tokens.load(Relaxed),
            images_encoded: self.images_encoded.load(Relaxed),
            images_reused: self.images_reused.load(Relaxed),
            preemptions: self.preemptions.load(Relaxed),
        }
    }

    /// Requests that have not started yet.
    pub(crate) fn queued(&self) -> usize {
        self.queued.load(Relaxed)
    }

    /// How long until the queue has moved on by one, judged by how it moved lately.
    pub(crate) fn until_next_start(&self) -> Duration {
        let pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.interval.unwrap_or(Duration::from_secs(1))
    }

    pub(crate) fn accepted(&self) {
        self.accepted.fetch_add(1, Relaxed);
        self.queued.fetch_add(1, Relaxed);
    }

    pub(crate) fn rejected(&self) {
        self.rejected.fetch_add(1, Relaxed);
    }

    /// A request has started, or was cancelled before.
    pub(crate) fn left_queue(&self) {
        // Those of a list of prompts were never queued.
        let before = self.queued.fetch_update(Relaxed, Relaxed, |queued| queued.checked_sub(1));
        let now = Instant::now();
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = pace.last.take() {
            let new = now - last;
            pace.interval = Some(pace.interval.map_or(new, |mean| (mean * 7 + new) / 8));
        }
        // Time in which nobody waits says nothing.
        pace.last = before.is_ok_and(|before| before > 1).then_some(now);
    }

    pub(crate) fn reused(&self, tokens: usize, images: usize) {
        self.reused_tokens.fetch_add(tokens as u64, Relaxed);
        self.images_reused.fetch_add(images as u64, Relaxed);
    }

    pub(crate) fn images_encoded(&self, images: usize) {
        self.images_encoded.fetch_add(images as u64, Relaxed);
    }

    pub(crate) fn preempted(&self) {
        self.preemptions.fetch_add(1, Relaxed);
    }

    pub(crate) fn step(&self, rows: usize, tokens: usize) {
        self.steps.fetch_add(1, Relaxed);
        self.rows.fetch_add(rows as u64, Relaxed);
        self.tokens_read.fetch_add(tokens as u64, Relaxed);
    }

    pub(crate) fn finished(&self, generated: &Generated) {
        let is_cancelled =
            generated.sequences.iter().any(|sequence| sequence.finish_reason == FinishReason::Cancelled);
        let total = if is_cancelled { &self.cancelled } else { &self.finished };
        total.fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(generated.usage.prompt_tokens as u64, Relaxed);
        self.generated_tokens.fetch_add(generated.usage.generated_tokens as u64, Relaxed);
    }

    pub(crate) fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    pub(crate) fn alive(&self, waiting: usize, running: usize, sequences: usize) {
        self.waiting.store(waiting, Relaxed);
        self.running.store(running, Relaxed);
        self.sequences.store(sequences, Relaxed);
    }

    pub(crate) fn bytes(&self, lanes: usize, pinned_images: usize, idle_images: usize, prefixes: usize) {
        self.cache_bytes.store(lanes + pinned_images, Relaxed);
        self.image_bytes.store(pinned_images + idle_images, Relaxed);
        self.kept_bytes.store(idle_images + prefixes, Relaxed);
    }
}
