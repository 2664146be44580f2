//! `idefics download`: a model of the hub into the standard cache.

use std::path::PathBuf;

use idefics::checkpoint::hub::{Hub, ModelId};

use crate::{output, progress::DownloadProgress};

const EXAMPLES: &str = "\
Examples:
  idefics download HuggingFaceM4/idefics-9b-instruct
  idefics download HuggingFaceM4/idefics-9b@main --cache-dir /data/hub

Environment:
  HF_HOME, HF_HUB_CACHE  where the cache lies (~/.cache/huggingface/hub otherwise)
  HF_TOKEN               access token for gated models; the token file of `hf auth login` is read, too
  HF_ENDPOINT            another hub
  HF_HUB_OFFLINE=1       make no request; only says whether the cache has the model

A broken download is continued by the same command. Only files that are needed are fetched: configuration,
tokenizer and safetensors weights, never pickles. The cache is shared with Python's huggingface_hub.";

/// Download a model from the Hugging Face hub and print its directory
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Model on the hub, with a branch, tag or commit if not `main`
    #[arg(value_name = "ORG/NAME[@REVISION]")]
    model: String,

    /// Cache directory instead of the one that the environment names
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,

    /// Print one JSON object instead of the directory alone
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let id: ModelId = args.model.parse()?;
    let mut hub = Hub::from_env()?;
    if let Some(directory) = &args.cache_dir {
        hub = hub.with_cache(directory);
    }
    let directory = hub.download(&id, &mut DownloadProgress::default())?;
    let text = if args.json {
        serde_json::json!({ "model": id.name(), "revision": id.revision(), "directory": directory })
            .to_string()
    } else {
        directory.display().to_string()
    };
    Ok(output::print(&text)?)
}
