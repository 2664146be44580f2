//! The tokenizer and the language model before it has learnt anything: a small LLaMA.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use anyhow::{Context, Result, anyhow};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tokenizers::{
    TokenizerBuilder,
    models::bpe::{BPE, BpeTrainerBuilder},
    normalizers::{Prepend, Replace, Sequence},
    pre_tokenizers::{
        PreTokenizerWrapper,
        digits::Digits,
        punctuation::Punctuation,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
    tokenizer::SplitDelimiterBehavior,
};

use crate::{
    concepts::{plural, with_article},
    onnx::Tensor,
    samples::{Kind, Maker},
    steps::Folders,
    things::Part,
    vision::save,
};

/// Pieces, control tokens and bytes included.
const VOCABULARY: usize = 4096;
const HIDDEN: usize = 320;
const INTERMEDIATE: usize = 832;
const LAYERS: usize = 6;
const HEADS: usize = 5;
const SEED: u64 = 11;
/// Standard deviation of the initial weights, LLaMA's.
const STD: f32 = 0.02;

/// Writes `text/`: tokenizer, configuration and weights of a `LlamaForCausalLM`.
pub(crate) fn language(folders: &Folders) -> Result<()> {
    let folder = folders.make("text")?;
    tokenizer(folders, &folder)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": STD,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": false,
        "torch_dtype": "float32",
    });
    fs::write(folder.join("config.json"), serde_json::to_string_pretty(&config)? + "\n")?;
    save(&weights(), &folder.join("model.safetensors"))
}

/// Random weights; outputs of the residual branches are smaller by the square root of their number, as in GPT-2.
fn weights() -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    let branch = STD / (2.0 * LAYERS as f32).sqrt();
    let mut shapes = vec![
        ("model.embed_tokens".to_owned(), [VOCABULARY, HIDDEN], STD),
        ("lm_head".to_owned(), [VOCABULARY, HIDDEN], STD),
    ];
    let mut norms = vec!["model.norm".to_owned()];
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        shapes.extend([
            (name("self_attn.q_proj"), [HIDDEN, HIDDEN], STD),
            (name("self_attn.k_proj"), [HIDDEN, HIDDEN], STD),
            (name("self_attn.v_proj"), [HIDDEN, HIDDEN], STD),
            (name("self_attn.o_proj"), [HIDDEN, HIDDEN], branch),
            (name("mlp.gate_proj"), [INTERMEDIATE, HIDDEN], STD),
            (name("mlp.up_proj"), [INTERMEDIATE, HIDDEN], STD),
            (name("mlp.down_proj"), [HIDDEN, INTERMEDIATE], branch),
        ]);
        norms.extend([name("input_layernorm"), name("post_attention_layernorm")]);
    }
    for (stream, (name, shape, std)) in shapes.into_iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        rng.set_stream(stream as u64);
        let data = (0..shape[0] * shape[1]).map(|_| std * normal(&mut rng)).collect();
        tensors.insert(format!("{name}.weight"), Tensor { shape: shape.to_vec(), data });
    }
    for name in norms {
        tensors.insert(format!("{name}.weight"), Tensor { shape: vec![HIDDEN], data: vec![1.0; HIDDEN] });
    }
    tensors
}

/// Box and Muller's.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    (radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()) as f32
}

/// LLaMA's kind of tokenizer: BPE over text in which `▁` stands for a space, bytes for what has no piece.
fn tokenizer(folders: &Folders, folder: &Path) -> Result<()> {
    let maker = Maker::open(folders, Part::Training)?;
    let pieces = train(&maker)?;
    let mut vocabulary: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    vocabulary.extend((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
    vocabulary.extend(pieces.pieces);
    vocabulary.truncate(VOCABULARY);
    let ids: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, piece)| (piece.clone(), json!(id))).collect();
    let known = |piece: &str| ids.contains_key(piece);
    let merges: Vec<_> = pieces
        .merges
        .iter()
        .filter(|(left, right)| known(left) && known(right) && known(&format!("{left}{right}")))
        .map(|(left, right)| json!([left, right]))
        .collect();
    let control = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [control(0, "<unk>"), control(1, "<s>"), control(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": ids, "merges": merges},
    });
    fs::write(folder.join("tokenizer.json"), serde_json::to_string_pretty(&file)? + "\n")?;
    let config = json!({
        "tokenizer_class": "LlamaTokenizer", "legacy": true, "add_bos_token": true, "add_eos_token": false,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "clean_up_tokenization_spaces": false, "spaces_between_special_tokens": false,
        "model_max_length": 2048, "sp_model_kwargs": {},
    });
    fs::write(folder.join("tokenizer_config.json"), serde_json::to_string_pretty(&config)? + "\n")?;
    let special =
        json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"});
    fs::write(folder.join("special_tokens_map.json"), serde_json::to_string_pretty(&special)? + "\n")?;
    Ok(())
}

struct Pieces {
    /// In the order in which they were learnt, single characters first.
    pieces: Vec<String>,
    merges: Vec<(String, String)>,
}

fn train(maker: &Maker) -> Result<Pieces> {
    let error = |error: tokenizers::Error| anyhow!("training the tokenizer: {error}");
    let split = |pattern: &str, behavior| {
        Split::new(SplitPattern::String(pattern.to_owned()), behavior, false).map_err(error)
    };
    // Pieces do not run across words, punctuation and digits; lines end pieces too.
    let boundaries = PreTokenizers::new(vec![
        PreTokenizerWrapper::Split(split("\n", SplitDelimiterBehavior::Isolated)?),
        PreTokenizerWrapper::Split(split("▁", SplitDelimiterBehavior::MergedWithNext)?),
        PreTokenizerWrapper::Punctuation(Punctuation::new(SplitDelimiterBehavior::Isolated)),
        PreTokenizerWrapper::Digits(Digits::new(true)),
    ]);
    let normalizer = Sequence::new(vec![
        Prepend::new("▁".to_owned()).into(),
        Replace::new(" ", "▁").map_err(error)?.into(),
    ]);
    let mut tokenizer =
        TokenizerBuilder::<_, _, _, tokenizers::PostProcessorWrapper, tokenizers::DecoderWrapper>::new()
            .with_model(BPE::default())
            .with_normalizer(Some(normalizer))
            .with_pre_tokenizer(Some(boundaries))
            .build()
            .map_err(error)?;
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(VOCABULARY - 259)
        .min_frequency(3)
        .limit_alphabet(96)
        .show_progress(false)
        .build();
    tokenizer.train(&mut trainer, corpus(maker)?.into_iter()).map_err(error)?;
    // The trained model gives its merges in order only by way of its file.
    let model: Value = serde_json::from_str(&tokenizer.to_string(false).map_err(error)?)?;
    let ids: HashMap<String, usize> = serde_json::from_value(model["model"]["vocab"].clone())?;
    let merges: Vec<(String, String)> = serde_json::from_value(model["model"]["merges"].clone())
        .context("merges of the trained tokenizer")?;
    let mut pieces: Vec<_> = ids.into_iter().collect();
    pieces.sort_by_key(|(_, id)| *id);
    Ok(Pieces { pieces: pieces.into_iter().map(|(piece, _)| piece).collect(), merges })
}

/// What the model will read and write: texts of all samples, and the names more often than they come there.
fn corpus(maker: &Maker) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for number in 0..12_000 {
        lines.extend(maker.texts(Kind::Text, number)?);
    }
    for thing in &maker.things.all {
        let lines_of =
            [format!("{}.", with_article(&thing.name)), plural(&thing.name), format!("The {}", thing.name)];
        let times = if thing.pictures.len() >= 3 { 40 } else { 3 };
        lines.extend(lines_of.into_iter().flat_map(|line| vec![line; times]));
    }
    Ok(lines)
}
