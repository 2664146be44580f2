//! Run: `cargo run --release -p idefics --example caption -- [MODEL [IMAGE...]]`
//!
//! Captions pictures, all in one batch. MODEL is a directory or a model of the hub, such as
//! `HuggingFaceM4/idefics-9b-instruct`. Without arguments it is the small random model of the tests: the way is
//! the same, but the words mean nothing.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error};

use idefics::{
    Idefics, LoadOptions, Processor, Prompt, Segment,
    checkpoint::hub,
    generate::GenerationConfig,
    processor::{ImageSource, ProcessOptions},
};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny");
const IMAGES: [&str; 2] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/444.jpg"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/rgba.png"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let model = arguments.next().unwrap_or_else(|| MODEL.to_owned());
    let mut images: Vec<String> = arguments.collect();
    if images.is_empty() {
        images.extend(IMAGES.map(str::to_owned));
    }

    let directory = hub::resolve(&model, &mut ())?;
    let processor = Processor::from_pretrained(&directory)?;
    let model = Idefics::from_pretrained(&directory, &LoadOptions::default())?;

    // Only instruct checkpoints have the token that ends a turn.
    let is_instruct = processor.special_tokens().end_of_utterance.is_some();
    let prompts: Vec<Prompt> = images.iter().map(|image| prompt(image, is_instruct)).collect();
    let inputs = processor.process(&prompts, &ProcessOptions::default())?;

    let config = GenerationConfig {
        max_new_tokens: Some(20),
        ..model.default_generation(Some(processor.special_tokens()))?
    };
    let answers = model.generate_text(&processor, &inputs, &config)?;
    for (image, answer) in images.iter().zip(&answers) {
        let caption = &answer.sequences[0];
        println!("{image}");
        println!("  caption: {}", caption.text.as_deref().unwrap_or_default().trim());
        println!(
            "  {} prompt tokens, {} new ones, ended by {}",
            answer.usage.prompt_tokens,
            caption.token_ids.len(),
            caption.finish_reason.as_str()
        );
    }
    Ok(())
}

/// What each kind of checkpoint was trained to answer.
fn prompt(image: &str, is_instruct: bool) -> Prompt {
    let image = Segment::Image(ImageSource::Path(image.into()));
    if is_instruct {
        vec![
            Segment::text("User:"),
            image,
            Segment::text("Describe this image.<end_of_utterance>"),
            Segment::text("\nAssistant:"),
        ]
    } else {
        vec![image, Segment::text("This is an image of")]
    }
}
