use std::sync::{
    atomic::AtomicUsize,
    mpsc::{self, Receiver},
};

use super::*;
use crate::generate::{
    Completion, FinishReason, generate,
    stub::{BAD_TOKEN, ByteTokenizer, PANIC_TOKEN, StubModel},
};
use crate::processor::PixelValues;

const VOCAB: usize = 24;

/// A prompt whose tokens behind the first see the picture, if there is one.
fn prompt(token_ids: &[u32], picture: Option<f32>) -> SequenceInputs {
    let mut image_index = vec![picture.map(|_| 0); token_ids.len()];
    image_index[0] = None;
    let images = picture.map(|value| Arc::new(PixelValues::new(vec![value; 3], 1, 1)));
    SequenceInputs { token_ids: token_ids.to_vec(), image_index, images: images.into_iter().collect() }
}

fn answer_of(tokens: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens: Some(tokens), ..Default::default() }
}

fn engine(options: EngineOptions) -> Engine<StubModel> {
    let model = StubModel { max_positions: 1 << 16, ..StubModel::new(VOCAB) };
    Engine::start(Arc::new(model), Arc::new(ByteTokenizer), options).unwrap()
}

fn submit(
    engine: &Engine<StubModel>,
    inputs: SequenceInputs,
    config: GenerationConfig,
) -> (Ticket, Receiver<EngineEvent>) {
    let (sender, receiver) = mpsc::channel();
    let listener = move |event| match sender.send(event) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    (engine.submit(Submission::new(inputs, config, listener)).unwrap(), receiver)
}

/// The last event, which is there when the engine is done with the request.
fn end(events: &Receiver<EngineEvent>) -> Result<Generated, GenerateError> {
    let mut texts = Vec::<String>::new();
    for event in events {
        match event {
            EngineEvent::Started => {}
            EngineEvent::Token(event) => {
                texts.resize(texts.len().max(event.sequence + 1), String::new());
                texts[event.sequence].push_str(&event.text);
            }
            EngineEvent::Finished(generated) => {
                for (text, sequence) in texts.iter().zip(&generated.sequences) {
                    assert_eq!(Some(text), sequence.text.as_ref(), "the pieces are the text");
                }
                return Ok(generated);
            }
            EngineEvent::Failed(error) => return Err(error),
        }
    }
    panic!("the engine forgot a request");
}

fn alone(inputs: &SequenceInputs, config: &GenerationConfig) -> Vec<Completion> {
    let model = StubModel { max_positions: 1 << 16, ..StubModel::new(VOCAB) };
    let inputs = std::slice::from_ref(inputs);
    generate(&model, Some(&ByteTokenizer), inputs, config, |_| ControlFlow::Continue(()))
        .unwrap()
        .remove(0)
        .sequences
}

/// Holds the engine in a listener until the sender is dropped, so that what is submitted meanwhile comes at once.
fn hold(engine: &Engine<StubModel>) -> mpsc::Sender<()> {
    let (go, gate) = mpsc::channel::<()>();
    let (here, is_here) = mpsc::channel();
    let listener = move |event| {
        if matches!(event, EngineEvent::Started) {
            here.send(()).unwrap();
            let _ = gate.recv();
        }
        ControlFlow::Continue(())
    };
    engine.submit(Submission::new(prompt(&[1, 2], None), answer_of(1), listener)).unwrap().detach();
    is_here.recv().unwrap();
    go
}

#[test]
fn requests_from_many_threads_get_what_they_get_alone() {
    let engine = engine(EngineOptions { memory: Some(Memory::of(2000)), ..Default::default() });
    std::thread::scope(|scope| {
        for client in 0..8u32 {
            let engine = &engine;
            scope.spawn(move || {
                for turn in 0..10 {
                    let picture = (turn % 2 == 0).then_some((client % 3) as f32);
                    let inputs = prompt(&[1, client % 5, turn, 7], picture);
                    let config = match turn % 3 {
                        0 => answer_of(12),
                        1 => GenerationConfig { num_beams: 3, ..answer_of(8) },
                        _ => GenerationConfig {
                            do_sample: true,
                            num_return_sequences: 2,
                            seed: Some(u64::from(client)),
                            ..answer_of(9)
                        },
                    };
                    let (_ticket, events) = submit(engine, inputs.clone(), config.clone());
                    assert_eq!(end(&events).unwrap().sequences, alone(&inputs, &config));
                }
            });
        }
    });
    let stats = engine.stats();
    assert_eq!((stats.accepted, stats.finished, stats.failed, stats.cancelled), (80, 80, 0, 0));
    assert!(stats.images_encoded <= 3 && stats.images_reused >= 37, "{stats:?}");
    assert!(stats.reused_tokens > 0 && stats.kept_bytes <= stats.cache_limit, "{stats:?}");
    engine.shutdown(Drain::Finish);
    let stats = engine.stats();
    assert_eq!((stats.waiting, stats.running, stats.cache_bytes), (0, 0, 0));
}

#[test]
fn requests_that_cannot_be_answered_are_refused_with_the_reason() {
    let memory = Memory::of(100);
    let engine = engine(EngineOptions { memory: Some(memory), max_waiting: 1, ..Default::default() });
    let refuse = |inputs: SequenceInputs, config: GenerationConfig| {
        let listener = |_| panic!("a request that is refused hears nothing");
        engine.submit(Submission::new(inputs, config, listener)).unwrap_err()
    };
    assert!(matches!(refuse(prompt(&vec![1; 1 << 16], None), answer_of(1)), Rejected::TooLong(_)));
    let short = GenerationConfig { max_length: Some(2), ..Default::default() };
    assert!(matches!(refuse(prompt(&[1, 2], None), short), Rejected::TooLong(_)));
    let needs = |inputs, config| match refuse(inputs, config) {
        Rejected::NeverFits { needed, limit: 100 } => needed,
        other => panic!("{other:?}"),
    };
    // Four tokens, of which the last is never read; times the beams; and the picture, once.
    assert_eq!(needs(prompt(&[1, 2], None), answer_of(100)), 101);
    assert_eq!(needs(prompt(&[1, 2], None), GenerationConfig { num_beams: 9, ..answer_of(12) }), 117);
    let mut pictures = prompt(&[1, 2], Some(1.0));
    pictures.images.push(Arc::clone(&pictures.images[0]));
    assert_eq!(needs(pictures, answer_of(90)), 101);
    assert!(matches!(refuse(prompt(&[1], None), answer_of(0)), Rejected::Invalid(_)));
    let blind = SequenceInputs { images: Vec::new(), ..prompt(&[1, 2], Some(1.0)) };
    let error = refuse(blind, answer_of(1));
    assert!(matches!(error, Rejected::Invalid(GenerateError::UnknownImage { index: 0, images: 0, .. })));

    for (inputs, config, expected) in [
        (prompt(&[1, 2], None), answer_of(1), 99),
        (prompt(&[1, 2], Some(1.0)), answer_of(1), 89),
        (prompt(&[1, 2], None), GenerationConfig { num_return_sequences: 3, ..answer_of(1) }, 32),
        (prompt(&[1; 101], None), answer_of(1), 0),
        (prompt(&vec![1; 1 << 16], None), answer_of(1), 0),
    ] {
        assert_eq!(engine.longest_answer(&inputs, &config), expected, "{config:?}");
    }

    let go = hold(&engine);
    let (_waiting, events) = submit(&engine, prompt(&[1], None), answer_of(1));
    match refuse(prompt(&[1], None), answer_of(1)) {
        Rejected::QueueFull { waiting: 1, limit: 1, retry_after } => assert!(retry_after > Duration::ZERO),
        other => panic!("{other:?}"),
    }
    drop(go);
    end(&events).unwrap();
    engine.shutdown(Drain::Finish);
    assert!(matches!(refuse(prompt(&[1], None), answer_of(1)), Rejected::ShuttingDown));
    let stats = engine.stats();
    assert_eq!((stats.accepted, stats.rejected), (2, 9));
}

#[test]
fn whoever_goes_away_is_cancelled() {
    let engine = engine(EngineOptions { memory: Some(Memory::of(1 << 20)), ..Default::default() });
    let endless = || answer_of(60_000);
    // By the ticket, while it waits: nothing was started.
    let go = hold(&engine);
    let (ticket, events) = submit(&engine, prompt(&[1, 2], None), endless());
    drop(ticket);
    drop(go);
    assert!(matches!(events.iter().next(), Some(EngineEvent::Token(Event { token_id: None, .. }))));
    assert_eq!(end(&events).unwrap().usage.generated_tokens, 0);
    // By the ticket, while it writes.
    let (ticket, events) = submit(&engine, prompt(&[1, 2], None), endless());
    while !matches!(events.recv().unwrap(), EngineEvent::Token(_)) {}
    ticket.cancel();
    let generated = events.iter().find_map(|event| match event {
        EngineEvent::Finished(generated) => Some(generated),
        _ => None,
    });
    let answer = &generated.unwrap().sequences[0];
    assert_eq!(answer.finish_reason, FinishReason::Cancelled);
    assert_eq!(
        answer.token_ids,
        alone(&prompt(&[1, 2], None), &answer_of(answer.token_ids.len()))[0].token_ids
    );
    // By its listener, which then hears nothing more.
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let listener = move |_| {
        if counted.fetch_add(1, Ordering::SeqCst) < 3 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    };
    engine.submit(Submission::new(prompt(&[1, 2], None), endless(), listener)).unwrap().detach();
    engine.shutdown(Drain::Finish);
    assert_eq!(calls.load(Ordering::SeqCst), 4);
    let stats = engine.stats();
    assert_eq!((stats.cancelled, stats.finished), (3, 1));
}

#[test]
fn one_request_s_failure_is_its_own() {
    let engine = engine(EngineOptions::default());
    let good = prompt(&[1, 5, 7], Some(1.0));
    let bad: [(SequenceInputs, &str); 3] = [
        (prompt(&[1, BAD_TOKEN], None), "the model failed"),
        (prompt(&[1, PANIC_TOKEN], None), "the stub panics"),
        (prompt(&[1, 2], Some(-1.0)), "the model failed"),
    ];
    let go = hold(&engine);
    let mut requests = Vec::new();
    for (inputs, _) in &bad {
        requests.push(submit(&engine, good.clone(), answer_of(5)));
        requests.push(submit(&engine, inputs.clone(), answer_of(5)));
    }
    drop(go);
    let expected = alone(&good, &answer_of(5));
    for (pair, (_, message)) in requests.chunks(2).zip(&bad) {
        assert_eq!(end(&pair[0].1).unwrap().sequences, expected);
        let error = end(&pair[1].1).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    // A rule that panics takes the batch with it, but not the engine, nor anybody's place in the queue.
    let (sender, events) = mpsc::channel();
    let mut submission = Submission::new(good.clone(), answer_of(5), move |event| {
        let _ = sender.send(event);
        ControlFlow::Continue(())
    });
    submission.custom = Some(Arc::new(|_, _| panic!("no rule")));
    let _ticket = engine.submit(submission).unwrap();
    assert!(matches!(end(&events).unwrap_err(), GenerateError::Panicked { message } if message == "no rule"));
    let stats = engine.stats();
    assert_eq!((stats.waiting, stats.running, stats.cache_bytes), (0, 0, 0));
    // A listener that panics is alone, too.
    let _ticket = engine.submit(Submission::new(good.clone(), answer_of(5), |_| panic!("no ear"))).unwrap();
    let (_ticket, events) = submit(&engine, good, answer_of(5));
    assert_eq!(end(&events).unwrap().sequences, expected);
}

#[test]
fn shutting_down_finishes_or_cancels() {
    for (drain, expected) in [(Drain::Finish, FinishReason::Length), (Drain::Now, FinishReason::Cancelled)] {
        let engine = engine(EngineOptions::default());
        let go = hold(&engine);
        let requests: Vec<_> =
            (0..5).map(|token| submit(&engine, prompt(&[token, 2], None), answer_of(2000))).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| engine.shutdown(drain));
            while engine.is_open() {
                std::thread::yield_now();
            }
            drop(go);
        });
        for (_ticket, events) in requests {
            assert_eq!(end(&events).unwrap().sequences[0].finish_reason, expected);
        }
        engine.shutdown(Drain::Finish);
    }
}

#[test]
fn a_second_shutdown_hurries_the_first() {
    let engine = engine(EngineOptions::default());
    let (_ticket, events) = submit(&engine, prompt(&[1, 2], None), answer_of(65_000));
    std::thread::scope(|scope| {
        scope.spawn(|| engine.shutdown(Drain::Finish));
        while engine.is_open() {
            std::thread::yield_now();
        }
        engine.shutdown(Drain::Now);
    });
    assert_eq!(end(&events).unwrap().sequences[0].finish_reason, FinishReason::Cancelled);
}

#[test]
fn it_works_in_a_pool_of_the_caller_s_and_ends_with_its_last_handle() {
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap());
    let engine = engine(EngineOptions { pool: Some(pool), ..Default::default() });
    let (ticket, events) = submit(&engine, prompt(&[1, 2], None), answer_of(60_000));
    drop(engine);
    assert_eq!(end(&events).unwrap().sequences[0].finish_reason, FinishReason::Cancelled);
    drop(ticket);
}

#[test]
fn a_rule_s_panic_leaves_the_queue_empty() {
    let one_place = Scheduler { max_sequences: 1, ..Scheduler::interactive() };
    let engine = engine(EngineOptions { scheduler: one_place, max_waiting: 3, ..Default::default() });
    for _ in 0..3 {
        let go = hold(&engine);
        let mut submission =
            Submission::new(prompt(&[1, 2], None), answer_of(5), |_| ControlFlow::Continue(()));
        submission.custom = Some(Arc::new(|_, _| panic!("no rule")));
        let _ticket = engine.submit(submission).unwrap();
        let behind: Vec<_> = (0..2).map(|_| submit(&engine, prompt(&[1, 2], None), answer_of(5))).collect();
        drop(go);
        for (_ticket, events) in behind {
            assert!(matches!(end(&events).unwrap_err(), GenerateError::Panicked { .. }));
        }
        assert_eq!(engine.stats().waiting, 0);
    }
}

#[test]
fn a_listener_may_shut_the_engine_down_and_hold_its_last_handle() {
    let pool = || Some(Arc::new(rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap()));
    for pool in [None, pool()] {
        let engine = Arc::new(engine(EngineOptions { pool, ..Default::default() }));
        let (say_gone, gone) = mpsc::channel::<()>();
        let own = Arc::clone(&engine);
        let listener = move |event| {
            if matches!(event, EngineEvent::Started) {
                own.shutdown(Drain::Finish);
            }
            let _alive = &say_gone;
            ControlFlow::Continue(())
        };
        engine.submit(Submission::new(prompt(&[1, 2], None), answer_of(3), listener)).unwrap().detach();
        let shared = Arc::downgrade(&engine.shared);
        drop(engine);
        // The sender goes with the listener, and what the thread holds when it ends.
        assert!(gone.recv().is_err(), "the listener went");
        while shared.strong_count() > 0 {
            std::thread::yield_now();
        }
    }
}
