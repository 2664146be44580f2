//! Run: `cargo run --release -p idefics --example image_features -- [MODEL [IMAGE...]]`
//!
//! What the text model sees of pictures: the latents `[L, E]` behind tower and resampler, with the values on the way
//! there, and how alike the pictures are by them. MODEL is a directory or a model of the hub; without arguments it is
//! the small random model of the tests. The same observer shows every stage of the text model.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error};

use idefics::{
    Idefics, LoadOptions, Processor, Segment,
    checkpoint::hub,
    ops,
    processor::{ImageSource, ProcessOptions},
};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny");
const IMAGES: [&str; 3] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/444.jpg"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/grey.jpg"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/alpha.bmp"),
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

    let prompt = images.iter().map(|image| Segment::Image(ImageSource::Path(image.into()))).collect();
    let inputs = processor.process(&[prompt], &ProcessOptions::default())?.remove(0);
    let pixels: Vec<_> = inputs.images.iter().map(AsRef::as_ref).collect();

    let states = model.model().encode_images_observed(&pixels, &mut |stage, values| {
        println!("{:24} {:?}", stage.to_string(), values.dims());
    })?;

    // The mean of each picture's latents: [E].
    let mut means = Vec::with_capacity(states.len());
    for state in &states {
        let (latents, width) = ops::dims2(&state.hidden)?; // [L, E]
        let values = ops::to_vec(&state.hidden)?;
        let mut mean = vec![0.0; width];
        for row in values.chunks_exact(width) {
            mean.iter_mut().zip(row).for_each(|(sum, value)| *sum += value / latents as f32);
        }
        means.push(mean);
    }
    for (image, a) in images.iter().zip(&means) {
        let alike: Vec<String> = means.iter().map(|b| format!("{:6.3}", cosine(a, b))).collect();
        println!("{} {image}", alike.join(" "));
    }
    Ok(())
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
