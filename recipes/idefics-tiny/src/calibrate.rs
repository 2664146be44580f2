//! Starts the resampler where it sees what the tower knows.
//!
//! Two channels of DINOv2's last layer are several times larger than all others. Through a LayerNorm that starts as
//! ones they hide the rest, and its weights move too little in a short training to change that: so each channel
//! starts with mean 0 and deviation 1.
//!
//! What a picture shows is in the class token, of which there is one among 81 patches, most of them background. Latents
//! that start at random read the mean of all, in which things hardly differ, and attention takes long to find the one.
//! So the first block starts with most latents looking at the class token, and with what all class tokens share
//! taken off.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use idefics::{
    Idefics, LoadOptions, Processor, Segment,
    model::Stage,
    ops,
    processor::{ImageSource, ProcessOptions},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::{
    onnx::Tensor,
    samples::Maker,
    scene::Variation,
    steps::Folders,
    things::Part,
    vision::{read, save},
};

/// Pictures to look at; each gives as many vectors as it has patches.
const PICTURES: usize = 320;
/// What `LayerNorm` adds to the variance in the resampler.
const EPS: f32 = 1e-5;

/// Latents that start at the class token; the others start at random.
const CLASS_LATENTS: usize = 16;
/// How much further a query lies along the class token's key than elsewhere.
const AIM: f32 = 5.0;
/// On the output of the later blocks, which start at random, so that they do not drown that of the first.
const LATER: f32 = 0.25;

/// Of the tower's vectors, each normalised over its channels: `[E]`.
struct Channels {
    mean: Vec<f32>,
    deviation: Vec<f32>,
    /// Mean of the class tokens.
    class: Vec<f32>,
}

type Tensors = BTreeMap<String, Tensor>;

/// Rewrites the weights of the model in `directory`.
pub(crate) fn calibrate(folders: &Folders, directory: &Path) -> Result<()> {
    let channels = channels(folders, directory)?;
    let path = directory.join("model.safetensors");
    let mut tensors = read(&path)?;
    norms(&mut tensors, &channels)?;
    aim(&mut tensors, &channels)?;
    save(&tensors, &path)
}

const RESAMPLER: &str = "model.perceiver_resampler.";

/// Mean 0 and deviation 1 for each channel that the blocks read.
fn norms(tensors: &mut Tensors, channels: &Channels) -> Result<()> {
    let Channels { mean, deviation, .. } = channels;
    let mut changed = 0;
    for (name, tensor) in tensors.iter_mut() {
        if name.ends_with("context_layer_norm.weight") {
            tensor.data = deviation.iter().map(|deviation| 1.0 / deviation).collect();
            changed += 1;
        } else if name.ends_with("context_layer_norm.bias") {
            tensor.data = mean.iter().zip(deviation).map(|(mean, deviation)| -mean / deviation).collect();
        }
    }
    ensure!(changed > 0, "no norm of the tower's vectors");
    Ok(())
}

/// Makes the first block read the class token.
fn aim(tensors: &mut Tensors, channels: &Channels) -> Result<()> {
    let Channels { mean, deviation, class } = channels;
    let width = class.len();
    let of = |tensors: &Tensors, name: &str| -> Result<Tensor> {
        tensors.get(&format!("{RESAMPLER}{name}")).cloned().with_context(|| format!("no {name}"))
    };
    // What all class tokens share, as the block sees it.
    let class: Vec<f32> = class
        .iter()
        .zip(mean.iter().zip(deviation))
        .map(|(class, (mean, deviation))| (class - mean) / deviation)
        .collect();
    let key = product(&of(tensors, "blocks.0.0.k_proj.weight")?, &class);
    let value = product(&of(tensors, "blocks.0.0.v_proj.weight")?, &class);
    let shared = product(&of(tensors, "blocks.0.0.output_proj.weight")?, &value);

    let mut latents = of(tensors, "latents")?; // [L, E]
    for latent in latents.data.chunks_exact_mut(width).take(CLASS_LATENTS) {
        latent.iter_mut().zip(&shared).for_each(|(latent, shared)| *latent -= shared);
    }
    // The direction of those latents behind their norm.
    let mean = shared.iter().sum::<f32>() / width as f32;
    let length = shared.iter().map(|value| (value - mean).powi(2)).sum::<f32>().sqrt();
    let direction: Vec<f32> = shared.iter().map(|value| (mean - value) / length).collect();
    // Behind a norm a vector is as long as the root of its width.
    let scale = AIM / (width as f32).sqrt();
    let mut queries = of(tensors, "blocks.0.0.q_proj.weight")?; // [H·K, E]
    for (row, key) in queries.data.chunks_exact_mut(width).zip(&key) {
        row.iter_mut().zip(&direction).for_each(|(weight, along)| *weight += scale * key * along);
    }
    tensors.insert(format!("{RESAMPLER}latents"), latents);
    tensors.insert(format!("{RESAMPLER}blocks.0.0.q_proj.weight"), queries);
    for (name, tensor) in tensors.iter_mut() {
        if name.starts_with(RESAMPLER) && name.ends_with("output_proj.weight") && !name.contains("blocks.0.")
        {
            tensor.data.iter_mut().for_each(|weight| *weight *= LATER);
        }
    }
    Ok(())
}

/// `[N, K]` times `[K]`.
fn product(matrix: &Tensor, vector: &[f32]) -> Vec<f32> {
    let rows = matrix.data.chunks_exact(vector.len());
    rows.map(|row| row.iter().zip(vector).map(|(weight, value)| weight * value).sum()).collect()
}

fn channels(folders: &Folders, directory: &Path) -> Result<Channels> {
    let maker = Maker::open(folders, Part::Training)?;
    let processor = Processor::from_pretrained(directory)?;
    let model = Idefics::from_pretrained(directory, &LoadOptions::default())?;
    let last = Stage::VisionLayer(model.config().vision_config.num_hidden_layers - 1);
    let mut sums: Vec<(f64, f64)> = vec![(0.0, 0.0); model.config().vision_config.embed_dim];
    let mut class = vec![0.0_f64; sums.len()];
    let tokens = model.config().vision_config.num_positions();
    let (mut count, mut pictures) = (0.0, 0.0);
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
        // The tower goes over a few pictures at a time.
        let mut seen = Vec::new();
        model.model().encode_images_observed(&pixels, &mut |stage, values| {
            if stage == last {
                seen.push(ops::to_vec(values));
            }
        })?;
        let vectors = seen.into_iter().collect::<Result<Vec<_>, _>>()?.concat(); // [ΣP, E]
        for (index, vector) in vectors.chunks_exact(sums.len()).enumerate() {
            let width = sums.len() as f32;
            let mean = vector.iter().sum::<f32>() / width;
            let variance = vector.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / width;
            let is_class = index % tokens == 0;
            for ((sum, class), value) in sums.iter_mut().zip(&mut class).zip(vector) {
                let value = f64::from((value - mean) / (variance + EPS).sqrt());
                *sum = (sum.0 + value, sum.1 + value * value);
                *class += if is_class { value } else { 0.0 };
            }
            count += 1.0;
            pictures += if is_class { 1.0 } else { 0.0 };
        }
    }
    let mean: Vec<f64> = sums.iter().map(|sum| sum.0 / count).collect();
    let deviation = sums.iter().zip(&mean).map(|(sum, mean)| (sum.1 / count - mean * mean).sqrt() as f32);
    let deviation: Vec<f32> = deviation.collect();
    let (least, most) = deviation
        .iter()
        .fold((f32::MAX, 0.0_f32), |(least, most), &deviation| (least.min(deviation), most.max(deviation)));
    eprintln!("init: the tower's channels deviate by {least:.2} to {most:.2}, by 1 in the resampler");
    Ok(Channels {
        mean: mean.into_iter().map(|mean| mean as f32).collect(),
        deviation,
        class: class.into_iter().map(|sum| (sum / pictures) as f32).collect(),
    })
}
