//! Adapters that PEFT wrote, against what PEFT computes with them.

use std::{fs, sync::Arc};

use idefics_testing::{Tensors, assert_close, fixture, golden_fill, tolerance};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::{
    ComputeType, Idefics, LoadOptions, SequenceInputs,
    checkpoint::{Checkpoint, read_config},
    generate::{LogitsOf, Row, StepModel},
    processor::PixelValues,
    quantize::{Format, Quantizer, Recipe},
};

fn source(name: &str, weight: f32) -> AdapterSource {
    AdapterSource { directory: fixture(&format!("adapters/{name}")), weight }
}

fn expected() -> Tensors {
    Tensors::fixture("adapters/expected.safetensors")
}

/// Logits of the fixture's one sequence, `[T, V + A]`.
fn logits(base: &Path, adapters: Vec<AdapterSource>) -> Vec<f32> {
    let options = LoadOptions { compute: ComputeType::F32, adapters, ..LoadOptions::default() };
    let model = Idefics::from_pretrained(base, &options).unwrap_or_else(|error| panic!("{error}"));
    let expected = expected();
    let token_ids: Vec<u32> = expected.i64("input_ids").1.iter().map(|&id| id as u32).collect();
    let image_index: Vec<Option<u32>> =
        expected.i64("image_index").1.iter().map(|&index| u32::try_from(index).ok()).collect();
    let picture = Arc::new(PixelValues::new(golden_fill("pixel_values", &[1, 3, 32, 32]), 32, 32));
    let inputs = SequenceInputs {
        token_ids: token_ids.clone(),
        image_index: image_index.clone(),
        images: vec![picture],
    };
    let mut cache = model.start(&inputs).unwrap();
    let row =
        Row { cache: &mut cache, token_ids: &token_ids, image_index: &image_index, logits: LogitsOf::All };
    model.step(&mut [row]).unwrap().remove(0)
}

#[test]
fn logits_are_pefts() {
    let expected = expected();
    for (case, adapters) in [
        ("base", vec![]),
        ("regex", vec![source("regex", 1.0)]),
        ("list", vec![source("list", 1.0)]),
        ("saved", vec![source("saved", 1.0)]),
        ("both", vec![source("regex", 1.0), source("list", 1.0)]),
        ("weighted", vec![source("regex", 0.5), source("list", -1.25)]),
        ("base", vec![source("regex", 0.0)]),
    ] {
        let (_, reference) = expected.f32(&format!("{case}.logits"));
        assert_close(case, &logits(&fixture("tiny"), adapters), reference, tolerance::LOGITS);
    }
}

fn merge(base: &Path, adapters: &[AdapterSource], dtype: Option<DType>) -> (TempDir, PathBuf, MergeSummary) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut merger = Merger::open(base, adapters).unwrap();
    if let Some(dtype) = dtype {
        merger = merger.with_dtype(dtype);
    }
    let mut done = 0;
    let summary = merger.write(&out, &mut |bytes| done += bytes).unwrap();
    assert_eq!((done, summary.bytes), (merger.output_bytes(), merger.output_bytes()));
    (dir, out, summary)
}

#[test]
fn merged_weights_are_pefts_and_all_others_stay() {
    let expected = expected();
    let (_dir, out, summary) = merge(&fixture("tiny"), &[source("regex", 1.0)], None);
    let (merged, base) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(fixture("tiny")).unwrap());
    let mut changed = 0;
    for (name, weight) in merged.weights.iter() {
        let key = format!("merged.{name}");
        if expected.names().any(|name| *name == *key) {
            changed += 1;
            // PEFT rounds the product of the factors, its scale and the sum, each to f32.
            assert_close(name, weight.as_f32().unwrap(), expected.f32(&key).1, tolerance::BLOCK);
        } else {
            assert_eq!(weight.bytes(), base.weights.get(name).unwrap().bytes(), "{name}");
        }
    }
    assert_eq!((summary.merged, summary.replaced, summary.unpacked), (changed, 0, 0));
    let (_, reference) = expected.f32("regex.logits");
    assert_close("logits", &logits(&out, vec![]), reference, tolerance::LOGITS);
}

#[test]
fn several_adapters_and_whole_modules_merge() {
    let expected = expected();
    for (case, adapters, replaced) in [
        ("weighted", vec![source("regex", 0.5), source("list", -1.25)], 0),
        ("saved", vec![source("saved", 1.0)], 1),
    ] {
        let (_dir, out, summary) = merge(&fixture("tiny"), &adapters, None);
        assert_eq!(summary.replaced, replaced, "{case}");
        let (_, reference) = expected.f32(&format!("{case}.logits"));
        assert_close(case, &logits(&out, vec![]), reference, tolerance::LOGITS);
    }
}

#[test]
fn rounding_happens_once() {
    let (_a, exact, _) = merge(&fixture("tiny"), &[source("regex", 1.0)], None);
    let (_b, rounded, _) = merge(&fixture("tiny"), &[source("regex", 1.0)], Some(DType::Bf16));
    let [exact, rounded] = [exact, rounded].map(|out| Checkpoint::open(out).unwrap());
    assert_eq!(rounded.config.declared_dtype(), Some(DType::Bf16));
    for (name, weight) in exact.weights.iter() {
        assert_eq!(
            rounded.weights.get(name).unwrap().bytes(),
            weight.to_dtype(DType::Bf16).bytes(),
            "{name}"
        );
    }
}

/// Beside packed weights, and merged into them once they are unpacked, factors add the same.
#[test]
fn a_packed_base_takes_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("nf4");
    let quantizer = Quantizer::open(fixture("tiny"), &Recipe::new(Format::Nf4)).unwrap();
    quantizer.write(&packed, &mut |_| ()).unwrap();
    let beside = logits(&packed, vec![source("regex", 1.0)]);
    assert!(beside != logits(&packed, vec![]));
    let (_dir, out, summary) = merge(&packed, &[source("regex", 1.0)], Some(DType::F32));
    assert!(summary.unpacked > 0);
    let merged = Checkpoint::open(&out).unwrap();
    assert!(merged.config.quantization_config.is_none() && merged.weights.iter_packed().next().is_none());
    assert_close("merged", &logits(&out, vec![]), &beside, tolerance::LOGITS);
}

/// A copy of an adapter with its configuration and the names of its tensors changed.
fn changed(name: &str, change: impl FnOnce(&mut Value), rename: impl Fn(&str) -> Option<String>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture(&format!("adapters/{name}"));
    let mut config: Value = serde_json::from_slice(&fs::read(from.join(CONFIG_FILE)).unwrap()).unwrap();
    change(&mut config);
    fs::write(dir.path().join(CONFIG_FILE), config.to_string()).unwrap();
    let bytes = fs::read(from.join(WEIGHTS_FILE)).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let renamed = tensors.iter().filter_map(|(name, view)| Some((rename(name)?, view)));
    safetensors::serialize_to_file(renamed, None, &dir.path().join(WEIGHTS_FILE)).unwrap();
    dir
}

#[test]
fn adapters_that_compute_something_else_are_refused() {
    let model = read_config(fixture("tiny")).unwrap();
    let check = |dir: &TempDir, expected: &str| {
        let error = Adapter::open(dir.path(), &model).expect_err(expected);
        let mut text = error.to_string();
        if let Some(cause) = std::error::Error::source(&error) {
            text = format!("{text}: {cause}");
        }
        assert!(text.contains(expected), "{text}");
    };
    let keep = |name: &str| Some(name.to_owned());
    let field = |field: &str, value: Value| changed("regex", |config| config[field] = value, keep);
    check(&field("peft_type", json!("LOHA")), r#"`peft_type` is "LOHA""#);
    check(&field("use_dora", json!(true)), "`use_dora` is true");
    check(&field("fan_in_fan_out", json!(true)), "`fan_in_fan_out` is true");
    check(&field("layer_replication", json!([[0, 2], [1, 4]])), "`layer_replication`");
    check(&field("r", json!(0)), "`r` is 0, expected 1 or more");
    check(&field("r", json!("four")), "not a usable adapter configuration");
    check(&field("rank_pattern", json!({"(": 3})), "`(` is not a regular expression");
    check(&field("alpha_pattern", json!({"v_proj": "x"})), "`alpha_pattern.v_proj` is \"x\"");

    let renamed = |rename: &dyn Fn(&str) -> Option<String>| changed("regex", |_| (), rename);
    check(&renamed(&|name| (!name.contains("lora_A")).then(|| name.to_owned())), "but no `lora_A`");
    check(&renamed(&|name| Some(name.replace("layers.3", "layers.9"))), "belongs to no linear layer");
    check(&renamed(&|name| Some(name.replace("lora_A", "lora_embedding_A"))), "a factor of an embedding");
    check(&renamed(&|name| Some(name.replace("down_proj", "up_proj"))), "expected [r, 32]");
    check(&renamed(&|_| None), "holds no tensor of an adapter");

    let error = Adapters::open(&[source("saved", 0.5)], &model).unwrap_err();
    assert!(error.to_string().contains("expected weight 1, got 0.5"), "{error}");
    let error = Adapters::open(&[source("saved", 1.0), source("saved", 1.0)], &model).unwrap_err();
    assert!(error.to_string().contains("both `"), "{error}");
    let error = Adapters::open(&[source("list", f32::NAN)], &model).unwrap_err();
    assert!(error.to_string().contains("finite weight"), "{error}");
}

#[test]
fn other_spellings_of_the_same_adapter_load() {
    let model = read_config(fixture("tiny")).unwrap();
    let plain = Adapter::open(fixture("adapters/saved"), &model).unwrap();
    let rename = |name: &str| {
        let name = name.replace("lora_A.weight", "lora_A.default.weight");
        Some(name.replace("model.norm.weight", "model.norm.modules_to_save.default.weight"))
    };
    let other = Adapter::open(changed("saved", |_| (), rename).path(), &model).unwrap();
    assert!(plain.factors.keys().eq(other.factors.keys()));
    assert!(plain.replaced.keys().eq(other.replaced.keys()) && plain.replaced.len() == 1);
    assert_eq!(plain.num_parameters(), other.num_parameters());
}

#[test]
fn a_tied_head_has_nothing_to_replace() {
    let own = read_config(fixture("tiny")).unwrap();
    let tied = IdeficsConfig { tie_word_embeddings: true, ..own.clone() };
    let dir = changed("saved", |_| (), |name| Some(name.replace("model.norm", "lm_head")));
    // The stand-in for a head is too short, which shows that it was taken for one.
    let error = Adapter::open(dir.path(), &own).unwrap_err();
    assert!(matches!(error, AdapterError::Shape { .. }), "{error}");
    let error = Adapter::open(dir.path(), &tied).unwrap_err();
    assert!(matches!(error, AdapterError::UnknownTensor { .. }), "{error}");
}

#[test]
fn a_pickled_adapter_is_named() {
    let model = read_config(fixture("tiny")).unwrap();
    let dir = changed("list", |_| (), |name| Some(name.to_owned()));
    fs::rename(dir.path().join(WEIGHTS_FILE), dir.path().join("adapter_model.bin")).unwrap();
    let error = Adapter::open(dir.path(), &model).unwrap_err();
    assert!(matches!(error, AdapterError::Pickle { .. }), "{error}");
}
