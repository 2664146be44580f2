//! Run: `cargo run --release -p idefics --example stream -- [MODEL [ITEM...]]`
//!
//! Writes an answer as it comes, drawn by chance under a seed. MODEL is a directory or a model of the hub; an ITEM
//! that is a file is a picture, any other a text. Without arguments it is the small random model of the tests, whose
//! words mean nothing. The same seed gives the same answer on any number of threads and in any batch.

use std::{
    env,
    error::Error,
    io::{self, Write},
    path::Path,
};

use idefics::{
    Idefics, LoadOptions, Processor, Prompt, Segment,
    checkpoint::hub,
    generate::GenerationConfig,
    processor::{ImageSource, ProcessOptions},
};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny");
const ITEMS: [&str; 3] = [
    "User:",
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/progressive.jpg"),
    "Write a short story based on the image.<end_of_utterance>\nAssistant:",
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let model = arguments.next().unwrap_or_else(|| MODEL.to_owned());
    let mut items: Vec<String> = arguments.collect();
    if items.is_empty() {
        items.extend(ITEMS.map(str::to_owned));
    }
    let prompt: Prompt = items.iter().map(|item| segment(item)).collect();

    let directory = hub::resolve(&model, &mut ())?;
    let processor = Processor::from_pretrained(&directory)?;
    let model = Idefics::from_pretrained(&directory, &LoadOptions::default())?;
    let inputs = processor.process(&[prompt], &ProcessOptions::default())?;

    let config = GenerationConfig {
        max_new_tokens: Some(40),
        do_sample: true,
        temperature: 0.8,
        top_p: 0.95,
        seed: Some(7),
        logprobs: Some(0),
        ..model.default_generation(Some(processor.special_tokens()))?
    };
    let mut out = io::stdout();
    let mut sum = 0.0;
    for event in model.stream(&processor, &inputs, &config)? {
        let event = event?;
        // A piece is never a part of a character; it may be empty while one is not complete.
        write!(out, "{}", event.text)?;
        out.flush()?;
        sum += event.logprob.map_or(0.0, |token| token.logprob);
        if let Some(reason) = event.finish_reason {
            writeln!(out, "\n[{}, log-probability {sum:.3}]", reason.as_str())?;
        }
    }
    Ok(())
}

/// Only what is a picture by its type can be opened; a text stays a text whatever it says.
fn segment(item: &str) -> Segment {
    if Path::new(item).is_file() {
        Segment::Image(ImageSource::Path(item.into()))
    } else {
        Segment::text(item)
    }
}
