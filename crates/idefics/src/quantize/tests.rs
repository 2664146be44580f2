//! Whole directories: written, read back, continued, refused.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use idefics_testing::fixture;
use tempfile::TempDir;

use super::{state::state_path, *};
use crate::checkpoint::{Checkpoint, DType, PackedWeight, Weight, WriteError, write::check_space};

const FORMATS: [Format; 3] = [Format::Nf4, Format::Nf4DoubleQuant, Format::Q8];

fn tiny(format: Format) -> Quantizer {
    Quantizer::open(fixture("tiny"), &Recipe::new(format)).expect("a sound model")
}

/// The bytes of every file by its name.
fn contents(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(directory)
        .expect("a directory")
        .map(|entry| {
            let path = entry.expect("an entry").path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).expect("a file"))
        })
        .collect();
    files.sort();
    files
}

fn message(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message = format!("{message}: {error}");
        source = error.source();
    }
    message
}

#[test]
fn what_is_written_is_what_is_packed_in_memory() {
    for format in FORMATS {
        let out = tempfile::tempdir().unwrap();
        let quantizer = tiny(format);
        let mut done = 0;
        let summary = quantizer.write(out.path(), &mut |bytes| done += bytes).unwrap();
        assert_eq!(done, quantizer.work_bytes(), "{format}");
        assert_eq!(summary.bytes, fs::metadata(out.path().join("model.safetensors")).unwrap().len());
        // 4 layers of 7 and 2 gated blocks of 7.
        assert_eq!(summary.packed, 42, "{format}");

        let written = Checkpoint::open(out.path()).unwrap();
        let mut packed = Checkpoint::open(fixture("tiny")).unwrap().weights;
        quantize_weights(&mut packed, &Recipe::new(format)).unwrap();
        assert_eq!(written.weights.len(), packed.len());
        for (name, weight) in packed.iter() {
            assert_eq!(written.weights.get(name).unwrap().bytes(), weight.bytes(), "{format} {name}");
        }
        for (name, weight) in packed.iter_packed() {
            let read = written.weights.get_packed(name).unwrap();
            assert_eq!(read.format_name(), format.to_string());
            assert_eq!(read.to_dense().bytes(), weight.to_dense().bytes(), "{format} {name}");
        }
        for name in ["tokenizer.json", "preprocessor_config.json", "generation_config.json"] {
            let (source, copy) = (fixture("tiny").join(name), out.path().join(name));
            assert_eq!(fs::read(source).unwrap(), fs::read(copy).unwrap(), "{name}");
        }
    }
}

#[test]
fn the_packed_parts_are_the_chosen_ones() {
    let recipe =
        Recipe { parts: BTreeSet::from([Part::Vision, Part::Perceiver]), ..Recipe::new(Format::Nf4) };
    let out = tempfile::tempdir().unwrap();
    Quantizer::open(fixture("tiny"), &recipe).unwrap().write(out.path(), &mut |_| ()).unwrap();
    let written = Checkpoint::open(out.path()).unwrap();
    for (name, _) in written.weights.iter_packed() {
        assert!(matches!(Part::of_linear(name), Some(Part::Vision | Part::Perceiver)), "{name}");
    }
    // 2 layers of 6, 2 blocks of 6.
    assert_eq!(written.weights.iter_packed().count(), 24);
    let config = fs::read_to_string(out.path().join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        config["quantization_config"]["llm_int8_skip_modules"],
        serde_json::json!(["lm_head", "model.layers", "model.gated_cross_attn_layers"])
    );
    assert_eq!(config["hidden_size"], 32);
}

#[test]
fn shards_hold_the_same_weights_as_one_file() {
    for format in FORMATS {
        let [one, many] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        tiny(format).write(one.path(), &mut |_| ()).unwrap();
        let quantizer = tiny(format).with_max_shard_bytes(40_000).unwrap();
        let summary = quantizer.write(many.path(), &mut |_| ()).unwrap();
        assert!(summary.files > 3, "{}", summary.files);
        let [one, many] = [one, many].map(|directory| Checkpoint::open(directory.path()).unwrap());
        assert_eq!(many.files.len(), summary.files);
        for (name, weight) in one.weights.iter_packed() {
            let other = many.weights.get_packed(name).unwrap();
            assert_eq!(weight.to_dense().bytes(), other.to_dense().bytes(), "{name}");
        }
        for (name, weight) in one.weights.iter() {
            assert_eq!(weight.bytes(), many.weights.get(name).unwrap().bytes(), "{name}");
        }
    }
}

/// Runs until so many bytes are done, then ends as a killed process does.
fn interrupted(quantizer: &Quantizer, out: &Path, after: u64) {
    let mut done = 0;
    let run = || {
        quantizer.write(out, &mut |bytes| {
            done += bytes;
            assert!(done < after, "interrupted");
        })
    };
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "the run was to be interrupted");
}

#[test]
fn an_interrupted_run_is_continued() {
    let quantizer = tiny(Format::Nf4DoubleQuant).with_max_shard_bytes(40_000).unwrap();
    let whole = tempfile::tempdir().unwrap();
    let files = quantizer.write(whole.path(), &mut |_| ()).unwrap().files;
    for share in [0.01, 0.3, 0.7, 1.0] {
        let out = tempfile::tempdir().unwrap();
        interrupted(&quantizer, out.path(), (quantizer.work_bytes() as f64 * share) as u64);
        assert!(Checkpoint::open(out.path()).is_err(), "an unfinished output must not open");
        let mut done = 0;
        let summary = quantizer.write(out.path(), &mut |bytes| done += bytes).unwrap();
        assert_eq!(done, quantizer.work_bytes());
        assert_eq!(summary.kept > 0, share > 0.2, "{share}: {} of {files} kept", summary.kept);
        assert_eq!(contents(out.path()), contents(whole.path()), "{share}");
    }
}

#[test]
fn finished_files_that_were_spoilt_are_written_again() {
    let quantizer = tiny(Format::Q8).with_max_shard_bytes(40_000).unwrap();
    let whole = tempfile::tempdir().unwrap();
    let files = quantizer.write(whole.path(), &mut |_| ()).unwrap().files;
    let out = tempfile::tempdir().unwrap();
    interrupted(&quantizer, out.path(), quantizer.work_bytes());
    let first = out.path().join(format!("model-00001-of-{files:05}.safetensors"));
    let mut bytes = fs::read(&first).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&first, bytes).unwrap();
    fs::remove_file(out.path().join(format!("model-00002-of-{files:05}.safetensors"))).unwrap();
    let summary = quantizer.write(out.path(), &mut |_| ()).unwrap();
    // Those two, and the last one, which was not finished.
    assert_eq!(summary.kept, files - 3);
    assert_eq!(contents(out.path()), contents(whole.path()));
}

#[track_caller]
fn check_refused(result: Result<impl Sized, QuantizeError>, expected: &str) {
    let message = message(&result.err().expect("this is refused"));
    assert!(message.contains(expected), "\n  gave     {message}\n  expected {expected}");
}

fn copy_of_tiny() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("tiny").join(name), directory.path().join(name)).unwrap();
    }
    directory
}

#[test]
fn directories_that_would_lose_something_are_refused() {
    let model = copy_of_tiny();
    let nf4 = Quantizer::open(model.path(), &Recipe::new(Format::Nf4)).unwrap();
    check_refused(nf4.write(model.path(), &mut |_| ()), "is the model's own directory");

    let out = tempfile::tempdir().unwrap();
    fs::write(out.path().join("thesis.tex"), "years of work").unwrap();
    check_refused(nf4.write(out.path(), &mut |_| ()), "is not empty");
    assert_eq!(contents(out.path()).len(), 1);

    let done = tempfile::tempdir().unwrap();
    nf4.write(done.path(), &mut |_| ()).unwrap();
    check_refused(nf4.write(done.path(), &mut |_| ()), "is not empty");
    check_refused(Quantizer::open(done.path(), &Recipe::new(Format::Q8)), "quantized already (nf4)");

    let file = out.path().join("thesis.tex");
    check_refused(nf4.write(&file, &mut |_| ()), "cannot create");
}

#[test]
fn unfinished_output_of_something_else_is_refused() {
    let model = copy_of_tiny();
    let open = |format| {
        let quantizer = Quantizer::open(model.path(), &Recipe::new(format)).unwrap();
        quantizer.with_max_shard_bytes(40_000).unwrap()
    };
    let out = tempfile::tempdir().unwrap();
    interrupted(&open(Format::Nf4), out.path(), 100_000);
    check_refused(
        open(Format::Q8).write(out.path(), &mut |_| ()),
        "another format, size of files or set of parts",
    );
    let other_size = open(Format::Nf4).with_max_shard_bytes(50_000).unwrap();
    check_refused(other_size.write(out.path(), &mut |_| ()), "another format, size of files or set of parts");

    let config = model.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}\n")).unwrap();
    check_refused(
        open(Format::Nf4).write(out.path(), &mut |_| ()),
        "another model, or of one that has changed",
    );
    fs::write(&config, text).unwrap();

    fs::write(state_path(out.path()), "{}").unwrap();
    check_refused(open(Format::Nf4).write(out.path(), &mut |_| ()), "another program");
}

#[test]
fn what_cannot_be_quantized_is_named() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut weights = Checkpoint::open(fixture("tiny")).unwrap().weights;
    let mut values = weights.get(name).unwrap().to_f32_vec();
    values[777] = f32::NAN;
    weights.insert(name, Weight::from_f32(values, [48, 32]));
    for format in FORMATS {
        check_refused(
            quantize_weights(&mut weights.clone(), &Recipe::new(format)),
            "tensor `model.layers.1.mlp.up_proj.weight` holds values that are not finite",
        );
    }
    weights.insert(name, Weight::from_f32(vec![1.0; 15], [3, 5]));
    check_refused(
        quantize_weights(&mut weights.clone(), &Recipe::new(Format::Nf4)),
        "has shape [3, 5]: nf4 needs",
    );
    quantize_weights(&mut weights, &Recipe::new(Format::Q8)).unwrap();
    check_refused(quantize_weights(&mut weights, &Recipe::new(Format::Q8)), "quantized already (q8)");
    let none = Recipe { parts: BTreeSet::new(), format: Format::Nf4 };
    check_refused(Quantizer::open(fixture("tiny"), &none), "no linear layer");
    let perceiver = Recipe { parts: BTreeSet::from([Part::Perceiver]), format: Format::Nf4 };
    check_refused(
        Quantizer::open(fixture("tiny-base"), &perceiver),
        "belongs to the chosen parts (perceiver)",
    );
}

#[test]
fn a_full_disk_is_seen_before_anything_is_written() {
    // No disk has room for this many bytes of headroom: the check is on the number that the plan gives.
    let out = tempfile::tempdir().unwrap();
    let error = check_space(out.path(), u64::MAX).expect_err("no disk is that large");
    let WriteError::NoSpace { needed, available, .. } = error else { panic!("{error}") };
    assert!(needed == u64::MAX && available > 0);
    check_space(out.path(), 1).unwrap();
}

#[test]
fn every_type_is_packed_from_its_own_numbers() {
    let values: Vec<f32> = (0..4 * 128).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 777.0).collect();
    let exact = Weight::from_f32(values, [4, 128]);
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let stored = exact.to_dtype(dtype);
        let widened = Weight::from_f32(stored.to_f32_vec(), [4, 128]);
        for format in FORMATS {
            let [a, b] =
                [&stored, &widened].map(|weight| pack::pack("w", weight, format).unwrap().to_dense());
            assert_eq!(a.bytes(), b.bytes(), "{dtype} {format}");
        }
    }
}

#[test]
fn a_slip_in_the_file_is_found() {
    let quantizer = tiny(Format::Nf4DoubleQuant);
    for (part, expected) in [
        ("mlp.up_proj.weight", "`model.layers.0.mlp.up_proj.weight`"),
        ("mlp.up_proj.weight.absmax", "`model.layers.0.mlp.up_proj.weight`"),
        ("input_layernorm.weight", "`model.layers.0.input_layernorm.weight`"),
    ] {
        let out = tempfile::tempdir().unwrap();
        quantizer.write(out.path(), &mut |_| ()).unwrap();
        let path = out.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = crate::checkpoint::parse_header(&bytes).unwrap();
        let at =
            header.iter().find(|info| info.name == format!("model.layers.0.{part}")).unwrap().bytes.start;
        bytes[at + 3] ^= 0xf0;
        fs::write(&path, bytes).unwrap();
        check_refused(quantizer.verify_file(&path), expected);
    }
}

#[test]
fn memory_and_files_hold_the_same_kinds() {
    let mut weights = Checkpoint::open(fixture("tiny-base")).unwrap().weights;
    quantize_weights(&mut weights, &Recipe::new(Format::Nf4DoubleQuant)).unwrap();
    let (_, weight) = weights.iter_packed().next().unwrap();
    assert!(matches!(weight, PackedWeight::Nf4(weight) if weight.is_double_quantized()));
}
