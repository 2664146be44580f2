use std::sync::LazyLock;

use idefics_testing::{TokenizerKind, idefics_tokenizer_dir};

use super::*;

static BASE: LazyLock<Processor> = LazyLock::new(|| load(TokenizerKind::Base));
static INSTRUCT: LazyLock<Processor> = LazyLock::new(|| load(TokenizerKind::Instruct));

fn load(kind: TokenizerKind) -> Processor {
    Processor::from_pretrained(idefics_tokenizer_dir(kind)).unwrap()
}

/// A picture of one colour, 30 x 400 as in the reference's own tests.
fn picture(value: u8) -> Segment {
    let image = RgbImage::new(400, 30, vec![value; 400 * 30 * 3]).unwrap();
    Segment::Image(ImageSource::Rgb(Arc::new(image)))
}

fn text(words: &str) -> Segment {
    Segment::text(words)
}

/// Small pictures keep the tests quick.
fn options() -> ProcessOptions {
    ProcessOptions { image_size: Some((4, 4)), ..ProcessOptions::default() }
}

/// The index of each token as one character, `.` for none.
fn seen(inputs: &SequenceInputs) -> String {
    let digit = |seen: &Option<u32>| seen.map_or('.', |i| char::from_digit(i, 10).unwrap());
    inputs.image_index.iter().map(digit).collect()
}

#[test]
fn a_prompt_becomes_ids_pictures_and_an_index() {
    let prompt = vec![text("User:"), picture(10), text("Describe this image.\nAssistant:")];
    let inputs = BASE.process(&[prompt], &options()).unwrap().remove(0);
    assert_eq!(
        inputs.token_ids,
        [1, 4911, 29901, 32000, 32001, 32000, 20355, 915, 445, 1967, 29889, 13, 7900, 22137, 29901]
    );
    assert_eq!(seen(&inputs), "....00000000000");
    assert_eq!(inputs.images.len(), 1);
    assert_eq!((inputs.images[0].height, inputs.images[0].width), (4, 4));
    let expected = (10.0f64 / 255.0) as f32;
    assert_eq!(inputs.images[0].data[0], (expected - Normalize::CLIP.mean[0]) / Normalize::CLIP.std[0]);
}

#[test]
fn the_model_card_dialogue_has_its_ids() {
    let prompt = vec![
        text("User: What is in this image?"),
        picture(1),
        text("<end_of_utterance>"),
        text(concat!(
            "\nAssistant: This picture depicts Idefix, the dog of Obelix in Asterix and Obelix. ",
            "Idefix is running on the ground.<end_of_utterance>"
        )),
        text("\nUser:"),
        picture(2),
        text("And who is that?<end_of_utterance>"),
        text("\nAssistant:"),
    ];
    let never = ProcessOptions { add_end_of_utterance: AddEndOfUtterance::Never, ..options() };
    let inputs = INSTRUCT.process(std::slice::from_ref(&prompt), &never).unwrap().remove(0);
    assert_eq!(inputs.token_ids.len(), 70);
    assert_eq!(
        inputs.token_ids[..13],
        [1, 4911, 29901, 1724, 338, 297, 445, 1967, 29973, 32000, 32001, 32000, 32002]
    );
    assert_eq!(inputs.token_ids[66..], [13, 7900, 22137, 29901]);
    assert_eq!(seen(&inputs), format!("{}{}{}", ".".repeat(10), "0".repeat(47), "1".repeat(13)));
    assert_eq!(inputs.images.len(), 2);

    // By default the token goes between neighbouring texts as well: four more.
    let auto = INSTRUCT.process(&[prompt], &options()).unwrap().remove(0);
    assert_eq!(auto.token_ids.iter().filter(|&&id| id == 32002).count(), 3 + 3);
}

#[test]
fn end_of_utterance_follows_the_vocabulary() {
    let prompt = vec![text("a"), text("b")];
    let of = |processor: &Processor, add| {
        let options = ProcessOptions { add_end_of_utterance: add, ..ProcessOptions::default() };
        processor.prompt_text(&prompt, &options).map_err(|e| e.to_string())
    };
    assert_eq!(of(&INSTRUCT, AddEndOfUtterance::Auto).unwrap(), "<s>a<end_of_utterance>b");
    assert_eq!(of(&INSTRUCT, AddEndOfUtterance::Always).unwrap(), "<s>a<end_of_utterance>b");
    assert_eq!(of(&INSTRUCT, AddEndOfUtterance::Never).unwrap(), "<s>ab");
    assert_eq!(of(&BASE, AddEndOfUtterance::Auto).unwrap(), "<s>ab");
    assert_eq!(
        of(&BASE, AddEndOfUtterance::Always).unwrap_err(),
        "option `add_end_of_utterance`: the vocabulary has no `<end_of_utterance>`: expected an instruct checkpoint"
    );
}

#[test]
fn truncation_drops_the_images_behind_the_cut() {
    let prompt = vec![picture(1), picture(2), picture(3), text("Question:")];
    let cut = |max_length| {
        let options = ProcessOptions { max_length, add_eos_token: true, ..options() };
        BASE.process(std::slice::from_ref(&prompt), &options).map(|mut inputs| inputs.remove(0))
    };
    let whole = cut(None).unwrap();
    assert_eq!(whole.token_ids, [1, 32000, 32001, 32000, 32001, 32000, 32001, 32000, 894, 29901, 2]);
    assert_eq!((seen(&whole).as_str(), whole.images.len()), ("..001122222", 3));
    let two = cut(Some(5)).unwrap();
    assert_eq!((seen(&two).as_str(), two.images.len()), ("..001", 2));
    let none = cut(Some(2)).unwrap();
    assert_eq!((seen(&none).as_str(), none.images.len()), ("..", 0));
    assert_eq!(cut(Some(0)).unwrap_err().to_string(), "option `max_length`: expected at least 1, got 0");
}

#[test]
fn image_tokens_in_text_have_no_picture() {
    let one = |prompt: Prompt| BASE.process(&[prompt], &options()).unwrap().remove(0);
    let none = one(vec![text("an <image> here")]);
    assert!(none.token_ids.contains(&32001));
    assert_eq!((seen(&none).contains('0'), none.images.len()), (false, 0));
    // The first image token takes the picture, whoever wrote it.
    let mixed = one(vec![text("<image>"), picture(1), text("b")]);
    assert_eq!(mixed.token_ids, [1, 32001, 32000, 32001, 32000, 289]);
    assert_eq!((seen(&mixed).as_str(), mixed.images.len()), (".00...", 1));
}

#[test]
fn a_sequence_does_not_depend_on_its_batch() {
    let prompts = vec![
        vec![text("<image>"), picture(1), text("b")],
        vec![picture(2), picture(3), picture(4)],
        vec![text("words")],
    ];
    let together = BASE.process(&prompts, &options()).unwrap();
    for (prompt, inputs) in prompts.iter().zip(together) {
        let alone = BASE.process(std::slice::from_ref(prompt), &options()).unwrap().remove(0);
        assert_eq!(inputs.token_ids, alone.token_ids);
        assert_eq!(inputs.image_index, alone.image_index);
        assert_eq!(inputs.images, alone.images);
    }
}

/// The four one-text samples of the reference's padding tests.
fn padding_samples() -> Vec<Prompt> {
    [
        "User:",
        "Describe this image.\nAssistant: An image of two kittens.\n",
        "User:",
        "Describe this image.\nAssistant:",
    ]
    .map(|words| vec![text(words)])
    .to_vec()
}

// transformers `test_processing_idefics.py`, `test_tokenizer_padding` and `test_tokenizer_left_padding`.
#[test]
fn padding_equals_the_reference() {
    let words = "Describe this image.\nAssistant:";
    for (padding, length) in [(Padding::MaxLength(20), 20), (Padding::Longest, 19)] {
        for side in [PaddingSide::Left, PaddingSide::Right] {
            let padded = BASE.process_padded(&padding_samples(), &options(), padding, side).unwrap();
            assert_eq!((padded.batch, padded.length), (4, length));
            let row = &padded.input_ids[3 * length..];
            let mask = &padded.attention_mask[3 * length..];
            let decoded = BASE.decode(row, SpecialTokenText::Keep).unwrap();
            let pads = "<unk>".repeat(length - 10);
            let (expected_text, expected_mask) = match side {
                PaddingSide::Left => {
                    (format!("{pads}<s> {words}"), [vec![0; length - 10], vec![1; 10]].concat())
                }
                PaddingSide::Right => {
                    (format!("<s> {words}{pads}"), [vec![1; 10], vec![0; length - 10]].concat())
                }
            };
            assert_eq!(decoded, expected_text, "{padding:?} {side:?}");
            assert_eq!(mask, expected_mask, "{padding:?} {side:?}");
            assert_eq!(padded.pixel_values, vec![0.0; 4 * 3 * 4 * 4], "zeros stand for no image");
            assert_eq!(padded.image_attention_mask, vec![0; 4 * length]);
        }
    }
}

#[test]
fn rows_that_stay_unequal_are_an_error() {
    let pad =
        |padding, prompts: &[Prompt]| BASE.process_padded(prompts, &options(), padding, PaddingSide::Left);
    for padding in [Padding::None, Padding::MaxLength(5)] {
        let error = pad(padding, &padding_samples()).unwrap_err();
        assert!(matches!(error, ProcessorError::RaggedBatch { longest: 19, .. }), "{error}");
    }
    assert_eq!(pad(Padding::None, &padding_samples()[..1]).unwrap().length, 3);
    assert_eq!(pad(Padding::MaxLength(2), &padding_samples()[..1]).unwrap().length, 3);
}

#[test]
fn padded_rows_hold_what_the_sequences_hold() {
    let prompts = vec![
        vec![text("User:"), picture(1), text("Describe this image.\nAssistant:")],
        vec![text("User:"), picture(2), text("or"), picture(3), text("?")],
        vec![text("User:")],
        vec![picture(4), picture(5)],
    ];
    let ragged = BASE.process(&prompts, &options()).unwrap();
    for side in [PaddingSide::Left, PaddingSide::Right] {
        let padded = BASE.process_padded(&prompts, &options(), Padding::Longest, side).unwrap();
        assert_eq!((padded.num_images, padded.image_size), (2, (4, 4)));
        let values = 3 * 4 * 4;
        for (b, sequence) in ragged.iter().enumerate() {
            let tokens = sequence.token_ids.len();
            let start = b * padded.length
                + match side {
                    PaddingSide::Left => padded.length - tokens,
                    PaddingSide::Right => 0,
                };
            assert_eq!(padded.input_ids[start..start + tokens], sequence.token_ids);
            let mask = &padded.image_attention_mask[start * 2..(start + tokens) * 2];
            assert_eq!(mask, image_index::one_hot(&sequence.image_index, 2), "row {b}, {side:?}");
            for slot in 0..2 {
                let got = &padded.pixel_values[(b * 2 + slot) * values..][..values];
                match sequence.images.get(slot) {
                    Some(image) => assert_eq!(got, image.data),
                    None => assert!(got.iter().all(|&v| v == 0.0)),
                }
            }
        }
    }
}

// In the padded form of the reference an image token may point to another row's zero slot.
#[test]
fn padded_masks_know_the_batch() {
    let prompts = vec![vec![text("<image>")], vec![picture(1)]];
    let padded = BASE.process_padded(&prompts, &options(), Padding::Longest, PaddingSide::Left).unwrap();
    assert_eq!(padded.image_attention_mask[..padded.length], [0, 0, 0, 1]);
    assert_eq!(BASE.process(&prompts, &options()).unwrap()[0].image_index, [None, None]);
}

// transformers `test_processing_idefics.py`, the common tests of keyword arguments.
#[test]
fn sizes_and_lengths_are_honoured() {
    for length in [117, 112, 76] {
        let padded = BASE
            .process_padded(
                &[vec![text("lower newer")]],
                &options(),
                Padding::MaxLength(length),
                PaddingSide::Left,
            )
            .unwrap();
        assert_eq!(padded.length, length);
    }
    for size in [234, 224, 214] {
        let options = ProcessOptions { image_size: Some((size, size)), ..ProcessOptions::default() };
        let inputs = BASE.process(&[vec![picture(3)]], &options).unwrap().remove(0);
        assert_eq!((inputs.images[0].height, inputs.images[0].width), (size, size));
    }
    // Two strings in a flat list are one prompt.
    let strings = [vec![text("lower newer"), text("upper older longer string")]];
    let padded = INSTRUCT.process_padded(&strings, &options(), Padding::Longest, PaddingSide::Left).unwrap();
    assert_eq!((padded.batch, padded.length), (1, 8));
    let zero = ProcessOptions { image_size: Some((0, 4)), ..ProcessOptions::default() };
    assert!(BASE.process(&strings, &zero).is_err());
}

#[test]
fn images_and_texts_pair_up() {
    let source = |n: u8| ImageSource::Bytes(vec![n].into());
    let texts = || vec!["a".to_owned(), "b".to_owned()];
    let one = prompts_from_images_and_text(ImagesPerText::One(vec![source(1), source(2)]), texts()).unwrap();
    assert_eq!(one, [vec![source(1).into(), text("a")], vec![source(2).into(), text("b")]]);
    let several = ImagesPerText::Several(vec![vec![source(1), source(2)], vec![]]);
    let several = prompts_from_images_and_text(several, texts()).unwrap();
    assert_eq!(several, [vec![text("a"), source(1).into(), source(2).into()], vec![text("b")]]);
    let error = prompts_from_images_and_text(ImagesPerText::One(vec![source(1)]), texts()).unwrap_err();
    assert_eq!(error.to_string(), "images and text must pair up: 2 texts, 1 images or lists of images");
}

#[test]
fn errors_say_where() {
    let bad = Segment::Image(ImageSource::Bytes(Arc::from(*b"nonsense")));
    let error = BASE.process(&[vec![text("a")], vec![text("b"), bad]], &options()).unwrap_err();
    assert_eq!(error.to_string(), "prompt 1, segment 1 (image bytes)");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, "not an image in an accepted format (accepted: JPEG, PNG, WebP, GIF, BMP)");

    let private = Segment::Image(ImageSource::Url("http://127.0.0.1/x.png?key=1".to_owned()));
    let error = BASE.process(&[vec![private]], &options()).unwrap_err();
    assert_eq!(error.to_string(), "prompt 0, segment 0 (http://127.0.0.1/x.png)");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, "host `127.0.0.1` has an address that is not public");
}

#[test]
fn texts_are_decoded_in_batches() {
    let rows = [vec![1, 4911, 29901], vec![1, 20355, 915, 445]];
    assert_eq!(BASE.batch_decode(&rows, SpecialTokenText::Skip).unwrap(), ["User:", "Describe this"]);
}

#[test]
fn a_directory_without_its_files_is_an_error_that_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let error = Processor::from_pretrained(dir.path()).unwrap_err().to_string();
    assert!(error.contains("preprocessor_config.json"), "{error}");
}

#[test]
fn continuations_are_tokenized_with_their_prompt() {
    let prompt = vec![text("User:"), picture(10), text("What is this?\nAssistant:")];
    let texts = [" A dog.".to_owned(), " A tractor.".to_owned(), "A".to_owned()];
    let joined = BASE.continuations(&prompt, &texts, &options()).unwrap();
    let whole = BASE.prompt_text(&prompt, &options()).unwrap();
    for (text, ids) in texts.iter().zip(&joined.token_ids) {
        let together = [&joined.inputs.token_ids[..], ids].concat();
        assert_eq!(together, BASE.tokenize(&format!("{whole}{text}")).unwrap(), "{text:?}");
    }
    assert_eq!(joined.inputs.token_ids.len(), joined.inputs.image_index.len());
    assert_eq!(joined.inputs.images.len(), 1);
    let cut = ProcessOptions { max_length: Some(3), ..options() };
    let error = BASE.continuations(&prompt, &texts, &cut).unwrap_err().to_string();
    assert_eq!(error, "option `max_length`: expected none where a prompt is continued, got 3");
}

#[test]
fn a_prompt_gives_away_the_tokens_that_a_continuation_joins() {
    // "apple" is one token, so that the prompt cannot keep its "app".
    let prompt = vec![text("The app")];
    let joined = BASE.continuations(&prompt, &["le".to_owned()], &options()).unwrap();
    let alone = BASE.process(&[prompt], &options()).unwrap().remove(0);
    assert!(joined.inputs.token_ids.len() < alone.token_ids.len());
    let together = [&joined.inputs.token_ids[..], &joined.token_ids[0]].concat();
    assert_eq!(together, BASE.tokenize("<s>The apple").unwrap());
}
