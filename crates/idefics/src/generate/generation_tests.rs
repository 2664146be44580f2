use std::sync::atomic::{AtomicBool, Ordering};

use serde::Deserialize;

use super::*;
use crate::generate::{
    Completion, EarlyStopping, FinishReason, LogitsOf, Usage, padded,
    stub::{ByteTokenizer, END_OF_UTTERANCE, StubModel},
};

const VOCAB: usize = 24;

fn inputs(token_ids: &[u32]) -> SequenceInputs {
    SequenceInputs {
        token_ids: token_ids.to_vec(),
        image_index: vec![None; token_ids.len()],
        images: Vec::new(),
    }
}

/// Three prompts of different lengths, pictures in two of them.
fn prompts() -> Vec<SequenceInputs> {
    let mut prompts = vec![inputs(&[1, 5, 7]), inputs(&[1, 9, 9, 4, 2, 11, 17, 3]), inputs(&[3])];
    prompts[1].image_index[3..].fill(Some(0));
    prompts[1].image_index[6..].fill(Some(1));
    prompts[2].image_index[0] = Some(0);
    prompts
}

fn run(model: &StubModel, prompts: &[SequenceInputs], config: &GenerationConfig) -> Vec<Generated> {
    generate(model, Some(&ByteTokenizer), prompts, config, |_| ControlFlow::Continue(())).unwrap()
}

/// All that does not depend on the clock.
fn answers(generated: &[Generated]) -> Vec<&[Completion]> {
    generated.iter().map(|generated| generated.sequences.as_slice()).collect()
}

/// Configurations of every kind of search.
fn configs() -> Vec<GenerationConfig> {
    let base = GenerationConfig {
        max_new_tokens: Some(9),
        eos_token_ids: vec![8],
        logprobs: Some(2),
        ..Default::default()
    };
    vec![
        base.clone(),
        GenerationConfig { repetition_penalty: 1.3, no_repeat_ngram_size: 2, ..base.clone() },
        GenerationConfig { do_sample: true, seed: Some(5), num_return_sequences: 3, ..base.clone() },
        GenerationConfig { num_beams: 3, num_return_sequences: 2, ..base.clone() },
        GenerationConfig { num_beams: 3, do_sample: true, seed: Some(5), ..base },
    ]
}

#[test]
fn searches_agree_with_the_reference() {
    #[derive(Deserialize)]
    struct Case {
        config: serde_json::Value,
        prompt: Vec<u32>,
        sequences: Vec<Vec<u32>>,
        scores: Option<Vec<f32>>,
    }
    let table = include_str!("../../../../fixtures/generation/generate.json");
    let cases: Vec<Case> = serde_json::from_str(table).unwrap();
    assert!(cases.len() > 50, "the table is there");
    let mut failures = Vec::new();
    for case in &cases {
        let mut config = GenerationConfig::from_json(&case.config.to_string()).unwrap();
        config.pad_token_id = Some(0);
        let generated = run(&StubModel::new(VOCAB), &[inputs(&case.prompt)], &config).remove(0);
        let rows: Vec<_> = generated.sequences.iter().map(|sequence| sequence.token_ids.clone()).collect();
        let rows = padded(&rows, config.filler_token_id().unwrap());
        let scores: Vec<f32> = generated.sequences.iter().filter_map(|sequence| sequence.score).collect();
        let expected_scores = case.scores.clone().unwrap_or_default();
        let is_close = scores.len() == expected_scores.len()
            && scores.iter().zip(&expected_scores).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
        if rows != case.sequences || !is_close {
            failures.push(format!(
                "{} after {:?}: expected {:?} {expected_scores:?}, got {rows:?} {scores:?}",
                case.config, case.prompt, case.sequences
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_batch_gives_each_prompt_what_it_gets_alone() {
    let model = StubModel::new(VOCAB);
    for config in configs() {
        let together = run(&model, &prompts(), &config);
        for (prompt, together) in prompts().into_iter().zip(&together) {
            let alone = run(&model, &[prompt], &config);
            assert_eq!(alone[0].sequences, together.sequences, "{config:?}");
        }
    }
}

#[test]
fn chunks_caches_and_schedules_change_nothing() {
    let model = StubModel::new(VOCAB);
    for config in configs() {
        let expected = run(&model, &prompts(), &config);
        for prefill_chunk in [1, 2, 5] {
            let chunked = GenerationConfig { prefill_chunk, ..config.clone() };
            assert_eq!(
                answers(&run(&model, &prompts(), &chunked)),
                answers(&expected),
                "chunk {prefill_chunk}"
            );
        }
        let uncached = GenerationConfig { use_cache: false, ..config.clone() };
        assert_eq!(answers(&run(&model, &prompts(), &uncached)), answers(&expected), "no cache");
        let prompts = prompts();
        let requests: Vec<_> = prompts.iter().map(|inputs| Request::new(inputs, &config)).collect();
        for (max_step_tokens, max_sequences) in [(1, 64), (4, 2), (2048, 1)] {
            let scheduler = Scheduler { max_step_tokens, max_sequences, ..Scheduler::default() };
            let tight = Generation::new(&model, Some(&ByteTokenizer), &requests, scheduler).unwrap();
            assert_eq!(answers(&tight.finish().unwrap()), answers(&expected), "{scheduler:?}");
        }
    }
}

#[test]
fn steps_hold_all_that_is_alive_and_no_needless_logits() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig { max_new_tokens: Some(2), prefill_chunk: 5, ..Default::default() };
    run(&model, &prompts(), &config);
    let steps = model.steps();
    let expected = [
        // Waiting for one token first in the plan, yet rows keep their order.
        vec![(3, LogitsOf::Last), (5, LogitsOf::Nothing), (1, LogitsOf::Last)],
        vec![(1, LogitsOf::Last), (3, LogitsOf::Last), (1, LogitsOf::Last)],
        vec![(1, LogitsOf::Last)],
    ];
    assert_eq!(*steps, expected);
}

#[test]
fn new_tokens_see_the_picture_of_the_last_prompt_token() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig { max_new_tokens: Some(3), ..Default::default() };
    let prompt = prompts().remove(1);
    let mut history: Vec<_> =
        prompt.token_ids.iter().copied().zip(prompt.image_index.iter().copied()).collect();
    for token in run(&model, &[prompt], &config)[0].sequences[0].token_ids.clone() {
        let expected = crate::generate::argmax(&model.logits(&history)).unwrap() as u32;
        assert_eq!(token, expected);
        history.push((token, Some(1)));
    }
}

#[test]
fn seeds_reproduce_and_answers_differ() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig {
        do_sample: true,
        temperature: 2.0,
        max_new_tokens: Some(12),
        num_return_sequences: 4,
        seed: Some(1),
        ..Default::default()
    };
    let first = run(&model, &prompts(), &config);
    assert_eq!(answers(&first), answers(&run(&model, &prompts(), &config)));
    assert_eq!(first[0].seed, Some(1));
    let texts: std::collections::HashSet<_> =
        first[0].sequences.iter().map(|s| s.token_ids.clone()).collect();
    assert_eq!(texts.len(), 4, "each answer has its own stream");
    let fewer = GenerationConfig { num_return_sequences: 2, ..config.clone() };
    assert_eq!(run(&model, &prompts(), &fewer)[0].sequences[..], first[0].sequences[..2]);
    let other = GenerationConfig { seed: Some(2), ..config.clone() };
    assert_ne!(answers(&first), answers(&run(&model, &prompts(), &other)));
    let unseeded = run(&model, &prompts(), &GenerationConfig { seed: None, ..config.clone() });
    let again = GenerationConfig { seed: unseeded[0].seed, ..config };
    assert_eq!(
        run(&model, &prompts()[..1], &again)[0].sequences,
        unseeded[0].sequences,
        "the seed is reported"
    );
}

#[test]
fn sampling_follows_the_distribution_of_the_model() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig {
        do_sample: true,
        top_k: 4,
        max_new_tokens: Some(1),
        num_return_sequences: 128,
        seed: Some(3),
        ..Default::default()
    };
    let prompt = inputs(&[1, 5, 7]);
    let mut scores = model.logits(&[(1, None), (5, None), (7, None)]);
    crate::generate::LogitsProcessors::new(&config, config.lengths(0, 3, 64).unwrap(), &prompt.token_ids)
        .process(&prompt.token_ids, &mut scores, None)
        .unwrap();
    let sum: f32 = scores.iter().map(|score| score.exp()).sum();
    let mut counts = [0.0f32; VOCAB];
    for seed in 0..32 {
        let config = GenerationConfig { seed: Some(seed), ..config.clone() };
        for sequence in &run(&model, std::slice::from_ref(&prompt), &config)[0].sequences {
            counts[sequence.token_ids[0] as usize] += 1.0;
        }
    }
    let draws = 32.0 * 128.0;
    for (id, (count, score)) in counts.iter().zip(&scores).enumerate() {
        let p = score.exp() / sum;
        // Five standard deviations of a binomial count.
        let deviation = 5.0 * (p * (1.0 - p) * draws).sqrt();
        assert!((count - p * draws).abs() <= deviation, "token {id}: {count} draws of {}", p * draws);
    }
}

#[test]
fn every_rule_of_stopping_ends_an_answer() {
    // The first tokens after [1, 5, 7] are 4 12 23 21 23 15 9 8 9 8 8 9, by the reference's table.
    let stopping = [0x0c, 0x17].map(char::from).iter().collect::<String>();
    let base = GenerationConfig { max_new_tokens: Some(12), ..Default::default() };
    let rows = [
        (GenerationConfig { ..base.clone() }, 12, FinishReason::Length),
        (
            GenerationConfig { max_new_tokens: None, max_length: Some(8), ..base.clone() },
            5,
            FinishReason::Length,
        ),
        (GenerationConfig { eos_token_ids: vec![2, 21], ..base.clone() }, 4, FinishReason::EndToken(21)),
        (
            GenerationConfig { stop_strings: vec!["x".to_owned(), stopping], ..base.clone() },
            3,
            FinishReason::StopString(1),
        ),
        (GenerationConfig { max_time: Some(1e-9), ..base.clone() }, 1, FinishReason::Time),
        (
            GenerationConfig { eos_token_ids: vec![4], max_time: Some(1e-9), ..base },
            1,
            FinishReason::EndToken(4),
        ),
    ];
    for (index, (config, length, reason)) in rows.into_iter().enumerate() {
        let answer =
            run(&StubModel::new(VOCAB), &[inputs(&[1, 5, 7])], &config).remove(0).sequences.remove(0);
        assert_eq!((answer.token_ids.len(), answer.finish_reason), (length, reason), "row {index}");
    }
}

#[test]
fn beams_stop_at_stop_strings_and_trim_them() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig { num_beams: 2, max_new_tokens: Some(6), ..Default::default() };
    let free = run(&model, &[inputs(&[1, 5, 7])], &config).remove(0).sequences.remove(0);
    let stop: String = free.token_ids[2..4].iter().map(|&id| char::from(id as u8)).collect();
    let stopped = GenerationConfig { stop_strings: vec![stop], trim_stop_strings: true, ..config };
    for answer in &run(&model, &[inputs(&[1, 5, 7])], &stopped)[0].sequences {
        let text = answer.text.as_deref().unwrap();
        assert!(stopped.stop_strings.iter().all(|stop| !text.contains(stop.as_str())));
        if matches!(answer.finish_reason, FinishReason::StopString(_)) {
            assert_eq!(answer.token_ids.len(), text.len() + 2, "tokens keep what the text drops");
        }
    }
}

#[test]
fn answers_end_at_the_last_position() {
    let model = StubModel { max_positions: 10, ..StubModel::new(VOCAB) };
    let config = GenerationConfig { max_new_tokens: Some(50), ..Default::default() };
    let answer = run(&model, &[inputs(&[1, 5, 7])], &config).remove(0).sequences.remove(0);
    assert_eq!((answer.token_ids.len(), answer.finish_reason), (7, FinishReason::Length));
}

#[test]
fn log_probabilities_are_the_model_s_own() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig {
        max_new_tokens: Some(3),
        logprobs: Some(2),
        repetition_penalty: 2.0,
        bad_words_ids: vec![vec![4]],
        ..Default::default()
    };
    let answer = run(&model, &[inputs(&[1, 5, 7])], &config).remove(0).sequences.remove(0);
    let mut scores = model.logits(&[(1, None), (5, None), (7, None)]);
    crate::generate::log_softmax(&mut scores);
    let first = &answer.logprobs[0];
    assert_eq!(answer.logprobs.len(), 3);
    assert_eq!(first.logprob, scores[first.token_id as usize]);
    assert_eq!(first.top.len(), 2);
    assert_eq!(first.top[0], (4, scores[4]), "the banned token is the model's favourite all the same");
    // A beam reports those of its own path.
    let beams =
        GenerationConfig { num_beams: 3, repetition_penalty: 1.0, bad_words_ids: Vec::new(), ..config };
    let beam = run(&model, &[inputs(&[1, 5, 7])], &beams).remove(0).sequences.remove(0);
    let sum: f32 = beam.logprobs.iter().map(|token| token.logprob).sum();
    assert!((sum / 3.0 - beam.score.unwrap()).abs() < 1e-5, "{beam:?}");
}

#[test]
fn events_joined_are_the_answer() {
    let model = StubModel::new(END_OF_UTTERANCE as usize + 1);
    for config in configs() {
        let config =
            GenerationConfig { max_new_tokens: Some(40), eos_token_ids: vec![END_OF_UTTERANCE], ..config };
        let mut texts = std::collections::BTreeMap::<_, String>::new();
        let mut ends = 0;
        let generated = generate(&model, Some(&ByteTokenizer), &prompts(), &config, |event| {
            texts.entry((event.request, event.sequence)).or_default().push_str(&event.text);
            ends += usize::from(event.finish_reason.is_some());
            ControlFlow::Continue(())
        });
        let generated = generated.unwrap();
        let mut answers = 0;
        for (request, generated) in generated.iter().enumerate() {
            for (sequence, completion) in generated.sequences.iter().enumerate() {
                assert_eq!(texts[&(request, sequence)], *completion.text.as_ref().unwrap(), "{config:?}");
                answers += 1;
            }
        }
        assert_eq!(ends, answers, "each answer ends once");
    }
}

#[test]
fn iterator_and_callback_give_the_same_events() {
    let model = StubModel::new(VOCAB);
    for config in configs() {
        let prompts = prompts();
        let mut seen = Vec::new();
        let by_callback = generate(&model, None, &prompts, &config, |event| {
            seen.push(event.clone());
            ControlFlow::Continue(())
        });
        assert!(by_callback.unwrap()[0].sequences[0].text.is_none(), "no decoder, no text");
        let requests: Vec<_> = prompts.iter().map(|inputs| Request::new(inputs, &config)).collect();
        let generation = Generation::new(&model, None, &requests, Scheduler::default()).unwrap();
        assert_eq!(generation.map(Result::unwrap).collect::<Vec<_>>(), seen);
    }
}

#[test]
fn a_caller_can_stop_all_or_one() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig { max_new_tokens: Some(10), ..Default::default() };
    let mut events = 0;
    let stopped = generate(&model, None, &prompts(), &config, |_| {
        events += 1;
        if events == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    for generated in stopped.unwrap() {
        assert_eq!(generated.sequences[0].finish_reason, FinishReason::Cancelled);
        assert!(generated.sequences[0].token_ids.len() <= 2);
    }
    let prompts = prompts();
    let flag = AtomicBool::new(false);
    let mut requests: Vec<_> = prompts.iter().map(|inputs| Request::new(inputs, &config)).collect();
    requests[1].cancel = Some(&flag);
    let generated = generate_requests(&model, None, &requests, Scheduler::default(), |event| {
        flag.fetch_or(event.request == 1, Ordering::Relaxed);
        ControlFlow::Continue(())
    });
    let reasons: Vec<_> = generated.unwrap().iter().map(|g| g.sequences[0].finish_reason).collect();
    assert_eq!(reasons, [FinishReason::Length, FinishReason::Cancelled, FinishReason::Length]);
}

#[test]
fn a_custom_rule_restricts_the_answer() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig { max_new_tokens: Some(6), ..Default::default() };
    let even = |_: &[u32], scores: &mut [f32]| {
        scores.iter_mut().skip(1).step_by(2).for_each(|s| *s = f32::NEG_INFINITY);
    };
    let nothing = |_: &[u32], scores: &mut [f32]| scores.fill(f32::NEG_INFINITY);
    let prompt = inputs(&[1, 5, 7]);
    for config in [config.clone(), GenerationConfig { num_beams: 2, ..config }] {
        let with = |custom| {
            let request = Request { custom: Some(custom), ..Request::new(&prompt, &config) };
            generate_requests(&model, None, &[request], Scheduler::default(), |_| ControlFlow::Continue(()))
        };
        assert!(with(&even).unwrap()[0].sequences[0].token_ids.iter().all(|id| id % 2 == 0));
        assert!(matches!(with(&nothing).unwrap_err(), GenerateError::NoCandidate { length: 3 }));
    }
}

#[test]
fn early_stopping_takes_the_first_finished_beams() {
    let model = StubModel::new(VOCAB);
    let config = |early_stopping| GenerationConfig {
        num_beams: 3,
        num_return_sequences: 3,
        eos_token_ids: vec![7, 8, 9],
        max_new_tokens: Some(20),
        early_stopping,
        length_penalty: 2.0,
        ..Default::default()
    };
    let tokens = |early_stopping| {
        let generated = run(&model, &prompts(), &config(early_stopping));
        generated.iter().map(|generated| generated.usage.generated_tokens).sum::<usize>()
    };
    assert!(tokens(EarlyStopping::Immediate) < tokens(EarlyStopping::Never));
}

#[test]
fn bad_requests_are_refused_before_anything_runs() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig::default();
    let refused = |decoder: Option<&dyn Decode>, inputs: &[SequenceInputs], config: &GenerationConfig| {
        let error = generate(&model, decoder, inputs, config, |_| ControlFlow::Continue(())).unwrap_err();
        assert!(model.steps().is_empty());
        error.to_string()
    };
    let good = inputs(&[1]);
    assert!(refused(None, &[good.clone(), inputs(&[])], &config).contains("prompt 1 has no tokens"));
    assert!(refused(None, &[inputs(&[1; 64])], &config).contains("64 positions"));
    let torn = SequenceInputs { image_index: Vec::new(), ..good.clone() };
    assert!(refused(None, &[torn], &config).contains("0 image indices"));
    let stops = GenerationConfig { stop_strings: vec!["x".to_owned()], ..config.clone() };
    assert!(refused(None, std::slice::from_ref(&good), &stops).contains("stop_strings"));
    let unknown = GenerationConfig { suppress_tokens: vec![24], ..config };
    assert!(refused(None, &[good], &unknown).contains("vocabulary has 24"));
}

#[test]
fn counts_and_no_prompts() {
    let model = StubModel::new(VOCAB);
    let config = GenerationConfig { max_new_tokens: Some(4), ..Default::default() };
    let generated = run(&model, &prompts(), &config);
    assert_eq!(generated[1].usage, Usage { prompt_tokens: 8, generated_tokens: 4, ..Usage::default() });
    assert!(run(&model, &[], &config).is_empty());
}
