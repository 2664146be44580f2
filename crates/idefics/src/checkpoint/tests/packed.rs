//! Packed weights: what bitsandbytes and `idefics quantize` write, and each way to spoil it.

use idefics_testing::fixture;
use serde_json::json;

use super::*;
use crate::quantize::{Format, Quantizer, Recipe};

const NAME: &str = "model.layers.0.mlp.up_proj.weight";

/// What is spoilt, how, and what the message says.
type Row = (&'static str, fn(&mut Model), &'static str);

impl Model {
    /// The tensors and the configuration of a directory with one weight file.
    fn of(directory: &Path) -> Self {
        let bytes = fs::read(directory.join(WEIGHTS_FILE)).unwrap();
        let config = fs::read_to_string(directory.join("config.json")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let store = |(name, view): (&str, TensorView<'_>)| Stored {
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        };
        Self { config: serde_json::from_str(&config).unwrap(), tensors: tensors.iter().map(store).collect() }
    }

    fn tensor(&mut self, part: &str) -> &mut Stored {
        let name = format!("{NAME}{part}");
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// Rewrites the state beside the weight.
    fn edit_state(&mut self, edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
        let tensor = self.tensor(".quant_state.bitsandbytes__nf4");
        let mut state = serde_json::from_slice(&tensor.bytes).unwrap();
        edit(&mut state);
        tensor.bytes = serde_json::Value::Object(state).to_string().into_bytes();
        tensor.shape = vec![tensor.bytes.len()];
    }
}

/// The message after the checkpoint of `format` was spoilt.
#[track_caller]
fn check_packed(format: Format, spoil: impl FnOnce(&mut Model), expected: &str) {
    let model = match format {
        Format::Nf4 => fixture("tiny-nf4-plain"),
        Format::Nf4DoubleQuant => fixture("tiny-nf4"),
        Format::Q8 => {
            let out = tempfile::tempdir().unwrap();
            let quantizer = Quantizer::open(fixture("tiny"), &Recipe::new(Format::Q8)).unwrap();
            quantizer.write(out.path(), &mut |_| ()).unwrap();
            out.keep()
        }
    };
    let mut model = Model::of(&model);
    spoil(&mut model);
    check(&model.write(), expected);
}

#[test]
fn directories_of_bitsandbytes_open() {
    for (name, format) in [("tiny-nf4", "nf4+dq"), ("tiny-nf4-plain", "nf4")] {
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        assert_eq!(checkpoint.weights.len(), expected_tensors(&checkpoint.config).len());
        for (name, weight) in checkpoint.weights.iter_packed() {
            assert!(Part::of_linear(name).is_some(), "{name}");
            assert_eq!(weight.format_name(), format);
            assert!(weight.count_non_finite().is_none());
        }
        // 2 layers and 1 gated block of 7, 1 tower layer and 1 resampler block of 6.
        assert_eq!(checkpoint.weights.iter_packed().count(), 3 * 7 + 2 * 6);
        let weight = checkpoint.weights.get_packed(NAME).unwrap();
        assert_eq!(weight.shape(), [128, 64]);
        let scales = if format == "nf4" { 128 * 4 } else { 128 + 4 + 1024 };
        assert_eq!(weight.num_bytes(), 128 * 64 / 2 + scales);
    }
}

/// A weight of a linear layer may stay dense in a quantized directory, as `llm_int8_skip_modules` does it.
#[test]
fn some_layers_may_be_dense() {
    let mut model = Model::of(&fixture("tiny-nf4-plain"));
    model.remove(NAME);
    model.add(NAME, Dtype::BF16, &[128, 64]);
    let checkpoint = Checkpoint::open(model.write().path()).unwrap();
    assert!(checkpoint.weights.get(NAME).is_some() && checkpoint.weights.get_packed(NAME).is_none());
}

#[test]
fn parts_of_nf4_weights_must_fit() {
    let rows: &[Row] = &[
        ("absmax gone", |m| m.remove(&format!("{NAME}.absmax")), "`absmax` is missing"),
        ("map gone", |m| m.remove(&format!("{NAME}.quant_map")), "`quant_map` is missing"),
        (
            "state gone",
            |m| m.remove(&format!("{NAME}.quant_state")),
            "`quant_state.bitsandbytes__nf4` is missing",
        ),
        (
            "codes gone",
            |m| m.tensors.retain(|tensor| tensor.name != NAME),
            "`model.layers.0.mlp.up_proj.weight`: `weight` is missing",
        ),
        (
            "codes of another type",
            |m| m.tensor("").dtype = Dtype::I8,
            "`weight` has element type I8, expected U8",
        ),
        (
            "dense codes",
            |m| {
                *m.tensor("") =
                    Stored { name: NAME.to_owned(), dtype: Dtype::F32, shape: vec![1, 1], bytes: vec![0; 4] };
            },
            "`weight` has element type F32, expected U8",
        ),
        (
            "codes of another shape",
            |m| m.tensor("").shape = vec![128, 32],
            "`weight` has shape [128, 32], expected [4096, 1]",
        ),
        (
            "too few codes",
            |m| {
                let tensor = m.tensor("");
                tensor.bytes.truncate(4000);
                tensor.shape = vec![4000, 1];
            },
            "`weight` has shape [4000, 1], expected [4096, 1]",
        ),
        (
            "too few scales",
            |m| {
                let tensor = m.tensor(".absmax");
                tensor.bytes.truncate(4 * 127);
                tensor.shape = vec![127];
            },
            "`absmax` has shape [127], expected [128]",
        ),
        (
            "scales of another type",
            |m| m.tensor(".absmax").dtype = Dtype::I32,
            "`absmax` has element type I32, expected F32",
        ),
        (
            "another map",
            |m| m.tensor(".quant_map").bytes[..4].copy_from_slice(&(-1.5f32).to_le_bytes()),
            "`quant_map` holds other values than the format's",
        ),
    ];
    for &(what, spoil, expected) in rows {
        eprintln!("{what}");
        check_packed(Format::Nf4, spoil, expected);
        check_packed(Format::Nf4, spoil, "1 packed unsoundly: ");
    }
}

#[test]
fn parts_of_double_quantization_must_fit() {
    let rows: &[Row] = &[
        ("nested absmax gone", |m| m.remove(&format!("{NAME}.nested_absmax")), "`nested_absmax` is missing"),
        (
            "nested map gone",
            |m| m.remove(&format!("{NAME}.nested_quant_map")),
            "`nested_quant_map` is missing",
        ),
        (
            "plain scales",
            |m| {
                let tensor = m.tensor(".absmax");
                (tensor.dtype, tensor.bytes) = (Dtype::F32, vec![0; 512]);
            },
            "`absmax` has element type F32, expected U8",
        ),
        (
            "too many groups",
            |m| {
                let tensor = m.tensor(".nested_absmax");
                (tensor.shape, tensor.bytes) = (vec![2], vec![0; 8]);
            },
            "`nested_absmax` has shape [2], expected [1]",
        ),
        (
            "a map with NaN",
            |m| m.tensor(".nested_quant_map").bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes()),
            "`nested_quant_map` holds other values",
        ),
        (
            "no offset",
            |m| {
                m.edit_state(|state| {
                    state.shift_remove("nested_offset");
                    state.shift_remove("nested_blocksize");
                });
            },
            "no `nested_offset`, but there is `nested_absmax`",
        ),
    ];
    for &(what, spoil, expected) in rows {
        eprintln!("{what}");
        check_packed(Format::Nf4DoubleQuant, spoil, expected);
    }
}

#[test]
fn states_must_be_understood() {
    let rows = [
        ("quant_type", json!("fp4"), "`quant_type` is fp4, expected nf4"),
        ("blocksize", json!(128), "`blocksize` is 128, expected 64"),
        ("blocksize", json!(-64), "quantization state cannot be read: invalid value: integer `-64`"),
        ("dtype", json!("int8"), "`dtype` is int8, expected float32"),
        ("shape", json!([64, 128]), "`model.layers.0.mlp.up_proj.weight`: expected [128, 64], got [64, 128]"),
        ("shape", json!([8192]), "`shape` is [8192], expected [N, K]"),
        ("shape", json!([3, 5]), "`shape` is [3, 5], expected [N, K] of an even number"),
        ("shape", json!([u64::MAX, 2]), "`shape` is [18446744073709551615, 2], expected [N, K]"),
        ("shape", json!([256, 64]), "`weight` has shape [4096, 1], expected [8192, 1]"),
        ("shape", json!("wide"), "quantization state cannot be read: invalid type: string"),
        ("nested_blocksize", json!(512), "`nested_blocksize` is 512, expected 256"),
        ("nested_offset", json!(1e300), "`nested_offset` is"),
        ("nested_offset", json!(null), "`nested_offset` is missing, expected a number"),
        ("nested_dtype", json!("bfloat16"), "`nested_dtype` is bfloat16, expected float32"),
    ];
    for (field, value, expected) in rows {
        eprintln!("{field} {value}");
        let edit = |model: &mut Model| model.edit_state(|state| drop(state.insert(field.to_owned(), value)));
        check_packed(Format::Nf4DoubleQuant, edit, expected);
    }
    for (text, expected) in [
        ("", "cannot be read: EOF"),
        ("{\"quant_type\": \"nf4\"}", "missing field `blocksize`"),
        ("\u{1b}[2J", "cannot be read: expected value"),
    ] {
        let edit = |model: &mut Model| {
            let tensor = model.tensor(".quant_state.bitsandbytes__nf4");
            (tensor.bytes, tensor.shape) = (text.as_bytes().to_vec(), vec![text.len()]);
        };
        check_packed(Format::Nf4, edit, expected);
    }
    let not_utf8 = |model: &mut Model| model.tensor(".quant_state.bitsandbytes__nf4").bytes[1] = 0xff;
    check_packed(Format::Nf4, not_utf8, "quantization state cannot be read");
}

#[test]
fn parts_of_q8_weights_must_fit() {
    let rows: &[Row] = &[
        ("scales gone", |m| m.remove(&format!("{NAME}.scales")), "has element type I8, expected F32"),
        ("codes gone", |m| m.tensors.retain(|tensor| tensor.name != NAME), "`weight` is missing"),
        (
            "codes of another type",
            |m| m.tensor("").dtype = Dtype::U8,
            "`weight` has element type U8, expected I8",
        ),
        (
            "codes of another shape",
            |m| m.tensor("").shape = vec![48 * 32],
            "`shape` is [1536], expected [N, K]",
        ),
        (
            "turned codes",
            |m| {
                m.tensor("").shape = vec![32, 48];
                let scales = m.tensor(".scales");
                (scales.shape, scales.bytes) = (vec![32, 1], vec![0; 128]);
            },
            "expected [48, 32], got [32, 48]",
        ),
        (
            "too few scales",
            |m| {
                let scales = m.tensor(".scales");
                (scales.shape, scales.bytes) = (vec![47, 1], vec![0; 188]);
            },
            "`scales` has shape [47, 1], expected [48, 1]",
        ),
    ];
    for &(what, spoil, expected) in rows {
        eprintln!("{what}");
        check_packed(Format::Q8, spoil, expected);
    }
}

#[test]
fn all_problems_are_listed_at_once() {
    let spoil = |model: &mut Model| {
        model.remove("model.layers.1.self_attn.q_proj.weight.absmax");
        model.remove("model.layers.0.self_attn.q_proj.weight.absmax");
        model.remove("model.norm.weight");
        let tensors = ["lm_head.weight", "lm_head.weight.absmax", "lm_head.weight.quant_map"];
        model.tensors.retain(|tensor| tensor.name != tensors[0]);
        model.add(tensors[0], Dtype::U8, &[90 * 64 / 2, 1]);
        model.add(tensors[1], Dtype::F32, &[90]);
        let map = model.tensor(".quant_map").bytes.clone();
        model.add(tensors[2], Dtype::F32, &[16]);
        model.tensors.last_mut().unwrap().bytes = map;
        let state = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [90, 64]}"#;
        model.add("lm_head.weight.quant_state.bitsandbytes__nf4", Dtype::U8, &[state.len()]);
        model.tensors.last_mut().unwrap().bytes = state.as_bytes().to_vec();
    };
    check_packed(
        Format::Nf4,
        spoil,
        "1 missing: `model.norm.weight`; 1 packed, though no linear layer reads them: `lm_head.weight`; \
         2 packed unsoundly: `model.layers.{0-1}.self_attn.q_proj.weight`: `absmax` is missing",
    );
}

#[test]
fn other_quantizations_are_refused_by_name() {
    let nf4 = || Model::of(&fixture("tiny-nf4"));
    let with = |edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let mut model = nf4();
        edit(model.config["quantization_config"].as_object_mut().unwrap());
        model.write()
    };
    check(
        &with(&|c| drop(c.insert("load_in_8bit".into(), true.into()))),
        "quantized (bitsandbytes in 8 bits)",
    );
    check(
        &with(&|c| drop(c.insert("bnb_4bit_quant_type".into(), "fp4".into()))),
        "quantized (bitsandbytes fp4)",
    );
    check(&with(&|c| drop(c.shift_remove("bnb_4bit_quant_type"))), "quantized (bitsandbytes fp4)");
    check(&with(&|c| drop(c.insert("load_in_4bit".into(), false.into()))), "neither in 4 nor in 8 bits");
    check(&with(&|c| drop(c.insert("quant_method".into(), "awq".into()))), "quantized (awq)");
    // Tensors and configuration must speak of the same.
    check(&with(&|c| drop(c.insert("quant_method".into(), "idefics_q8".into()))), "quantized (bitsandbytes)");
    let mut fp4 = nf4();
    fp4.tensor(".quant_state.bitsandbytes__nf4").name = format!("{NAME}.quant_state.bitsandbytes__fp4");
    check(&fp4.write(), "`quant_type` is fp4, expected nf4");
    let mut undeclared = nf4();
    undeclared.config.as_object_mut().unwrap().shift_remove("quantization_config");
    check(&undeclared.write(), "but `config.json` has no `quantization_config`");
}
