use idefics_testing::{Golden, fixture, write_golden_checkpoint};
use tempfile::TempDir;

use super::*;
use crate::checkpoint::Checkpoint;

fn golden() -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    write_golden_checkpoint(dir.path(), Golden::A);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn specs(checkpoint: &Checkpoint, dtype: DType) -> Vec<TensorSpec> {
    checkpoint.weights.iter().map(|(name, weight)| TensorSpec::new(name, dtype, weight.shape())).collect()
}

fn copy(checkpoint: &Checkpoint, out: &Path, dtype: DType, max_shard_bytes: u64) {
    let writer = CheckpointWriter::create(out).unwrap().with_max_shard_bytes(max_shard_bytes);
    let weight = |spec: &TensorSpec| Ok::<_, WriteError>(checkpoint.weights.get(&spec.name).unwrap().clone());
    writer.write_weights(&specs(checkpoint, dtype), weight).unwrap();
    writer.write_json("config.json", &config_json(&checkpoint.config, dtype)).unwrap();
    assert!(!out.join("config.json").exists(), "nothing is there before all is");
    assert_eq!(writer.finish().unwrap(), out);
}

#[test]
fn what_is_written_opens_again() {
    let (dir, checkpoint) = golden();
    let all = checkpoint.weights.len();
    for (name, dtype, max_shard_bytes, files) in [
        ("one", DType::F32, u64::MAX, 1..=1),
        ("many", DType::Bf16, 10_000, 5..=9),
        ("each", DType::F16, 0, all..=all),
    ] {
        let out = dir.path().join(name);
        copy(&checkpoint, &out, dtype, max_shard_bytes);
        let written = Checkpoint::open(&out).unwrap();
        assert!(files.contains(&written.files.len()), "{name}: {} files", written.files.len());
        assert_eq!(written.config.declared_dtype(), Some(dtype));
        for (name, weight) in checkpoint.weights.iter() {
            let got = written.weights.get(name).unwrap();
            assert_eq!(got.dtype(), dtype);
            assert_eq!(got.bytes(), weight.to_dtype(dtype).bytes(), "{name}");
        }
        let entries = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(!entries.into_iter().any(|name| name.to_string_lossy().ends_with(".partial")));
    }
}

#[test]
fn unknown_fields_of_a_configuration_stay() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let writer = CheckpointWriter::create(&out).unwrap();
    writer
        .copy_config(&fixture("tiny").into(), |config| _ = config.insert("dtype".into(), json!("bfloat16")))
        .unwrap();
    writer.copy_side_files(&fixture("tiny").into()).unwrap();
    writer.finish().unwrap();
    let [before, after] =
        [fixture("tiny"), out.clone()].map(|dir| read_object(&dir.into(), "config.json").unwrap());
    assert_eq!(after["dtype"], "bfloat16");
    assert!(before.keys().all(|key| after.contains_key(key)));
    for name in ["tokenizer.json", "preprocessor_config.json"] {
        assert_eq!(fs::read(out.join(name)).unwrap(), fs::read(fixture("tiny").join(name)).unwrap());
    }
}

#[test]
fn an_interrupted_writer_leaves_nothing_and_a_killed_one_nothing_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let writer = CheckpointWriter::create(&out).unwrap();
    writer.write_file("x", b"x").unwrap();
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    let writer = CheckpointWriter::create(&out).unwrap();
    writer.write_file("x", b"x").unwrap();
    std::mem::forget(writer);
    let writer = CheckpointWriter::create(&out).unwrap();
    assert_eq!(fs::read_dir(writer.directory()).unwrap().count(), 0);
    writer.finish().unwrap();
    assert!(out.is_dir());
}

#[test]
fn directories_in_use_are_refused() {
    let (dir, _checkpoint) = golden();
    let error = CheckpointWriter::create(dir.path()).unwrap_err();
    assert!(matches!(error, WriteError::NotEmpty { .. }), "{error}");
    let error = CheckpointWriter::create(dir.path().join("..")).unwrap_err();
    assert!(matches!(error, WriteError::NoName { .. }), "{error}");
    let error = check_not_same(dir.path(), dir.path()).unwrap_err();
    assert!(matches!(error, WriteError::SameDirectory { .. }), "{error}");
}
