//! Run: `cargo run --release -p idefics --example few_shot -- [MODEL IMAGE ANSWER [IMAGE ANSWER]... IMAGE]`
//!
//! Learning in context: pictures with their answers go first, the model goes on with the last picture. MODEL is a
//! directory or a model of the hub. Without arguments it is the small random model of the tests, whose words mean
//! nothing. Several answers are kept by a beam search, best first.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error};

use idefics::{
    Idefics, LoadOptions, Processor, Prompt, Segment,
    checkpoint::hub,
    generate::GenerationConfig,
    processor::{AddEndOfUtterance, ImageSource, ProcessOptions},
};

const DEFAULTS: [&str; 6] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/444.jpg"),
    "An image of a dog.",
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/lossy.webp"),
    "An image of the sea.",
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/rgb.png"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.is_empty() {
        arguments.extend(DEFAULTS.map(str::to_owned));
    }
    let [model, shots @ .., query] = arguments.as_slice() else {
        return Err("expected MODEL, pairs of IMAGE and ANSWER, and the last IMAGE".into());
    };
    let (pairs, []) = shots.as_chunks::<2>() else {
        return Err("each picture before the last needs its answer".into());
    };

    let directory = hub::resolve(model, &mut ())?;
    let processor = Processor::from_pretrained(&directory)?;
    let model = Idefics::from_pretrained(&directory, &LoadOptions::default())?;

    let mut prompt = Prompt::new();
    for [image, answer] in pairs {
        prompt.extend(question(image));
        // A space before the answer; the newline ends the example.
        prompt.push(Segment::text(format!("Describe this image.\nAssistant: {answer}\n")));
    }
    prompt.extend(question(query));
    prompt.push(Segment::text("Describe this image.\nAssistant:"));

    // The format of the examples says where a turn ends, so nothing is put between the texts.
    let options =
        ProcessOptions { add_end_of_utterance: AddEndOfUtterance::Never, ..ProcessOptions::default() };
    println!("{}", processor.prompt_text(&prompt, &options)?);
    let inputs = processor.process(&[prompt], &options)?;

    let config = GenerationConfig {
        max_new_tokens: Some(12),
        num_beams: 3,
        num_return_sequences: 3,
        stop_strings: vec!["\nUser:".to_owned()],
        trim_stop_strings: true,
        ..model.default_generation(Some(processor.special_tokens()))?
    };
    for answers in model.generate_text(&processor, &inputs, &config)? {
        println!("{} tokens and {} pictures read", answers.usage.prompt_tokens, answers.usage.images);
        for answer in answers.sequences {
            let text = answer.text.unwrap_or_default();
            println!("{:8.4} {}", answer.score.unwrap_or_default(), text.trim());
        }
    }
    Ok(())
}

/// The start of a turn: who speaks, and the picture.
fn question(image: &str) -> [Segment; 2] {
    [Segment::text("User:"), Segment::Image(ImageSource::Path(image.into()))]
}
