//! The files beside the weights.

use std::path::Path;

use serde_json::{Value, json};

use super::{Format, Recipe};
use crate::{
    checkpoint::{
        DType, Part, Q8_METHOD, WriteError, torch_name,
        write::{copy_side_files, read_object, write_json},
    },
    files::ModelFiles,
};

/// Copies tokenizer, processor and generation files, then writes the configuration: without it a directory is
/// no model, so it comes last.
pub(super) fn write_side_files(
    from: &ModelFiles,
    to: &Path,
    recipe: &Recipe,
    dtype: DType,
) -> Result<(), WriteError> {
    copy_side_files(from, to)?;
    let mut config = read_object(from, "config.json")?;
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
