//! Each logits processor and warper by itself against transformers' own class (`fixtures/warpers.json`), on broad,
//! peaked, nearly flat and tied scores.

use idefics::generate::{GenerationConfig, Lengths, LogitsProcessors};
use idefics_testing::{assert_close, fixture_json, tolerance};
use serde_json::{Map, Value, json};

/// A score; JSON has no infinities and no NaN, so they are strings.
fn score(value: &Value) -> f32 {
    match value.as_str() {
        Some(name) => name.parse().expect("inf, -inf or nan"),
        None => value.as_f64().expect("a number") as f32,
    }
}

fn scores(row: &Value) -> Vec<f32> {
    row.as_array().expect("a row of scores").iter().map(score).collect()
}

/// The options under which a model's `generate` makes exactly this processor.
fn config_of(entry: &Value, eos: &Value) -> GenerationConfig {
    let option = entry["option"].as_str().expect("an option");
    let mut options = Map::new();
    if ["temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"]
        .contains(&option)
    {
        options.extend([("do_sample".to_owned(), json!(true)), ("top_k".to_owned(), json!(0))]);
    }
    // A beam search keeps one token more than there are end tokens.
    if entry["min_tokens_to_keep"] == 2 {
        options.extend([("num_beams".to_owned(), json!(2)), ("eos_token_id".to_owned(), json!(2))]);
    } else if ["min_length", "min_new_tokens", "exponential_decay_length_penalty", "bad_words_ids"]
        .contains(&option)
    {
        options.insert("eos_token_id".to_owned(), eos.clone());
    }
    options.insert(option.to_owned(), entry["value"].clone());
    GenerationConfig::from_json(&Value::Object(options).to_string()).expect("known options")
}

#[test]
fn each_processor_agrees_with_the_reference_s() {
    let table = fixture_json("warpers.json");
    let entries = table["entries"].as_array().expect("entries");
    assert!(entries.len() > 60, "the fixture is whole");
    let tokens: Vec<Vec<u32>> = serde_json::from_value(table["tokens"].clone()).expect("tokens");
    let prompt_length = table["prompt_length"].as_u64().expect("a length") as usize;
    for entry in entries {
        let config = config_of(entry, &table["eos_token_id"]);
        config.validate().expect("options in range");
        for (row, history) in tokens.iter().enumerate() {
            let mut history = history.as_slice();
            let mut prompt = entry["begin_index"].as_u64().map_or(prompt_length, |index| index as usize);
            if entry["option"] == "repetition_penalty" {
                // The reference is told to overlook left padding, which does not exist here.
                let pads = history.iter().take_while(|&&token| token == 0).count();
                (history, prompt) = (&history[pads..], prompt - pads);
            }
            let lengths = Lengths {
                prompt,
                min: config.min_new_tokens.map_or(config.min_length, |new| prompt + new),
                max: entry["max_length"].as_u64().map_or(100, |length| length as usize),
            };
            let mut got = scores(&table["scores"][row]);
            LogitsProcessors::new(&config, lengths, &history[..prompt])
                .process(history, &mut got, None)
                .expect("scores");
            let keep = &entry["min_tokens_to_keep"];
            let what = format!("{} = {}, keeping {keep}, row {row}", entry["option"], entry["value"]);
            assert_close(&what, &got, &scores(&entry["scores"][row]), tolerance::SCORES);
        }
    }
}

#[test]
fn invalid_values_become_what_the_reference_makes_of_them() {
    let table = &fixture_json("warpers.json")["remove_invalid_values"];
    let config = GenerationConfig { remove_invalid_values: true, ..Default::default() };
    let mut got = scores(&table["scores"]);
    LogitsProcessors::new(&config, Lengths { prompt: 1, min: 0, max: 9 }, &[1])
        .process(&[1], &mut got, None)
        .expect("scores");
    assert_close("cleaned scores", &got, &scores(&table["processed"]), tolerance::EXACT);
}
