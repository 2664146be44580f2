//! A model whose files are in memory is the same as in its directory, and its weights are used where they are.

use idefics::{
    Idefics, LoadError, LoadOptions, MemoryFiles, Processor, Segment,
    checkpoint::{Checkpoint, CheckpointError, PackedWeight},
    generate::GenerationConfig,
    processor::{ImageSource, ProcessOptions},
};
use idefics_testing::fixture;

/// The files of a directory of `fixtures/`, `shift` bytes behind an aligned address. They stay until the end of the
/// test, as those of a program do.
fn embed(name: &'static str, shift: usize) -> MemoryFiles {
    let entries =
        std::fs::read_dir(fixture(name)).expect("a directory").map(|entry| entry.expect("an entry"));
    let files: Vec<(&'static str, &'static [u8])> = entries
        .map(|entry| {
            let bytes = std::fs::read(entry.path()).expect("a file");
            let mut aligned = vec![0_u64; (shift + bytes.len()).div_ceil(8)];
            let place: &mut [u8] = bytemuck::cast_slice_mut(&mut aligned);
            place[shift..shift + bytes.len()].copy_from_slice(&bytes);
            let place: &'static [u8] = bytemuck::cast_slice(aligned.leak());
            let name = entry.file_name().into_string().expect("a name in UTF-8");
            (&*name.leak(), &place[shift..shift + bytes.len()])
        })
        .collect();
    MemoryFiles { name, files: files.leak() }
}

fn answers(model: &Idefics, processor: &Processor) -> Vec<(Vec<u32>, Option<String>)> {
    let image = || Segment::Image(ImageSource::Path(fixture("processor/444.jpg")));
    let prompts = [
        vec![Segment::text("User:"), image(), Segment::text("What is this?<end_of_utterance>\nAssistant:")],
        vec![Segment::text("A text alone")],
    ];
    let inputs = processor.process(&prompts, &ProcessOptions::default()).expect("inputs");
    let defaults = model.default_generation(Some(processor.special_tokens())).expect("sound defaults");
    let config = GenerationConfig { max_new_tokens: Some(12), min_new_tokens: Some(12), ..defaults };
    let generated = model.generate_text(processor, &inputs, &config).expect("answers");
    generated
        .into_iter()
        .map(|answer| answer.sequences.into_iter().next().expect("an answer"))
        .map(|sequence| (sequence.token_ids, sequence.text))
        .collect()
}

#[test]
fn a_model_in_memory_answers_as_from_its_directory() {
    let options = LoadOptions::default();
    let model = Idefics::from_pretrained(fixture("tiny"), &options).expect("a sound model");
    let processor = Processor::from_pretrained(fixture("tiny")).expect("a sound processor");
    let expected = answers(&model, &processor);
    // A linker that is told nothing may leave the bytes anywhere.
    for shift in [0, 1, 2] {
        let files = embed("tiny", shift);
        let model = Idefics::from_pretrained(files, &options).expect("the same model");
        let processor = Processor::from_pretrained(files).expect("the same processor");
        model.check_processor(&processor).expect("they fit");
        assert_eq!(answers(&model, &processor), expected, "{shift} bytes off");
    }
}

#[test]
fn weights_are_used_where_the_bytes_are() {
    for name in ["tiny", "tiny-nf4"] {
        let files = embed(name, 0);
        let program = files.get("model.safetensors").expect("weights").as_ptr_range();
        let checkpoint = Checkpoint::open(files).expect("a sound model");
        let on_disk = Checkpoint::open(fixture(name)).expect("the same model");
        assert_eq!(checkpoint.config, on_disk.config);
        assert_eq!(checkpoint.generation_config, on_disk.generation_config);
        assert_eq!(checkpoint.weights.len(), on_disk.weights.len());
        assert_eq!(checkpoint.files[0].bytes, on_disk.files[0].bytes);
        for ((name, weight), (other, twin)) in checkpoint.weights.iter().zip(on_disk.weights.iter()) {
            assert_eq!((name, weight.bytes()), (other, twin.bytes()));
            assert!(program.contains(&weight.bytes().as_ptr()), "{name} was copied");
        }
        for ((name, weight), (other, twin)) in
            checkpoint.weights.iter_packed().zip(on_disk.weights.iter_packed())
        {
            assert_eq!((name, weight.to_dense().bytes()), (other, twin.to_dense().bytes()));
            let PackedWeight::Nf4(weight) = weight else { panic!("{name}: {}", weight.format_name()) };
            assert!(program.contains(&weight.view().codes.as_ptr()), "{name} was copied");
        }
        assert_eq!(checkpoint.weights.iter_packed().count() > 0, name != "tiny");
    }
}

#[test]
fn what_is_missing_or_broken_is_named() {
    let whole = embed("tiny", 0);
    let without = |name: &str| -> MemoryFiles {
        let files: Vec<_> = whole.files.iter().copied().filter(|(file, _)| *file != name).collect();
        MemoryFiles { files: files.leak(), ..whole }
    };
    let open = |files| Idefics::from_pretrained(files, &LoadOptions::default()).err().expect("an error");
    let message = open(without("config.json")).to_string();
    assert!(message.contains("tiny/config.json"), "{message}");
    let error = open(without("model.safetensors"));
    assert!(matches!(error, LoadError::Checkpoint(CheckpointError::NoWeights { .. })), "{error}");
    let cut = |(name, bytes): (&'static str, &'static [u8])| (name, &bytes[..bytes.len() / 2]);
    let files: Vec<_> = whole.files.iter().copied().map(cut).collect();
    let error = open(MemoryFiles { files: files.leak(), ..whole });
    assert!(error.to_string().contains("tiny/config.json"), "{error}");

    let process = |files| Processor::from_pretrained(files).expect_err("an error").to_string();
    let message = process(without("preprocessor_config.json"));
    assert!(message.contains("tiny/preprocessor_config.json"), "{message}");
    // Either form of the tokenizer will do.
    Processor::from_pretrained(without("tokenizer.json")).expect("the other form");
    let neither = without("tokenizer.json");
    let files: Vec<_> =
        neither.files.iter().copied().filter(|(file, _)| *file != "tokenizer.model").collect();
    let message = process(MemoryFiles { files: files.leak(), ..whole });
    assert!(message.contains("tiny: found neither"), "{message}");
}
