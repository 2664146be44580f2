//! A sequence's result depends on nothing but the sequence: all equalities here are bit for bit, because every
//! sum runs in an order that its own length alone decides.

use std::sync::Arc;

use idefics::{
    SequenceInputs,
    checkpoint::Checkpoint,
    generate::{LogitsOf, Row, StepModel},
    model::Model,
    ops::{Compute, Context, Isa},
    processor::PixelValues,
    quantize::{Format, Recipe, quantize_weights},
};
use idefics_testing::{Golden, golden_fill, write_golden_checkpoint};

const VOCAB: usize = 43;

/// The golden models in every form of their weights, on every tier, in both types. Their narrow layers take the
/// plain way through packed weights; wide ones are in `quantized.rs`.
fn models() -> impl Iterator<Item = (String, Model)> {
    let formats = [None, Some(Format::Nf4), Some(Format::Nf4DoubleQuant), Some(Format::Q8)];
    let forms =
        [Golden::A, Golden::B].into_iter().flat_map(move |golden| formats.map(|format| (golden, format)));
    let cases = forms.flat_map(|form| {
        [Compute::F32, Compute::Bf16]
            .into_iter()
            .flat_map(move |compute| Isa::available().map(move |isa| (form, Context { isa, compute })))
    });
    cases.map(|((golden, format), ctx)| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write_golden_checkpoint(dir.path(), golden);
        let mut checkpoint = Checkpoint::open(dir.path()).expect("a sound checkpoint");
        if let Some(format) = format {
            quantize_weights(&mut checkpoint.weights, &Recipe::new(format)).expect("packed weights");
        }
        let model = Model::new(checkpoint.config, &checkpoint.weights, ctx).expect("a model");
        (format!("{golden:?} {format:?} {} {:?}", ctx.isa.tier(), ctx.compute), model)
    })
}

fn picture(name: &str) -> Arc<PixelValues> {
    Arc::new(PixelValues::new(golden_fill(name, &[3, 8, 8]), 8, 8))
}

/// A sequence of `n` tokens whose text before `first_image` sees nothing and whose pictures change every few.
fn sequence(n: usize, first_image: usize, n_images: usize) -> SequenceInputs {
    SequenceInputs {
        token_ids: (0..n).map(|i| (i * 17 % VOCAB) as u32).collect(),
        image_index: (0..n)
            .map(|i| {
                (n_images > 0 && i >= first_image).then(|| ((i - first_image) / 3).min(n_images - 1) as u32)
            })
            .collect(),
        images: (0..n_images).map(|i| picture(&format!("picture {i}"))).collect(),
    }
}

/// Logits of all positions, the sequences fed together, `chunk` tokens of each at a time.
fn logits(model: &Model, inputs: &[SequenceInputs], chunk: usize) -> Vec<Vec<f32>> {
    let mut caches: Vec<_> = inputs.iter().map(|row| model.start(row).expect("image states")).collect();
    let mut all = vec![Vec::new(); inputs.len()];
    let longest = inputs.iter().map(|row| row.token_ids.len()).max().unwrap_or(0);
    for start in (0..longest).step_by(chunk) {
        let mut rows: Vec<_> = inputs
            .iter()
            .zip(&mut caches)
            .map(|(inputs, cache)| {
                let range = start.min(inputs.token_ids.len())..(start + chunk).min(inputs.token_ids.len());
                Row {
                    cache,
                    token_ids: &inputs.token_ids[range.clone()],
                    image_index: &inputs.image_index[range],
                    logits: LogitsOf::All,
                }
            })
            .collect();
        for (all, new) in all.iter_mut().zip(model.step(&mut rows).expect("logits")) {
            all.extend(new);
        }
    }
    all
}

#[test]
fn a_batch_gives_each_sequence_what_it_gets_alone() {
    let inputs =
        [sequence(9, 2, 2), sequence(23, 0, 3), sequence(1, 0, 1), sequence(14, 0, 0), sequence(80, 70, 1)];
    for (name, model) in models() {
        let together = logits(&model, &inputs, usize::MAX >> 1);
        for (index, input) in inputs.iter().enumerate() {
            let alone = logits(&model, std::slice::from_ref(input), usize::MAX >> 1);
            assert_eq!(alone[0], together[index], "{name}, sequence {index}");
        }
    }
}

#[test]
fn chunks_of_a_prompt_and_single_tokens_equal_the_whole() {
    let inputs = [sequence(150, 5, 4), sequence(40, 0, 0)];
    for (name, model) in models() {
        let whole = logits(&model, &inputs, usize::MAX >> 1);
        for chunk in [1, 7, 64, 149] {
            assert_eq!(logits(&model, &inputs, chunk), whole, "{name}, chunks of {chunk}");
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let inputs = [sequence(30, 3, 2), sequence(12, 0, 1)];
    for (name, model) in models() {
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| logits(&model, &inputs, usize::MAX >> 1))
        };
        assert_eq!(on(1), on(4), "{name}");
    }
}

#[test]
fn the_order_of_pictures_follows_the_index_and_nothing_else() {
    let forward = sequence(20, 2, 3);
    let mut permuted = forward.clone();
    permuted.images.rotate_left(1); // picture i now stands at i - 1
    for index in permuted.image_index.iter_mut().flatten() {
        *index = (*index + 2) % 3;
    }
    let mut swapped = forward.clone();
    swapped.images.swap(0, 1);
    for (name, model) in models() {
        let got = logits(&model, &[forward.clone(), permuted.clone(), swapped.clone()], usize::MAX >> 1);
        assert_eq!(got[0], got[1], "{name}: the same pictures under other numbers");
        assert_ne!(got[0], got[2], "{name}: other pictures under the same numbers");
    }
}

#[test]
fn a_branch_of_a_cache_does_not_touch_the_other() {
    let input = sequence(12, 1, 1);
    for (name, model) in models() {
        let mut cache = model.start(&input).expect("image states");
        let feed = |cache: &mut _, ids: &[u32]| {
            let index = vec![Some(0); ids.len()];
            let row = Row { cache, token_ids: ids, image_index: &index, logits: LogitsOf::Last };
            model.step(&mut [row]).expect("logits").remove(0)
        };
        feed(&mut cache, &input.token_ids);
        let mut branch = cache.clone();
        let first = feed(&mut cache, &[7]);
        let other = feed(&mut branch.clone(), &[9]);
        assert_eq!(feed(&mut branch, &[7]), first, "{name}");
        assert_ne!(other, first, "{name}");
    }
}

/// The upstream test of the gate (transformers `test_cross_attention_gates`): with no token looking at a
/// picture its pixels change nothing, and looking at it does.
#[test]
fn pictures_reach_only_the_tokens_that_look_at_them() {
    let constant = |value: f32| Arc::new(PixelValues::new(vec![value; 192], 8, 8));
    let with = |value: f32, looking: bool| SequenceInputs {
        token_ids: (0..7).collect(),
        image_index: vec![looking.then_some(0); 7],
        images: vec![constant(value)],
    };
    for (name, model) in models() {
        let got = logits(&model, &[with(0.6, false), with(0.3, false), with(0.6, true)], usize::MAX >> 1);
        assert_eq!(got[0], got[1], "{name}");
        assert_ne!(got[0], got[2], "{name}");
    }
}
