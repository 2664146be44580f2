//! The engine on a tiny checkpoint: many clients at once, memory that is short, conversations that go on.

mod common;

use std::{
    ops::ControlFlow,
    sync::{Arc, atomic::AtomicBool, mpsc},
};

use common::TINY;
use idefics::{
    Idefics, Processor, SequenceInputs,
    generate::{
        Completion, Drain, Engine, EngineEvent, EngineOptions, FinishReason, Generated, GenerationConfig,
        Memory, Scheduler, StepModel, Submission,
    },
};
use idefics_testing::fixture;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

fn processor() -> Arc<Processor> {
    Arc::new(Processor::from_pretrained(fixture("tiny")).expect("a sound processor"))
}

fn engine(model: &Arc<Idefics>, options: EngineOptions) -> Engine<Idefics> {
    Engine::start(Arc::clone(model), processor(), options).expect("a thread")
}

fn configs() -> Vec<GenerationConfig> {
    let base = GenerationConfig {
        max_new_tokens: Some(10),
        min_new_tokens: Some(6),
        eos_token_ids: vec![2],
        logprobs: Some(1),
        ..Default::default()
    };
    vec![
        base.clone(),
        GenerationConfig { do_sample: true, seed: Some(3), num_return_sequences: 2, ..base.clone() },
        GenerationConfig { num_beams: 2, ..base.clone() },
        GenerationConfig { repetition_penalty: 1.5, prefill_chunk: 3, ..base },
    ]
}

/// The prompts of the fixture, and each with a few tokens more: they begin the same.
fn prompts() -> Vec<SequenceInputs> {
    let mut prompts = TINY.inputs();
    for mut longer in TINY.inputs() {
        let last = longer.image_index.last().copied().flatten();
        longer.token_ids.extend([9, 5, 7]);
        longer.image_index.extend([last; 3]);
        prompts.push(longer);
    }
    prompts
}

fn alone(model: &Idefics, inputs: &SequenceInputs, config: &GenerationConfig) -> Vec<Completion> {
    let inputs = std::slice::from_ref(inputs);
    model.generate_text(&*processor(), inputs, config).expect("an answer").remove(0).sequences
}

fn is_cancelled(generated: &Generated) -> bool {
    generated.sequences.iter().any(|answer| answer.finish_reason == FinishReason::Cancelled)
}

/// Submits, goes away after `patience` events, and returns the answers that came by then.
fn ask(
    engine: &Engine<Idefics>,
    inputs: &SequenceInputs,
    config: &GenerationConfig,
    patience: usize,
) -> Option<Generated> {
    let (sender, events) = mpsc::channel();
    let listener = move |event| match sender.send(event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    let submission = Submission::new(inputs.clone(), config.clone(), listener);
    let _ticket = engine.submit(submission).expect("a place");
    events.iter().take(patience).find_map(|event| match event {
        EngineEvent::Finished(generated) => Some(generated),
        EngineEvent::Failed(error) => panic!("{error}"),
        _ => None,
    })
}

#[test]
fn clients_that_come_and_go_get_what_they_get_alone() {
    let model = Arc::new(TINY.model());
    let (prompts, configs) = (prompts(), configs());
    let expected: Vec<Vec<_>> = prompts
        .iter()
        .map(|inputs| configs.iter().map(|config| alone(&model, inputs, config)).collect())
        .collect();
    // Once with room for all, once for two or three at a time, so that many step back.
    let tight = model.cache_bytes(64) * 4 + 4 * model.image_bytes(&prompts[0].images[0]);
    for (bytes, chunk) in [(1 << 30, 64), (tight, 5)] {
        let scheduler = Scheduler { prompt_tokens_beside_answers: chunk, ..Scheduler::interactive() };
        let memory = Some(Memory { answer_share: 0.0, ..Memory::of(bytes) });
        let engine = engine(&model, EngineOptions { scheduler, memory, ..Default::default() });
        std::thread::scope(|scope| {
            for client in 0..64 {
                let (engine, prompts, configs, expected) = (&engine, &prompts, &configs, &expected);
                scope.spawn(move || {
                    let mut random = ChaCha8Rng::seed_from_u64(client);
                    for _ in 0..3 {
                        let mut draw = |below: usize| random.next_u32() as usize % below;
                        let (prompt, config) = (draw(prompts.len()), draw(configs.len()));
                        let patience = if draw(4) == 0 { draw(8) } else { usize::MAX };
                        let generated = ask(engine, &prompts[prompt], &configs[config], patience);
                        assert!(generated.is_some() || patience < usize::MAX, "an answer");
                        if let Some(generated) = generated.filter(|generated| !is_cancelled(generated)) {
                            assert_eq!(generated.sequences, expected[prompt][config], "{prompt} {config}");
                        }
                    }
                });
            }
        });
        engine.shutdown(Drain::Finish);
        let stats = engine.stats();
        assert_eq!((stats.accepted, stats.rejected, stats.failed), (192, 0, 0), "{stats:?}");
        assert_eq!(stats.finished + stats.cancelled, 192);
        assert_eq!((stats.waiting, stats.running, stats.cache_bytes), (0, 0, 0));
        assert!(stats.kept_bytes <= bytes, "{stats:?}");
        assert!(stats.reused_tokens > 0 && stats.images_reused > 0, "{stats:?}");
    }
}

#[test]
fn another_question_about_a_picture_runs_neither_tower_nor_prompt() {
    let model = Arc::new(TINY.model());
    let engine = engine(&model, EngineOptions::default());
    let config = &configs()[0];
    let first = TINY.input("two_images");
    let answer = ask(&engine, &first, config, usize::MAX).expect("an answer");
    let before = engine.stats();
    assert_eq!(before.images_encoded, first.images.len() as u64);

    // The conversation goes on behind the answer, whose tokens see the last picture.
    let mut second = first.clone();
    second.token_ids.extend(answer.sequences[0].token_ids.iter().chain(&[5, 9, 6]));
    second.image_index.resize(second.token_ids.len(), *first.image_index.last().expect("a token"));
    let generated = ask(&engine, &second, config, usize::MAX).expect("an answer");
    assert_eq!(generated.sequences, alone(&model, &second, config));
    let after = engine.stats();
    assert_eq!(after.images_encoded, before.images_encoded, "no picture is read again");
    // All but the last token of the answer was read before.
    let written = answer.sequences[0].token_ids.len();
    assert_eq!(generated.usage.cached_tokens, first.token_ids.len() + written - 1);
    assert_eq!(generated.usage.cached_images, first.images.len());
    let read = (after.tokens_read - before.tokens_read) as usize;
    assert_eq!(read, 4 + generated.usage.generated_tokens - 1, "only what is new is read");

    // Another question about the same pictures, as a new conversation.
    let mut other = first.clone();
    *other.token_ids.last_mut().expect("a token") = 11;
    let generated = ask(&engine, &other, config, usize::MAX).expect("an answer");
    assert_eq!(generated.sequences, alone(&model, &other, config));
    assert_eq!(generated.usage.cached_tokens, first.token_ids.len() - 1);
    assert_eq!(engine.stats().images_encoded, before.images_encoded);
}

#[test]
fn a_list_is_answered_as_a_batch_is() {
    let model = Arc::new(TINY.model());
    let engine = engine(&model, EngineOptions { max_waiting: 2, ..Default::default() });
    let config = configs().remove(0);
    let mut prompts = TINY.inputs();
    let batch = model.generate_text(&*processor(), &prompts, &config).expect("answers");
    let bad = prompts.len();
    let missing = model.vocab_size() as u32;
    prompts.push(SequenceInputs {
        token_ids: vec![1, missing],
        image_index: vec![None; 2],
        images: Vec::new(),
    });
    prompts.push(SequenceInputs::default());
    let requests = || prompts.iter().map(|inputs| (inputs.clone(), config.clone()));
    let mut texts = vec![String::new(); prompts.len()];
    let answers = engine.answer_each(requests(), &AtomicBool::new(false), |event| {
        texts[event.request].push_str(&event.text);
        ControlFlow::Continue(())
    });
    for (index, (answer, expected)) in answers.iter().zip(&batch).enumerate() {
        let answer = answer.as_ref().expect("an answer");
        assert_eq!(answer.sequences, expected.sequences);
        assert_eq!(Some(&texts[index]), answer.sequences[0].text.as_ref());
    }
    let messages = answers[bad..].iter().map(|answer| answer.as_ref().expect_err("refused").to_string());
    assert_eq!(messages.collect::<Vec<_>>(), ["the model failed", "prompt 0 has no tokens"]);

    let cancelled =
        engine.answer_each(requests().take(bad), &AtomicBool::new(true), |_| ControlFlow::Continue(()));
    assert!(cancelled.iter().all(|answer| answer.as_ref().is_ok_and(is_cancelled)));
}
