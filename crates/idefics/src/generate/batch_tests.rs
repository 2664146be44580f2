//! The policies together, turn by turn, on the stub model: a token takes a byte of cache and a picture ten.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::{
    SequenceInputs,
    generate::{
        Completion, FinishReason, Generated, GenerationConfig, Request, Stats, generate,
        request::CancelFlag,
        stub::{ByteTokenizer, StubModel},
    },
};

const VOCAB: usize = 24;

fn model() -> StubModel {
    StubModel { max_positions: 1 << 16, ..StubModel::new(VOCAB) }
}

/// A prompt; each token sees the latest of the pictures that stand at the given places, with their contents.
fn prompt(token_ids: &[u32], pictures: &[(usize, f32)]) -> SequenceInputs {
    let before = |place: usize| pictures.iter().filter(|(at, _)| *at <= place).count().checked_sub(1);
    SequenceInputs {
        token_ids: token_ids.to_vec(),
        image_index: (0..token_ids.len()).map(|place| before(place).map(|index| index as u32)).collect(),
        images: pictures.iter().map(|(_, value)| Arc::new(PixelValues::new(vec![*value; 3], 1, 1))).collect(),
    }
}

fn answer_of(tokens: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens: Some(tokens), ..Default::default() }
}

fn alone(inputs: &SequenceInputs, config: &GenerationConfig) -> Vec<Completion> {
    let inputs = std::slice::from_ref(inputs);
    let go_on = |_: &_| ControlFlow::Continue(());
    generate(&model(), Some(&ByteTokenizer), inputs, config, go_on).unwrap().remove(0).sequences
}

/// A batch and all that was told of it.
struct Run<'a> {
    model: &'a StubModel,
    batch: Batch<'a, StubModel>,
    counters: Arc<Counters>,
    flags: Vec<Arc<AtomicBool>>,
    out: Vec<Outcome>,
    done: BTreeMap<u64, Generated>,
    /// Requests in the order they started.
    started: Vec<u64>,
    /// Tokens that were told.
    told: HashMap<u64, usize>,
    turns: usize,
}

impl<'a> Run<'a> {
    fn new(model: &'a StubModel, scheduler: Scheduler, memory: Memory) -> Self {
        let counters = Arc::new(Counters::default());
        let batch = Batch::new(model, Some(&ByteTokenizer), scheduler, memory, Arc::clone(&counters));
        let (flags, out, done) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { model, batch, counters, flags, out, done, started: Vec::new(), told: HashMap::new(), turns: 0 }
    }

    fn submit(&mut self, inputs: SequenceInputs, config: GenerationConfig) -> u64 {
        let lengths = Request::new(&inputs, &config).check(self.model, 0).unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        let id = self.flags.len() as u64;
        let (inputs, config) = (Cow::Owned(inputs), Cow::Owned(config));
        let cancel = CancelFlag::Shared(Arc::clone(&flag));
        self.flags.push(flag);
        self.batch.submit(id, Job { index: 0, inputs, config, custom: None, cancel, lengths });
        id
    }

    fn cancel(&self, id: u64) {
        self.flags[id as usize].store(true, Ordering::Relaxed);
    }

    /// One turn, after which what always holds is checked.
    fn turn(&mut self) {
        self.batch.turn(&mut self.out);
        self.turns += 1;
        for (id, event) in self.out.drain(..) {
            assert!(!self.done.contains_key(&id), "nothing comes behind the end");
            match event {
                EngineEvent::Started => self.started.push(id),
                EngineEvent::Token(event) => {
                    *self.told.entry(id).or_default() += usize::from(event.token_id.is_some());
                }
                EngineEvent::Finished(generated) => {
                    self.done.insert(id, generated);
                }
                EngineEvent::Failed(error) => panic!("request {id}: {error}"),
            }
        }
        let stats = self.stats();
        let limit = self.batch.admission.bytes;
        assert!(stats.cache_bytes <= limit || stats.running == 1, "{stats:?}");
        assert!(stats.cache_bytes + stats.kept_bytes <= limit || stats.kept_bytes == 0, "{stats:?}");
        assert!(stats.sequences <= self.batch.admission.sequences || stats.running == 1, "{stats:?}");
    }

    fn finish(&mut self) {
        while !self.batch.is_idle() {
            self.turn();
        }
        assert_eq!(self.batch.taken(), 0, "nothing stays taken");
    }

    fn stats(&self) -> Stats {
        self.counters.snapshot(self.batch.admission.bytes)
    }

    fn tokens_told(&self, id: u64) -> usize {
        self.told.get(&id).copied().unwrap_or(0)
    }
}

/// All searches, with answers of `tokens` tokens.
fn searches(tokens: usize) -> Vec<GenerationConfig> {
    let base = GenerationConfig { logprobs: Some(1), ..answer_of(tokens) };
    vec![
        base.clone(),
        GenerationConfig { do_sample: true, seed: Some(5), num_return_sequences: 3, ..base.clone() },
        GenerationConfig { num_beams: 3, num_return_sequences: 2, ..base.clone() },
        GenerationConfig { use_cache: false, ..base },
    ]
}

#[test]
fn a_preempted_request_loses_no_token() {
    let model = model();
    for answer_share in [0.0, 0.5, 1.0] {
        let memory = Memory { answer_share, ..Memory::of(130) };
        let mut run = Run::new(&model, Scheduler::interactive(), memory);
        let mut expected = Vec::new();
        for round in 0..3 {
            for config in searches(30) {
                let inputs = prompt(&[1, round, 7, 3], &[(1, round as f32)]);
                expected.push(alone(&inputs, &config));
                run.submit(inputs, config);
            }
        }
        run.finish();
        for (generated, expected) in run.done.values().zip(&expected) {
            assert_eq!(generated.sequences, *expected, "share {answer_share}");
        }
        assert_eq!(run.done.len(), expected.len());
        let preemptions = run.stats().preemptions;
        assert_eq!(preemptions > 0, answer_share < 1.0, "{preemptions} at share {answer_share}");
    }
}

#[test]
fn a_short_request_behind_long_ones_has_its_first_token_soon() {
    let model = model();
    let scheduler = Scheduler { prompt_tokens_beside_answers: 16, ..Scheduler::interactive() };
    for others in [1, 3, 7] {
        let mut run = Run::new(&model, scheduler, Memory::of(1 << 20));
        let answer = run.submit(prompt(&[1], &[]), answer_of(2000));
        run.turn();
        for _ in 0..others {
            run.submit(prompt(&vec![1; 5000], &[]), answer_of(2));
        }
        run.turn();
        let short = run.submit(prompt(&[1, 2, 3, 4, 5], &[]), answer_of(2));
        let (start, written) = (run.turns, run.tokens_told(answer));
        while run.tokens_told(short) == 0 {
            run.turn();
        }
        let turns = run.turns - start;
        assert!(turns <= scheduler.steps_to_read(5, others), "{turns} turns behind {others}");
        assert_eq!(run.tokens_told(answer) - written, turns, "the running answer gets a token in each");
    }
}

#[test]
fn pictures_are_read_in_turns_and_answers_go_on() {
    let model = model();
    let mut run = Run::new(&model, Scheduler::interactive(), Memory::of(1 << 20));
    let answer = run.submit(prompt(&[1], &[]), answer_of(100));
    run.turn();
    let album: Vec<_> = (0..20).map(|index| (index, index as f32)).collect();
    run.submit(prompt(&[1; 20], &album), answer_of(2));
    run.turn();
    let one = run.submit(prompt(&[1, 2, 3], &[(0, 100.0)]), answer_of(2));
    let (start, written) = (run.turns, run.tokens_told(answer));
    while run.tokens_told(one) == 0 {
        run.turn();
        let read = model.pictures().len();
        assert!(read < run.turns, "at most one in a turn: {read} in {}", run.turns);
    }
    // Two with pictures, one each: k * m = 2; and the step that reads the prompt.
    let turns = run.turns - start;
    assert!(turns <= 3, "{turns} turns for one picture");
    assert_eq!(run.tokens_told(answer) - written, turns);
    run.finish();
    assert_eq!(model.pictures().len(), 21);
    let mut idle = Run::new(&model, Scheduler::interactive(), Memory::of(1 << 20));
    idle.submit(prompt(&[1; 20], &album), answer_of(1));
    idle.finish();
    assert_eq!(idle.turns, 20, "somebody may come");
    let mut batch = Run::new(&model, Scheduler::default(), Memory::of(1 << 20));
    batch.submit(prompt(&[1; 20], &album), answer_of(1));
    batch.finish();
    assert_eq!(batch.turns, 5, "several at once while nobody else waits");
}

#[test]
fn memory_is_counted_before_a_request_starts() {
    let model = model();
    let memory = Memory { answer_share: 1.0, overtakes: 2, ..Memory::of(100) };
    let mut run = Run::new(&model, Scheduler::interactive(), memory);
    // 50 bytes: 10 of a picture, 31 of tokens, 9 for later tokens.
    let first = run.submit(prompt(&[1; 31], &[(0, 1.0)]), answer_of(10));
    // The same picture costs nothing: 60 would not fit, 50 do.
    let second = run.submit(prompt(&[2; 41], &[(0, 1.0)]), answer_of(10));
    let large = run.submit(prompt(&[3; 80], &[]), answer_of(10));
    let small: Vec<_> = (0..5).map(|token| run.submit(prompt(&[token], &[]), answer_of(1))).collect();
    run.turn();
    assert_eq!(run.stats().cache_bytes, 10 + 31 + 41);
    assert_eq!((run.stats().running, run.stats().images_encoded), (2, 1));
    run.finish();
    assert_eq!(run.done.len(), 8);
    assert_eq!(run.stats().preemptions, 0);
    // Nothing small fits beside the two, so nobody overtook.
    assert_eq!((first, second, large, small.len()), (0, 1, 2, 5));

    let mut run = Run::new(&model, Scheduler::interactive(), memory);
    run.submit(prompt(&[1; 31], &[]), answer_of(10));
    let large = run.submit(prompt(&[3; 80], &[]), answer_of(10));
    let small: Vec<_> = (0..5).map(|token| run.submit(prompt(&[token], &[]), answer_of(1))).collect();
    run.finish();
    assert_eq!(
        run.started,
        [0, small[0], small[1], large, small[2], small[3], small[4]],
        "two may overtake it"
    );
}

#[test]
fn the_next_turn_of_a_conversation_reads_only_what_is_new() {
    let model = model();
    let config = answer_of(5);
    let mut run = Run::new(&model, Scheduler::interactive(), Memory::of(1000));
    let mut tokens: Vec<u32> = vec![1, 4, 9, 2, 11, 17, 3];
    let mut cached = Vec::new();
    for turn in 0..4u32 {
        let inputs = prompt(&tokens, &[(2, 0.5), (4, 0.25)]);
        let (before, id) = (run.stats().tokens_read, run.submit(inputs.clone(), config.clone()));
        run.finish();
        let generated = &run.done[&id];
        assert_eq!(generated.sequences, alone(&inputs, &config), "turn {turn}");
        let usage = generated.usage;
        // The last token of an answer is never read.
        let read = (run.stats().tokens_read - before) as usize;
        assert_eq!(read, usage.prompt_tokens - usage.cached_tokens + 4);
        cached.push((usage.cached_tokens, usage.cached_images));
        tokens.extend(&generated.sequences[0].token_ids);
        tokens.extend([20 + turn % 2, 5, 6]);
    }
    // All but the last token of the answer before, and what the user wrote behind it.
    assert_eq!(cached, [(0, 0), (11, 2), (19, 2), (27, 2)]);
    assert_eq!(*model.pictures(), [0.5, 0.25]);
    assert_eq!((run.stats().reused_tokens, run.stats().images_reused), (57, 6));
}

#[test]
fn another_question_about_a_picture_reads_neither_it_nor_the_words_before() {
    let model = model();
    let mut run = Run::new(&model, Scheduler::interactive(), Memory::of(1000));
    for (question, picture, expected) in [
        (vec![1, 2, 3, 4, 5, 6], 0.5, 0),
        (vec![1, 2, 3, 4, 9], 0.5, 4),
        // The same words about another picture share what stands before it.
        (vec![1, 2, 3, 4, 5, 6], 0.25, 2),
        // A prompt that was read before is read from its last token on.
        (vec![1, 2, 3, 4, 9], 0.5, 4),
        (vec![1, 2, 3, 4], 0.25, 3),
    ] {
        let inputs = prompt(&question, &[(2, picture)]);
        let mut expected = expected;
        for config in searches(6) {
            let id = run.submit(inputs.clone(), config.clone());
            run.finish();
            assert_eq!(run.done[&id].sequences, alone(&inputs, &config), "{question:?} {config:?}");
            let expected =
                if config.use_cache { std::mem::replace(&mut expected, question.len() - 1) } else { 0 };
            assert_eq!(run.done[&id].usage.cached_tokens, expected, "{question:?} {config:?}");
        }
    }
    assert_eq!(*model.pictures(), [0.5, 0.25]);
}

#[test]
fn what_is_kept_gives_way_and_is_used_even_where_no_copy_fits() {
    let model = model();
    let memory = Memory { kept_prefix_bytes: 100, ..Memory::of(100) };
    let mut run = Run::new(&model, Scheduler::interactive(), memory);
    let long: Vec<u32> = (0..60).map(|place| place % 20).collect();
    run.submit(prompt(&long, &[(0, 1.0)]), answer_of(2));
    run.finish();
    assert_eq!(run.stats().kept_bytes, 71);
    // Beside its copy of 61 bytes the new request would have no room: it takes the original.
    let longer: Vec<u32> = long.iter().copied().chain([5, 6, 7]).collect();
    let inputs = prompt(&longer, &[(0, 1.0)]);
    let id = run.submit(inputs.clone(), answer_of(4));
    run.finish();
    assert_eq!(run.done[&id].sequences, alone(&inputs, &answer_of(4)));
    assert_eq!((run.done[&id].usage.cached_tokens, run.done[&id].usage.cached_images), (60, 1));
    // A stranger needs the room.
    run.submit(prompt(&[7; 91], &[]), answer_of(2));
    run.turn();
    assert_eq!(run.stats().kept_bytes, 0);
    run.finish();
    let id = run.submit(inputs.clone(), answer_of(4));
    run.finish();
    let usage = run.done[&id].usage;
    assert_eq!((usage.cached_tokens, usage.cached_images), (0, 0));
    assert_eq!(*model.pictures(), [1.0, 1.0]);
}

#[test]
fn a_request_can_be_cancelled_at_every_stage() {
    let model = model();
    let scheduler =
        Scheduler { prompt_tokens_beside_answers: 2, max_sequences: 2, ..Scheduler::interactive() };
    let pictures = [(0, 1.0), (1, 2.0), (2, 3.0)];
    let long = prompt(&(0..20).collect::<Vec<_>>(), &pictures);
    for beams in [1, 2] {
        // Turns before the cancellation -> tokens of the prompt read by then, pictures read by then.
        for (turns, tokens, read) in [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 2, 3), (6, 8, 3), (14, 20, 3)] {
            let mut run = Run::new(&model, scheduler, Memory::of(1000));
            model.pictures().clear();
            let answer = run.submit(prompt(&[1], &[]), answer_of(100));
            run.turn();
            let id = run.submit(long.clone(), GenerationConfig { num_beams: beams, ..answer_of(50) });
            if beams == 2 {
                // Three sequences are too many: it waits, whatever the turns.
                (0..turns).for_each(|_| run.turn());
                run.cancel(id);
                run.turn();
                assert_eq!(run.done[&id].usage.generated_tokens, 0);
                assert!(model.pictures().is_empty());
                continue;
            }
            (0..turns).for_each(|_| run.turn());
            run.cancel(id);
            run.turn();
            let generated = &run.done[&id];
            assert!(generated.sequences.iter().all(|s| s.finish_reason == FinishReason::Cancelled));
            assert_eq!(model.pictures().len(), read, "after {turns} turns");
            let written = generated.sequences[0].token_ids.len();
            assert!(alone(&long, &answer_of(50))[0].token_ids.starts_with(&generated.sequences[0].token_ids));
            assert_eq!(written > 0, tokens == 20, "after {turns} turns");
            // What was read is not lost: the same request goes on from there.
            let id = run.submit(long.clone(), answer_of(50));
            run.cancel(answer);
            run.finish();
            assert_eq!(run.done[&id].sequences, alone(&long, &answer_of(50)));
            assert_eq!(run.done[&id].usage.cached_tokens, tokens.min(19), "after {turns} turns");
            assert_eq!(run.done[&id].usage.cached_images, read, "after {turns} turns");
        }
    }
}

#[test]
fn random_clients_that_come_and_go_get_what_they_get_alone() {
    let model = model();
    let mut expected = HashMap::new();
    for seed in 0..6 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let scheduler = Scheduler {
            max_step_tokens: rng.random_range(1..40),
            prompt_tokens_beside_answers: rng.random_range(1..20),
            max_step_images: rng.random_range(1..4),
            max_sequences: rng.random_range(3..20),
        };
        let memory = Memory { answer_share: rng.random(), ..Memory::of(rng.random_range(150..600)) };
        let mut run = Run::new(&model, scheduler, memory);
        let mut submitted = Vec::new();
        while submitted.len() < 64 {
            if rng.random_bool(0.4) {
                let kind = rng.random_range(0..searches(1).len());
                let length = rng.random_range(1..25);
                // Few different tokens and pictures, so that prompts share beginnings.
                let tokens: Vec<u32> = (0..length).map(|_| rng.random_range(1..3)).collect();
                let picture = rng
                    .random_bool(0.6)
                    .then(|| (rng.random_range(0..3), f32::from(rng.random_range(0..4u8))));
                let inputs = prompt(&tokens, picture.as_slice());
                let config = searches(rng.random_range(1..12)).remove(kind);
                submitted.push((run.submit(inputs.clone(), config.clone()), inputs, config));
            }
            if let Some((id, ..)) = submitted.last()
                && rng.random_bool(0.15)
            {
                run.cancel(rng.random_range(0..=*id));
            }
            run.turn();
        }
        run.finish();
        assert_eq!(run.done.len(), 64);
        for (id, inputs, config) in &submitted {
            let key = format!("{:?} {:?} {config:?}", inputs.token_ids, inputs.image_index)
                + &format!("{:?}", inputs.images.iter().map(|image| image.data[0]).collect::<Vec<_>>());
            let expected = expected.entry(key).or_insert_with(|| alone(inputs, config));
            let got = &run.done[id].sequences;
            if got.iter().any(|answer| answer.finish_reason == FinishReason::Cancelled) {
                // Beams change their minds; the others wrote the beginning of what they would have written.
                let is_beginning =
                    got.iter().zip(&*expected).all(|(got, all)| all.token_ids.starts_with(&got.token_ids));
                assert!(is_beginning || config.num_beams > 1, "seed {seed}: {config:?}");
            } else {
                assert_eq!(got, expected, "seed {seed}: {config:?}");
            }
        }
    }
}
