//! The measurements: the machine itself, then vision, prefill and decode of a model, in turns.

use std::{sync::Arc, time::Instant};

use half::bf16;
use idefics_kernels::{Compute, Isa, Matrix, linear::linear, probe};
use serde::Serialize;

use crate::{
    config::IdeficsConfig,
    generate::{LogitsOf, Row},
    model::{ImageStates, Model, ModelError, SequenceCache, Stage},
    ops,
    processor::PixelValues,
};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Lengths of prompts, in tokens.
    pub prefill: Vec<usize>,
    /// Sequences that decode together.
    pub batches: Vec<usize>,
    /// Pictures of each sequence.
    pub images: Vec<usize>,
    /// Rounds, of which the medians are taken.
    pub rounds: usize,
    /// Tokens that each decode measurement takes.
    pub steps: usize,
    /// Tokens of the prompt behind which decoding starts.
    pub context: usize,
    /// Whole answers: tokens of the prompt, which looks at one picture, and new tokens.
    pub answers: Vec<[usize; 2]>,
    /// Products in bf16 by themselves: rows of activations, rows of the weight, inner dimension.
    pub products: Vec<[usize; 3]>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            prefill: vec![32, 128, 512, 2048],
            batches: vec![1, 2, 4, 8, 16],
            images: vec![0, 1, 8],
            rounds: 3,
            steps: 4,
            context: 64,
            answers: vec![[64, 32]],
            products: vec![[512, 4096, 4096], [257, 1280, 5120]],
        }
    }
}

/// All figures of one run; the keys of its JSON are stable.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What the machine gave.
    pub machine: Machine,
    /// Tokens one at a time.
    pub decode: Vec<Decode>,
    /// Prompts.
    pub prefill: Vec<Prefill>,
    /// Whole answers.
    pub answers: Vec<Answer>,
    /// Single products in bf16.
    pub products: Vec<Product>,
    /// The vision tower.
    pub vision: Vision,
    /// The resampler, if the model has one.
    pub perceiver: Option<Perceiver>,
}

/// What the machine gave during the run, all threads together.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Streaming reads from memory.
    pub read_gb_per_s: f64,
    /// Products of bf16 in registers.
    pub bf16_gflops: f64,
    /// Products of bytes in registers, where the processor has an instruction for them.
    pub int8_gops: Option<f64>,
    /// Threads.
    pub threads: usize,
    /// The kernels' instruction tier.
    pub isa: &'static str,
}

/// Decoding at one batch size and number of pictures.
#[derive(Debug, Clone, Serialize)]
pub struct Decode {
    /// Sequences together.
    pub batch: usize,
    /// Pictures of each.
    pub images: usize,
    /// Tokens a second, all sequences together.
    pub tokens_per_s: f64,
    /// Bytes of weights read a second.
    pub weight_gb_per_s: f64,
    /// That over what the machine read in the same rounds.
    pub share: f64,
}

/// One length of prompt.
#[derive(Debug, Clone, Serialize)]
pub struct Prefill {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Arithmetic of the linear layers.
    pub gflops: f64,
    /// That over the bf16 arithmetic that the machine gave in the same rounds.
    pub share: f64,
}

/// A whole answer: a picture through the tower, a prompt, then tokens one at a time.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub new_tokens: usize,
    /// Seconds for all of it.
    pub seconds: f64,
}

/// `x [M, K] · W [N, K]ᵀ` in bf16.
#[derive(Debug, Clone, Serialize)]
pub struct Product {
    /// Rows of activations.
    pub m: usize,
    /// Rows of the weight.
    pub n: usize,
    /// Inner dimension.
    pub k: usize,
    /// Arithmetic.
    pub gflops: f64,
    /// That over the bf16 arithmetic that the machine gave in the same rounds.
    pub share: f64,
}

/// The vision tower on one picture.
#[derive(Debug, Clone, Serialize)]
pub struct Vision {
    /// Seconds for a picture.
    pub seconds_per_image: f64,
    /// Arithmetic of linear layers and attention.
    pub gflops: f64,
    /// That over the bf16 arithmetic that the machine gave in the same rounds.
    pub share: f64,
}

/// The resampler on one picture.
#[derive(Debug, Clone, Serialize)]
pub struct Perceiver {
    /// Seconds for a picture.
    pub seconds_per_image: f64,
}

/// One measured quantity: a sample for each round.
#[derive(Default, Clone)]
struct Samples(Vec<f64>);

impl Samples {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// Runs the plan. `progress` is told what comes next.
pub fn run(model: &Model, plan: &Plan, progress: &mut dyn FnMut(&str)) -> Result<Report, ModelError> {
    let isa = model.context().isa;
    let pictures = pictures(model.config(), plan.images.iter().copied().max().unwrap_or(0).max(1));
    progress("pictures");
    let states = model.encode_images(&pictures.iter().collect::<Vec<_>>())?;
    let caches = plan
        .images
        .iter()
        .map(|images| prefilled(model, &states[..*images], plan.context))
        .collect::<Result<Vec<_>, _>>()?;

    let buffer = vec![1u8; 1 << 30];
    let (mut read, mut bf16, mut int8) = (Samples::default(), Samples::default(), Samples::default());
    let (mut vision, mut perceiver) = (Samples::default(), Samples::default());
    let mut products = vec![Samples::default(); plan.products.len()];
    let mut prefill = vec![Samples::default(); plan.prefill.len()];
    let mut decode = vec![Samples::default(); plan.batches.len() * plan.images.len()];
    let mut answers = vec![Samples::default(); plan.answers.len()];
    for round in 1..=plan.rounds {
        let mut at = |what: &str| progress(&format!("round {round} of {}: {what}", plan.rounds));
        at("arithmetic of the machine");
        bf16.0.push(probe::bf16_peak(isa));
        int8.0.extend(probe::int8_peak());
        for (samples, [m, n, k]) in products.iter_mut().zip(&plan.products) {
            at(&format!("a product of {m} x {n} x {k}"));
            samples.0.push(time_product(isa, *m, *n, *k));
        }
        at("vision");
        let (tower, resampler) = time_image(model, &pictures[0])?;
        vision.0.push(tower);
        perceiver.0.extend(resampler);
        for (samples, batch) in decode.chunks_mut(plan.images.len()).zip(&plan.batches) {
            // Reads are timed next to what they are compared with.
            read.0.push(probe::read_bandwidth(isa, &buffer));
            for (samples, cache) in samples.iter_mut().zip(&caches) {
                at(&format!("decode of {batch} with {} images", cache.images().len()));
                samples.0.push(time_decode(model, cache, *batch, plan.steps)?);
            }
        }
        for (samples, tokens) in prefill.iter_mut().zip(&plan.prefill) {
            at(&format!("prompt of {tokens} tokens"));
            let start = Instant::now();
            prefilled(model, &states[..1], *tokens)?;
            samples.0.push(start.elapsed().as_secs_f64());
        }
        for (samples, [prompt, new]) in answers.iter_mut().zip(&plan.answers) {
            at(&format!("an answer of {new} tokens"));
            samples.0.push(time_answer(model, &pictures[0], *prompt, *new)?);
        }
    }

    let (read, bf16) = (read.median(), bf16.median());
    let parameters = model.prompt_parameters() as f64;
    let decode = decode.iter().enumerate().map(|(index, samples)| {
        let (batch, images) =
            (plan.batches[index / plan.images.len()], plan.images[index % plan.images.len()]);
        let steps_per_s = 1.0 / samples.median();
        let bytes = model.step_weight_bytes(images > 0) as f64;
        Decode {
            batch,
            images,
            tokens_per_s: batch as f64 * steps_per_s,
            weight_gb_per_s: bytes * steps_per_s * 1e-9,
            share: bytes * steps_per_s / read,
        }
    });
    let prefill = prefill.iter().zip(&plan.prefill).map(|(samples, tokens)| {
        let tokens_per_s = *tokens as f64 / samples.median();
        let flops = 2.0 * parameters * tokens_per_s;
        Prefill { tokens: *tokens, tokens_per_s, gflops: flops * 1e-9, share: flops / bf16 }
    });
    let products = products.iter().zip(&plan.products).map(|(samples, &[m, n, k])| {
        let flops = (2 * m * n * k) as f64 / samples.median();
        Product { m, n, k, gflops: flops * 1e-9, share: flops / bf16 }
    });
    let vision_flops = vision_flops(model.config()) / vision.median();
    Ok(Report {
        decode: decode.collect(),
        prefill: prefill.collect(),
        answers: answers
            .iter()
            .zip(&plan.answers)
            .map(|(samples, &[prompt_tokens, new_tokens])| Answer {
                prompt_tokens,
                new_tokens,
                seconds: samples.median(),
            })
            .collect(),
        products: products.collect(),
        vision: Vision {
            seconds_per_image: vision.median(),
            gflops: vision_flops * 1e-9,
            share: vision_flops / bf16,
        },
        perceiver: (!perceiver.0.is_empty()).then(|| Perceiver { seconds_per_image: perceiver.median() }),
        machine: Machine {
            read_gb_per_s: read * 1e-9,
            bf16_gflops: bf16 * 1e-9,
            int8_gops: (!int8.0.is_empty()).then(|| int8.median() * 1e-9),
            threads: rayon::current_num_threads(),
            isa: Isa::tier(isa).name(),
        },
    })
}

pub(super) fn pictures(config: &IdeficsConfig, n: usize) -> Vec<PixelValues> {
    let side = config.vision_config.image_size;
    let picture = |index: usize| {
        let data = (0..3 * side * side).map(|i| ((i * 31 + index * 17) % 255) as f32 / 127.0 - 1.0).collect();
        PixelValues::new(data, side, side)
    };
    (0..n).map(picture).collect()
}

/// A cache behind a prompt of `tokens` tokens that look at all of `images` in turn, the last one at the last.
fn prefilled(model: &Model, images: &[Arc<ImageStates>], tokens: usize) -> Result<SequenceCache, ModelError> {
    let mut cache = model.new_cache(images.to_vec());
    let token_ids: Vec<u32> = (0..tokens).map(|i| (i * 37 % model.config().vocab_size) as u32).collect();
    let image_index: Vec<_> =
        (0..tokens).map(|i| (!images.is_empty()).then(|| (i * images.len() / tokens) as u32)).collect();
    let row = Row {
        cache: &mut cache,
        token_ids: &token_ids,
        image_index: &image_index,
        logits: LogitsOf::Nothing,
    };
    // As `step` does, of which this is the part without logits.
    ops::in_pool(|| model.forward(&mut [row]).map(drop))?;
    Ok(cache)
}

/// Seconds of the tower and of the resampler for one picture.
fn time_image(model: &Model, picture: &PixelValues) -> Result<(f64, Option<f64>), ModelError> {
    // Where `encode_images` does it.
    ops::in_pool(|| {
        let start = Instant::now();
        let (mut tower, mut resampler) = (0.0, None);
        model.encode_images_observed(&[picture], &mut |stage, _| match stage {
            Stage::VisionLayer(_) => tower = start.elapsed().as_secs_f64(),
            Stage::PerceiverBlock(_) => resampler = Some(start.elapsed().as_secs_f64() - tower),
            _ => {}
        })?;
        Ok((tower, resampler))
    })
}

/// Seconds from a picture and a prompt to the last of `new` tokens.
fn time_answer(model: &Model, picture: &PixelValues, prompt: usize, new: usize) -> Result<f64, ModelError> {
    use crate::generate::StepModel;
    let start = Instant::now();
    let states = model.encode_images(&[picture])?;
    let mut cache = prefilled(model, &states, prompt.saturating_sub(1))?;
    // The last token of the prompt gives the first of the answer.
    for id in 0..new {
        let ids = [id as u32];
        let row = Row { cache: &mut cache, token_ids: &ids, image_index: &[Some(0)], logits: LogitsOf::Last };
        model.step(&mut [row])?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds of one decode step of `batch` sequences, the mean of `steps`, logits included.
fn time_decode(model: &Model, cache: &SequenceCache, batch: usize, steps: usize) -> Result<f64, ModelError> {
    use crate::generate::StepModel;
    let mut caches = vec![cache.clone(); batch];
    let image_index = [cache.images().len().checked_sub(1).map(|last| last as u32)];
    let mut step = |id: u32| {
        let ids = [id];
        let mut rows: Vec<_> = caches
            .iter_mut()
            .map(|cache| Row { cache, token_ids: &ids, image_index: &image_index, logits: LogitsOf::Last })
            .collect();
        model.step(&mut rows).map(drop)
    };
    step(1)?; // warms up
    let start = Instant::now();
    for id in 0..steps {
        step(id as u32)?;
    }
    Ok(start.elapsed().as_secs_f64() / steps as f64)
}

/// Seconds of one product in bf16, weights and activations included as they come: the median of five.
fn time_product(isa: Isa, m: usize, n: usize, k: usize) -> f64 {
    let (x, weight) = (vec![0.5f32; m * k], vec![bf16::ONE; n * k]);
    let mut out = vec![0.0; m * n];
    let mut samples = Samples::default();
    for _ in 0..5 {
        let start = Instant::now();
        linear(isa, Compute::Bf16, &x, Matrix::Bf16(&weight), k, None, &mut out);
        samples.0.push(start.elapsed().as_secs_f64());
    }
    samples.median()
}

/// Multiplications and additions of the tower for one picture.
fn vision_flops(config: &IdeficsConfig) -> f64 {
    let vision = &config.vision_config;
    let [tokens, width, inner] =
        [vision.num_positions(), vision.embed_dim, vision.intermediate_size].map(|n| n as f64);
    let linear = tokens * (4.0 * width * width + 2.0 * width * inner);
    let attention = 2.0 * tokens * tokens * width;
    let patches = tokens * width * (vision.num_channels * vision.patch_size.pow(2)) as f64;
    2.0 * (vision.num_hidden_layers as f64 * (linear + attention) + patches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        bench::{Format, RandomWeights, shape},
        config::{PerceiverConfig, VisionConfig},
        ops::Context,
    };

    #[test]
    fn a_small_model_gives_a_full_report_in_every_format() {
        let vision_config = VisionConfig {
            embed_dim: 64,
            image_size: 28,
            intermediate_size: 64,
            num_hidden_layers: 1,
            ..Default::default()
        };
        let perceiver_config = PerceiverConfig { resampler_depth: 1, ..Default::default() };
        let config = IdeficsConfig {
            vocab_size: 50,
            hidden_size: 128,
            intermediate_size: 192,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            use_resampler: true,
            vision_config,
            perceiver_config,
            ..IdeficsConfig::default()
        };
        let plan = Plan {
            prefill: vec![8],
            batches: vec![1, 3],
            images: vec![0, 2],
            rounds: 1,
            steps: 1,
            context: 4,
            answers: vec![[6, 3]],
            products: vec![[3, 5, 7]],
        };
        for format in [Format::F32, Format::Bf16, Format::Q8, Format::Nf4] {
            let ctx = Context { isa: Isa::best(), compute: Compute::Bf16 };
            let model =
                Model::new(config.clone(), &RandomWeights::new(&config, format), ctx).expect("a model");
            let report = run(&model, &plan, &mut |_| ()).expect("a report");
            assert_eq!((report.decode.len(), report.prefill.len()), (4, 1));
            assert_eq!((report.answers[0].prompt_tokens, report.answers[0].new_tokens), (6, 3));
            assert!(report.answers[0].seconds > 0.0);
            assert_eq!((report.decode[3].batch, report.decode[3].images), (3, 2));
            for decode in &report.decode {
                assert!(decode.tokens_per_s > 0.0 && decode.share.is_finite(), "{decode:?}");
            }
            assert!(report.vision.seconds_per_image > 0.0 && report.perceiver.is_some());
        }
    }

    #[test]
    fn the_real_tower_takes_the_published_work() {
        // 335 GFLOP: ViT-H/14 on 224 x 224 pixels.
        let flops = vision_flops(&shape("9b").expect("a published size"));
        assert!((flops / 335e9 - 1.0).abs() < 0.02, "{flops}");
    }
}
