//! Any text as a configuration: an error, or numbers that can be computed with.
#![no_main]

use idefics::{
    checkpoint::{DType, expected_tensors},
    config::{IdeficsConfig, Workload},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(config) = IdeficsConfig::from_json(text) else { return };
    for (name, shape) in expected_tensors(&config) {
        assert!(shape.iter().all(|&extent| extent > 0), "{name} {shape:?}");
        assert!(
            shape.iter().try_fold(4usize, |bytes, &extent| bytes.checked_mul(extent)).is_some(),
            "{name}"
        );
    }
    assert!(config.num_cross_layers() > 0 && config.image_seq_len() > 0);
    assert!(config.head_dim() % 2 == 0);
    let context = config.max_position_embeddings;
    let memory = config.memory(Workload { context, batch: 1, images: 1, compute: DType::F32 });
    assert!(memory.total() > 0);
    let written = serde_json::to_string(&config).expect("a configuration has a text form");
    let again = IdeficsConfig::from_json(&written).expect("what is written can be read");
    assert_eq!(again, config);
});
