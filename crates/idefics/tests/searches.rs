//! Every search and rule of generation on the tiny checkpoints against the sequences of the reference
//! (`fixtures/tiny*/generation.json`): tokens exactly, log-probabilities and scores of beams within rounding. The
//! reference found the same sequences in f64, so rounding cannot excuse another one.

mod common;

use common::{TINIES, TINY, Tiny};
use idefics::{
    ComputeType, Idefics, LoadOptions, Processor, SequenceInputs,
    generate::{FinishReason, Generated, GenerationConfig, Request, Scheduler, generate_requests, padded},
    processor::SpecialTokenText,
};
use idefics_testing::{assert_close, fixture, fixture_json, tolerance};
use rayon::ThreadPoolBuilder;
use serde_json::Value;

/// The checkpoint's own `generation_config.json` with the entry's options over it, as `generate` merges them. The
/// reference bans no token by itself.
fn config_of(tiny: Tiny, entry: &Value) -> GenerationConfig {
    let mut options = fixture_json(&format!("{}/generation_config.json", tiny.name));
    for (name, value) in entry["options"].as_object().expect("options") {
        options[name] = value.clone();
    }
    let mut config = GenerationConfig::from_json(&options.to_string()).expect("known options");
    config.skip_special_tokens = false;
    config.logprobs = Some(0);
    config
}

fn entries(tiny: Tiny) -> Vec<Value> {
    let fixture = fixture_json(&format!("{}/generation.json", tiny.name));
    fixture["entries"].as_array().expect("entries").clone()
}

fn inputs_of(tiny: Tiny, entry: &Value) -> Vec<SequenceInputs> {
    let names = entry["inputs"].as_array().expect("names");
    names.iter().map(|name| tiny.input(name.as_str().expect("a name"))).collect()
}

fn processor(tiny: Tiny) -> Processor {
    Processor::from_pretrained(fixture(tiny.name)).expect("a sound processor")
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("token ids")
}

#[test]
fn every_entry_gives_the_reference_s_sequences() {
    for (tiny, least) in TINIES.into_iter().zip([41, 6]) {
        let model = tiny.model();
        let processor = processor(tiny);
        let entries = entries(tiny);
        assert!(entries.len() >= least, "the fixture is whole");
        for entry in &entries {
            let config = config_of(tiny, entry);
            let inputs = inputs_of(tiny, entry);
            let generated = model.generate_text(&processor, &inputs, &config).expect("answers");
            check_entry(&format!("{} {}", tiny.name, entry["name"]), entry, &config, &generated);
        }
    }
}

/// Alone or in its batch, the reference fills finished rows up; so do we to compare.
fn check_entry(what: &str, entry: &Value, config: &GenerationConfig, generated: &[Generated]) {
    let rows = entry["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), generated.len(), "{what}: prompts");
    let filler = config.filler_token_id().expect("the checkpoints have a padding token");
    let tokens = |generated: &Generated| -> Vec<Vec<u32>> {
        generated.sequences.iter().map(|sequence| sequence.token_ids.clone()).collect()
    };
    let got: Vec<Vec<Vec<u32>>> = if entry["batched"] == true {
        let together = padded(&generated.iter().flat_map(tokens).collect::<Vec<_>>(), filler);
        together.chunks(config.num_return_sequences).map(<[_]>::to_vec).collect()
    } else {
        generated.iter().map(|row| padded(&tokens(row), filler)).collect()
    };
    for (row, (expected, got)) in rows.iter().zip(got).enumerate() {
        let what = format!("{what}, row {row}");
        let expected = expected.as_array().expect("results");
        let tokens: Vec<Vec<u32>> = expected.iter().map(|result| ids(&result["token_ids"])).collect();
        assert_eq!(got, tokens, "{what}");
        for (result, sequence) in expected.iter().zip(&generated[row].sequences) {
            if let Some(score) = result["score"].as_f64() {
                let got = sequence.score.expect("a beam has a score");
                assert_close(&format!("{what}: score"), &[got], &[score as f32], tolerance::SEQUENCE_SCORE);
            }
            if let Some(expected) = result["logprobs"].as_array() {
                let expected: Vec<f32> =
                    expected.iter().map(|x| x.as_f64().expect("a number") as f32).collect();
                let got: Vec<f32> = sequence.logprobs.iter().map(|token| token.logprob).collect();
                assert_close(&format!("{what}: log-probabilities"), &got, &expected, tolerance::LOGITS);
            }
            check_end(&what, config, sequence.finish_reason, &sequence.token_ids);
        }
    }
}

/// The reason agrees with the tokens.
fn check_end(what: &str, config: &GenerationConfig, reason: FinishReason, tokens: &[u32]) {
    let last = tokens.last().copied();
    match reason {
        FinishReason::EndToken(id) => assert_eq!(last, Some(id), "{what}"),
        FinishReason::StopString(index) => assert!(index < config.stop_strings.len(), "{what}"),
        FinishReason::Length => {
            assert!(last.is_some_and(|id| !config.eos_token_ids.contains(&id)), "{what}");
            let room = config.max_new_tokens.unwrap_or(usize::MAX);
            assert!(tokens.len() == room || config.max_length.is_some(), "{what}");
        }
        other => panic!("{what}: ended by {other:?}"),
    }
}

#[test]
fn stop_strings_end_the_text_where_the_reference_ends_it() {
    let model = TINY.model();
    let processor = processor(TINY);
    let entries = entries(TINY);
    let entries: Vec<_> =
        entries.iter().filter(|entry| entry["options"].get("stop_strings").is_some()).collect();
    assert_eq!(entries.len(), 5);
    for entry in entries {
        let name = &entry["name"];
        let config = config_of(TINY, entry);
        let inputs = inputs_of(TINY, entry);
        let expected = &entry["rows"][0][0];
        let whole = expected["text"].as_str().expect("a text");
        let answer =
            model.generate_text(&processor, &inputs, &config).expect("answers").remove(0).sequences.remove(0);
        let decoded = processor.decode(&answer.token_ids, SpecialTokenText::Keep).expect("a text");
        assert_eq!(decoded, whole, "{name}");
        // Behind its prompt an answer keeps the space that its first token begins with.
        let text = answer.text.expect("a decoder was given");
        assert_eq!(text.trim_start(), whole.trim_start(), "{name}");

        let FinishReason::StopString(index) = answer.finish_reason else {
            assert_eq!(
                (name.as_str(), answer.finish_reason),
                (Some("stop_string_absent"), FinishReason::Length)
            );
            continue;
        };
        let stop = &config.stop_strings[index];
        let (before, _) =
            text.split_once(stop.as_str()).unwrap_or_else(|| panic!("{name}: no {stop:?} in {text:?}"));
        let trimmed = GenerationConfig { trim_stop_strings: true, ..config.clone() };
        let answer = model
            .generate_text(&processor, &inputs, &trimmed)
            .expect("answers")
            .remove(0)
            .sequences
            .remove(0);
        assert_eq!(answer.text.as_deref(), Some(before), "{name}, trimmed");
        assert_eq!(answer.token_ids, ids(&expected["token_ids"]), "{name}: the tokens stay");
    }
}

/// Kinds of search, on prompts with no, one and two pictures.
fn searches() -> [GenerationConfig; 4] {
    let base = GenerationConfig {
        max_new_tokens: Some(10),
        eos_token_ids: vec![2, 308],
        pad_token_id: Some(0),
        logprobs: Some(3),
        ..Default::default()
    };
    let sample =
        GenerationConfig { do_sample: true, seed: Some(11), temperature: 0.9, top_p: 0.95, ..base.clone() };
    [
        GenerationConfig { repetition_penalty: 1.2, ..base.clone() },
        GenerationConfig { num_return_sequences: 3, ..sample.clone() },
        GenerationConfig { num_beams: 3, num_return_sequences: 2, ..base },
        GenerationConfig { num_beams: 2, ..sample },
    ]
}

/// What the model says, without the clock.
fn answers(
    model: &Idefics,
    inputs: &[SequenceInputs],
    config: &GenerationConfig,
    scheduler: Scheduler,
) -> Vec<String> {
    let requests: Vec<_> = inputs.iter().map(|inputs| Request::new(inputs, config)).collect();
    let generated =
        generate_requests(model, None, &requests, scheduler, |_| std::ops::ControlFlow::Continue(()));
    generated.expect("answers").iter().map(|generated| format!("{:?}", generated.sequences)).collect()
}

/// Batch, threads, chunks, cache and schedule change no bit: not of the tokens, the log-probabilities or the draws.
#[test]
fn an_answer_depends_on_its_prompt_options_and_seed_alone() {
    let on = |threads, run: &(dyn Fn() -> Vec<String> + Sync)| {
        ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool").install(run)
    };
    for tiny in TINIES {
        for compute in [ComputeType::F32, ComputeType::Bf16] {
            let model = tiny.open(&LoadOptions { compute, ..Default::default() });
            let inputs = tiny.inputs();
            for config in searches() {
                let what = format!("{} {compute:?} {config:?}", tiny.name);
                let run = |config: &GenerationConfig, scheduler| answers(&model, &inputs, config, scheduler);
                let expected = run(&config, Scheduler::default());
                for threads in [1, 3] {
                    assert_eq!(
                        on(threads, &|| run(&config, Scheduler::default())),
                        expected,
                        "{what}: {threads} threads"
                    );
                }
                for (input, expected) in inputs.iter().zip(&expected) {
                    let alone = answers(&model, std::slice::from_ref(input), &config, Scheduler::default());
                    assert_eq!(alone[0], *expected, "{what}: alone");
                }
                let chunked = GenerationConfig { prefill_chunk: 5, ..config.clone() };
                assert_eq!(run(&chunked, Scheduler::default()), expected, "{what}: chunks");
                let uncached = GenerationConfig { use_cache: false, ..config.clone() };
                assert_eq!(run(&uncached, Scheduler::default()), expected, "{what}: no cache");
                let tight = Scheduler { max_step_tokens: 7, max_sequences: 3, ..Scheduler::default() };
                assert_eq!(run(&config, tight), expected, "{what}: a tight schedule");
            }
        }
    }
}
