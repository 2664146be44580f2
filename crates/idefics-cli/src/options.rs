//! The flags of generation. Each is an option of [`GenerationConfig`] by its Hugging Face name.

use anyhow::{Context, bail};
use idefics::{
    Processor,
    generate::{EarlyStopping, GenerationConfig},
};

/// How answers are written. What is not set comes from the checkpoint, then from the defaults of transformers:
/// the best token at each step, 20 tokens.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Generation")]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(crate) struct GenerationArgs {
    /// Longest answer, in tokens
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,

    /// Longest prompt and answer together, in tokens
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,

    /// Shortest answer, in tokens
    #[arg(long, value_name = "N")]
    min_new_tokens: Option<usize>,

    /// Shortest prompt and answer together, in tokens
    #[arg(long, value_name = "N")]
    min_length: Option<usize>,

    /// Stop after so many seconds
    #[arg(long, value_name = "SECONDS")]
    max_time: Option<f64>,

    /// Stop when the text contains this; may be given several times
    #[arg(long = "stop", value_name = "TEXT")]
    stop_strings: Vec<String>,

    /// Leave the stop string and what follows out of the text
    #[arg(long, requires = "stop_strings")]
    trim_stop: bool,

    /// Tokens that end an answer [default: the checkpoint's, and `<end_of_utterance>` if it is in the vocabulary]
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    eos_token_id: Vec<u32>,

    /// Draw tokens instead of taking the best; any flag that shapes the draw implies it
    #[arg(long)]
    sample: bool,

    /// Seed of the draws; the same seed gives the same answer in any batch
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Divide the scores before the draw
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,

    /// Draw among so many best tokens, 0 for all [default: 50]
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,

    /// Draw among the best tokens that together have this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,

    /// Draw among tokens with this share of the best token's probability
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,

    /// Draw among the best tokens that together have this share of the entropy
    #[arg(long, value_name = "P")]
    top_h: Option<f64>,

    /// Draw among the most typical tokens that together have this probability
    #[arg(long, value_name = "P")]
    typical_p: Option<f64>,

    /// Draw among tokens of at least this probability
    #[arg(long, value_name = "P")]
    epsilon_cutoff: Option<f64>,

    /// The same with a threshold that falls with the entropy
    #[arg(long, value_name = "P")]
    eta_cutoff: Option<f64>,

    /// Beams of a beam search
    #[arg(long, value_name = "N")]
    num_beams: Option<usize>,

    /// Answers to each prompt
    #[arg(long, short = 'n', value_name = "N")]
    num_return_sequences: Option<usize>,

    /// When a beam search may end: `false`, `true` or `never`
    #[arg(long, value_name = "WHEN")]
    early_stopping: Option<EarlyStopping>,

    /// Above 0 a beam search favours long answers
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    length_penalty: Option<f64>,

    /// Above 1 makes tokens of the prompt and the answer less likely
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f64>,

    /// Above 1 makes tokens of the prompt more likely
    #[arg(long, value_name = "X")]
    encoder_repetition_penalty: Option<f64>,

    /// No n-gram of this size twice
    #[arg(long, value_name = "N")]
    no_repeat_ngram_size: Option<usize>,

    /// No n-gram of this size that the prompt has
    #[arg(long, value_name = "N")]
    encoder_no_repeat_ngram_size: Option<usize>,

    /// A word that is never written; may be given several times
    #[arg(long = "bad-word", value_name = "TEXT")]
    bad_words: Vec<String>,

    /// Token sequences that are never completed, as JSON: [[5,9],[7]]
    #[arg(long, value_name = "JSON")]
    bad_words_ids: Option<String>,

    /// Added to the scores of tokens that complete a sequence, as JSON: [[[5,9],-2.0]]
    #[arg(long, value_name = "JSON")]
    sequence_bias: Option<String>,

    /// Tokens that are never chosen
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    suppress_tokens: Vec<u32>,

    /// Tokens that are not chosen first
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    begin_suppress_tokens: Vec<u32>,

    /// The token after a prompt of one token
    #[arg(long, value_name = "ID")]
    forced_bos_token_id: Option<u32>,

    /// The token at the last position
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    forced_eos_token_id: Vec<u32>,

    /// After START tokens the end becomes likelier, by a power of FACTOR
    #[arg(long, value_name = "START,FACTOR", value_parser = start_and_factor)]
    exponential_decay_length_penalty: Option<(usize, f64)>,

    /// Let the model write the tokens that stand for pictures
    #[arg(long)]
    allow_image_tokens: bool,

    /// Write special tokens into the text
    #[arg(long)]
    keep_special_tokens: bool,

    /// Replace NaN and infinities among the scores
    #[arg(long)]
    remove_invalid_values: bool,

    /// Turn processed scores into log-probabilities before the choice
    #[arg(long)]
    renormalize_logits: bool,

    /// Report log-probabilities of the tokens, and of so many best tokens
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "0")]
    logprobs: Option<usize>,

    /// Read the whole sequence again at each step
    #[arg(long)]
    no_cache: bool,

    /// Tokens of a prompt that are read in one step
    #[arg(long, value_name = "N")]
    prefill_chunk: Option<usize>,
}

impl GenerationArgs {
    /// The options, on top of `base`. What has no effect is told on stderr.
    pub(crate) fn apply(
        &self,
        base: GenerationConfig,
        processor: &Processor,
    ) -> anyhow::Result<GenerationConfig> {
        let mut config = base;
        self.apply_lengths(&mut config);
        self.apply_sampling(&mut config);
        self.apply_rules(&mut config, processor)?;
        set(&mut config.num_beams, self.num_beams);
        set(&mut config.num_return_sequences, self.num_return_sequences);
        set(&mut config.early_stopping, self.early_stopping);
        set(&mut config.length_penalty, self.length_penalty);
        set(&mut config.prefill_chunk, self.prefill_chunk);
        config.use_cache &= !self.no_cache;
        config.logprobs = self.logprobs.or(config.logprobs);
        config.skip_special_tokens &= !self.keep_special_tokens;
        config.validate()?;
        for unused in config.unused_options() {
            eprintln!("warning: {unused}");
        }
        Ok(config)
    }

    /// The same, with the stop strings of `base` beside those of the flags: they end answers in the form of `base`.
    pub(crate) fn apply_beside_stops(
        &self,
        base: GenerationConfig,
        processor: &Processor,
    ) -> anyhow::Result<GenerationConfig> {
        let own = base.stop_strings.clone();
        let mut config = self.apply(base, processor)?;
        for stop in own {
            if !config.stop_strings.contains(&stop) {
                config.stop_strings.push(stop);
            }
        }
        Ok(config)
    }

    /// Refuses flags whose results have no place in a record of one text.
    pub(crate) fn refuse_more_than_text(&self) -> anyhow::Result<()> {
        if self.num_return_sequences.is_some_and(|answers| answers != 1) {
            bail!(
                "--num-return-sequences: a record has one answer to a picture; `idefics generate` has several"
            );
        }
        if self.logprobs.is_some() {
            bail!(
                "--logprobs: a record has the text of an answer; `idefics generate --json` has its log-probabilities"
            );
        }
        Ok(())
    }

    fn apply_lengths(&self, config: &mut GenerationConfig) {
        // A length on the command line replaces one of the checkpoint, of whichever kind.
        if self.max_new_tokens.is_some() || self.max_length.is_some() {
            (config.max_new_tokens, config.max_length) = (self.max_new_tokens, self.max_length);
        }
        if self.min_new_tokens.is_some() || self.min_length.is_some() {
            config.min_new_tokens = self.min_new_tokens;
            config.min_length = self.min_length.unwrap_or(0);
        }
        config.max_time = self.max_time.or(config.max_time);
        replace(&mut config.stop_strings, &self.stop_strings);
        config.trim_stop_strings |= self.trim_stop;
        replace(&mut config.eos_token_ids, &self.eos_token_id);
    }

    fn apply_sampling(&self, config: &mut GenerationConfig) {
        let shapes = [
            self.temperature,
            self.top_p,
            self.min_p,
            self.top_h,
            self.typical_p,
            self.epsilon_cutoff,
            self.eta_cutoff,
        ];
        config.do_sample |= self.sample || self.top_k.is_some() || shapes.iter().any(Option::is_some);
        config.seed = self.seed.or(config.seed);
        set(&mut config.temperature, self.temperature);
        set(&mut config.top_k, self.top_k);
        set(&mut config.top_p, self.top_p);
        config.min_p = self.min_p.or(config.min_p);
        config.top_h = self.top_h.or(config.top_h);
        set(&mut config.typical_p, self.typical_p);
        set(&mut config.epsilon_cutoff, self.epsilon_cutoff);
        set(&mut config.eta_cutoff, self.eta_cutoff);
    }

    fn apply_rules(&self, config: &mut GenerationConfig, processor: &Processor) -> anyhow::Result<()> {
        set(&mut config.repetition_penalty, self.repetition_penalty);
        set(&mut config.encoder_repetition_penalty, self.encoder_repetition_penalty);
        set(&mut config.no_repeat_ngram_size, self.no_repeat_ngram_size);
        set(&mut config.encoder_no_repeat_ngram_size, self.encoder_no_repeat_ngram_size);
        if let Some(json) = &self.bad_words_ids {
            config.bad_words_ids = serde_json::from_str(json).context("--bad-words-ids")?;
        }
        for word in &self.bad_words {
            let ids = processor.tokenize(word)?;
            if ids.is_empty() {
                bail!("--bad-word: {word:?} has no tokens");
            }
            config.bad_words_ids.push(ids);
        }
        if let Some(json) = &self.sequence_bias {
            config.sequence_bias = serde_json::from_str(json).context("--sequence-bias")?;
        }
        replace(&mut config.suppress_tokens, &self.suppress_tokens);
        replace(&mut config.begin_suppress_tokens, &self.begin_suppress_tokens);
        config.forced_bos_token_id = self.forced_bos_token_id.or(config.forced_bos_token_id);
        replace(&mut config.forced_eos_token_id, &self.forced_eos_token_id);
        config.exponential_decay_length_penalty =
            self.exponential_decay_length_penalty.or(config.exponential_decay_length_penalty);
        config.allow_image_tokens |= self.allow_image_tokens;
        config.remove_invalid_values |= self.remove_invalid_values;
        config.renormalize_logits |= self.renormalize_logits;
        Ok(())
    }
}

fn set<T: Copy>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn replace<T: Clone>(field: &mut Vec<T>, values: &[T]) {
    if !values.is_empty() {
        *field = values.to_vec();
    }
}

fn start_and_factor(text: &str) -> Result<(usize, f64), String> {
    let (start, factor) = text.split_once(',').ok_or("expected START,FACTOR, such as 50,1.1")?;
    let start = start.trim().parse().map_err(|error| format!("START: {error}"))?;
    let factor = factor.trim().parse().map_err(|error| format!("FACTOR: {error}"))?;
    Ok((start, factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decay_is_two_numbers() {
        assert_eq!(start_and_factor("50, 1.1"), Ok((50, 1.1)));
        for bad in ["50", "x,1", "1,y"] {
            assert!(start_and_factor(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn stop_strings_stand_beside_those_of_the_form() {
        let processor = Processor::from_pretrained(idefics_testing::fixture("tiny")).unwrap();
        let base = GenerationConfig { stop_strings: vec!["\nUser:".to_owned()], ..Default::default() };
        let args = |stops: &[&str]| GenerationArgs {
            stop_strings: stops.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let stops =
            |args: GenerationArgs| args.apply_beside_stops(base.clone(), &processor).unwrap().stop_strings;
        assert_eq!(stops(args(&[])), ["\nUser:"]);
        assert_eq!(stops(args(&["."])), [".", "\nUser:"]);
        assert_eq!(stops(args(&["\nUser:", "."])), ["\nUser:", "."]);
        assert_eq!(args(&["."]).apply(base.clone(), &processor).unwrap().stop_strings, ["."]);
    }

    #[test]
    fn flags_replace_what_the_checkpoint_proposes() {
        let mut config = GenerationConfig { max_length: Some(100), temperature: 0.5, ..Default::default() };
        let args = GenerationArgs { max_new_tokens: Some(5), top_p: Some(0.9), ..Default::default() };
        args.apply_lengths(&mut config);
        args.apply_sampling(&mut config);
        assert_eq!((config.max_new_tokens, config.max_length), (Some(5), None));
        assert!(config.do_sample, "a flag that shapes the draw implies it");
        assert_eq!((config.top_p, config.temperature), (0.9, 0.5));
    }
}
