//! Run: `cargo run --release -p idefics --example score -- [MODEL IMAGE LABEL...]`
//!
//! Ranks labels for a picture by how likely the model finds each behind the prompt, then rates one text as a whole.
//! MODEL is a directory or a model of the hub. Without arguments it is the small random model of the tests, whose
//! ranking means nothing. The prompt is read once for all labels.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error};

use idefics::{
    Idefics, LoadOptions, Processor, Segment,
    checkpoint::hub,
    generate::{ScoreOptions, ScoreRequest, score, score_continuations},
    processor::{ImageSource, ProcessOptions},
};

const DEFAULTS: [&str; 5] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/processor/palette.png"),
    "a dog",
    "a cat",
    "a bridge over the river",
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    if arguments.is_empty() {
        arguments.extend(DEFAULTS.map(str::to_owned));
    }
    let [model, image, labels @ ..] = arguments.as_slice() else {
        return Err("expected MODEL, IMAGE and labels".into());
    };

    let directory = hub::resolve(model, &mut ())?;
    let processor = Processor::from_pretrained(&directory)?;
    let model = Idefics::from_pretrained(&directory, &LoadOptions::default())?;

    let image = Segment::Image(ImageSource::Path(image.into()));
    let prompt = vec![image, Segment::text("This is a photo of")];
    let inputs = processor.process(&[prompt], &ProcessOptions::default())?.remove(0);

    // The tokenizer puts a space before every text, so a label is tokenized as it would be in the sentence.
    let continuations =
        labels.iter().map(|label| processor.tokenize(label)).collect::<Result<Vec<_>, _>>()?;
    let options = ScoreOptions::default();
    let scored = score_continuations(&model, &inputs, &continuations, &options)?;

    let best = scored.iter().map(idefics::generate::Scored::sum).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scored.iter().map(|scored| (scored.sum() - best).exp()).sum();
    let mut ranked: Vec<_> = labels.iter().zip(&scored).collect();
    ranked.sort_by(|(_, a), (_, b)| b.sum().total_cmp(&a.sum()));
    for (label, scored) in ranked {
        println!(
            "{:6.2}%  log-probability {:9.3}, {:7.3} a token  {label}",
            100.0 * (scored.sum() - best).exp() / total,
            scored.sum(),
            scored.mean()
        );
    }

    // Without a continuation the prompt itself is rated, from its second token.
    let whole = ScoreRequest { inputs, continuation: None };
    let rated = &score(&model, &[whole], &options)?[0];
    println!(
        "the prompt's {} tokens: log-probability {:.3}, perplexity {:.1}",
        rated.token_ids.len(),
        rated.sum(),
        rated.perplexity()
    );
    Ok(())
}
