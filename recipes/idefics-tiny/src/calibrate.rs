//! Starts the resampler's norms of the tower's vectors where each channel has mean 0 and deviation 1.
//!
//! Two channels of DINOv2's last layer are several times larger than all others. Through a LayerNorm that starts as
//! ones they hide the rest, and its weights move too little in a short training to change that.

use std::{fs, path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use idefics::{
    Idefics, LoadOptions, Processor, Segment,
    model::Stage,
    ops,
    processor::{ImageSource, ProcessOptions},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors};

use crate::{onnx::Tensor, samples::Maker, scene::Variation, steps::Folders, things::Part, vision::save};

/// Pictures to look at; each gives as many vectors as it has patches.
const PICTURES: usize = 320;
/// What `LayerNorm` adds to the variance in the resampler.
const EPS: f32 = 1e-5;

/// Mean and deviation of each channel of the tower's vectors, each vector normalised over its channels: `[E]`.
struct Channels {
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

/// Rewrites the weights of the model in `directory`.
pub(crate) fn calibrate(folders: &Folders, directory: &Path) -> Result<()> {
    let Channels { mean, deviation } = channels(folders, directory)?;
    let path = directory.join("model.safetensors");
    let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| format!("reading {}", path.display()))?;
    let mut tensors = std::collections::BTreeMap::new();
    let mut changed = 0;
    for (name, view) in file.tensors() {
        ensure!(view.dtype() == Dtype::F32, "{name}: expected f32, got {:?}", view.dtype());
        let mut data: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
        if name.ends_with("context_layer_norm.weight") {
            data = deviation.iter().map(|deviation| 1.0 / deviation).collect();
            changed += 1;
        } else if name.ends_with("context_layer_norm.bias") {
            data = mean.iter().zip(&deviation).map(|(mean, deviation)| -mean / deviation).collect();
        }
        tensors.insert(name, Tensor { shape: view.shape().to_vec(), data });
    }
    ensure!(changed > 0, "{}: no norm of the tower's vectors", path.display());
    save(&tensors, &path)
}

fn channels(folders: &Folders, directory: &Path) -> Result<Channels> {
    let maker = Maker::open(folders, Part::Training)?;
    let processor = Processor::from_pretrained(directory)?;
    let model = Idefics::from_pretrained(directory, &LoadOptions::default())?;
    let last = Stage::VisionLayer(model.config().vision_config.num_hidden_layers - 1);
    let mut sums: Vec<(f64, f64)> = vec![(0.0, 0.0); model.config().vision_config.embed_dim];
    let mut count = 0.0;
    let numbers: Vec<u64> = (0..PICTURES as u64).collect();
    for numbers in numbers.chunks(32) {
        let prompt = numbers.iter().map(|number| {
            let rng = &mut ChaCha8Rng::seed_from_u64(*number);
            let thing = maker.any(rng);
            let scene = Maker::alone(rng, thing, Variation::Strong)?;
            Ok(Segment::Image(ImageSource::Bytes(Arc::from(scene.jpeg))))
        });
        let prompt = prompt.collect::<Result<Vec<_>>>()?;
        let inputs = processor.process(&[prompt], &ProcessOptions::default())?.remove(0);
        let pixels: Vec<_> = inputs.images.iter().map(AsRef::as_ref).collect();
        let mut seen = None;
        model.model().encode_images_observed(&pixels, &mut |stage, values| {
            if stage == last {
                seen = Some(ops::to_vec(values));
            }
        })?;
        let vectors = seen.context("the tower has no layers")??; // [ΣP, E]
        for vector in vectors.chunks_exact(sums.len()) {
            let width = sums.len() as f32;
            let mean = vector.iter().sum::<f32>() / width;
            let variance = vector.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / width;
            for (sum, value) in sums.iter_mut().zip(vector) {
                let value = f64::from((value - mean) / (variance + EPS).sqrt());
                *sum = (sum.0 + value, sum.1 + value * value);
            }
            count += 1.0;
        }
    }
    let mean: Vec<f64> = sums.iter().map(|sum| sum.0 / count).collect();
    let deviation = sums.iter().zip(&mean).map(|(sum, mean)| (sum.1 / count - mean * mean).sqrt() as f32);
    let deviation: Vec<f32> = deviation.collect();
    let (least, most) = deviation
        .iter()
        .fold((f32::MAX, 0.0_f32), |(least, most), &deviation| (least.min(deviation), most.max(deviation)));
    eprintln!("init: the tower's channels deviate by {least:.2} to {most:.2}, by 1 in the resampler");
    Ok(Channels { mean: mean.into_iter().map(|mean| mean as f32).collect(), deviation })
}
