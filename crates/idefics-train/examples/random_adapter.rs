//! An adapter with random factors, to see that other programs load what this project writes.
//!
//!     cargo run --release -p idefics-train --example random_adapter -- MODEL OUT CONFIG
//!
//! CONFIG is an `adapter_config.json`; `reference/check_adapters.py` compares the result with PEFT.

use std::path::Path;

use idefics::{
    adapter::LoraConfig,
    checkpoint::{Weight, read_config},
};
use idefics_train::{
    adapter::{new_layers, write_adapter},
    random::Stream,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, config] = arguments.as_slice() else { return Err("usage: MODEL OUT CONFIG".into()) };
    let lora: LoraConfig = serde_json::from_slice(&std::fs::read(config)?)?;
    let mut layers = new_layers(&read_config(Path::new(model))?, &lora, 1)?;
    for layer in &mut layers {
        // A new adapter has zeros here and would change nothing.
        let shape = layer.factors.b.shape().to_vec();
        let values = Stream::new(2, &layer.module).normal(shape.iter().product(), 0.3);
        layer.factors.b = Weight::from_f32(values, shape);
    }
    write_adapter(Path::new(out), &lora, model, &layers, &[])?;
    Ok(())
}
