//! New LoRA adapters: which layers get factors, how these start, and the directory that PEFT reads.
//!
//! Reference: PEFT `tuners/lora/layer.py`, `reset_lora_parameters`: `A` uniform within `1 / √K` (`kaiming_uniform_`
//! with `a = √5`), `B` zero, so that a new adapter changes nothing.

use std::path::{Path, PathBuf};

use idefics::{
    adapter::{AdapterError, CONFIG_FILE, Factors, LoraConfig, PREFIX, WEIGHTS_FILE},
    checkpoint::{CheckpointWriter, DType, Part, TensorSpec, Weight, WriteError, expected_tensors},
    config::IdeficsConfig,
};
use serde_json::{Value, json};

use crate::random::Stream;

/// Factors beside one linear layer, on their way through training.
#[derive(Debug, Clone)]
pub struct LoraLayer {
    /// The layer, without `.weight`.
    pub module: String,
    /// Factors and what scales them.
    pub factors: Factors,
}

/// Why an adapter could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoraError {
    /// A pattern of the configuration.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// No layer is meant.
    #[error("no linear layer of the model is meant by `target_modules`: {targets}")]
    NoTarget {
        /// The setting.
        targets: String,
    },
}

impl LoraLayer {
    /// The name of `A` in the adapter's file.
    pub fn a_name(&self) -> String {
        format!("{PREFIX}{}.lora_A.weight", self.module)
    }

    /// The name of `B` in the adapter's file.
    pub fn b_name(&self) -> String {
        format!("{PREFIX}{}.lora_B.weight", self.module)
    }
}

/// New factors for every linear layer that the configuration means, in the order of the model.
pub fn new_layers(model: &IdeficsConfig, lora: &LoraConfig, seed: u64) -> Result<Vec<LoraLayer>, LoraError> {
    let mut layers = Vec::new();
    for (name, shape) in expected_tensors(model) {
        let (Some(module), &[n, k]) = (name.strip_suffix(".weight"), shape.as_slice()) else { continue };
        if Part::of_linear(&name).is_none() || !lora.targets(module)? {
            continue;
        }
        let rank = lora.rank(module)?;
        let a = Stream::new(seed, &format!("{module}.lora_A")).uniform(rank * k, (k as f64).powf(-0.5));
        let factors = Factors {
            a: Weight::from_f32(a, [rank, k]),
            b: Weight::from_f32(vec![0.0; n * rank], [n, rank]),
            scale: lora.scale(module, rank)?,
        };
        layers.push(LoraLayer { module: module.to_owned(), factors });
    }
    if layers.is_empty() {
        let targets = serde_json::to_string(&lora.target_modules).unwrap_or_default();
        return Err(LoraError::NoTarget { targets });
    }
    Ok(layers)
}

/// Writes an adapter to `out`, a new or empty directory. `replaced` are modules that were trained whole, by the names
/// of their weights: all of a module's or none, as PEFT reads modules and no single weights. `base_model` is what PEFT
/// and a reader are told that the adapter is for.
pub fn write_adapter(
    out: &Path,
    lora: &LoraConfig,
    base_model: &str,
    layers: &[LoraLayer],
    replaced: &[(String, Weight)],
) -> Result<PathBuf, WriteError> {
    let writer = CheckpointWriter::create(out)?;
    write_adapter_files(&writer, lora, base_model, layers, replaced)?;
    writer.finish()
}

/// The same into a directory that something else goes into, too.
pub(crate) fn write_adapter_files(
    writer: &CheckpointWriter,
    lora: &LoraConfig,
    base_model: &str,
    layers: &[LoraLayer],
    replaced: &[(String, Weight)],
) -> Result<(), WriteError> {
    let mut tensors: Vec<(String, &Weight)> = Vec::new();
    for layer in layers {
        tensors.push((layer.a_name(), &layer.factors.a));
        tensors.push((layer.b_name(), &layer.factors.b));
    }
    tensors.extend(replaced.iter().map(|(name, weight)| (format!("{PREFIX}{name}"), weight)));
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, weight)| TensorSpec::new(name.as_str(), DType::F32, weight.shape()))
        .collect();

    let mut weights = tensors.iter().map(|(_, weight)| (*weight).clone());
    writer.write_file_of_weights(WEIGHTS_FILE, &specs, |spec| match weights.next() {
        Some(weight) => Ok::<_, WriteError>(weight),
        None => unreachable!("{}: there is a weight for each description", spec.name),
    })?;
    writer.write_json(CONFIG_FILE, &config_json(lora, base_model, replaced))
}

/// `adapter_config.json`, with the fields that PEFT cannot do without.
fn config_json(lora: &LoraConfig, base_model: &str, replaced: &[(String, Weight)]) -> Value {
    let Ok(mut value) = serde_json::to_value(lora) else {
        unreachable!("a configuration holds nothing that JSON has no form for")
    };
    if !replaced.is_empty() {
        let module = |(name, _): &(String, Weight)| {
            let module = name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module);
            module.to_owned()
        };
        let mut modules: Vec<String> = replaced.iter().map(module).collect();
        modules.sort();
        modules.dedup();
        value["modules_to_save"] = json!(modules);
    }
    for (field, constant) in [
        ("peft_type", json!("LORA")),
        ("task_type", Value::Null),
        ("base_model_name_or_path", json!(base_model)),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
    ] {
        value[field] = constant;
    }
    value
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use idefics::{
        adapter::{Adapter, Targets},
        checkpoint::{read_config, read_tensor_file},
    };
    use idefics_testing::fixture;

    use super::*;

    fn lora(targets: Targets) -> LoraConfig {
        LoraConfig {
            r: 4,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: Some(targets),
            exclude_modules: None,
            rank_pattern: serde_json::Map::new(),
            alpha_pattern: serde_json::Map::new(),
            use_rslora: false,
            modules_to_save: None,
        }
    }

    fn names(list: &[&str]) -> Targets {
        Targets::Names(list.iter().map(|&name| name.to_owned()).collect())
    }

    /// `lora-start` and `adapters/regex` are what PEFT makes of the same configurations.
    #[test]
    fn the_layers_are_those_that_peft_chooses() {
        let model = read_config(fixture("tiny")).unwrap();
        for directory in ["training/lora-start", "adapters/regex", "adapters/list"] {
            let pefts = Adapter::open(fixture(directory), &model).unwrap();
            let ours = new_layers(&model, &pefts.config, 0).unwrap();
            let ours: BTreeMap<_, _> =
                ours.into_iter().map(|layer| (layer.module.clone(), layer.factors)).collect();
            assert!(ours.keys().eq(pefts.factors.keys()), "{directory}");
            for (module, factors) in &pefts.factors {
                let ours = &ours[module];
                assert_eq!(ours.a.shape(), factors.a.shape(), "{module}");
                assert_eq!(ours.b.shape(), factors.b.shape(), "{module}");
                assert_eq!(ours.scale, factors.scale, "{module}");
            }
        }
    }

    #[test]
    fn new_factors_add_nothing_and_follow_from_the_seed() {
        let model = read_config(fixture("tiny")).unwrap();
        let lora = lora(names(&["q_proj", "down_proj"]));
        let [first, again, other] = [5, 5, 6].map(|seed| new_layers(&model, &lora, seed).unwrap());
        let a = |layers: &[LoraLayer]| -> Vec<Vec<f32>> {
            layers.iter().map(|layer| layer.factors.a.to_f32_vec()).collect()
        };
        assert!(a(&first) == a(&again) && a(&first) != a(&other));
        for layer in &first {
            assert!(layer.factors.b.to_f32_vec().iter().all(|value| *value == 0.0));
            let bound = (layer.factors.a.shape()[1] as f32).powf(-0.5);
            let values = layer.factors.a.to_f32_vec();
            let largest = values.iter().fold(0f32, |most, value| most.max(value.abs()));
            assert!(largest <= bound && largest > 0.8 * bound, "{}: {largest} of {bound}", layer.module);
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let model = read_config(fixture("tiny")).unwrap();
        let lora = lora(names(&["v_proj"]));
        let layers = new_layers(&model, &lora, 1).unwrap();
        let norm = Weight::from_f32((0..32).map(|n| n as f32).collect(), [32]);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("adapter");
        let replaced = [("model.norm.weight".to_owned(), norm.clone())];
        write_adapter(&out, &lora, "tiny", &layers, &replaced).unwrap();
        let adapter = Adapter::open(&out, &model).unwrap();
        assert_eq!(adapter.config.modules_to_save, Some(vec!["model.norm".to_owned()]));
        assert_eq!(adapter.replaced["model.norm.weight"].bytes(), norm.bytes());
        assert_eq!(adapter.factors.len(), layers.len());
        for layer in &layers {
            let read = &adapter.factors[&layer.module];
            assert_eq!(read.a.bytes(), layer.factors.a.bytes());
            assert_eq!(read.scale, 2.0);
        }
        let weights = read_tensor_file(&out.join(WEIGHTS_FILE)).unwrap();
        assert_eq!(weights.len(), 2 * layers.len() + 1);
    }

    #[test]
    fn a_pattern_that_means_nothing_is_refused() {
        let model = read_config(fixture("tiny")).unwrap();
        let error = new_layers(&model, &lora(names(&["lm_head"])), 0).unwrap_err();
        assert!(error.to_string().contains(r#"["lm_head"]"#), "{error}");
    }
}
