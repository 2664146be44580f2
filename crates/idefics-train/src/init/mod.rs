//! Building a model: two unimodal ones with new blocks between them, or one from scratch.
//!
//! A text model and a vision tower are taken as they are: the text model's logits for a prompt without pictures and
//! the tower's features stay the same, exactly, as long as the gates start at zero. Keys and values that several heads
//! share are repeated for each (IDEFICS-1 has plain multi-head attention), which changes nothing either. Everything
//! else is drawn by the rules of the original training code, m4 (see `rules`).
//!
//! Surprising: transformers before 5.17 computes IDEFICS's rotary embedding with base 10000, whatever the text model
//! had. The base is written to `rope_parameters`, which newer versions and this library follow.

mod clip;
mod error;
mod llama;
mod rules;
mod tokenizer;

use std::path::{Path, PathBuf};

use idefics::{
    checkpoint::{
        CheckpointWriter, Component, DType, TensorSpec, Weight, WriteError, check_not_same, config_json,
        expected_tensors,
    },
    config::{AlphaType, IdeficsConfig, PerceiverConfig, TokenIds},
};
use serde::Serialize;
use serde_json::json;

pub use error::InitError;
pub use rules::Rule;

use clip::VisionTower;
use llama::TextModel;
use tokenizer::NewTokenizer;

/// What a new model is made of.
#[derive(Debug, Clone)]
pub enum Source {
    /// A text model and a vision tower.
    Unimodal {
        /// Directory of a `LlamaForCausalLM`.
        text: PathBuf,
        /// Directory of a `CLIPVisionModel` or a `CLIPModel`.
        vision: PathBuf,
        /// What is put between them.
        blocks: Blocks,
    },
    /// Nothing but a configuration: all weights are new.
    Scratch(Box<IdeficsConfig>),
}

/// The parts that join a text model and a tower.
#[derive(Debug, Clone)]
pub struct Blocks {
    /// A gated block stands before every n-th layer.
    pub cross_layer_interval: usize,
    /// RMSNorm on queries and keys of the gated blocks.
    pub qk_layer_norms: bool,
    /// One gate for a block, or one for each of its channels.
    pub alpha_type: AlphaType,
    /// How gates start: `zeros`, `ones`, `normal`, `gaussian` or `random`.
    pub alpha_initializer: String,
    /// Standard deviation of random gates.
    pub alphas_initializer_range: f64,
    /// The perceiver resampler, or nothing to show the text model all features of the tower.
    pub resampler: Option<PerceiverConfig>,
}

impl Default for Blocks {
    /// Those of the published models.
    fn default() -> Self {
        Self {
            cross_layer_interval: 4,
            qk_layer_norms: true,
            alpha_type: AlphaType::Float,
            alpha_initializer: "zeros".to_owned(),
            alphas_initializer_range: 0.0,
            resampler: Some(PerceiverConfig {
                use_resampler: true,
                qk_layer_norms_perceiver: true,
                ..PerceiverConfig::default()
            }),
        }
    }
}

/// Whether dialogues can be told apart by a token of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AddedTokens {
    /// `<fake_token_around_image>` and `<image>`, as the base models have them.
    #[default]
    Base,
    /// `<end_of_utterance>` too, as the instruct models have it.
    Instruct,
}

/// A model to be built.
#[derive(Debug, Clone)]
pub struct Initializer {
    /// What it is made of.
    pub source: Source,
    /// Directory of the tokenizer; that of the text model if none is named.
    pub tokenizer: Option<PathBuf>,
    /// Tokens to add to one that has none of IDEFICS's.
    pub added_tokens: AddedTokens,
    /// Element type of all weights; the text model's, or the configuration's, if none is named.
    pub dtype: Option<DType>,
    /// What the new weights follow from.
    pub seed: u64,
    /// Largest weight file; nothing means 5 GB.
    pub max_shard_bytes: Option<u64>,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The directory.
    pub directory: PathBuf,
    /// Parameters of the text model.
    pub text_parameters: u64,
    /// Parameters of the vision tower.
    pub vision_parameters: u64,
    /// Parameters of gated blocks and resampler, and rows of additional tokens.
    pub new_parameters: u64,
    /// Rows of the text model's embedding that no token stands for, left out.
    pub dropped_rows: usize,
    /// Element type of the weights.
    pub dtype: String,
    /// Bytes of the weights.
    pub bytes: u64,
}

/// Everything that is known before the first weight is written.
struct Plan {
    config: IdeficsConfig,
    dtype: DType,
    text: Option<TextModel>,
    vision: Option<VisionTower>,
    tokenizer: Option<NewTokenizer>,
    preprocessor: serde_json::Value,
    dropped_rows: usize,
}

impl Initializer {
    /// A model of that source with the defaults of everything else and seed 0.
    pub fn new(source: Source) -> Self {
        let added_tokens = AddedTokens::default();
        Self { source, tokenizer: None, added_tokens, dtype: None, seed: 0, max_shard_bytes: None }
    }

    /// Builds the model and writes it to `out`, a new or empty directory. `progress` is called with the bytes
    /// written since the last call, and before with 0 and the bytes that there will be.
    pub fn write(&self, out: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Summary, InitError> {
        let plan = self.plan()?;
        for from in self.directories() {
            check_not_same(from, out)?;
        }
        let specs = plan.specs();
        let total: u64 = specs.iter().map(TensorSpec::num_bytes).sum();
        progress(0, total);

        let mut writer = CheckpointWriter::create(out)?;
        if let Some(bytes) = self.max_shard_bytes {
            writer = writer.with_max_shard_bytes(bytes);
        }
        if let Some(tokenizer) = &plan.tokenizer {
            tokenizer.write(&writer)?;
        }
        writer.write_json("preprocessor_config.json", &plan.preprocessor)?;
        writer.write_json("generation_config.json", &generation_config(&plan.config))?;
        writer.write_weights(&specs, |spec| {
            let weight = self.weight(&plan, spec)?;
            progress(spec.num_bytes(), total);
            Ok::<_, InitError>(weight)
        })?;
        writer.write_json("config.json", &config_json(&plan.config, plan.dtype))?;
        let directory = writer.finish()?;
        Ok(plan.summary(directory, total))
    }

    fn directories(&self) -> impl Iterator<Item = &Path> {
        let sources: [Option<&PathBuf>; 3] = match &self.source {
            Source::Unimodal { text, vision, .. } => [Some(text), Some(vision), self.tokenizer.as_ref()],
            Source::Scratch(_) => [None, None, self.tokenizer.as_ref()],
        };
        sources.into_iter().flatten().map(PathBuf::as_path)
    }

    fn plan(&self) -> Result<Plan, InitError> {
        let (config, text, vision, tokenizer) = match &self.source {
            Source::Unimodal { text, vision, blocks } => {
                let tokenizer = self.tokenizer.as_ref().unwrap_or(text);
                let (text, vision) = (TextModel::open(text)?, VisionTower::open(vision)?);
                let tokenizer = NewTokenizer::open(tokenizer, self.added_tokens)?;
                let config = join(&text, &vision, blocks);
                (config, Some(text), Some(vision), Some(tokenizer))
            }
            Source::Scratch(config) => {
                let open = |directory: &PathBuf| NewTokenizer::open(directory, self.added_tokens);
                ((**config).clone(), None, None, self.tokenizer.as_ref().map(open).transpose()?)
            }
        };
        let dtype = self
            .dtype
            .or(text.as_ref().map(TextModel::dtype))
            .or(config.declared_dtype())
            .unwrap_or(DType::F32);
        let mut plan = Plan {
            preprocessor: clip::preprocessor(vision.as_ref(), &config),
            config,
            dtype,
            text,
            vision,
            tokenizer,
            dropped_rows: 0,
        };
        plan.fit_vocabulary()?;
        let config = &mut plan.config;
        config.dtype = None;
        config.torch_dtype = None;
        config.quantization_config = None;
        config.validate()?;
        let (layers, interval) = (config.num_hidden_layers, config.cross_layer_interval);
        if !layers.is_multiple_of(interval) {
            let possible: Vec<String> =
                (1..=layers).filter(|n| layers.is_multiple_of(*n)).map(|n| n.to_string()).collect();
            return Err(InitError::Interval { layers, interval, possible: possible.join(", ") });
        }
        Ok(plan)
    }

    /// The numbers of one tensor.
    fn weight(&self, plan: &Plan, spec: &TensorSpec) -> Result<Weight, InitError> {
        let taken = match Component::of(&spec.name) {
            Component::Vision => plan.vision.as_ref().map(|vision| vision.weight(spec)),
            Component::Embedding | Component::Decoder | Component::Norm | Component::Head => {
                plan.text.as_ref().and_then(|text| text.weight(spec))
            }
            _ => None,
        };
        taken.unwrap_or_else(|| Ok(rules::draw(&plan.config, spec, self.seed)))
    }
}

impl Plan {
    /// Brings embedding and tokenizer together: rows that no token stands for would stand between the tokens of
    /// the text model and those of IDEFICS, whose ids follow the vocabulary.
    fn fit_vocabulary(&mut self) -> Result<(), InitError> {
        let config = &mut self.config;
        let Some(tokenizer) = &self.tokenizer else { return Ok(()) };
        let (base, rows) = (tokenizer.base_tokens(), config.vocab_size);
        let fits = match self.text {
            Some(_) => base <= rows,
            None => base == rows && tokenizer.added_tokens() == config.additional_vocab_size,
        };
        if !fits {
            let rows = if self.text.is_some() { rows } else { rows + config.additional_vocab_size };
            let tokens = if self.text.is_some() { base } else { base + tokenizer.added_tokens() };
            return Err(InitError::Vocabulary { path: tokenizer.directory().to_owned(), tokens, rows });
        }
        self.dropped_rows = rows - base;
        config.vocab_size = base;
        config.additional_vocab_size = tokenizer.added_tokens();
        let special = tokenizer.special_ids();
        config.bos_token_id = Some(special.bos);
        config.eos_token_id = Some(TokenIds::One(special.eos));
        config.pad_token_id = Some(special.pad);
        Ok(())
    }

    fn specs(&self) -> Vec<TensorSpec> {
        let tied = self.config.tie_word_embeddings;
        expected_tensors(&self.config)
            .into_iter()
            // Tied heads are the embeddings; the reference's files have only these.
            .filter(|(name, _)| !(tied && name.starts_with("lm_head.")))
            .map(|(name, shape)| TensorSpec::new(name, self.dtype, shape))
            .collect()
    }

    fn summary(&self, directory: PathBuf, bytes: u64) -> Summary {
        let count = |wanted: fn(&str) -> bool| -> u64 {
            let specs = self.specs().into_iter().filter(|spec| wanted(&spec.name));
            specs.map(|spec| spec.shape.iter().product::<usize>() as u64).sum()
        };
        let all = count(|_| true);
        let vision_parameters = count(|name| Component::of(name) == Component::Vision);
        let new_parameters = count(|name| {
            let part = Component::of(name);
            matches!(part, Component::GatedCrossAttention | Component::Perceiver)
                || name.contains(".additional_")
        });
        Summary {
            directory,
            text_parameters: all - vision_parameters - new_parameters,
            vision_parameters,
            new_parameters,
            dropped_rows: self.dropped_rows,
            dtype: self.dtype.to_string(),
            bytes,
        }
    }
}

/// The configuration of the new model, but for its vocabulary.
fn join(text: &TextModel, vision: &VisionTower, blocks: &Blocks) -> IdeficsConfig {
    IdeficsConfig {
        vision_config: vision.config.clone(),
        perceiver_config: blocks.resampler.clone().unwrap_or_default(),
        use_resampler: blocks.resampler.is_some(),
        cross_layer_interval: blocks.cross_layer_interval,
        qk_layer_norms: blocks.qk_layer_norms,
        alpha_type: blocks.alpha_type,
        alpha_initializer: blocks.alpha_initializer.clone(),
        alphas_initializer_range: blocks.alphas_initializer_range,
        // As in the published files: what is trained is for the training run to say.
        freeze_text_layers: false,
        freeze_vision_layers: false,
        freeze_lm_head: false,
        ..text.config()
    }
}

fn generation_config(config: &IdeficsConfig) -> serde_json::Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    })
}

/// Reads a text file of JSON into the fields that are wanted of it.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, InitError> {
    let text = std::fs::read_to_string(path).map_err(|source| WriteError::cannot_read(path, source))?;
    serde_json::from_str(&text).map_err(|source| InitError::Json { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
