//! Any text as an index: an error, or shards that are plain file names.
#![no_main]

use std::path::{Component, Path};

use idefics::checkpoint::Index;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(index) = Index::from_json(text) else { return };
    assert!(!index.weight_map.is_empty());
    for shard in index.shards() {
        let parts: Vec<_> = Path::new(shard).components().collect();
        assert!(matches!(parts.as_slice(), [Component::Normal(_)]), "{shard:?}");
        assert!(!shard.contains(['/', '\\', '\0']), "{shard:?}");
    }
});
