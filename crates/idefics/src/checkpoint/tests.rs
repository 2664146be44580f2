//! Whole directories: good ones open, and each way to be bad has its own message.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;

use super::*;

mod packed;

const CONFIG: &str = r#"{"model_type": "idefics", "vocab_size": 40, "additional_vocab_size": 3, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "cross_layer_interval": 2,
    "qk_layer_norms": true, "use_resampler": true, "torch_dtype": "float32",
    "vision_config": {"embed_dim": 12, "image_size": 8, "patch_size": 4, "num_hidden_layers": 2,
        "num_attention_heads": 3, "intermediate_size": 20},
    "perceiver_config": {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2,
        "resampler_head_dim": 5, "qk_layer_norms_perceiver": true}}"#;

/// A tensor to be written.
#[derive(Clone)]
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A directory under construction: what the configuration calls for, until it is spoilt.
struct Model {
    config: serde_json::Value,
    tensors: Vec<Stored>,
}

impl Model {
    fn good() -> Self {
        let tensors = expected_tensors(&IdeficsConfig::from_json(CONFIG).unwrap());
        let store = |(name, shape): (String, Vec<usize>)| {
            let count = shape.iter().product::<usize>();
            let bytes = (0..count).flat_map(|n| (n as f32).to_le_bytes()).collect();
            Stored { name, dtype: Dtype::F32, shape, bytes }
        };
        Self {
            config: serde_json::from_str(CONFIG).unwrap(),
            tensors: tensors.into_iter().map(store).collect(),
        }
    }

    fn remove(&mut self, part: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|tensor| !tensor.name.contains(part));
        assert_ne!(self.tensors.len(), before, "{part}");
    }

    fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
        self.tensors.push(Stored { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes });
    }

    fn replace(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        self.remove(name);
        self.add(name, dtype, shape);
    }

    fn write(&self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config.json"), self.config.to_string()).unwrap();
        fs::write(directory.path().join(WEIGHTS_FILE), bytes_of(&self.tensors)).unwrap();
        directory
    }

    /// Two shards, split at a third of the tensors, and their index.
    fn write_sharded(&self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = self.tensors.split_at(self.tensors.len() / 3);
        let mut weight_map = serde_json::Map::new();
        for (name, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
            fs::write(directory.path().join(name), bytes_of(tensors)).unwrap();
            weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.into())));
        }
        let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
        fs::write(directory.path().join(INDEX_FILE), index.to_string()).unwrap();
        fs::write(directory.path().join("config.json"), self.config.to_string()).unwrap();
        directory
    }
}

fn bytes_of(tensors: &[Stored]) -> Vec<u8> {
    let views = tensors.iter().map(|Stored { name, dtype, shape, bytes }| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    serialize(views, Some(HashMap::from([("format".to_owned(), "pt".to_owned())]))).unwrap()
}

/// The whole message of the error that opening gives, causes included.
fn message(directory: &TempDir) -> String {
    let error = Checkpoint::open(directory).expect_err("a bad directory");
    let mut message = error.to_string();
    let mut error: &dyn std::error::Error = &error;
    while let Some(source) = error.source() {
        message = format!("{message}: {source}");
        error = source;
    }
    message
}

#[track_caller]
fn check(directory: &TempDir, expected: &str) {
    let message = message(directory);
    assert!(message.contains(expected), "\n  gave     {message}\n  expected {expected}");
    assert!(!message.contains('\n'), "{message}");
}

/// What opening says after the good model was spoilt.
#[track_caller]
fn check_spoilt(spoil: impl FnOnce(&mut Model), expected: &str) {
    let mut model = Model::good();
    spoil(&mut model);
    check(&model.write(), expected);
}

#[test]
fn a_single_file_opens_and_is_used_where_it_is_mapped() {
    let mut model = Model::good();
    model.add("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[2]);
    model.add("model.vision_model.embeddings.position_ids", Dtype::I64, &[1, 5]);
    let directory = model.write();
    let mut checkpoint = Checkpoint::open(&directory).unwrap();
    assert_eq!(checkpoint.weights.len(), expected_tensors(&checkpoint.config).len());
    assert_eq!(checkpoint.ignored.len(), 2);
    assert_eq!(checkpoint.generation_config, GenerationConfigFile::default());
    let latents = checkpoint.weights.take("model.perceiver_resampler.latents").unwrap();
    assert_eq!(latents.shape(), [3, 12]);
    assert_eq!(latents.as_f32().unwrap()[35], 35.0);
    assert!(checkpoint.weights.take("model.perceiver_resampler.latents").is_err());

    // Two views of one file lie as far apart in memory as in the file.
    let a = checkpoint.weights.get("model.norm.weight").unwrap();
    let b = checkpoint.weights.get("lm_head.weight").unwrap();
    let file = fs::read(&checkpoint.files[0].path).unwrap();
    let header = parse_header(&file).unwrap();
    let at = |name: &str| header.iter().find(|info| info.name == name).unwrap().bytes.start;
    let distance = at("lm_head.weight").wrapping_sub(at("model.norm.weight"));
    assert_eq!(b.bytes().as_ptr().addr().wrapping_sub(a.bytes().as_ptr().addr()), distance);
    // A weight outlives everything else.
    drop(checkpoint);
    drop(directory);
    assert_eq!(latents.to_f32_vec()[7], 7.0);
}

#[test]
fn shards_open_like_a_single_file() {
    let model = Model::good();
    let single = Checkpoint::open(model.write().path()).unwrap();
    let sharded = Checkpoint::open(model.write_sharded().path()).unwrap();
    assert_eq!(sharded.files.len(), 2);
    for ((name, a), (other, b)) in single.weights.iter().zip(sharded.weights.iter()) {
        assert_eq!((name, a.shape(), a.bytes()), (other, b.shape(), b.bytes()));
    }
}

#[test]
fn types_may_be_mixed() {
    let mut model = Model::good();
    model.replace("model.norm.weight", Dtype::BF16, &[16]);
    model.replace("lm_head.weight", Dtype::F16, &[40, 16]);
    let checkpoint = Checkpoint::open(model.write().path()).unwrap();
    assert_eq!(checkpoint.weights.get("model.norm.weight").unwrap().dtype(), DType::Bf16);
    assert_eq!(checkpoint.weights.get("lm_head.weight").unwrap().dtype(), DType::F16);
    assert_eq!(checkpoint.weights.get("model.norm.weight").unwrap().to_f32_vec(), [0.0; 16]);
}

#[test]
fn tied_heads_are_the_embeddings() {
    let mut model = Model::good();
    model.config["tie_word_embeddings"] = true.into();
    let with_heads = Checkpoint::open(model.write().path()).unwrap();
    model.remove("lm_head.");
    let without = Checkpoint::open(model.write().path()).unwrap();
    for checkpoint in [with_heads, without] {
        for (head, embedding) in [
            ("lm_head.weight", "model.embed_tokens.weight"),
            ("lm_head.additional_fc.weight", "model.embed_tokens.additional_embedding.weight"),
        ] {
            let head = checkpoint.weights.get(head).unwrap();
            assert!(head.shares_bytes_with(checkpoint.weights.get(embedding).unwrap()));
        }
    }
    check_spoilt(
        |model| model.remove("lm_head."),
        "2 missing: `lm_head.additional_fc.weight`, `lm_head.weight`",
    );
}

#[test]
fn tensors_must_fit_the_configuration() {
    check_spoilt(
        |model| {
            model.remove("mlp.up_proj.weight");
            model.add("model.layers.9.mlp.up_proj.weight", Dtype::F32, &[24, 16]);
            model.replace("model.norm.weight", Dtype::F32, &[17]);
        },
        "the tensors do not fit the configuration: \
         6 missing: `model.gated_cross_attn_layers.{0-1}.mlp.up_proj.weight`, `model.layers.{0-3}.mlp.up_proj.weight`; \
         1 unexpected: `model.layers.9.mlp.up_proj.weight`; \
         1 of another shape: `model.norm.weight`: expected [16], got [17]",
    );
    check_spoilt(
        |model| model.config["use_resampler"] = false.into(),
        "35 unexpected: `model.perceiver_resampler.blocks.{0-1}.0.context_layer_norm.bias`",
    );
    check_spoilt(
        |model| model.config["cross_layer_interval"] = 1.into(),
        "26 missing: `model.gated_cross_attn_layers.{2-3}",
    );
    check_spoilt(
        |model| model.config["alpha_type"] = "vector".into(),
        "4 of another shape: `model.gated_cross_attn_layers.{0-1}.alpha_cross_attn`, \
         `model.gated_cross_attn_layers.{0-1}.alpha_dense`: expected [1, 1, 16], got [1]",
    );
    check_spoilt(|model| model.tensors.clear(), "141 missing");
}

#[test]
fn additional_vocabularies_are_compared() {
    let expected = "`config.json` says `additional_vocab_size` is 2, but \
                    `model.embed_tokens.additional_embedding.weight` has 3 rows";
    check_spoilt(|model| model.config["additional_vocab_size"] = 2.into(), expected);
    check_spoilt(|model| model.config["additional_vocab_size"] = 0.into(), "is 0, but");
    check_spoilt(
        |model| model.remove("additional"),
        "is 3, but `model.embed_tokens.additional_embedding.weight` has 0 rows",
    );
    check_spoilt(
        |model| model.replace("lm_head.additional_fc.weight", Dtype::F32, &[2, 16]),
        "is 3, but `lm_head.additional_fc.weight` has 2 rows",
    );
    check_spoilt(|model| model.remove("additional_fc"), "1 missing: `lm_head.additional_fc.weight`");
}

#[test]
fn other_element_types_are_named() {
    for (dtype, name) in [(Dtype::F64, "F64"), (Dtype::I32, "I32"), (Dtype::BOOL, "BOOL")] {
        let expected =
            format!("tensor `model.norm.weight` has element type {name}, expected F32, F16 or BF16");
        check_spoilt(|model| model.replace("model.norm.weight", dtype, &[16]), &expected);
    }
}

#[test]
fn quantized_models_are_named() {
    let bits = "model.layers.0.mlp.up_proj.weight";
    check_spoilt(
        |model| {
            model.replace(bits, Dtype::U8, &[192, 1]);
            model.add(&format!("{bits}.absmax"), Dtype::F32, &[6]);
        },
        "holds the bitsandbytes tensor `model.layers.0.mlp.up_proj.weight.absmax`, but `config.json` has no",
    );
    check_spoilt(
        |model| model.add("model.layers.0.mlp.up_proj.qweight", Dtype::I32, &[2, 24]),
        "quantized (GPTQ or AWQ)",
    );
    check_spoilt(
        |model| model.config["quantization_config"] = serde_json::json!({"quant_method": "gptq", "bits": 4}),
        "quantized (gptq)",
    );
    check_spoilt(
        |model| model.config["quantization_config"] = serde_json::json!({"load_in_4bit": true}),
        "quantized (bitsandbytes fp4)",
    );
    let directory = Model::good().write();
    fs::write(directory.path().join("quantize_config.json"), "{}").unwrap();
    check(&directory, "quantized (GPTQ or AWQ)");
}

#[test]
fn directories_without_safetensors() {
    let directory = tempfile::tempdir().unwrap();
    check(&directory, "cannot read");
    fs::write(directory.path().join("config.json"), CONFIG).unwrap();
    check(&directory, "holds neither `model.safetensors` nor `model.safetensors.index.json`");
    fs::write(directory.path().join("pytorch_model.bin"), "PK").unwrap();
    check(&directory, "pytorch_model.bin` is a pickle");
    check(&directory, "save_pretrained('OUT', safe_serialization=True)");
    fs::write(directory.path().join("generation_config.json"), "{\"max_length\": \"long\"}").unwrap();
    check(&directory, "not a usable generation configuration: invalid type: string \"long\"");

    let error = Checkpoint::open(directory.path().join("config.json")).unwrap_err();
    assert!(error.to_string().ends_with("config.json` is not a directory"), "{error}");
    let error = Checkpoint::open(directory.path().join("none")).unwrap_err();
    assert!(matches!(error, CheckpointError::Io { .. }), "{error}");
}

#[test]
fn spoilt_files_are_named() {
    let directory = Model::good().write();
    let file = directory.path().join(WEIGHTS_FILE);
    let whole = fs::read(&file).unwrap();
    for (length, expected) in [
        (0, "the file has 0 bytes, a safetensors file has at least 8"),
        (100, "is it truncated"),
        (whole.len() - 1, "the tensors take"),
    ] {
        fs::write(&file, &whole[..length]).unwrap();
        check(&directory, expected);
    }
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    check(&directory, "not a regular file");

    let config = directory.path().join("config.json");
    fs::write(&config, " ".repeat(5 << 20)).unwrap();
    check(&directory, "has more than 4194304 bytes");
    fs::write(&config, [0xff, 0xfe]).unwrap();
    check(&directory, "valid UTF-8");
    fs::write(&config, "{\"hidden_size\": 0}").unwrap();
    check(&directory, "config.json`: `hidden_size` is 0");
    fs::remove_file(&config).unwrap();
    fs::create_dir(&config).unwrap();
    check(&directory, "config.json` is not a regular file");
}

#[test]
fn an_index_must_describe_its_shards() {
    let rewrite = |directory: &TempDir, edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let path = directory.path().join(INDEX_FILE);
        let mut index: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(index["weight_map"].as_object_mut().unwrap());
        fs::write(path, index.to_string()).unwrap();
    };
    let directory = Model::good().write_sharded();
    rewrite(&directory, &|map| {
        map.insert("lm_head.weight".to_owned(), "a.safetensors".into());
        map.insert("model.norm.bias".to_owned(), "a.safetensors".into());
        map.shift_remove("model.norm.weight");
    });
    check(
        &directory,
        "does not describe its shards: `lm_head.weight`, `model.norm.bias`, `model.norm.weight`",
    );
    rewrite(&directory, &|map| drop(map.insert("lm_head.weight".to_owned(), "../a.safetensors".into())));
    check(&directory, "shard name `../a.safetensors` is not a plain name");
    rewrite(&directory, &|map| drop(map.insert("lm_head.weight".to_owned(), "c.safetensors".into())));
    check(&directory, "shard `c.safetensors` is missing");
    fs::copy(directory.path().join("b.safetensors"), directory.path().join("c.safetensors")).unwrap();
    check(&directory, "is both in");
}
