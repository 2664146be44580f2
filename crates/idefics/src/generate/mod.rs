//! From logits to text: processors, sampling, beams, stopping, streaming.

mod step;

pub use step::{LogitsOf, Row, StepModel};
