//! The memory of a run, known before anything of it is allocated.
//!
//! Weights, gradients and moments are exact. What a pass keeps is an estimate from the layers' widths; the trial of
//! the longest batch, before the first step, is what proves it.

use idefics::{
    checkpoint::{Part, Weights},
    config::IdeficsConfig,
    generate::available_bytes,
    ops::Compute,
    quantize::{Format, Recipe},
};
use serde::Serialize;

use crate::{
    TrainError,
    adapter::LoraLayer,
    config::{TapeName, TrainConfig},
    parameters::Precision,
};

/// Bytes of an `f32`.
const F32: u64 = 4;

/// What the memory of a run follows from.
pub struct Workload<'a> {
    /// The run.
    pub config: &'a TrainConfig,
    /// The model.
    pub model: &'a IdeficsConfig,
    /// Its weights as they are stored.
    pub weights: &'a Weights,
    /// Which of them are trained.
    pub is_trained: &'a dyn Fn(&str) -> bool,
    /// Factors beside them.
    pub lora: &'a [LoraLayer],
    /// Tokens of the largest pass.
    pub tokens: usize,
    /// Its pictures.
    pub images: usize,
    /// What products are rounded to.
    pub compute: Compute,
}

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Prediction {
    /// Weights that stay. Those of a file can be dropped and read again, at the price of time.
    pub frozen: u64,
    /// Weights that move, with the numbers behind rounded ones.
    pub trained: u64,
    /// Their gradients.
    pub gradients: u64,
    /// Their moments.
    pub moments: u64,
    /// What the largest pass keeps.
    pub activations: u64,
    /// What of both is never there at once: gradients come as what a pass keeps goes. Nothing where the gradients of
    /// several passes are added up.
    pub reused: u64,
    /// What a frozen tower has made of pictures, when its place is full.
    pub images: u64,
}

impl Prediction {
    /// The memory of a run.
    pub fn new(work: &Workload<'_>) -> Self {
        let recipe = work.config.quantize.as_ref().map(crate::config::QuantizeOptions::recipe);
        let format = work.config.optimizer.moments;
        let (mut frozen, mut trained, mut elements, mut moments, mut largest) = (0, 0, 0, 0, 0);
        for (name, weight) in work.weights.iter() {
            let len = weight.len() as u64;
            if (work.is_trained)(name) {
                let is_bf16 = work.config.run.precision == Precision::Bf16
                    || (work.config.run.precision == Precision::Auto
                        && weight.dtype() == idefics::checkpoint::DType::Bf16);
                trained += len * if is_bf16 { F32 + 2 } else { F32 };
                elements += len;
                largest = largest.max(len);
                moments += format.num_bytes(len);
            } else {
                frozen += packed_bytes(recipe.as_ref(), name, len).unwrap_or(weight.bytes().len() as u64);
            }
        }
        frozen += work.weights.iter_packed().map(|(_, weight)| weight.num_bytes() as u64).sum::<u64>();
        for layer in work.lora {
            for factor in [&layer.factors.a, &layer.factors.b] {
                let len = factor.len() as u64;
                elements += len;
                trained += len * F32;
                moments += format.num_bytes(len);
            }
        }
        let (gradients, activations) = (elements * F32, activations(work));
        // The last layers' gradients and the largest one, the head's or the embeddings', come before the rest goes.
        let reused = match work.config.batch.accumulation {
            1 => gradients.min(activations).saturating_sub(2 * largest * F32),
            _ => 0,
        };
        Self {
            frozen,
            trained,
            gradients,
            moments,
            activations,
            reused,
            images: work.config.loading.kept_image_bytes() as u64,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        let passes = self.gradients + self.activations - self.reused;
        self.frozen + self.trained + self.moments + passes + self.images
    }

    /// Refuses what will not fit, with numbers.
    pub fn check(&self) -> Result<(), TrainError> {
        match available_bytes() {
            Some(available) => self.check_against(available as u64),
            None => Ok(()),
        }
    }

    fn check_against(&self, available: u64) -> Result<(), TrainError> {
        if self.total() <= available {
            return Ok(());
        }
        let Self { frozen, trained, gradients, moments, activations, images, .. } = *self;
        let parts = [
            (frozen, "frozen weights, which `quantize` packs"),
            (
                trained + gradients + moments,
                "trained weights, of which `lora` has far fewer (`optimizer.moments = \"8bit\"` has smaller moments)",
            ),
            (activations, "the largest pass, which `batch.tokens` and `batch.images` bound"),
            (images, "pictures that were read, which `loading.image_cache_gb` bounds"),
        ];
        let (bytes, largest) = parts.into_iter().max_by_key(|(bytes, _)| *bytes).unwrap_or_default();
        Err(TrainError::Memory {
            needed: gigabytes(self.total()),
            available: gigabytes(available),
            advice: format!("{} are for {largest}", gigabytes(bytes)),
        })
    }
}

/// Bytes as they are shown.
pub fn gigabytes(bytes: u64) -> String {
    if bytes < 1_000_000_000 {
        format!("{:.1} MB", bytes as f64 / 1e6)
    } else {
        format!("{:.1} GB", bytes as f64 / 1e9)
    }
}

/// Bytes of a weight that will be packed.
fn packed_bytes(recipe: Option<&Recipe>, name: &str, len: u64) -> Option<u64> {
    let recipe = recipe?;
    Part::of_linear(name).filter(|part| recipe.parts.contains(part))?;
    let bits = match recipe.format {
        Format::Nf4 => 4.5,
        Format::Nf4DoubleQuant => 4.13,
        Format::Q8 => 8.5,
    };
    Some((len as f64 * bits / 8.0) as u64)
}

/// What the largest pass keeps, by the widths of the layers.
fn activations(work: &Workload<'_>) -> u64 {
    let (model, vision) = (work.model, &work.model.vision_config);
    let size = |count: usize| count as u64;
    let keeps = work.config.run.tape == TapeName::Keep;
    // What products read is kept as they round it.
    let factor = if work.compute == Compute::F32 { F32 } else { 2 };
    // A layer of `rows` vectors of `d`, whose MLP has `f` inside in `halves` halves. Kept: what goes in and what goes
    // into the second norm; both normed, queries, keys, values and attention; the inside of the MLP.
    let kept = |rows: u64, d: u64, f: u64, halves: u64| rows * (2 * d * F32 + (6 * d + halves * f) * factor);
    // On the way back, while a layer's gradients are there beside what it kept.
    let passing = |rows: u64, d: u64, f: u64, halves: u64| rows * (8 * d + (halves + 1) * f) * F32;
    let of_layers = |layers: u64, rows: u64, d: u64, kept: u64, passing: u64| {
        if keeps { layers * kept + passing } else { layers * rows * d * F32 + kept + passing }
    };

    let tokens = size(work.tokens);
    let (d, f) = (size(model.hidden_size), size(model.intermediate_size));
    let layers = size(model.num_hidden_layers + model.num_cross_layers());
    let text = of_layers(layers, tokens, d, kept(tokens, d, f, 2), passing(tokens, d, f, 2));

    let images = size(work.images);
    let (p, e, inner) =
        (size(vision.num_positions()), size(vision.embed_dim), size(vision.intermediate_size));
    let has_factors = |prefix: &str| work.lora.iter().any(|layer| layer.module.starts_with(prefix));
    let is_trained = |prefix: &str| {
        has_factors(prefix)
            || work.weights.iter().any(|(name, _)| name.starts_with(prefix) && (work.is_trained)(name))
    };
    let tower = if is_trained("model.vision_model.") {
        let (rows, layers) = (images * p, size(vision.num_hidden_layers));
        of_layers(layers, rows, e, kept(rows, e, inner, 1), passing(rows, e, inner, 1))
    } else {
        passing(images * p, e, inner, 1)
    };
    let pixels = images * 3 * size(vision.image_size * vision.image_size) * F32;
    // The head works on some hundred rows at a time, and beside them on their gradients.
    let logits = 2 * tokens.min(256) * size(model.vocab_size + model.additional_vocab_size) * F32;
    text + tower + pixels + logits
}

/// The most memory that this process ever had, where the system tells.
pub fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use idefics::checkpoint::{DType, Weight};

    use super::*;

    fn predict(overrides: &[&str], is_trained: &dyn Fn(&str) -> bool) -> Prediction {
        let weights: Weights = [
            ("model.layers.0.mlp.up_proj.weight", Weight::from_f32(vec![0.0; 6400], [100, 64])),
            ("model.norm.weight", Weight::from_f32(vec![0.0; 64], [64]).to_dtype(DType::Bf16)),
        ]
        .into_iter()
        .collect();
        predict_for(overrides, &weights, is_trained)
    }

    fn predict_for(overrides: &[&str], weights: &Weights, is_trained: &dyn Fn(&str) -> bool) -> Prediction {
        let text = "model='m'\noutput='o'\n[run]\nsteps=1\n[[data]]\nformat='jsonl'\npath='x'\n";
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let config = TrainConfig::parse("test", text, &overrides).unwrap();
        let model = IdeficsConfig::default();
        let (tokens, images) = (100, 2);
        Prediction::new(&Workload {
            config: &config,
            model: &model,
            weights,
            is_trained,
            lora: &[],
            tokens,
            images,
            compute: Compute::F32,
        })
    }

    #[test]
    fn weights_are_counted_to_the_byte() {
        let full = predict(&[], &|_| true);
        assert_eq!((full.frozen, full.trained), (0, 6400 * 4 + 64 * 6));
        assert_eq!((full.gradients, full.moments), (6464 * 4, 6464 * 8));
        let frozen = predict(&["quantize.format='nf4'"], &|name| name.contains("norm"));
        assert_eq!((frozen.frozen, frozen.trained), (6400 * 9 / 16, 64 * 6));
        let keep = predict(&["run.tape='keep'"], &|_| true);
        let coded = predict(&["optimizer.moments='8bit'"], &|_| true);
        assert_eq!(coded.moments, 6464 * 2 + 25 * 8 + 8);
        assert!(keep.activations > 5 * full.activations, "{keep:?} {full:?}");
    }

    #[test]
    fn gradients_take_over_what_a_pass_kept_unless_passes_add_up() {
        let (one, two) = (predict(&[], &|_| true), predict(&["batch.accumulation=2"], &|_| true));
        assert_eq!((one.reused, two.reused), (0, 0), "nearly all of it is the largest gradient");
        assert_eq!(one.total(), two.total());
        let many: Weights = (0..20)
            .map(|layer| {
                let name = format!("model.layers.{layer}.mlp.up_proj.weight");
                (name, Weight::from_f32(vec![0.0; 6400], [100, 64]))
            })
            .collect();
        let (one, two) =
            (predict_for(&[], &many, &|_| true), predict_for(&["batch.accumulation=2"], &many, &|_| true));
        assert_eq!((one.reused, two.reused), (18 * 6400 * 4, 0));
        assert_eq!(two.total() - one.total(), one.reused);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let prediction = Prediction {
            frozen: 1_000_000_000,
            trained: 20_000_000_000,
            gradients: 20_000_000_000,
            moments: 40_000_000_000,
            activations: 500_000_000,
            reused: 0,
            images: 0,
        };
        assert!(prediction.check_against(100_000_000_000).is_ok());
        let error = prediction.check_against(24_000_000_000).unwrap_err().to_string();
        for part in ["81.5 GB", "24.0 GB", "80.0 GB are for trained weights", "lora"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
