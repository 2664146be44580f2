//! One step: the gradient of a mean loss over several passes, clipped, and AdamW.

use idefics::{
    config::IdeficsConfig,
    model::{KeptImages, LossOptions, Model, ModelError, Tape, TrainingSequence},
    ops::{Context, LossSum},
};

use crate::{optim::AdamW, parameters::Parameters};

/// A model that learns.
pub struct Learner {
    /// Its weights.
    pub parameters: Parameters,
    /// Its configuration.
    pub config: IdeficsConfig,
    /// How it is computed.
    pub ctx: Context,
    /// How weights move.
    pub rules: StepRules,
    /// Pictures that a frozen tower has read.
    pub kept_images: KeptImages,
}

/// How weights move, besides the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRules {
    /// The optimiser's constants.
    pub adamw: AdamW,
    /// Largest norm of all gradients together; 0 for no bound.
    pub clip_norm: f64,
    /// Weight of the squared log-sum of the logits.
    pub z_loss: f32,
    /// What is kept for the backward pass.
    pub tape: Tape,
}

/// The loss of a step, and the norm of its gradient before clipping.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gradients {
    /// Sums over all passes.
    pub loss: LossSum,
    /// 2-norm over all trained weights.
    pub norm: f64,
}

impl Learner {
    /// The model as it is now. It must be gone before [`apply`](Self::apply).
    pub fn model(&self) -> Result<Model, ModelError> {
        Model::new(self.config.clone(), &self.parameters, self.ctx)
    }

    /// Computes the gradient of the mean loss over the targets of all passes. `step` is for draws of dropout.
    pub fn gradients(
        &mut self,
        passes: &[Vec<TrainingSequence>],
        step: u64,
    ) -> Result<Gradients, ModelError> {
        let targets: usize = passes.iter().map(|batch| num_targets(batch)).sum();
        let options = LossOptions {
            z_loss: self.rules.z_loss,
            gradient_scale: (1.0 / targets.max(1) as f64) as f32,
            tape: self.rules.tape,
        };
        self.parameters.zero_gradients();
        let mut loss = LossSum::default();
        for (pass, batch) in passes.iter().enumerate() {
            // A model is made for each pass: it is cheap, and it is gone before the weights move.
            let weights = self.parameters.learning(step, pass as u64);
            let model = Model::new(self.config.clone(), weights, self.ctx);
            let sum = model
                .and_then(|model| model.accumulate_gradients_with(batch, &options, &mut self.kept_images));
            self.parameters.rest();
            loss.add(&sum?);
        }
        Ok(Gradients { loss, norm: self.parameters.gradient_norm() })
    }

    /// Moves the weights; `step` counts from 1.
    pub fn apply(&mut self, gradients: &Gradients, learning_rate: f64, step: u64) {
        let clip = self.rules.clip_norm;
        // As `torch.nn.utils.clip_grad_norm_`.
        let scale = if clip > 0.0 { (clip / (gradients.norm + 1e-6)).min(1.0) } else { 1.0 };
        self.parameters.update(self.rules.adamw, learning_rate, step, scale as f32);
    }
}

/// Targets of a batch.
pub fn num_targets(batch: &[TrainingSequence]) -> usize {
    batch.iter().map(|sequence| sequence.targets.iter().flatten().count()).sum()
}
