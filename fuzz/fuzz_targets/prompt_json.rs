//! Any text as a prompt in JSON: an error, or tokens whose image indices name pictures that are there.
#![no_main]

// The command line's own reader of prompts.
#[allow(dead_code)]
#[path = "../../crates/idefics-cli/src/prompts.rs"]
mod prompts;

use std::{path::Path, sync::LazyLock};

use idefics::{
    Prompt, Segment,
    processor::{FetchPolicy, ImageLimits, ImageSource, ProcessOptions, Processor},
};
use libfuzzer_sys::fuzz_target;

static PROCESSOR: LazyLock<Processor> = LazyLock::new(|| {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("processor");
    Processor::from_pretrained(directory).expect("the processor beside the targets is right")
});

fuzz_target!(|text: &str| {
    let Ok(prompt) = serde_json::from_str::<prompts::JsonPrompt>(text) else { return };
    let mut prompt = Prompt::from(prompt);
    // What a path leads to is the machine's business.
    prompt.retain(|segment| !matches!(segment, Segment::Image(ImageSource::Path(_))));
    let options = ProcessOptions {
        limits: ImageLimits { max_pixels: 1 << 16, ..ImageLimits::default() },
        fetch: FetchPolicy { enabled: false, ..FetchPolicy::default() },
        ..ProcessOptions::default()
    };
    let Ok(sequences) = PROCESSOR.process(&[prompt], &options) else { return };
    for sequence in sequences {
        assert_eq!(sequence.token_ids.len(), sequence.image_index.len());
        let images = sequence.images.len();
        assert!(sequence.image_index.iter().flatten().all(|&image| (image as usize) < images));
    }
});
