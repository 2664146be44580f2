//! The files beside the weights, and how any file comes to be: written under another name, synced, renamed.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{Format, QuantizeError, Recipe, error::io_error};
use crate::checkpoint::{DType, Part, Q8_METHOD, torch_name};

/// Files that are copied as they are, where the model has them.
const COPIED: [&str; 14] = [
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
];

/// The name of a file that is being written.
pub(super) fn partial_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

/// Writes a file that is either whole or not there: `check` looks at it before it gets its name.
pub(super) fn write_whole<T>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), QuantizeError>,
    check: impl FnOnce(&Path) -> Result<T, QuantizeError>,
) -> Result<T, QuantizeError> {
    let partial = partial_path(path);
    let mut file =
        BufWriter::with_capacity(1 << 20, File::create(&partial).map_err(io_error("create", &partial))?);
    write(&mut file)?;
    let file = file.into_inner().map_err(|error| io_error("write", &partial)(error.into_error()))?;
    file.sync_all().map_err(io_error("write", &partial))?;
    drop(file);
    let checked = check(&partial)?;
    fs::rename(&partial, path).map_err(io_error("rename", &partial))?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))?;
    Ok(checked)
}

/// Writes a text of JSON.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), QuantizeError> {
    let text = format!("{value:#}\n");
    let write = |file: &mut BufWriter<File>| file.write_all(text.as_bytes()).map_err(io_error("write", path));
    write_whole(path, write, |_| Ok(()))
}

/// Makes renames last.
fn sync_directory(directory: &Path) -> Result<(), QuantizeError> {
    #[cfg(unix)]
    File::open(directory).and_then(|file| file.sync_all()).map_err(io_error("sync", directory))?;
    let _ = directory;
    Ok(())
}

/// Copies tokenizer, processor and generation files, then writes the configuration: without it a directory is
/// no model, so it comes last.
pub(super) fn write_side_files(
    from: &Path,
    to: &Path,
    recipe: &Recipe,
    dtype: DType,
) -> Result<(), QuantizeError> {
    for name in COPIED {
        let source = from.join(name);
        if !source.is_file() {
            continue;
        }
        let bytes = fs::read(&source).map_err(io_error("read", &source))?;
        let target = to.join(name);
        let write = |file: &mut BufWriter<File>| file.write_all(&bytes).map_err(io_error("write", &target));
        write_whole(&target, write, |_| Ok(()))?;
    }
    let path = from.join("config.json");
    let text = fs::read_to_string(&path).map_err(io_error("read", &path))?;
    let mut config: Map<String, Value> =
        serde_json::from_str(&text).map_err(|source| QuantizeError::Json { path, source })?;
    config.insert("quantization_config".to_owned(), quantization_config(recipe, dtype));
    write_json(&to.join("config.json"), &Value::Object(config))
}

/// What transformers and this library need to know. Modules that stay dense are named: bitsandbytes would
/// otherwise replace every linear layer but the head.
fn quantization_config(recipe: &Recipe, dtype: DType) -> Value {
    let others = Part::ALL.into_iter().filter(|part| !recipe.parts.contains(part)).map(Part::module);
    let dense: Vec<&str> = std::iter::once("lm_head").chain(others).collect();
    match recipe.format {
        Format::Q8 => json!({
            "quant_method": Q8_METHOD,
            "block_size": idefics_kernels::q8::BLOCK,
            "modules_to_not_convert": dense,
        }),
        Format::Nf4 | Format::Nf4DoubleQuant => json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": torch_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": recipe.format == Format::Nf4DoubleQuant,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": dense,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        }),
    }
}

/// Bytes that may still be written to the disk of a directory, where the system tells.
pub(super) fn available_bytes(directory: &Path) -> Option<u64> {
    #[cfg(unix)]
    return rustix::fs::statvfs(directory).ok().map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    #[cfg(not(unix))]
    return {
        _ = directory;
        None
    };
}
