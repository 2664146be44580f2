//! What training asks of a model.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use idefics::processor::PixelValues;

/// Where backward passes add the gradient of one weight.
#[derive(Debug, Clone)]
pub struct Gradient(Arc<Mutex<Vec<f32>>>);

impl Gradient {
    /// A gradient of zeros.
    pub fn new(len: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0.0; len])))
    }

    /// The numbers, for this thread alone until they are given back.
    pub fn lock(&self) -> MutexGuard<'_, Vec<f32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets all numbers to zero.
    pub fn zero(&self) {
        self.lock().fill(0.0);
    }
}

/// One sequence to learn from.
#[derive(Debug, Clone, Default)]
pub struct TrainingSequence {
    /// Token ids `[T]`.
    pub token_ids: Vec<u32>,
    /// For each token, the picture it sees: `[T]`.
    pub image_index: Vec<Option<u32>>,
    /// The pictures.
    pub images: Vec<Arc<PixelValues>>,
    /// What each position must predict, if that counts: `[T]`.
    pub targets: Vec<Option<u32>>,
}

/// How the loss of a batch is computed.
#[derive(Debug, Clone, Copy)]
pub struct LossOptions {
    /// Weight of the squared log-sum of the logits.
    pub z_loss: f32,
    /// Seed of dropout in this pass.
    pub image_step_seed: u64,
    /// Multiplied into every gradient.
    pub grad_scale: f32,
}

/// Sums over the targets of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSum {
    /// Cross-entropy.
    pub cross_entropy: f64,
    /// Squared log-sums of the logits.
    pub z: f64,
    /// Number of targets.
    pub n_targets: usize,
    /// Targets that the model finds most likely.
    pub n_correct: usize,
}
