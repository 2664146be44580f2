//! Building layers from named weights, with the checkpoint's path spelled as it is read.

use std::fmt::Display;

use super::ModelError;
use crate::{
    checkpoint::{LinearWeight, Weight, Weights},
    ops::{LayerNorm, Linear, RmsNorm},
};

/// Lends weights by their full checkpoint name.
pub trait WeightSource {
    /// The weight of that name, if there is one. A clone shares its bytes.
    fn weight(&self, name: &str) -> Option<Weight>;

    /// The weight of a linear layer of that name, which may be packed.
    fn linear_weight(&self, name: &str) -> Option<LinearWeight> {
        self.weight(name).map(LinearWeight::Dense)
    }
}

impl WeightSource for Weights {
    fn weight(&self, name: &str) -> Option<Weight> {
        self.get(name).cloned()
    }

    fn linear_weight(&self, name: &str) -> Option<LinearWeight> {
        self.get_linear(name)
    }
}

/// A place in the tree of checkpoint names.
pub(super) struct Loader<'a> {
    source: &'a dyn WeightSource,
    prefix: String,
}

impl<'a> Loader<'a> {
    pub(super) fn new(source: &'a dyn WeightSource) -> Self {
        Self { source, prefix: String::new() }
    }

    /// The place one step deeper.
    pub(super) fn at(&self, name: impl Display) -> Self {
        Self { source: self.source, prefix: format!("{}{name}.", self.prefix) }
    }

    /// The weight `name` here, which must have `shape`.
    pub(super) fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight, ModelError> {
        let name = format!("{}{name}", self.prefix);
        let Some(weight) = self.source.weight(&name) else { return Err(ModelError::MissingTensor { name }) };
        if weight.shape() == shape {
            Ok(weight)
        } else {
            Err(ModelError::WrongShape { name, expected: shape.to_vec(), got: weight.shape().to_vec() })
        }
    }

    /// The weight `name.weight`, dense or packed, which must be `[n, k]`.
    fn linear_weight(&self, name: &str, n: usize, k: usize) -> Result<LinearWeight, ModelError> {
        let name = format!("{}{name}.weight", self.prefix);
        let Some(weight) = self.source.linear_weight(&name) else {
            return Err(ModelError::MissingTensor { name });
        };
        if weight.shape() == [n, k] {
            Ok(weight)
        } else {
            Err(ModelError::WrongShape { name, expected: vec![n, k], got: weight.shape().to_vec() })
        }
    }

    /// `name.weight` `[n, k]` without a bias.
    pub(super) fn linear(&self, name: &str, n: usize, k: usize) -> Result<Linear, ModelError> {
        Ok(Linear::new(self.linear_weight(name, n, k)?, None))
    }

    /// `name.weight` `[n, k]` and `name.bias` `[n]`.
    pub(super) fn biased_linear(&self, name: &str, n: usize, k: usize) -> Result<Linear, ModelError> {
        let bias = self.at(name).weight("bias", &[n])?;
        Ok(Linear::new(self.linear_weight(name, n, k)?, Some(&bias)))
    }

    /// `name.weight` `[width]`.
    pub(super) fn rms_norm(&self, name: &str, width: usize, eps: f64) -> Result<RmsNorm, ModelError> {
        Ok(RmsNorm::new(&self.at(name).weight("weight", &[width])?, eps))
    }

    /// `name.weight` and `name.bias`, both `[width]`.
    pub(super) fn layer_norm(&self, name: &str, width: usize, eps: f64) -> Result<LayerNorm, ModelError> {
        let here = self.at(name);
        Ok(LayerNorm::new(&here.weight("weight", &[width])?, &here.weight("bias", &[width])?, eps))
    }
}
