//! Lists the files of the default model for `include_bytes!`.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// What is put into the program of `models/idefics-tiny/`, where it is there.
const FILES: [&str; 9] = [
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
];

fn main() {
    let variable = |name: &str| PathBuf::from(env::var_os(name).expect("cargo sets it"));
    let model = variable("CARGO_MANIFEST_DIR").join("../../models/idefics-tiny");
    println!("cargo::rerun-if-changed={}", model.display());
    let files = variable("OUT_DIR").join("files.rs");
    fs::write(&files, list(&model))
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", files.display()));
}

/// `embed!` of name and path of each file; of none where there is no model.
fn list(model: &Path) -> String {
    if !model.is_dir() {
        println!("cargo::warning=no {}: the program will have no default model", model.display());
    }
    let there = FILES.into_iter().map(|name| (name, model.join(name))).filter(|(_, path)| path.is_file());
    // As strings, which are quoted as literals are.
    let lines = there.map(|(name, path)| format!("    {name:?}: {:?},\n", path.display().to_string()));
    format!("embed! {{\n{}}}\n", lines.collect::<String>())
}
