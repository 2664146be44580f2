//! AdamW (Loshchilov and Hutter, 2019) as `torch.optim.AdamW` computes it: what a step's arithmetic needs to know.

use idefics_kernels::adamw::Step;
use serde::{Deserialize, Serialize};

use crate::moments::Moments;

/// The constants of AdamW. The defaults are those that IDEFICS was trained with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of the parameters that have any; see [`decays`].
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 }
    }
}

/// Whether weight decay applies to a parameter. Source: m4 `training/main.py`, the names without decay.
pub fn decays(name: &str) -> bool {
    const WITHOUT: [&str; 6] = ["bias", "alpha", "layernorm", "ln", "layer_norm", "perceiver_resampler"];
    !WITHOUT.iter().any(|part| name.contains(part))
}

/// One step of AdamW, the same for all parameters.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// The constants.
    pub adamw: AdamW,
    /// Learning rate.
    pub rate: f64,
    /// Number of this step, the first being 1.
    pub step: u64,
    /// Multiplied into each gradient: less than 1 where the norm is clipped.
    pub gradient_scale: f32,
}

impl Update {
    fn step(&self, decay: Decay) -> Step {
        let AdamW { beta1, beta2, eps, weight_decay } = self.adamw;
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        Step {
            keep: if decay == Decay::Yes { (1.0 - self.rate * weight_decay) as f32 } else { 1.0 },
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            size: (self.rate / correction(beta1)) as f32,
            second_root: correction(beta2).sqrt() as f32,
            eps: eps as f32,
            gradient_scale: self.gradient_scale,
        }
    }

    /// Moves `values` against their gradient. `decay` as [`decays`] says.
    pub fn apply(&self, values: &mut [f32], gradient: &[f32], moments: &mut Moments, decay: Decay) {
        moments.step(&self.step(decay), self.step, values, gradient);
    }
}

/// Whether weight decay applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// It does.
    Yes,
    /// It does not.
    No,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moments::MomentFormat;

    #[test]
    fn names_without_decay_are_the_reference_s() {
        let check = |name, expected| assert_eq!(decays(name), expected, "{name}");
        check("model.layers.0.self_attn.q_proj.weight", true);
        check("model.embed_tokens.additional_embedding.weight", true);
        check("lm_head.weight", true);
        check("model.norm.weight", true);
        check("model.layers.0.input_layernorm.weight", false);
        check("model.vision_model.encoder.layers.0.layer_norm1.weight", false);
        check("model.vision_model.encoder.layers.0.mlp.fc1.bias", false);
        check("model.gated_cross_attn_layers.0.alpha_cross_attn", false);
        check("model.gated_cross_attn_layers.0.cross_attn.q_layer_norm.weight", false);
        check("model.perceiver_resampler.blocks.0.1.c_proj.weight", false);
    }

    /// Values of `torch.optim.AdamW(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)` (torch 2.15) after
    /// three steps from [1, -2, 0.5] with gradients [0.1, -0.2, 3], [0.3, 0.2, -1], [0, 1e-4, 2].
    #[test]
    fn steps_are_torch_s() {
        let mut values = TORCH_START;
        let mut moments = Moments::new(3, MomentFormat::F32);
        for (step, gradient) in TORCH_GRADIENTS.iter().enumerate() {
            let update =
                Update { adamw: AdamW::default(), rate: 0.1, step: step as u64 + 1, gradient_scale: 1.0 };
            update.apply(&mut values, gradient, &mut moments, Decay::Yes);
            for (value, expected) in values.iter().zip(TORCH_EXPECTED[step]) {
                assert!((value - expected).abs() < 2e-6, "step {step}: {values:?}");
            }
        }
    }

    const TORCH_START: [f32; 3] = [1.0, -2.0, 0.5];
    const TORCH_GRADIENTS: [[f32; 3]; 3] = [[0.1, -0.2, 3.0], [0.3, 0.2, -1.0], [0.0, 1e-4, 2.0]];
    const TORCH_EXPECTED: [[f32; 3]; 3] = [
        [0.89, -1.88, 0.395],
        [0.789_321_9, -1.866_463_2, 0.351_028_14],
        [0.710_483_97, -1.851_889_6, 0.287_209_2],
    ];
}
