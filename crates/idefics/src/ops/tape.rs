//! A piece of the model that runs forward, and later backward.
//!
//! Training goes layer by layer: a [`Segment`] keeps what went in, and either the tape of its own operations or
//! nothing, in which case it runs again before it goes backward (gradient checkpointing, Chen et al., 2016).

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Var};

use super::{Result, Tensor};

/// What a segment computes from its inputs.
type Run<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

/// One layer, or a few, with inputs that gradients are asked for.
pub struct Segment<'a> {
    inputs: Vec<Var>,
    run: Box<Run<'a>>,
    /// The output with its tape, if it was kept.
    output: Option<Tensor>,
}

impl<'a> Segment<'a> {
    /// Runs `run` on `inputs`; returns what it gives, without a tape. `keeps_tape` trades memory for not having
    /// to run it again.
    pub fn forward(
        inputs: &[Tensor],
        keeps_tape: bool,
        run: impl Fn(&[Tensor]) -> Result<Tensor> + 'a,
    ) -> Result<(Self, Tensor)> {
        // A variable of its own for every input, sharing nothing with the tape below.
        let inputs: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
        let (kept, output) = if keeps_tape {
            let output = run(&tensors(&inputs))?;
            let detached = output.detach();
            (Some(output), detached)
        } else {
            let plain: Vec<Tensor> = inputs.iter().map(|input| input.as_tensor().detach()).collect();
            (None, run(&plain)?)
        };
        Ok((Self { inputs, run: Box::new(run), output: kept }, output))
    }

    /// The gradients of the inputs from that of the output. Gradients of trained weights are added where they go.
    pub fn backward(self, dy: &Tensor) -> Result<Vec<Tensor>> {
        let output = match self.output {
            Some(output) => output,
            None => (self.run)(&tensors(&self.inputs))?,
        };
        let mut gradients = output.apply_op1(Start(dy.clone()))?.backward()?;
        self.inputs
            .iter()
            .map(|input| match gradients.remove(input) {
                Some(gradient) => Ok(gradient.contiguous()?),
                None => Ok(input.zeros_like()?), // an input that nothing read
            })
            .collect()
    }
}

/// A tape runs backward from a number: one whose gradient by its argument is the tensor that is carried.
struct Start(Tensor);

impl CustomOp1 for Start {
    fn name(&self) -> &'static str {
        "start"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), ().into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

fn tensors(inputs: &[Var]) -> Vec<Tensor> {
    inputs.iter().map(|input| input.as_tensor().clone()).collect()
}
