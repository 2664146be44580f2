//! `idefics generate`: prompts of texts and pictures in, text out.

use std::{io::Write, ops::ControlFlow, path::PathBuf};

use anyhow::{Context, bail};
use idefics::{
    Idefics, Prompt, SequenceInputs,
    generate::{AnswerError, Completion, Engine, Event, Generated, GenerationConfig, Request},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    cancel,
    lines::Lines,
    model::{Loaded, ModelArgs},
    options::GenerationArgs,
    output,
    prompts::{JsonPrompt, PromptItems, json_lines},
};

/// Continue prompts of interleaved texts and pictures
///
/// An instruct model wants its dialogue written out, as in the example; every turn ends with
/// `<end_of_utterance>`. Without a length an answer has 20 tokens.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  idefics generate -m HuggingFaceM4/idefics-9b-instruct --max-new-tokens 100 \\\n      \
    'User: What is in this image?' dog.jpg '<end_of_utterance>\n' 'Assistant:'"
)]
pub(crate) struct Args {
    #[command(flatten)]
    items: PromptItems,

    /// A batch of prompts, one a line: {"prompt": [{"text": ..}, {"image": ..}]}; `-` is stdin. A line may have
    /// options of its own under "generation"; its other fields are copied to the answer
    #[arg(long, value_name = "FILE", conflicts_with_all = ["items", "image", "text"])]
    prompts: Option<PathBuf>,

    /// Prompts that are answered together
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch_size: usize,

    /// Print one JSON object for each answer
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    generation: GenerationArgs,
}

/// A line of `--prompts`.
#[derive(Debug, Deserialize)]
struct Line {
    prompt: JsonPrompt,
    #[serde(default)]
    generation: Map<String, Value>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// A prompt that is ready to run.
struct Job {
    inputs: SequenceInputs,
    config: GenerationConfig,
    /// Copied to the answer.
    fields: Map<String, Value>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.batch_size == 0 {
        bail!("--batch-size: expected at least 1, got 0");
    }
    // Read first: a mistake there should not cost the loading of a model.
    let lines = args.prompts.as_deref().map(json_lines::<Line>).transpose()?;
    if lines.is_none() && args.items.0.is_empty() {
        bail!("there is no prompt; give texts and pictures, or a file by --prompts");
    }
    let loaded = args.model.load()?;
    let special = loaded.processor.special_tokens();
    let base = loaded.model.default_generation(Some(special))?;
    let config = args.generation.apply(base, &loaded.processor)?;
    cancel::on_interrupt()?;
    match lines {
        None => {
            let job = prepare(&loaded, args.items.0.clone(), config, Map::new())?;
            // Several answers would be mixed up if they came token by token.
            let is_streamed = !args.json && job.config.num_return_sequences == 1;
            let generated = answer(&loaded.engine()?, std::slice::from_ref(&job), is_streamed)?;
            let generated = generated.into_iter().next().context("a prompt has an answer")??;
            // What was streamed still needs the end of its line.
            let rest =
                if is_streamed { String::new() } else { as_text(&loaded, &job, &generated, args.json) };
            Ok(output::print(&rest)?)
        }
        Some(lines) => run_lines(args, &loaded, &config, lines),
    }
}

/// Answers a file of prompts.
fn run_lines(
    args: &Args,
    loaded: &Loaded,
    config: &GenerationConfig,
    lines: Vec<(usize, anyhow::Result<Line>)>,
) -> anyhow::Result<()> {
    let lines =
        Lines { entries: lines, batch_size: args.batch_size, what: "prompts", reports_errors: args.json };
    let prepare_line = |number, line: Line| {
        let mut fields = line.other;
        fields.insert("line".to_owned(), json!(number));
        prepare(loaded, line.prompt.into(), with_own_options(config, line.generation)?, fields)
    };
    let engine = loaded.engine()?;
    lines.run(prepare_line, |jobs| {
        let generated = answer(&engine, jobs, false)?;
        let text = |(job, generated): (&Job, Result<Generated, AnswerError>)| {
            Ok(as_text(loaded, job, &generated?, args.json))
        };
        Ok(jobs.iter().zip(generated).map(text).collect())
    })
}

/// The options of a line in place of the common ones. A name that is no option is an error.
fn with_own_options(config: &GenerationConfig, own: Map<String, Value>) -> anyhow::Result<GenerationConfig> {
    if own.is_empty() {
        return Ok(config.clone());
    }
    let known = serde_json::to_value(config)?;
    if let Some(unknown) = own.keys().find(|name| known.get(name.as_str()).is_none()) {
        bail!("\"generation\": `{unknown}` is no option of generation");
    }
    Ok(config.with_json(Value::Object(own))?)
}

fn prepare(
    loaded: &Loaded,
    prompt: Prompt,
    config: GenerationConfig,
    fields: Map<String, Value>,
) -> anyhow::Result<Job> {
    let inputs = loaded.processor.process(&[prompt], &loaded.options)?;
    let inputs = inputs.into_iter().next().context("a prompt has inputs")?;
    Request::new(&inputs, &config).check(&*loaded.model, 0)?;
    Ok(Job { inputs, config, fields })
}

/// Answers some prompts together; shows the text as it comes if asked to.
fn answer(
    engine: &Engine<Idefics>,
    jobs: &[Job],
    is_streamed: bool,
) -> anyhow::Result<Vec<Result<Generated, AnswerError>>> {
    let requests = jobs.iter().map(|job| (job.inputs.clone(), job.config.clone()));
    let mut broken = None;
    let show = |event: &Event| {
        if !is_streamed {
            return ControlFlow::Continue(());
        }
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(event.text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                broken = Some(error);
                ControlFlow::Break(())
            }
        }
    };
    let generated = engine.answer_each(requests, cancel::flag(), show);
    match broken {
        // A reader that went away wants no more.
        Some(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write the answer")
        }
        _ => Ok(generated),
    }
}

/// The answers to a prompt, a line each, as text or JSON.
fn as_text(loaded: &Loaded, job: &Job, generated: &Generated, is_json: bool) -> String {
    let line = |(index, completion): (usize, &Completion)| {
        if is_json {
            answer_json(loaded, job, generated, (index, completion)).to_string()
        } else {
            completion.text.clone().unwrap_or_default()
        }
    };
    generated.sequences.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
}

fn answer_json(
    loaded: &Loaded,
    job: &Job,
    generated: &Generated,
    (index, completion): (usize, &Completion),
) -> Value {
    let mut answer = job.fields.clone();
    if job.config.num_return_sequences > 1 {
        answer.insert("sequence".to_owned(), json!(index));
    }
    answer.insert("text".to_owned(), json!(completion.text));
    answer.insert("token_ids".to_owned(), json!(completion.token_ids));
    answer.insert("finish_reason".to_owned(), json!(completion.finish_reason.as_str()));
    if let Some(score) = completion.score {
        answer.insert("score".to_owned(), json!(score));
    }
    if let Some(seed) = generated.seed {
        answer.insert("seed".to_owned(), json!(seed));
    }
    if job.config.logprobs.is_some() {
        let token = |token: &idefics::generate::TokenLogprob| {
            let top: Vec<Value> =
                token.top.iter().map(|(id, logprob)| json!({"token_id": id, "logprob": logprob})).collect();
            json!({"token_id": token.token_id, "logprob": token.logprob, "top": top})
        };
        answer.insert("logprobs".to_owned(), completion.logprobs.iter().map(token).collect());
    }
    let special = loaded.processor.special_tokens();
    let stands_for_image = |id: &&u32| **id == special.image.id || **id == special.fake_token_around_image.id;
    let (prefill, decode) = (generated.timings.prefill.as_secs_f64(), generated.timings.decode.as_secs_f64());
    // The first token belongs to the prefill.
    let decoded = generated.usage.generated_tokens.saturating_sub(generated.sequences.len());
    answer.insert(
        "usage".to_owned(),
        json!({
            "prompt_tokens": generated.usage.prompt_tokens,
            "image_tokens": job.inputs.token_ids.iter().filter(stands_for_image).count(),
            "images": generated.usage.images,
            "generated_tokens": completion.token_ids.len(),
        }),
    );
    answer.insert(
        "timings".to_owned(),
        json!({
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "decode_tokens_per_second": if decode > 0.0 { decoded as f64 / decode } else { 0.0 },
        }),
    );
    Value::Object(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_line_replace_the_common_ones() {
        let base = GenerationConfig { max_new_tokens: Some(3), ..Default::default() };
        let own = |json: Value| json.as_object().cloned().unwrap();
        let config = with_own_options(&base, own(json!({"num_beams": 2, "eos_token_id": 7}))).unwrap();
        assert_eq!((config.num_beams, config.max_new_tokens), (2, Some(3)));
        assert_eq!(config.eos_token_ids, [7]);
        let error = with_own_options(&base, own(json!({"num_beam": 2}))).unwrap_err().to_string();
        assert!(error.contains("num_beam"), "{error}");
    }

    #[test]
    fn lines_keep_their_other_fields() {
        let line: Line = serde_json::from_str(r#"{"id": 7, "prompt": [{"text": "a"}]}"#).unwrap();
        assert_eq!(line.other["id"], 7);
        assert!(line.generation.is_empty());
        assert!(serde_json::from_str::<Line>(r#"{"id": 7}"#).is_err(), "a line needs a prompt");
    }
}
