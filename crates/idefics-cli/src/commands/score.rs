//! `idefics score`: how likely the model finds given texts.

use std::path::PathBuf;

use anyhow::{Context, bail};
use idefics::{
    Idefics, Prompt, SequenceInputs,
    generate::{GenerateError, ScoreOptions, ScoreRequest, Scored, score},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    cancel,
    lines::Lines,
    model::{Loaded, ModelArgs},
    prompts::{JsonPrompt, json_lines},
};

/// Print the log-probabilities of given texts, token by token
///
/// Each line of the file is {"prompt": [{"text": ..}, {"image": ..}], "continuation": ".."} and scores the
/// continuation, or the prompt itself from its second token where there is none. `"token_ids": [..]` may stand in
/// place of either one; `{"token_ids": [..]}` may be the value of either. Other fields are copied to the result.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  echo '{\"prompt\": [{\"text\": \"The capital of France is\"}], \"continuation\": \" Paris\"}' \\\n      \
    | idefics score -m HuggingFaceM4/idefics-9b --prompts -"
)]
pub(crate) struct Args {
    /// The texts, one a line; `-` is stdin
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,

    /// Texts that are scored together
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch_size: usize,

    /// Report so many best tokens at each place
    #[arg(long, value_name = "N", default_value_t = 0)]
    top: usize,

    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Deserialize)]
struct Line {
    prompt: Option<TextOrIds<JsonPrompt>>,
    continuation: Option<TextOrIds<String>>,
    token_ids: Option<Vec<u32>>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TextOrIds<T> {
    Text(T),
    Ids { token_ids: Vec<u32> },
}

/// A line with its two parts in their places.
enum Parts {
    Whole(TextOrIds<JsonPrompt>),
    Continued(TextOrIds<JsonPrompt>, TextOrIds<String>),
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.batch_size == 0 {
        bail!("--batch-size: expected at least 1, got 0");
    }
    if args.top > 1000 {
        bail!("--top: expected at most 1000, got {}", args.top);
    }
    let lines = json_lines::<Line>(&args.prompts)?;
    let loaded = args.model.load()?;
    cancel::on_interrupt()?;
    let options = ScoreOptions { top: args.top, ..ScoreOptions::default() };
    let lines = Lines { entries: lines, batch_size: args.batch_size, what: "texts", reports_errors: true };
    lines.run(
        |_, line| prepare(&loaded, line),
        |jobs: &[(Map<String, Value>, ScoreRequest)]| {
            let requests: Vec<_> = jobs.iter().map(|(_, request)| request.clone()).collect();
            let scored = score_each(&loaded.model, &requests, &options);
            let text = |((fields, _), scored): (&(Map<String, Value>, _), Result<Scored, _>)| {
                Ok(result(fields.clone(), &scored?).to_string())
            };
            Ok(jobs.iter().zip(scored).map(text).collect())
        },
    )
}

/// Scores texts together, or one by one where one of them fails all.
fn score_each(
    model: &Idefics,
    requests: &[ScoreRequest],
    options: &ScoreOptions,
) -> Vec<Result<Scored, GenerateError>> {
    match score(model, requests, options) {
        Ok(scored) => scored.into_iter().map(Ok).collect(),
        Err(_) => requests
            .iter()
            .map(|one| Ok(score(model, std::slice::from_ref(one), options)?.remove(0)))
            .collect(),
    }
}

impl Line {
    fn parts(self) -> anyhow::Result<(Parts, Map<String, Value>)> {
        let parts = match (self.prompt, self.continuation, self.token_ids) {
            (Some(_), Some(_), Some(_)) => {
                bail!(
                    "\"token_ids\" stands in place of the prompt or of the continuation, but both are there"
                )
            }
            (Some(prompt), Some(continuation), None) => Parts::Continued(prompt, continuation),
            (Some(prompt), None, Some(token_ids)) => Parts::Continued(prompt, TextOrIds::Ids { token_ids }),
            (None, Some(continuation), Some(token_ids)) => {
                Parts::Continued(TextOrIds::Ids { token_ids }, continuation)
            }
            (Some(prompt), None, None) => Parts::Whole(prompt),
            (None, None, Some(token_ids)) => Parts::Whole(TextOrIds::Ids { token_ids }),
            (None, _, None) => bail!("there is neither \"prompt\" nor \"token_ids\""),
        };
        Ok((parts, self.other))
    }
}

fn prepare(loaded: &Loaded, line: Line) -> anyhow::Result<(Map<String, Value>, ScoreRequest)> {
    let (parts, fields) = line.parts()?;
    let request = match parts {
        Parts::Whole(prompt) => ScoreRequest { inputs: inputs(loaded, prompt)?, continuation: None },
        Parts::Continued(prompt, TextOrIds::Ids { token_ids }) => {
            ScoreRequest { inputs: inputs(loaded, prompt)?, continuation: Some(token_ids) }
        }
        Parts::Continued(TextOrIds::Text(prompt), TextOrIds::Text(text)) => {
            let prompt = Prompt::from(prompt);
            let mut joined = loaded.processor.continuations(&prompt, &[text], &loaded.options)?;
            ScoreRequest { inputs: joined.inputs, continuation: joined.token_ids.pop() }
        }
        Parts::Continued(prompt, TextOrIds::Text(text)) => {
            // The prompt is given as tokens, so the text has no left side to be tokenized with.
            let continuation = loaded.processor.tokenize(&text)?;
            ScoreRequest { inputs: inputs(loaded, prompt)?, continuation: Some(continuation) }
        }
    };
    request.check(&*loaded.model, 0)?;
    Ok((fields, request))
}

fn inputs(loaded: &Loaded, prompt: TextOrIds<JsonPrompt>) -> anyhow::Result<SequenceInputs> {
    match prompt {
        TextOrIds::Text(prompt) => {
            let inputs = loaded.processor.process(&[prompt.into()], &loaded.options)?;
            inputs.into_iter().next().context("a prompt has inputs")
        }
        TextOrIds::Ids { token_ids } => {
            if token_ids.contains(&loaded.processor.special_tokens().image.id) {
                bail!(
                    "\"token_ids\" has the token of a picture, but no picture; write the prompt as segments"
                );
            }
            let image_index = vec![None; token_ids.len()];
            Ok(SequenceInputs { token_ids, image_index, images: Vec::new() })
        }
    }
}

fn result(mut fields: Map<String, Value>, scored: &Scored) -> Value {
    fields.insert("token_ids".to_owned(), json!(scored.token_ids));
    fields.insert("logprobs".to_owned(), json!(scored.logprobs));
    if !scored.top.is_empty() {
        let place = |place: &Vec<(u32, f32)>| -> Value {
            place.iter().map(|(id, logprob)| json!({"token_id": id, "logprob": logprob})).collect()
        };
        fields.insert("top".to_owned(), scored.top.iter().map(place).collect());
    }
    fields.insert("sum_logprob".to_owned(), json!(scored.sum()));
    fields.insert("perplexity".to_owned(), json!(scored.perplexity()));
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(json: &str) -> String {
        let line: Line = match serde_json::from_str(json) {
            Ok(line) => line,
            Err(error) => return error.to_string(),
        };
        let name = |is_ids: bool| if is_ids { "ids" } else { "text" };
        match line.parts() {
            Ok((Parts::Whole(prompt), _)) => name(matches!(prompt, TextOrIds::Ids { .. })).to_owned(),
            Ok((Parts::Continued(prompt, continuation), _)) => {
                let prompt = name(matches!(prompt, TextOrIds::Ids { .. }));
                format!("{prompt} + {}", name(matches!(continuation, TextOrIds::Ids { .. })))
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn token_ids_stand_in_place_of_either_part() {
        for (json, expected) in [
            (r#"{"prompt": [{"text": "a"}]}"#, "text"),
            (r#"{"token_ids": [1, 2]}"#, "ids"),
            (r#"{"prompt": [{"text": "a"}], "continuation": "b"}"#, "text + text"),
            (r#"{"prompt": [{"text": "a"}], "token_ids": [1]}"#, "text + ids"),
            (r#"{"token_ids": [1], "continuation": "b"}"#, "ids + text"),
            (r#"{"prompt": {"token_ids": [1]}, "continuation": {"token_ids": [2]}}"#, "ids + ids"),
        ] {
            assert_eq!(kind(json), expected, "{json}");
        }
        assert!(kind(r#"{"continuation": "b"}"#).contains("neither"));
        assert!(kind(r#"{"prompt": [], "continuation": "b", "token_ids": [1]}"#).contains("both"));
    }
}
