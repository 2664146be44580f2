//! How long a training step takes and what memory it needs.
//!
//!     cargo run --release -p idefics-train --example training_speed -- full [f32|bf16] [recompute|keep] [8bit]
//!     cargo run --release -p idefics-train --example training_speed -- tiny [f32|bf16] [recompute|keep] [8bit]
//!     cargo run --release -p idefics-train --example training_speed -- qlora [LAYERS]
//!
//! `full` trains all of a model of 100 M parameters on 512 tokens and 4 pictures, AdamW included; the same step in
//! torch is `reference/compare_training.py`. `tiny` is a step of the third stage of `recipes/idefics-tiny`: all but the
//! tower, 4096 tokens and 40 pictures of 126 pixels. `qlora` trains factors of rank 16 beside `q_proj`, `k_proj` and
//! `v_proj` of the 9B shape in NF4 on one picture and 256 tokens, and compares it with the forward pass alone.

#![allow(clippy::print_stdout)] // The figures are the output.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use idefics::{
    bench::{Format, RandomWeights, shape},
    checkpoint::{LinearWeight, Weight, expected_tensors},
    config::{AlphaType, IdeficsConfig, PerceiverConfig, VisionConfig},
    model::{LossOptions, Model, Tape, TrainingSequence, WeightSource},
    ops::{Compute, Context, Gradient, Isa, LowRank},
    processor::PixelValues,
};
use idefics_kernels::allocator::{Allocator, pack_large_blocks};
use idefics_train::{
    moments::{MomentFormat, Moments},
    optim::{AdamW, Decay, Update},
};

/// As in the command line.
#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

const ROUNDS: usize = 5;

fn main() {
    pack_large_blocks(); // as `idefics train` does
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        [work @ ("full" | "tiny"), rest @ ..] => {
            let compute = if rest.contains(&"f32") { Compute::F32 } else { Compute::Bf16 };
            let tape = if rest.contains(&"recompute") { Tape::Recompute } else { Tape::Keep };
            let moments = if rest.contains(&"8bit") { MomentFormat::EightBit } else { MomentFormat::F32 };
            let (config, batch, is_trained): (_, _, fn(&str) -> bool) = if *work == "full" {
                let config = hundred_million();
                let batch = vec![sequence(&config, 512, 4)];
                (config, batch, |_| true)
            } else {
                let config = tiny();
                // Answers are a quarter of the tokens.
                let batch = (0..40).map(|_| answers(sequence(&config, 102, 1))).collect();
                (config, batch, |name| !name.starts_with("model.vision_model"))
            };
            step(&config, &batch, is_trained, (compute, tape, moments));
        }
        ["qlora", rest @ ..] => qlora(rest.first().and_then(|layers| layers.parse().ok())),
        _ => eprintln!("usage: training_speed full|tiny [f32|bf16] [recompute|keep] [8bit] | qlora [LAYERS]"),
    }
}

/// A model of 100 M parameters; `reference/compare_training.py` has the same.
fn hundred_million() -> IdeficsConfig {
    IdeficsConfig {
        vocab_size: 8000,
        additional_vocab_size: 2,
        hidden_size: 640,
        intermediate_size: 1728,
        num_hidden_layers: 8,
        num_attention_heads: 10,
        cross_layer_interval: 4,
        qk_layer_norms: true,
        use_resampler: true,
        vision_config: VisionConfig {
            embed_dim: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            ..VisionConfig::default()
        },
        perceiver_config: PerceiverConfig {
            resampler_n_latents: 64,
            resampler_depth: 2,
            resampler_n_heads: 8,
            resampler_head_dim: 64,
            ..PerceiverConfig::default()
        },
        ..IdeficsConfig::default()
    }
}

/// The model of `recipes/idefics-tiny`.
fn tiny() -> IdeficsConfig {
    IdeficsConfig {
        vocab_size: 4096,
        additional_vocab_size: 3,
        hidden_size: 320,
        intermediate_size: 832,
        num_hidden_layers: 6,
        num_attention_heads: 5,
        cross_layer_interval: 2,
        alpha_type: AlphaType::Vector,
        qk_layer_norms: true,
        use_resampler: true,
        vision_config: VisionConfig {
            embed_dim: 384,
            image_size: 126,
            intermediate_size: 1536,
            num_hidden_layers: 12,
            num_attention_heads: 6,
            ..VisionConfig::default()
        },
        perceiver_config: PerceiverConfig {
            resampler_n_latents: 24,
            resampler_depth: 2,
            resampler_n_heads: 6,
            resampler_head_dim: 64,
            ..PerceiverConfig::default()
        },
        ..IdeficsConfig::default()
    }
}

/// The same with targets in its last quarter alone.
fn answers(mut sequence: TrainingSequence) -> TrainingSequence {
    let n = sequence.targets.len();
    sequence.targets[..n - n / 4].fill(None);
    sequence
}

/// `tokens` tokens that see `images` pictures in turn; each predicts the next.
fn sequence(config: &IdeficsConfig, tokens: usize, images: usize) -> TrainingSequence {
    let side = config.vision_config.image_size;
    let picture = |seed: usize| {
        let data = (0..3 * side * side).map(|i| ((i * (seed + 3)) % 251) as f32 / 125.0 - 1.0).collect();
        Arc::new(PixelValues::new(data, side, side))
    };
    let ids: Vec<u32> = (0..=tokens).map(|t| (3 + t * 7919 % (config.vocab_size - 3)) as u32).collect();
    TrainingSequence {
        token_ids: ids[..tokens].to_vec(),
        image_index: (0..tokens).map(|t| Some((t * images / tokens) as u32)).collect(),
        images: (0..images).map(picture).collect(),
        targets: ids[1..].iter().copied().map(Some).collect(),
    }
}

/// Weights, some of which are trained.
struct Learning {
    trained: BTreeMap<String, (Weight, Gradient, Moments)>,
    frozen: BTreeMap<String, Weight>,
}

impl WeightSource for Learning {
    fn weight(&self, name: &str) -> Option<Weight> {
        let trained = self.trained.get(name).map(|(weight, ..)| weight.clone());
        trained.or_else(|| self.frozen.get(name).cloned())
    }
    fn gradient(&self, name: &str) -> Option<Gradient> {
        self.trained.get(name).map(|(_, gradient, _)| gradient.clone())
    }
}

fn step(
    config: &IdeficsConfig,
    batch: &[TrainingSequence],
    is_trained: fn(&str) -> bool,
    (compute, tape, moments): (Compute, Tape, MomentFormat),
) {
    let random = RandomWeights::new(config, Format::F32);
    let mut source = Learning { trained: BTreeMap::new(), frozen: BTreeMap::new() };
    for (name, _) in expected_tensors(config) {
        let weight = random.weight(&name).expect("every weight is there");
        if is_trained(&name) {
            let n = weight.len();
            source.trained.insert(name, (weight, Gradient::new(n), Moments::new(n, moments)));
        } else {
            source.frozen.insert(name, weight);
        }
    }
    let parameters: usize = source.trained.values().map(|(weight, ..)| weight.len()).sum();
    let targets: usize = batch.iter().map(|sequence| sequence.targets.iter().flatten().count()).sum();
    let options = LossOptions { z_loss: 0.0, gradient_scale: 1.0 / targets as f32, tape };
    let ctx = Context { isa: Isa::best(), compute };
    let mut seconds = Vec::new();
    for step in 0..=ROUNDS {
        let start = Instant::now();
        let model = Model::new(config.clone(), &source, ctx).expect("a model");
        let loss = model.accumulate_gradients(batch, &options).expect("a loss");
        drop(model);
        let passes = start.elapsed().as_secs_f64();
        let update =
            Update { adamw: AdamW::default(), rate: 1e-4, step: step as u64 + 1, gradient_scale: 1.0 };
        for (weight, gradient, moments) in source.trained.values_mut() {
            let values = weight.as_f32_mut().expect("the model is dropped");
            update.apply(values, &gradient.lock(), moments, Decay::Yes);
            gradient.zero();
        }
        let whole = start.elapsed().as_secs_f64();
        eprintln!("step {step}: {whole:.3} s ({passes:.3} s passes), loss {:.4}", loss.mean());
        if step > 0 {
            seconds.push(whole); // the first one warms up
        }
    }
    println!(
        "step, {:.1} M parameters trained, {compute:?}, tape {tape:?}, moments {}: median {:.3} s, peak {:.2} GB",
        parameters as f64 / 1e6,
        moments.name(),
        median(&mut seconds),
        peak_gb()
    );
}

/// A packed model with factors beside the layers that the published recipe names.
struct Factors {
    base: RandomWeights,
    factors: BTreeMap<String, LowRank>,
}

impl WeightSource for Factors {
    fn weight(&self, name: &str) -> Option<Weight> {
        self.base.weight(name)
    }
    fn linear_weight(&self, name: &str) -> Option<LinearWeight> {
        self.base.linear_weight(name)
    }
    fn low_rank(&self, name: &str) -> Vec<LowRank> {
        self.factors.get(name).cloned().into_iter().collect()
    }
}

fn qlora(layers: Option<usize>) {
    const RANK: usize = 16;
    let mut config = shape("9b").expect("a published size");
    if let Some(layers) = layers {
        config.num_hidden_layers = layers;
    }
    let mut factors = BTreeMap::new();
    for (name, shape) in expected_tensors(&config) {
        let Some(layer) = name.strip_suffix(".weight") else { continue };
        let &[n, k] = shape.as_slice() else { continue };
        if !["q_proj", "k_proj", "v_proj"].iter().any(|last| layer.ends_with(last)) {
            continue;
        }
        factors.insert(
            layer.to_owned(),
            LowRank {
                a: Weight::from_f32(vec![0.01; RANK * k], [RANK, k]),
                b: Weight::from_f32(vec![0.0; n * RANK], [n, RANK]),
                scale: 2.0,
                dropout: 0.05,
                dropout_seed: 1,
                a_gradient: Some(Gradient::new(RANK * k)),
                b_gradient: Some(Gradient::new(n * RANK)),
            },
        );
    }
    let parameters: usize = factors.values().map(|factors| factors.a.len() + factors.b.len()).sum();
    let source = Factors { base: RandomWeights::new(&config, Format::Nf4), factors };
    let ctx = Context { isa: Isa::best(), compute: Compute::Bf16 };
    let model = Model::new(config.clone(), &source, ctx).expect("a model");
    let batch = [sequence(&config, 256, 1)];
    let options = LossOptions { z_loss: 0.0, gradient_scale: 1.0 / 256.0, tape: Tape::Recompute };
    let (mut forward, mut both) = (Vec::new(), Vec::new());
    for round in 0..3 {
        let start = Instant::now();
        model.evaluate_loss(&batch).expect("a loss");
        forward.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        model.accumulate_gradients(&batch, &options).expect("a loss");
        both.push(start.elapsed().as_secs_f64());
        eprintln!("round {round}: forward {:.2} s, both {:.2} s", forward[round], both[round]);
    }
    let (forward, both) = (median(&mut forward), median(&mut both));
    println!(
        "QLoRA, {} layers, {:.1} M trained: forward {forward:.2} s, forward and backward {both:.2} s ({:.2}x), \
         peak {:.2} GB",
        config.num_hidden_layers,
        parameters as f64 / 1e6,
        both / forward,
        peak_gb()
    );
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The most memory that this process had, by `VmHWM` of Linux; 0 elsewhere.
fn peak_gb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) * 1024.0 / 1e9
}
