//! The weights of a model in training: some move, the others stay where the checkpoint is mapped.
//!
//! A weight that is trained in bf16 has an `f32` master beside it, which is what the optimiser moves; the model
//! reads the master rounded. Gradients are `f32`, and moments unless they are asked for in 8 bits. A [`Model`](idefics::model::Model) is built anew
//! for each step and dropped before the update, so that the numbers can be changed where they are.

use std::collections::BTreeMap;

use idefics::{
    adapter::Factors,
    checkpoint::{DType, LinearWeight, Weight, Weights},
    model::WeightSource,
    ops::{Gradient, LowRank},
};
use idefics_kernels::{Isa, adamw::sum_of_squares, linear::round_into};

use crate::{
    adapter::LoraLayer,
    error::TrainError,
    moments::{MomentFormat, Moments},
    optim::{AdamW, Decay, Update, decays},
    rng::mix,
};

/// A weight that is trained.
#[derive(Debug)]
pub struct Parameter {
    weight: Weight,
    /// The numbers behind a weight that is not `f32` itself.
    master: Option<Vec<f32>>,
    gradient: Gradient,
    moments: Moments,
    decay: Decay,
    /// Multiplied into the learning rate.
    rate_factor: f64,
}

/// What the trained weights are kept as while the model reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As they are stored, `f16` as `f32`.
    #[default]
    Auto,
    /// `f32`.
    F32,
    /// `bf16` with `f32` masters.
    Bf16,
}

/// All weights of a model.
pub struct Parameters {
    /// Those that stay.
    frozen: Weights,
    /// Those that move, by name.
    trained: BTreeMap<String, Parameter>,
    /// Heads that are the embeddings.
    is_tied: bool,
    /// Factors beside linear layers, by the names of these. Their numbers are among the trained ones.
    lora: BTreeMap<String, FactorNames>,
    /// Step and pass, for dropout.
    draw: [u64; 2],
    /// Whether models that are made now drop inputs.
    is_learning: bool,
}

/// Factors beside one linear layer.
struct FactorNames {
    a: String,
    b: String,
    scale: f32,
    dropout: f32,
}

/// Names of heads and of the embeddings that they are where they are tied.
const TIED: [(&str, &str); 2] = [
    ("lm_head.weight", "model.embed_tokens.weight"),
    ("lm_head.additional_fc.weight", "model.embed_tokens.additional_embedding.weight"),
];

impl Parameter {
    /// A weight that will move, as it is stored.
    fn new(name: &str, stored: &Weight, precision: Precision) -> Self {
        let values = stored.to_f32_vec();
        let is_bf16 =
            precision == Precision::Bf16 || (precision == Precision::Auto && stored.dtype() == DType::Bf16);
        let decay = if decays(name) { Decay::Yes } else { Decay::No };
        let (gradient, moments) =
            (Gradient::new(values.len()), Moments::new(values.len(), MomentFormat::F32));
        let shape = stored.shape().to_vec();
        let (weight, master) = if is_bf16 {
            (Weight::from_f32(values.clone(), shape).to_dtype(DType::Bf16), Some(values))
        } else {
            (Weight::from_f32(values, shape), None)
        };
        Self { weight, master, gradient, moments, decay, rate_factor: 1.0 }
    }

    /// What the model reads.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The numbers that the optimiser moves.
    pub fn values(&self) -> &[f32] {
        let Some(values) = self.master.as_deref().or_else(|| self.weight.as_f32()) else {
            unreachable!("a weight without a master is f32")
        };
        values
    }

    /// The sum of the gradients so far.
    pub fn gradient(&self) -> &Gradient {
        &self.gradient
    }

    /// First and second moment.
    pub fn moments(&self) -> &Moments {
        &self.moments
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.weight.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.weight.is_empty()
    }

    /// Whether the model reads something coarser than what the optimiser moves.
    pub(crate) fn is_rounded(&self) -> bool {
        self.master.is_some()
    }

    /// Bytes of numbers, master, gradient and moments.
    pub fn num_bytes(&self) -> u64 {
        let len = self.len() as u64;
        let of_f32 = 1 + u64::from(self.is_rounded());
        self.weight.bytes().len() as u64 + of_f32 * 4 * len + self.moments.format().num_bytes(len)
    }

    fn update(&mut self, update: &Update) -> Result<(), SharedWeight> {
        let update = &Update { rate: update.rate * self.rate_factor, ..*update };
        let gradient = self.gradient.lock();
        if let Some(master) = &mut self.master {
            let rounded = self.weight.as_bf16_mut().ok_or(SharedWeight)?;
            update.apply(master, &gradient, &mut self.moments, self.decay);
            round_into(Isa::best(), master, rounded);
        } else {
            let values = self.weight.as_f32_mut().ok_or(SharedWeight)?;
            update.apply(values, &gradient, &mut self.moments, self.decay);
        }
        Ok(())
    }

    /// Takes over numbers and moments of an earlier run; all have the parameter's length.
    pub(crate) fn restore(&mut self, values: Vec<f32>, moments: Moments) {
        let shape = self.weight.shape().to_vec();
        assert!(values.len() == self.len() && moments.len() == self.len(), "lengths were compared");
        self.weight = Weight::from_f32(values.clone(), shape);
        if self.master.is_some() {
            self.weight = self.weight.to_dtype(DType::Bf16);
            self.master = Some(values);
        }
        self.moments = moments;
        self.gradient.zero();
    }
}

/// A model still reads the weight.
struct SharedWeight;

impl Parameters {
    /// Splits the weights of a checkpoint into those that `is_trained` names and the others.
    pub fn new(
        mut weights: Weights,
        is_tied: bool,
        precision: Precision,
        is_trained: impl Fn(&str) -> bool,
    ) -> Result<Self, TrainError> {
        let is_head = |name: &str| is_tied && TIED.iter().any(|(head, _)| *head == name);
        if let Some((name, weight)) = weights.iter_packed().find(|(name, _)| is_trained(name)) {
            let (name, format) = (name.to_owned(), weight.format_name());
            return Err(TrainError::PackedTrained { name, format });
        }
        let names: Vec<String> = weights
            .iter()
            .map(|(name, _)| name.to_owned())
            .filter(|name| is_trained(name) && !is_head(name))
            .collect();
        let mut trained = BTreeMap::new();
        for name in names {
            let stored = weights.take(&name)?;
            trained.insert(name.clone(), Parameter::new(&name, &stored, precision));
            stored.release_pages();
        }
        Ok(Self {
            frozen: weights,
            trained,
            is_tied,
            lora: BTreeMap::new(),
            draw: [0; 2],
            is_learning: false,
        })
    }

    /// The same with low-rank factors beside some layers, which are trained, too. In training they do not see that
    /// share of their inputs, `dropout`.
    #[must_use]
    pub fn with_lora(mut self, layers: &[LoraLayer], dropout: f32) -> Self {
        for layer in layers {
            let (a, b, scale) = (layer.a_name(), layer.b_name(), layer.factors.scale);
            for (name, factor) in [(&a, &layer.factors.a), (&b, &layer.factors.b)] {
                self.trained.insert(name.clone(), Parameter::new(name, factor, Precision::F32));
            }
            self.lora.insert(layer.module.clone(), FactorNames { a, b, scale, dropout });
        }
        self
    }

    /// The same where `factor` of a weight's name is multiplied into its learning rate.
    #[must_use]
    pub fn with_rates(mut self, factor: impl Fn(&str) -> f64) -> Self {
        for (name, parameter) in &mut self.trained {
            parameter.rate_factor = factor(name);
        }
        self
    }

    /// The same with moments, as before the first step, in that format.
    #[must_use]
    pub fn with_moments(mut self, format: MomentFormat) -> Self {
        for parameter in self.trained.values_mut() {
            parameter.moments = Moments::new(parameter.len(), format);
        }
        self
    }

    /// The factors as they are now.
    pub fn lora_layers(&self) -> Vec<LoraLayer> {
        let layer = |(module, names): (&String, &FactorNames)| LoraLayer {
            module: module.clone(),
            factors: Factors {
                a: self.trained[&names.a].weight.clone(),
                b: self.trained[&names.b].weight.clone(),
                scale: names.scale,
            },
        };
        self.lora.iter().map(layer).collect()
    }

    /// Weights of the model itself that are trained although there are factors.
    pub fn replaced(&self) -> Vec<(String, Weight)> {
        let is_factor = |name: &str| self.lora.values().any(|names| names.a == name || names.b == name);
        let own = self.trained.iter().filter(|(name, _)| !is_factor(name));
        own.map(|(name, parameter)| (name.clone(), parameter.weight.clone())).collect()
    }

    /// The weights that move, in the order of their names.
    pub fn trained(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.trained.iter().map(|(name, parameter)| (name.as_str(), parameter))
    }

    pub(crate) fn trained_mut(&mut self) -> impl Iterator<Item = (&str, &mut Parameter)> {
        self.trained.iter_mut().map(|(name, parameter)| (name.as_str(), parameter))
    }

    /// The weights that stay.
    pub fn frozen(&self) -> &Weights {
        &self.frozen
    }

    /// Number of elements that are trained.
    pub fn num_trained(&self) -> usize {
        self.trained.values().map(Parameter::len).sum()
    }

    /// Whether there are factors beside the weights.
    pub fn has_lora(&self) -> bool {
        !self.lora.is_empty()
    }

    /// Whether the heads are the embeddings, and are not saved beside them.
    pub fn is_tied_head(&self, name: &str) -> bool {
        self.is_tied && TIED.iter().any(|(head, _)| *head == name)
    }

    /// Sets all gradients to zero.
    pub fn zero_gradients(&self) {
        self.trained.values().for_each(|parameter| parameter.gradient.zero());
    }

    /// Lends weights to a model that learns: with dropout, whose draws are those of a step's pass.
    pub(crate) fn learning(&mut self, step: u64, pass: u64) -> &Self {
        (self.draw, self.is_learning) = ([step, pass], true);
        self
    }

    /// Ends what [`learning`](Self::learning) began.
    pub(crate) fn rest(&mut self) {
        self.is_learning = false;
    }

    /// The norm of all gradients as one vector.
    pub fn gradient_norm(&self) -> f64 {
        let squares =
            self.trained.values().map(|parameter| sum_of_squares(Isa::best(), &parameter.gradient.lock()));
        squares.sum::<f64>().sqrt()
    }

    /// Moves all weights.
    ///
    /// # Panics
    /// If a model that reads them is still there.
    pub fn update(&mut self, adamw: AdamW, rate: f64, step: u64, gradient_scale: f32) {
        let update = Update { adamw, rate, step, gradient_scale };
        for (name, parameter) in &mut self.trained {
            let updated = parameter.update(&update);
            assert!(updated.is_ok(), "{name}: the model of a step is dropped before the update");
        }
    }

    /// The name under which a weight lies here.
    fn own_name<'a>(&self, name: &'a str) -> &'a str {
        let tied = TIED.iter().find(|(head, _)| self.is_tied && *head == name);
        tied.map_or(name, |(_, embedding)| embedding)
    }
}

impl WeightSource for Parameters {
    fn weight(&self, name: &str) -> Option<Weight> {
        let name = self.own_name(name);
        let trained = self.trained.get(name).map(|parameter| parameter.weight.clone());
        trained.or_else(|| self.frozen.weight(name))
    }

    fn linear_weight(&self, name: &str) -> Option<LinearWeight> {
        let own = self.own_name(name);
        let trained = self.trained.get(own).map(|parameter| parameter.weight.clone().into());
        trained.or_else(|| self.frozen.linear_weight(own))
    }

    fn low_rank(&self, name: &str) -> Vec<LowRank> {
        let Some(names) = self.lora.get(name) else { return Vec::new() };
        let (a, b) = (&self.trained[&names.a], &self.trained[&names.b]);
        let [step, pass] = self.draw;
        let letters: Vec<u64> = name.bytes().map(u64::from).collect();
        vec![LowRank {
            a: a.weight.clone(),
            b: b.weight.clone(),
            scale: names.scale,
            dropout: if self.is_learning { names.dropout } else { 0.0 },
            dropout_seed: mix(&[step, pass, mix(&letters)]),
            a_gradient: Some(a.gradient.clone()),
            b_gradient: Some(b.gradient.clone()),
        }]
    }

    fn gradient(&self, name: &str) -> Option<Gradient> {
        self.trained.get(self.own_name(name)).map(|parameter| parameter.gradient.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights() -> Weights {
        [
            ("model.embed_tokens.weight", Weight::from_f32(vec![1.0, 2.0], [2, 1])),
            ("lm_head.weight", Weight::from_f32(vec![1.0, 2.0], [2, 1])),
            ("model.norm.weight", Weight::from_f32(vec![3.0], [1]).to_dtype(DType::Bf16)),
        ]
        .into_iter()
        .collect()
    }

    #[test]
    fn frozen_weights_stay_and_others_move() {
        let mut parameters =
            Parameters::new(weights(), false, Precision::Auto, |name| name == "model.norm.weight").unwrap();
        assert_eq!(parameters.num_trained(), 1);
        assert!(parameters.gradient("lm_head.weight").is_none());
        parameters.gradient("model.norm.weight").unwrap().lock()[0] = -2.0;
        assert_eq!(parameters.gradient_norm(), 2.0);
        parameters.update(AdamW::default(), 0.25, 1, 1.0);
        let weight = parameters.weight("model.norm.weight").unwrap();
        assert_eq!((weight.dtype(), weight.to_f32_vec()), (DType::Bf16, vec![3.171_875]));
        let (_, norm) = parameters.trained().next().unwrap();
        assert!((norm.values()[0] - (3.0 * 0.975 + 0.25)).abs() < 1e-5, "the master is not rounded");
        assert_eq!(parameters.weight("lm_head.weight").unwrap().to_f32_vec(), [1.0, 2.0]);
        parameters.zero_gradients();
        assert_eq!(parameters.gradient_norm(), 0.0);
    }

    #[test]
    fn weights_can_learn_at_rates_of_their_own() {
        let adamw = AdamW { weight_decay: 0.0, ..AdamW::default() };
        let moved = |factor| {
            let parameters = Parameters::new(weights(), false, Precision::F32, |_| true).unwrap();
            let mut parameters =
                parameters.with_rates(|name| if name == "lm_head.weight" { factor } else { 1.0 });
            parameters.gradient("lm_head.weight").unwrap().lock()[0] = 1.0;
            parameters.update(adamw, 0.5, 1, 1.0);
            1.0 - parameters.weight("lm_head.weight").unwrap().to_f32_vec()[0]
        };
        assert!((moved(1.0) - 0.5).abs() < 1e-5);
        assert!((moved(0.1) - 0.05).abs() < 1e-5);
        assert_eq!(moved(0.0), 0.0);
    }

    #[test]
    fn tied_heads_are_the_embeddings() {
        let mut parameters = Parameters::new(weights(), true, Precision::F32, |_| true).unwrap();
        assert_eq!(parameters.num_trained(), 3);
        parameters.gradient("lm_head.weight").unwrap().lock()[0] = 1.0;
        parameters.update(AdamW::default(), 0.5, 1, 1.0);
        let [head, embedding] =
            ["lm_head.weight", "model.embed_tokens.weight"].map(|name| parameters.weight(name).unwrap());
        assert!(head.shares_bytes_with(&embedding));
        assert!(head.to_f32_vec()[0] < 0.5);
    }

    #[test]
    #[should_panic(expected = "dropped before the update")]
    fn a_weight_in_use_is_not_changed() {
        let mut parameters = Parameters::new(weights(), false, Precision::F32, |_| true).unwrap();
        let _model = parameters.weight("lm_head.weight");
        parameters.update(AdamW::default(), 0.5, 1, 1.0);
    }
}
