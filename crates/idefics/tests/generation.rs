//! Generation on the golden models against what the reference printed (transformers 5.23.0, f32, one CPU), and
//! its invariances on real caches.

use std::sync::Arc;

use idefics::{
    ComputeType, Idefics, LoadOptions, Processor, SequenceInputs,
    checkpoint::Checkpoint,
    generate::{EarlyStopping, Generated, GenerationConfig, ScoreOptions, ScoreRequest, score},
    processor::PixelValues,
};
use idefics_testing::{
    Golden, Tensors, assert_close, fixture, fixture_json, golden_fill, tolerance, write_golden_checkpoint,
};
use serde::Deserialize;

fn model(golden: Golden) -> Idefics {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_golden_checkpoint(dir.path(), golden);
    let checkpoint = Checkpoint::open(dir.path()).expect("a sound checkpoint");
    let options = LoadOptions { compute: ComputeType::F32, ..Default::default() };
    Idefics::from_checkpoint(checkpoint, &options).expect("a model")
}

/// The two rows of the reference's batch without their padding. Its second picture of row 1 is all zero and seen
/// by no token.
fn rows() -> [SequenceInputs; 2] {
    let pixels = golden_fill("pixel_values", &[2, 2, 3, 8, 8]);
    let picture =
        |index: usize| Arc::new(PixelValues::new(pixels[index * 192..(index + 1) * 192].to_vec(), 8, 8));
    [
        SequenceInputs {
            token_ids: vec![1, 5, 41, 40, 7, 8, 9],
            image_index: vec![None, None, Some(0), Some(0), Some(1), Some(1), Some(1)],
            images: vec![picture(0), picture(1)],
        },
        SequenceInputs {
            token_ids: vec![1, 5, 6, 40, 9],
            image_index: vec![None, None, None, Some(0), Some(0)],
            images: vec![picture(2)],
        },
    ]
}

/// Eight new tokens, none of them the end.
fn eight() -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: Some(8),
        min_new_tokens: Some(8),
        eos_token_ids: vec![2],
        pad_token_id: Some(0),
        ..Default::default()
    }
}

fn tokens(generated: &Generated) -> String {
    let row = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    generated.sequences.iter().map(|sequence| row(&sequence.token_ids)).collect::<Vec<_>>().join(" / ")
}

/// Checks both rows in a batch, and each alone.
fn check(golden: Golden, config: &GenerationConfig, expected: [&str; 2]) {
    let model = model(golden);
    let rows = rows();
    let batch = model.generate(&rows, config).expect("an answer");
    for ((row, generated), expected) in rows.iter().zip(&batch).zip(expected) {
        assert_eq!(tokens(generated), expected, "{golden:?} {config:?}");
        let alone = model.generate(std::slice::from_ref(row), config).expect("an answer");
        assert_eq!(alone[0].sequences, generated.sequences, "{golden:?} alone {config:?}");
    }
}

#[test]
fn greedy_search_gives_the_printed_tokens() {
    check(Golden::A, &eight(), ["17 23 5 23 5 23 5 23", "17 23 5 23 5 30 17 23"]);
    check(Golden::B, &eight(), ["17 17 41 28 5 23 28 5", "17 17 17 17 17 17 33 17"]);
}

#[test]
fn banned_image_tokens_give_the_printed_tokens() {
    let listed = GenerationConfig { bad_words_ids: vec![vec![40], vec![41], vec![42]], ..eight() };
    let by_default = GenerationConfig { image_token_ids: vec![40, 41, 42], ..eight() };
    for config in [listed, by_default] {
        check(Golden::A, &config, ["17 23 5 23 5 23 5 23", "17 23 5 23 5 30 17 23"]);
        check(Golden::B, &config, ["17 17 17 17 17 17 17 36", "17 17 17 17 17 17 33 17"]);
    }
}

#[test]
fn repetition_rules_give_the_printed_tokens() {
    let config = GenerationConfig { repetition_penalty: 1.3, ..eight() };
    check(Golden::A, &config, ["17 23 5 30 5 23 28 5", "17 23 28 5 30 5 16 35"]);
    check(Golden::B, &config, ["17 17 30 5 23 28 5 20", "17 17 17 17 33 17 36 10"]);
    let config = GenerationConfig { no_repeat_ngram_size: 2, ..eight() };
    check(Golden::A, &config, ["17 23 5 23 28 5 30 5", "17 23 5 23 30 5 30 17"]);
    check(Golden::B, &config, ["17 17 41 28 5 23 28 28", "17 17 33 17 28 17 10 34"]);
}

#[test]
fn beam_search_gives_the_printed_tokens() {
    let config = GenerationConfig { num_beams: 3, ..eight() };
    check(Golden::A, &config, ["17 23 5 23 5 23 28 5", "17 23 28 5 23 28 5 30"]);
    check(Golden::B, &config, ["28 5 23 28 5 23 28 5", "17 17 17 17 17 17 33 17"]);
    let config = GenerationConfig { num_return_sequences: 3, length_penalty: 0.5, ..config };
    check(
        Golden::A,
        &config,
        [
            "17 23 5 23 5 23 28 5 / 17 23 5 23 28 5 23 5 / 17 23 5 23 28 5 23 28",
            "17 23 28 5 23 28 5 30 / 17 23 28 5 23 28 5 23 / 17 23 28 5 23 5 30 14",
        ],
    );
    check(
        Golden::B,
        &config,
        [
            "28 5 23 28 5 23 28 5 / 28 5 23 28 5 23 28 28 / 28 5 23 28 5 23 28 17",
            "17 17 17 17 17 17 33 17 / 17 17 17 17 17 33 17 33 / 17 17 17 17 17 33 17 9",
        ],
    );
}

#[test]
fn an_end_token_ends_its_row_alone() {
    let config = GenerationConfig { eos_token_ids: vec![5], min_new_tokens: None, ..eight() };
    check(Golden::A, &config, ["17 23 5", "17 23 5"]);
    check(Golden::B, &config, ["17 17 41 28 5", "17 17 17 17 17 17 33 17"]);
}

/// Beam search with end token 5: the sequences of both rows and their scores.
fn check_scored(golden: Golden, change: &GenerationConfig, expected: [(&str, &[f32]); 2]) {
    let model = model(golden);
    for (generated, (sequences, scores)) in
        model.generate(&rows(), change).expect("an answer").iter().zip(expected)
    {
        assert_eq!(tokens(generated), sequences, "{golden:?} {change:?}");
        let got: Vec<f32> = generated.sequences.iter().filter_map(|sequence| sequence.score).collect();
        assert_close("beam scores", &got, scores, tolerance::SEQUENCE_SCORE);
    }
}

#[test]
fn beams_that_end_early_give_the_printed_sequences_and_scores() {
    let base = GenerationConfig {
        num_beams: 3,
        num_return_sequences: 3,
        eos_token_ids: vec![5],
        min_new_tokens: None,
        ..eight()
    };
    let b1 = "17 17 17 17 17 17 33 17 / 17 17 17 17 17 33 17 33 / 17 17 17 17 17 33 17 9";
    let a1 = ("17 23 28 5 / 17 23 28 28 5 / 17 23 5", &[-2.427_9, -2.451_09, -2.489_79][..]);
    check_scored(
        Golden::A,
        &base,
        [("17 23 5 / 17 23 28 5 / 17 23 32 5", &[-2.504_87, -2.572_49, -2.600_47]), a1],
    );
    let b1_default = (b1, &[-2.565_97, -2.573_9, -2.574_1][..]);
    check_scored(
        Golden::B,
        &base,
        [("17 17 41 28 5 / 28 5 / 17 30 5", &[-2.518_92, -2.566_27, -2.580_5]), b1_default],
    );

    let immediate = GenerationConfig { early_stopping: EarlyStopping::Immediate, ..base.clone() };
    check_scored(Golden::A, &immediate, [("5 / 30 5 / 11 5", &[-2.680_92, -2.813_49, -2.836_19]), a1]);
    check_scored(
        Golden::B,
        &immediate,
        [("28 5 / 17 30 5 / 5", &[-2.566_27, -2.580_5, -2.708_02]), b1_default],
    );

    let never =
        GenerationConfig { early_stopping: EarlyStopping::Never, length_penalty: 2.0, ..base.clone() };
    check_scored(
        Golden::A,
        &never,
        [
            (
                "17 23 32 23 28 28 28 5 / 17 23 32 23 32 23 28 5 / 17 23 32 23 28 28 32 5",
                &[-0.328_66, -0.329_12, -0.334_72],
            ),
            (
                "17 23 28 17 23 28 28 5 / 17 23 28 17 23 28 28 28 / 17 23 17 23 28 28 28 5",
                &[-0.310_22, -0.315_45, -0.315_58],
            ),
        ],
    );
    check_scored(
        Golden::B,
        &never,
        [
            (
                "17 17 41 28 28 28 28 5 / 17 17 17 41 28 28 28 5 / 17 17 41 28 28 28 28 28",
                &[-0.316_73, -0.319_38, -0.321_82],
            ),
            (b1, &[-0.320_75, -0.321_74, -0.321_76]),
        ],
    );

    let short = GenerationConfig { length_penalty: -1.0, ..base.clone() };
    check_scored(
        Golden::A,
        &short,
        [
            ("5 / 30 5 / 11 5", &[-2.680_92, -11.253_96, -11.344_76]),
            ("17 23 5 / 17 23 28 5 / 17 23 28 28 5", &[-22.408_13, -38.846_36, -61.277_23]),
        ],
    );
    check_scored(
        Golden::B,
        &short,
        [("5 / 28 5 / 17 30 5", &[-2.708_02, -10.265_08, -23.224_46]), (b1, &[-164.222, -164.73, -164.743])],
    );

    let two_ends = GenerationConfig {
        num_beams: 2,
        num_return_sequences: 2,
        eos_token_ids: vec![5, 23],
        min_new_tokens: Some(3),
        max_new_tokens: Some(6),
        ..base
    };
    check_scored(
        Golden::A,
        &two_ends,
        [
            ("17 30 30 5 / 17 30 17 23", &[-2.755_69, -2.782_85]),
            ("17 14 17 23 / 17 14 30 17 23", &[-2.554_54, -2.611_77]),
        ],
    );
    check_scored(
        Golden::B,
        &two_ends,
        [
            ("17 17 41 28 5 / 17 17 41 28 28 5", &[-2.518_92, -2.520_6]),
            ("17 17 17 17 17 17 / 17 17 17 17 17 33", &[-2.525_2, -2.542_84]),
        ],
    );
}

#[test]
fn chunks_and_caches_change_no_answer() {
    for golden in [Golden::A, Golden::B] {
        let model = model(golden);
        for base in [
            GenerationConfig { logprobs: Some(1), ..eight() },
            GenerationConfig { do_sample: true, seed: Some(3), num_return_sequences: 2, ..eight() },
            GenerationConfig { num_beams: 3, num_return_sequences: 2, ..eight() },
        ] {
            let whole = model.generate(&rows(), &base).expect("an answer");
            for changed in [
                GenerationConfig { prefill_chunk: 2, ..base.clone() },
                GenerationConfig { use_cache: false, ..base.clone() },
            ] {
                let other = model.generate(&rows(), &changed).expect("an answer");
                for (whole, other) in whole.iter().zip(&other) {
                    assert_eq!(whole.sequences, other.sequences, "{golden:?} {changed:?}");
                }
            }
        }
    }
}

#[test]
fn scores_of_an_answer_are_the_log_probabilities_it_was_written_with() {
    let model = model(Golden::A);
    let config = GenerationConfig { logprobs: Some(0), ..eight() };
    for (inputs, generated) in rows().into_iter().zip(model.generate(&rows(), &config).expect("an answer")) {
        let answer = &generated.sequences[0];
        let request = ScoreRequest { inputs, continuation: Some(answer.token_ids.clone()) };
        let scored = score(&model, &[request], &ScoreOptions::default()).expect("scores").remove(0);
        let got: Vec<f32> = scored.logprobs.iter().map(|&logprob| logprob as f32).collect();
        let written: Vec<f32> = answer.logprobs.iter().map(|token| token.logprob).collect();
        assert_eq!(got, written);
    }
}

/// One run of the reference on a checkpoint of `fixtures/`.
#[derive(Deserialize)]
struct Entry {
    name: String,
    /// Names of prompts.
    inputs: Vec<String>,
    /// Whether they were one batch, whose rows are padded behind their ends.
    batched: bool,
    options: serde_json::Value,
    /// Answers of each prompt.
    rows: Vec<Vec<Answer>>,
}

#[derive(Deserialize)]
struct Answer {
    token_ids: Vec<u32>,
    logprobs: Option<Vec<f32>>,
    score: Option<f32>,
    text: Option<String>,
}

/// A prompt of `expected.safetensors`.
fn prompt(tensors: &Tensors, name: &str, side: usize) -> SequenceInputs {
    let (_, token_ids) = tensors.i64(&format!("{name}.input_ids"));
    let (shape, mask) = tensors.i64(&format!("{name}.image_attention_mask"));
    let (_, images) = tensors.i64(&format!("{name}.images"));
    let pixels = golden_fill("pixel_values", &[3, 3, side, side]);
    let picture = |&index: &i64| {
        let pixels = pixels.chunks(3 * side * side).nth(index as usize).expect("one of three pictures");
        Arc::new(PixelValues::new(pixels.to_vec(), side, side))
    };
    let image = |row: &[i64]| row.iter().position(|&seen| seen == 1).map(|index| index as u32);
    SequenceInputs {
        token_ids: token_ids.iter().map(|&id| id as u32).collect(),
        image_index: mask.chunks(shape[1]).map(image).collect(),
        images: images.iter().map(picture).collect(),
    }
}

fn check_fixture(directory: &str) {
    let options = LoadOptions { compute: ComputeType::F32, ..Default::default() };
    let model = Idefics::from_pretrained(fixture(directory), &options).expect("a sound checkpoint");
    let processor = Processor::from_pretrained(fixture(directory)).expect("a sound processor");
    let tensors = Tensors::fixture(&format!("{directory}/expected.safetensors"));
    let entries = fixture_json(&format!("{directory}/generation.json"))["entries"].take();
    let entries: Vec<Entry> = serde_json::from_value(entries).expect("runs of the reference");
    assert!(entries.len() > 5, "the runs are there");
    let side = model.config().vision_config.image_size;
    for entry in entries {
        // Without its special tokens: the reference bans no tokens of pictures by itself.
        let config = model.default_generation(None).expect("a sound proposal");
        let config = config.with_json(entry.options.clone()).expect("options of the reference");
        let is_greedy = config.num_beams == 1;
        let config = GenerationConfig { logprobs: is_greedy.then_some(0), ..config };
        let inputs: Vec<_> = entry.inputs.iter().map(|name| prompt(&tensors, name, side)).collect();
        let generated = model.generate_text(&processor, &inputs, &config).expect("answers");
        for ((name, generated), expected) in entry.inputs.iter().zip(&generated).zip(&entry.rows) {
            let what = format!("{directory}, {}, {name}", entry.name);
            assert_eq!(generated.sequences.len(), expected.len(), "{what}");
            for (got, expected) in generated.sequences.iter().zip(expected) {
                let (ids, padding) =
                    expected.token_ids.split_at(got.token_ids.len().min(expected.token_ids.len()));
                assert_eq!(got.token_ids, ids, "{what}");
                let filler = config.filler_token_id();
                let is_padded = entry.batched || config.num_return_sequences > 1;
                assert!(
                    padding.iter().all(|&id| is_padded && Some(id) == filler),
                    "{what}: expected {:?}, got {:?}",
                    expected.token_ids,
                    got.token_ids
                );
                if let Some(logprobs) = &expected.logprobs {
                    let got: Vec<f32> = got.logprobs.iter().map(|token| token.logprob).collect();
                    assert_close(&what, &got, logprobs, tolerance::LOGITS);
                }
                if let Some(score) = expected.score {
                    let got = got.score.expect("a beam has a score");
                    assert_close(&what, &[got], &[score], tolerance::SEQUENCE_SCORE);
                }
                if let Some(text) = &expected.text {
                    // The reference decodes the new tokens alone, so that a leading space is lost.
                    let got = got.text.as_deref().expect("there is a decoder");
                    assert_eq!(got.trim_start_matches(' '), text, "{what}");
                }
            }
        }
    }
}

#[test]
fn fresh_checkpoints_generate_what_the_reference_does() {
    check_fixture("tiny");
    check_fixture("tiny-base");
}
