use std::{fs, path::PathBuf, sync::Arc};

use idefics_testing::{TokenizerKind, idefics_tokenizer_dir, llama_tokenizer_dir};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// Text, with F, I and E for the three tokens where the flag is set, and its ids. From the reference's
/// tokenizer with LLaMA's vocabulary.
#[rustfmt::skip]
const GOLDEN: &[(&str, &[u32])] = &[
    ("<s>User: What is in this image?FIF", &[1, 4911, 29901, 1724, 338, 297, 445, 1967, 29973, 32000, 32001, 32000]),
    ("<s>User:FIFCan you tell me a very short story based on the image?", &[1, 4911, 29901, 32000, 32001, 32000, 1815, 366, 2649, 592, 263, 1407, 3273, 5828, 2729, 373, 278, 1967, 29973]),
    ("<s>Describe this image.\nAssistant:", &[1, 20355, 915, 445, 1967, 29889, 13, 7900, 22137, 29901]),
    ("<s>Describe this image.\nAssistant: An image of two kittens.\n", &[1, 20355, 915, 445, 1967, 29889, 13, 7900, 22137, 29901, 530, 1967, 310, 1023, 413, 986, 575, 29889, 13]),
    ("<s>User:", &[1, 4911, 29901]),
    ("E\nAssistant:", &[32002, 29871, 13, 7900, 22137, 29901]),
    ("<s>User:FIFDescribe this image.\nAssistant: An image of two dogs.\nUser:FIFDescribe this image.\nAssistant:", &[1, 4911, 29901, 32000, 32001, 32000, 20355, 915, 445, 1967, 29889, 13, 7900, 22137, 29901, 530, 1967, 310, 1023, 26361, 29889, 13, 2659, 29901, 32000, 32001, 32000, 20355, 915, 445, 1967, 29889, 13, 7900, 22137, 29901]),
    ("<s>FIFIn this picture from Asterix and Obelix, we can see", &[1, 32000, 32001, 32000, 512, 445, 7623, 515, 319, 2475, 861, 322, 4250, 295, 861, 29892, 591, 508, 1074]),
    ("<s>FIFIFQuestion: What's on the picture? Answer:", &[1, 32000, 32001, 32000, 32001, 32000, 894, 29901, 1724, 29915, 29879, 373, 278, 7623, 29973, 673, 29901]),
    ("<s>User: What is in this image?FIFE\nAssistant: This picture depicts Idefix, the dog of Obelix in Asterix and Obelix. Idefix is running on the ground.E\nUser:FIFAnd who is that?E\nAssistant:", &[1, 4911, 29901, 1724, 338, 297, 445, 1967, 29973, 32000, 32001, 32000, 32002, 29871, 13, 7900, 22137, 29901, 910, 7623, 1401, 919, 29879, 306, 1753, 861, 29892, 278, 11203, 310, 4250, 295, 861, 297, 319, 2475, 861, 322, 4250, 295, 861, 29889, 306, 1753, 861, 338, 2734, 373, 278, 5962, 29889, 32002, 29871, 13, 2659, 29901, 32000, 32001, 32000, 1126, 1058, 338, 393, 29973, 32002, 29871, 13, 7900, 22137, 29901]),
    ("<s>Instruction: provide an answer to the question. Use the image to answer.\nImage:FIFQuestion: What color? Answer:", &[1, 2799, 4080, 29901, 3867, 385, 1234, 304, 278, 1139, 29889, 4803, 278, 1967, 304, 1234, 29889, 13, 2940, 29901, 32000, 32001, 32000, 894, 29901, 1724, 2927, 29973, 673, 29901]),
    ("<s>  two  spaces\tTab é 你好 🙂 x", &[1, 259, 1023, 29871, 8162, 12, 8863, 904, 29871, 30919, 31076, 29871, 243, 162, 156, 133, 921]),
    ("\n", &[29871, 13]),
    ("\n\n", &[29871, 13, 13]),
    (" ", &[259]),
    ("I", &[32001]),
    ("F", &[32000]),
    ("E", &[32002]),
    ("</s>", &[2]),
    ("", &[]),
];

/// Puts the tokens in place of their letters, which stand alone only where a token is meant.
fn spelled_out(text: &str) -> String {
    let text = text.replace("FIFIF", "\u{1}\u{2}\u{1}\u{2}\u{1}").replace("FIF", "\u{1}\u{2}\u{1}");
    let text = match text.as_str() {
        "I" => "\u{2}".to_owned(),
        "F" => "\u{1}".to_owned(),
        _ => text,
    };
    let text = text.replace("E\n", "\u{3}\n").replace("\u{1}E", "\u{1}\u{3}");
    let text = if text == "E" { "\u{3}".to_owned() } else { text };
    text.replace('\u{1}', FAKE_TOKEN_AROUND_IMAGE)
        .replace('\u{2}', IMAGE_TOKEN)
        .replace('\u{3}', END_OF_UTTERANCE)
}

fn instruct() -> PathBuf {
    idefics_tokenizer_dir(TokenizerKind::Instruct)
}

fn check_golden(tokenizer: &Tokenizer, what: &str) {
    assert!(tokenizer.is_legacy_llama(), "{what}");
    for (text, expected) in GOLDEN {
        assert_eq!(tokenizer.encode(&spelled_out(text)).unwrap(), *expected, "{what}: {text}");
    }
}

/// A copy of the instruct tokenizer's files, without those named.
fn copy_without(names: &[&str]) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(instruct()).unwrap() {
        let entry = entry.unwrap();
        if !names.iter().any(|name| entry.file_name() == *name) {
            fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
    }
    copy
}

/// The instruct tokenizer with its `tokenizer.json` changed.
fn with_json(change: impl FnOnce(&mut Value)) -> TempDir {
    let copy = copy_without(&[]);
    let path = copy.path().join("tokenizer.json");
    let mut file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut file);
    fs::write(path, serde_json::to_vec(&file).unwrap()).unwrap();
    copy
}

#[test]
fn golden_ids_from_tokenizer_json() {
    check_golden(&Tokenizer::from_pretrained(instruct()).unwrap(), "tokenizer.json");
}

#[test]
fn golden_ids_from_tokenizer_model() {
    let dir = copy_without(&["tokenizer.json"]);
    check_golden(&Tokenizer::from_pretrained(dir.path()).unwrap(), "tokenizer.model");
}

#[test]
fn the_legacy_form_is_used_whatever_the_file_says() {
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    for scheme in ["first", "always", "never"] {
        let dir = with_json(|file| {
            file["normalizer"] = Value::Null;
            file["pre_tokenizer"] = metaspace(scheme);
        });
        check_golden(&Tokenizer::from_pretrained(dir.path()).unwrap(), scheme);
    }
    let dir = with_json(|file| {
        for token in file["added_tokens"].as_array_mut().unwrap() {
            token["normalized"] = json!(true);
        }
        file["truncation"] =
            json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        file["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
        file["model"]["dropout"] = json!(0.5);
    });
    check_golden(
        &Tokenizer::from_pretrained(dir.path()).unwrap(),
        "normalised special tokens, truncation, padding, dropout",
    );
}

#[test]
fn added_tokens_are_taken_from_the_files_beside() {
    let without_added = |file: &mut Value| {
        let tokens = file["added_tokens"].as_array_mut().unwrap();
        tokens.retain(|t| t["id"].as_u64().unwrap() < 32000);
    };
    check_golden(&Tokenizer::from_pretrained(with_json(without_added).path()).unwrap(), "added_tokens.json");

    let dir = with_json(without_added);
    fs::remove_file(dir.path().join("added_tokens.json")).unwrap();
    let entry = |text: &str| json!({"content": text, "lstrip": false, "normalized": false, "special": true});
    let config = json!({"bos_token": {"content": "<s>"}, "added_tokens_decoder": {
        "32002": entry(END_OF_UTTERANCE), "32001": entry(IMAGE_TOKEN), "32000": entry(FAKE_TOKEN_AROUND_IMAGE)}});
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    check_golden(&Tokenizer::from_pretrained(dir.path()).unwrap(), "added_tokens_decoder");
}

#[test]
fn special_tokens_are_known() {
    let tokens = Tokenizer::from_pretrained(instruct()).unwrap().special_tokens().clone();
    let found = |token: &SpecialToken| (token.text.clone(), token.id);
    assert_eq!(found(&tokens.bos), ("<s>".to_owned(), 1));
    assert_eq!(found(&tokens.eos), ("</s>".to_owned(), 2));
    assert_eq!(found(&tokens.pad), ("<unk>".to_owned(), 0));
    assert_eq!(tokens.fake_token_around_image.id, 32000);
    assert_eq!(tokens.image.id, 32001);
    assert_eq!(tokens.end_of_utterance.unwrap().id, 32002);

    let base = Tokenizer::from_pretrained(idefics_tokenizer_dir(TokenizerKind::Base)).unwrap();
    assert_eq!(base.special_tokens().end_of_utterance, None);
    assert_eq!((base.vocab_size(), base.id_bound()), (32002, 32002));
    assert_eq!(base.token_id("▁User"), Some(4911));
    assert_eq!(base.token(4911).as_deref(), Some("▁User"));
    assert_eq!(base.token(40000), None);
}

#[test]
fn wrong_tokenizers_are_refused() {
    let error = |dir: &Path| Tokenizer::from_pretrained(dir).unwrap_err().to_string();
    assert_eq!(
        error(&llama_tokenizer_dir()),
        "tokenizer has no token `<fake_token_around_image>`: not a tokenizer of an IDEFICS checkpoint"
    );
    let empty = tempfile::tempdir().unwrap();
    assert!(error(empty.path()).ends_with("found neither tokenizer.json nor tokenizer.model"));

    let shifted = copy_without(&[]);
    fs::write(shifted.path().join("added_tokens.json"), r#"{"<image>": 32000}"#).unwrap();
    assert_eq!(
        error(shifted.path()),
        "token `<image>`: added_tokens.json says id 32000, the tokenizer says 32001"
    );
    let files = [
        "",
        "{",
        "[]",
        "{}",
        r#"{"model": {}}"#,
        r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}"#,
    ];
    for content in files {
        let dir = copy_without(&[]);
        fs::write(dir.path().join("tokenizer.json"), content).unwrap();
        let error = error(dir.path());
        assert!(error.contains("tokenizer.json: "), "{content}: {error}");
    }
    let no_model = copy_without(&["tokenizer.json"]);
    fs::write(no_model.path().join("tokenizer.model"), b"not a model").unwrap();
    assert!(error(no_model.path()).contains("tokenizer.model: "));
}

// From the reference's tokenizer.
#[test]
fn decoding_equals_the_reference() {
    let cases: &[(&[u32], &str, &str)] = &[
        (&[1, 4, 5, 8, 1, 0, 8], "\u{1}\u{2}\u{5}\u{5}", "<s>\u{1}\u{2}\u{5}<s><unk>\u{5}"),
        (&[3, 4, 3, 1, 1, 8, 9], "\0\u{1}\0\u{5}\u{6}", "\0\u{1}\0<s><s>\u{5}\u{6}"),
        (
            &[1, 4911, 29901, 32000, 32001, 32000, 32002, 29871, 13, 7900],
            "User: \nAss",
            "<s> User:<fake_token_around_image><image><fake_token_around_image><end_of_utterance> \nAss",
        ),
        (&[243, 162, 156, 133, 921], "🙂 x", "🙂 x"),
        (&[162, 156, 921], "\u{fffd}\u{fffd} x", "\u{fffd}\u{fffd} x"),
        (
            &[243, 162, 156, 133, 162],
            "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}",
            "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}",
        ),
        (&[29871, 29871, 1, 29871, 31076], "  好", " <s> 好"),
        (&[40000, 4911], "User", "User"),
    ];
    let tokenizer = Arc::new(Tokenizer::from_pretrained(instruct()).unwrap());
    for (ids, skipped, kept) in cases {
        for (special, expected) in [(SpecialTokenText::Skip, skipped), (SpecialTokenText::Keep, kept)] {
            assert_eq!(tokenizer.decode(ids, special).unwrap(), *expected, "{ids:?}");
            assert_eq!(streamed(&tokenizer, special, ids).concat(), *expected, "{ids:?} streamed");
        }
    }
}

/// What each token brings, and what the end brings.
fn streamed(tokenizer: &Arc<Tokenizer>, special: SpecialTokenText, ids: &[u32]) -> Vec<String> {
    let mut stream = DecodeStream::new(tokenizer.clone(), special);
    let mut parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    parts.push(stream.finish().unwrap());
    parts
}

fn check_streams_equal_whole(tokenizer: &Arc<Tokenizer>, ids: impl Fn(&mut rand_chacha::ChaCha8Rng) -> u32) {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    for _ in 0..2000 {
        let length = random.random_range(0..12);
        let ids: Vec<u32> = (0..length).map(|_| ids(&mut random)).collect();
        for special in [SpecialTokenText::Skip, SpecialTokenText::Keep] {
            let whole = tokenizer.decode(&ids, special).unwrap();
            assert_eq!(streamed(tokenizer, special, &ids).concat(), whole, "{ids:?}");
        }
    }
}

#[test]
fn a_stream_equals_the_whole() {
    let tokenizer = Arc::new(Tokenizer::from_pretrained(instruct()).unwrap());
    // Mostly bytes, specials and spaces, where the difficulties are.
    check_streams_equal_whole(&tokenizer, |random| match random.random_range(0..6) {
        0 => random.random_range(0..3),
        1 => *[29871, 259, 32000, 32001, 32002, 32005].choose(random).unwrap(),
        2 | 3 => random.random_range(3..259),
        _ => random.random_range(259..32000),
    });
}

#[test]
fn a_stream_gives_words_at_once_and_characters_whole() {
    let tokenizer = Arc::new(Tokenizer::from_pretrained(instruct()).unwrap());
    let parts = streamed(&tokenizer, SpecialTokenText::Skip, &[1, 4911, 29901, 243, 162, 156, 133, 921]);
    assert_eq!(parts, ["", "User", ":", "", "", "", "", "🙂 x", ""]);

    // After a prompt the leading space is part of the answer.
    let mut stream = DecodeStream::after(tokenizer, SpecialTokenText::Skip, &[1, 4911, 29901]).unwrap();
    assert_eq!(stream.push(910).unwrap(), " This");
}

/// A byte-level tokenizer, of another family than LLaMA's: its own rules stay in force.
fn byte_level_dir() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    // GPT-2's stand-ins for the bytes of "é" (c3 a9), and a space.
    let vocabulary = json!({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "Ġ": 5, "Ã": 6, "©": 7, "ð": 8});
    let added = [("<s>", 0), ("</s>", 1), (FAKE_TOKEN_AROUND_IMAGE, 9), (IMAGE_TOKEN, 10)];
    let added: Vec<Value> = added
        .iter()
        .map(|(text, id)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b"]}});
    fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    dir
}

#[test]
fn other_tokenizers_are_used_as_their_file_says() {
    let tokenizer = Arc::new(Tokenizer::from_pretrained(byte_level_dir().path()).unwrap());
    assert!(!tokenizer.is_legacy_llama());
    assert_eq!(tokenizer.encode("<s>ab aé").unwrap(), [0, 4, 5, 2, 6, 7]);
    assert_eq!(tokenizer.special_tokens().pad.id, 1, "without <unk> the end token pads");
    assert_eq!(
        streamed(&tokenizer, SpecialTokenText::Skip, &[4, 6, 7, 5, 3, 6]),
        ["ab", "", "é", " ", "b", "", "\u{fffd}"]
    );
    check_streams_equal_whole(&tokenizer, |random| random.random_range(0..12));
}

#[test]
fn single_tokens_are_spelled_and_placed() {
    let tokenizer = Tokenizer::from_pretrained(instruct()).unwrap();
    let bytes = |id| String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned();
    // Ids of `GOLDEN`: " User", ":", " ", newline, the first byte of an emoji.
    for (id, expected) in [(4911, " User"), (29901, ":"), (29871, " "), (13, "\n"), (1, "<s>"), (99_999, "")]
    {
        assert_eq!(bytes(id), expected, "{id}");
    }
    assert_eq!(tokenizer.token_bytes(243), [0xf0]);
    assert_eq!([1, 32000, 4911, 99_999].map(|id| tokenizer.is_special_token(id)), [true, true, false, false]);

    let text = "<s>Usér: \u{1f642}";
    let tokens = tokenizer.encode_with_places(text).unwrap();
    let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, tokenizer.encode(text).unwrap());
    assert_eq!(tokens[0], (1, 0..3));
    let length = text.chars().count();
    assert!(tokens.iter().all(|(_, place)| place.start <= place.end && place.end <= length), "{tokens:?}");
    assert_eq!(tokens.last().unwrap().1.end, length);
}
