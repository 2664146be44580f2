//! The LLaMA MLP, shared by decoder layers and gated blocks: `down(act(gate(x)) · up(x))`, no biases.

use super::{ModelError, loader::Loader};
use crate::{
    config::IdeficsConfig,
    ops::{self, Activation, Context, Linear, Tensor},
};

pub(super) struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    pub(super) fn new(config: &IdeficsConfig, loader: &Loader<'_>) -> Result<Self, ModelError> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_proj: loader.linear("gate_proj", inner, width)?,
            up_proj: loader.linear("up_proj", inner, width)?,
            down_proj: loader.linear("down_proj", width, inner)?,
            activation: config.hidden_act.into(),
        })
    }

    pub(super) fn linears(&self) -> [&Linear; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }

    /// `[T, D] -> [T, D]`.
    pub(super) fn forward(&self, ctx: Context, x: &Tensor) -> ops::Result<Tensor> {
        let [gate, up] = Linear::forward_all([&self.gate_proj, &self.up_proj], ctx, x)?; // [T, F]
        self.down_proj.forward_gated(ctx, self.activation, &gate, &up)
    }
}

impl From<crate::config::Activation> for Activation {
    fn from(activation: crate::config::Activation) -> Self {
        use crate::config::Activation as Named;
        match activation {
            Named::Silu => Self::Silu,
            Named::Gelu => Self::Gelu,
            Named::QuickGelu => Self::QuickGelu,
            Named::GeluPytorchTanh => Self::GeluTanh,
            Named::Relu => Self::Relu,
        }
    }
}
