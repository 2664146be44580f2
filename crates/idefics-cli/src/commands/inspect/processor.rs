//! The processor's files against the configuration: special tokens, vocabulary, picture size.

use idefics::{
    ModelFiles,
    config::IdeficsConfig,
    processor::{Processor, SpecialToken},
};

use super::report::Report;

/// Adds the special tokens to the report, and what is wrong with the processor's files.
pub(super) fn describe(report: &mut Report, files: &ModelFiles, config: &IdeficsConfig) {
    let processor = match Processor::from_pretrained(files) {
        Ok(processor) => processor,
        Err(error) => return report.problems.push(format!("{:#}", anyhow::Error::new(error))),
    };
    let tokens = processor.special_tokens();
    let roles: [(&'static str, Option<&SpecialToken>); 6] = [
        ("bos", Some(&tokens.bos)),
        ("eos", Some(&tokens.eos)),
        ("pad", Some(&tokens.pad)),
        ("fake_token_around_image", Some(&tokens.fake_token_around_image)),
        ("image", Some(&tokens.image)),
        ("end_of_utterance", tokens.end_of_utterance.as_ref()),
    ];
    report.add_special_tokens(roles.into_iter().filter_map(|(role, token)| Some((role, token?))));

    let vocab = config.vocab_size + config.additional_vocab_size;
    let tokenizer = processor.tokenizer().vocab_size();
    if tokenizer > vocab {
        let problem =
            format!("the tokenizer has {tokenizer} tokens, but the model has embeddings for {vocab}");
        report.problems.push(problem);
    }
    let side = config.vision_config.image_size;
    if let Some((height, width)) = processor.image_processor().size.filter(|size| *size != (side, side)) {
        report.problems.push(format!(
            "`preprocessor_config.json` makes pictures of {height} x {width} pixels, but the vision tower takes \
             {side} x {side}"
        ));
    }
}
