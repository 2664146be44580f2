//! From files to text: a checkpoint directory, prompts of words and picture files, and the answers that the whole
//! reference gives to them (`fixtures/tiny*/answers.json`).

mod common;

use std::collections::BTreeMap;

use common::{TINIES, TINY, Tiny};
use idefics::{
    Processor, Prompt, Segment,
    generate::{FinishReason, Generated, GenerationConfig},
    processor::{ImageSource, ProcessOptions, SpecialTokenText},
};
use idefics_testing::{assert_close, fixture, fixture_json, tolerance};
use serde_json::Value;

fn prompts_of(entry: &Value) -> Vec<Prompt> {
    let segment = |segment: &Value| {
        if let Some(text) = segment["text"].as_str() {
            return Segment::text(text);
        }
        let name = segment["image"].as_str().expect("a text or a picture");
        Segment::Image(ImageSource::Path(fixture("processor").join(name)))
    };
    let prompt = |prompt: &Value| prompt.as_array().expect("segments").iter().map(segment).collect();
    entry["prompts"].as_array().expect("prompts").iter().map(prompt).collect()
}

struct Answers {
    every_options: Value,
    entries: Vec<Value>,
}

fn answers(tiny: Tiny) -> Answers {
    let file = fixture_json(&format!("{}/answers.json", tiny.name));
    let entries = file["entries"].as_array().expect("entries").clone();
    Answers { every_options: file["every_options"].clone(), entries }
}

#[test]
fn prompts_of_files_and_words_get_the_reference_s_answers() {
    for (tiny, least) in TINIES.into_iter().zip([12, 4]) {
        let model = tiny.model();
        let processor = Processor::from_pretrained(fixture(tiny.name)).expect("a sound processor");
        // What the command and the examples use: no image tokens, and an utterance ends the answer.
        let defaults = model.default_generation(Some(processor.special_tokens())).expect("sound defaults");
        let Answers { every_options, entries } = answers(tiny);
        let banned: Vec<u32> = defaults.image_token_ids.clone();
        let expected: Vec<Vec<u32>> =
            serde_json::from_value(every_options["bad_words_ids"].clone()).expect("ids");
        assert_eq!(banned.iter().map(|&id| vec![id]).collect::<Vec<_>>(), expected, "{}: banned", tiny.name);
        assert_eq!(
            serde_json::json!(defaults.eos_token_ids),
            every_options["eos_token_id"],
            "{}: ends",
            tiny.name
        );
        assert!(entries.len() >= least, "the fixture is whole");
        for entry in &entries {
            let option = |name: &str| entry["options"].get(name).or(every_options.get(name));
            let count = |name: &str| option(name).and_then(Value::as_u64).map(|n| n as usize);
            let config = GenerationConfig {
                max_new_tokens: count("max_new_tokens"),
                min_new_tokens: count("min_new_tokens"),
                num_beams: count("num_beams").unwrap_or(1),
                num_return_sequences: count("num_return_sequences").unwrap_or(1),
                repetition_penalty: option("repetition_penalty").and_then(Value::as_f64).unwrap_or(1.0),
                ..defaults.clone()
            };
            let prompts = prompts_of(entry);
            let inputs = processor.process(&prompts, &ProcessOptions::default()).expect("inputs");
            let generated = model.generate_text(&processor, &inputs, &config).expect("answers");
            for (row, (inputs, generated)) in inputs.iter().zip(&generated).enumerate() {
                let what = format!("{} {}, prompt {row}", tiny.name, entry["name"]);
                check(&what, &processor, &inputs.token_ids, generated, &entry["answers"][row]);
                assert_eq!(generated.usage.images, inputs.images.len(), "{what}");
                assert_eq!(generated.usage.prompt_tokens, inputs.token_ids.len(), "{what}");
            }
        }
    }
}

fn check(what: &str, processor: &Processor, prompt: &[u32], generated: &Generated, expected: &Value) {
    let expected = expected.as_array().expect("answers");
    assert_eq!(generated.sequences.len(), expected.len(), "{what}: answers");
    for (answer, expected) in generated.sequences.iter().zip(expected) {
        assert_eq!(serde_json::json!(answer.token_ids), expected["token_ids"], "{what}: tokens");
        let decode = |ids: &[u32]| processor.decode(ids, SpecialTokenText::Skip).expect("a text");
        assert_eq!(decode(&answer.token_ids), expected["text"], "{what}: text");
        let whole: Vec<u32> = prompt.iter().chain(&answer.token_ids).copied().collect();
        assert_eq!(decode(&whole), expected["whole"], "{what}: prompt and answer");
        // The answer's text is what stands behind the prompt.
        let text = answer.text.as_deref().expect("a decoder was given");
        assert_eq!(
            format!("{}{text}", decode(prompt)),
            expected["whole"],
            "{what}: answer behind its prompt"
        );
        if let Some(score) = expected["score"].as_f64() {
            let got = answer.score.expect("a beam has a score");
            assert_close(&format!("{what}: score"), &[got], &[score as f32], tolerance::SEQUENCE_SCORE);
        }
    }
}

#[test]
fn a_stream_joined_is_the_answer() {
    let model = TINY.model();
    let processor = Processor::from_pretrained(fixture(TINY.name)).expect("a sound processor");
    let defaults = model.default_generation(Some(processor.special_tokens())).expect("sound defaults");
    let config = GenerationConfig { max_new_tokens: Some(16), ..defaults };
    let Answers { entries, .. } = answers(TINY);
    let entry = entries.iter().find(|entry| entry["name"] == "batch").expect("an entry of several prompts");
    let inputs = processor.process(&prompts_of(entry), &ProcessOptions::default()).expect("inputs");
    let mut texts = BTreeMap::<usize, String>::new();
    let mut tokens = BTreeMap::<usize, Vec<u32>>::new();
    let mut ends = BTreeMap::<usize, FinishReason>::new();
    for event in model.stream(&processor, &inputs, &config).expect("a stream") {
        let event = event.expect("an event");
        texts.entry(event.request).or_default().push_str(&event.text);
        tokens.entry(event.request).or_default().extend(event.token_id);
        if let Some(reason) = event.finish_reason {
            assert_eq!(ends.insert(event.request, reason), None, "an answer ends once");
        }
    }
    assert_eq!(ends.len(), inputs.len());
    for (row, inputs) in inputs.iter().enumerate() {
        let expected = &entry["answers"][row][0];
        assert_eq!(serde_json::json!(tokens[&row]), expected["token_ids"], "prompt {row}");
        let prompt = processor.decode(&inputs.token_ids, SpecialTokenText::Skip).expect("a text");
        assert_eq!(format!("{prompt}{}", texts[&row]), expected["whole"], "prompt {row}");
    }
}
