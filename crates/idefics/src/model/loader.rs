//! Building layers from named weights, with the checkpoint's path spelled as it is read.

use std::{cell::Cell, fmt::Display, rc::Rc};

use super::ModelError;
use crate::{
    checkpoint::{LinearWeight, Weight, Weights},
    ops::{Gradient, LayerNorm, Linear, LowRank, RmsNorm},
};

/// Lends weights by their full checkpoint name.
pub trait WeightSource {
    /// The weight of that name, if there is one. A clone shares its bytes.
    fn weight(&self, name: &str) -> Option<Weight>;

    /// The weight of a linear layer of that name, which may be packed.
    fn linear_weight(&self, name: &str) -> Option<LinearWeight> {
        self.weight(name).map(LinearWeight::Dense)
    }

    /// Where the gradient of the weight of that name goes; none for one that is frozen, as all are outside of
    /// training.
    fn gradient(&self, _name: &str) -> Option<Gradient> {
        None
    }

    /// Low-rank factors beside the linear layer of that name, which is spelled without `.weight`.
    fn low_rank(&self, _name: &str) -> Vec<LowRank> {
        Vec::new()
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
    /// Weights with a gradient that were asked for so far, anywhere in the tree.
    n_trained: Rc<Cell<usize>>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(source: &'a dyn WeightSource) -> Self {
        Self { source, prefix: String::new(), n_trained: Rc::default() }
    }

    /// The place one step deeper.
    pub(super) fn at(&self, name: impl Display) -> Self {
        let prefix = format!("{}{name}.", self.prefix);
        Self { source: self.source, prefix, n_trained: Rc::clone(&self.n_trained) }
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

    /// Where the gradient of the weight `name` here goes, if it is trained.
    pub(super) fn gradient(&self, name: &str) -> Option<Gradient> {
        let gradient = self.source.gradient(&format!("{}{name}", self.prefix));
        self.n_trained.set(self.n_trained.get() + usize::from(gradient.is_some()));
        gradient
    }

    /// Whether `build` asks for a weight that is trained, and what it builds.
    pub(super) fn trained<T>(
        &self,
        build: impl FnOnce() -> Result<T, ModelError>,
    ) -> Result<Trained<T>, ModelError> {
        let before = self.n_trained.get();
        let part = build()?;
        Ok(Trained { part, is_trained: self.n_trained.get() > before })
    }

    /// `name.weight` `[n, k]` without a bias.
    pub(super) fn linear(&self, name: &str, n: usize, k: usize) -> Result<Linear, ModelError> {
        self.linear_layer(name, n, k, None)
    }

    /// `name.weight` `[n, k]` and `name.bias` `[n]`.
    pub(super) fn biased_linear(&self, name: &str, n: usize, k: usize) -> Result<Linear, ModelError> {
        let bias = self.at(name).weight("bias", &[n])?;
        self.linear_layer(name, n, k, Some(&bias))
    }

    fn linear_layer(
        &self,
        name: &str,
        n: usize,
        k: usize,
        bias: Option<&Weight>,
    ) -> Result<Linear, ModelError> {
        let here = self.at(name);
        let bias_gradient = bias.and_then(|_| here.gradient("bias"));
        let full_name = format!("{}{name}", self.prefix);
        let factors = self.source.low_rank(&full_name);
        for factors in &factors {
            let (a, b) = (factors.a.shape(), factors.b.shape());
            let rank = a.first().copied().unwrap_or(0);
            if a != [rank, k] || b != [n, rank] {
                let (a, b) = (a.to_vec(), b.to_vec());
                return Err(ModelError::LowRankShape { name: full_name, a, b, n, k });
            }
            let trained = [&factors.a_gradient, &factors.b_gradient].into_iter().flatten().count();
            self.n_trained.set(self.n_trained.get() + trained);
        }
        Ok(Linear::new(self.linear_weight(name, n, k)?, bias)
            .with_gradients(here.gradient("weight"), bias_gradient)
            .with_low_rank(factors))
    }

    /// `name.weight` `[width]`.
    pub(super) fn rms_norm(&self, name: &str, width: usize, eps: f64) -> Result<RmsNorm, ModelError> {
        let here = self.at(name);
        Ok(RmsNorm::new(&here.weight("weight", &[width])?, eps, here.gradient("weight")))
    }

    /// `name.weight` and `name.bias`, both `[width]`.
    pub(super) fn layer_norm(&self, name: &str, width: usize, eps: f64) -> Result<LayerNorm, ModelError> {
        let here = self.at(name);
        let (weight, bias) = (here.weight("weight", &[width])?, here.weight("bias", &[width])?);
        Ok(LayerNorm::new(&weight, &bias, eps, here.gradient("weight"), here.gradient("bias")))
    }
}

/// A part of the model, and whether any of its weights is trained.
pub(super) struct Trained<T> {
    pub(super) part: T,
    pub(super) is_trained: bool,
}

impl<T> std::ops::Deref for Trained<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.part
    }
}
