//! Matrix products and lookups over weights that stay where the checkpoint is mapped.

use std::sync::Arc;

use idefics_kernels::{
    Matrix, backward,
    elementwise::{self, Activation},
    linear::{product, products},
};

use super::{
    Context, Gradient, Result, Tensor, activate, activate_gate, add_times, dims2, dropout::dropout,
    expect_alike, kept::Kept, message, record, tensor,
};
use crate::checkpoint::{DType, LinearWeight, PackedWeight, Weight};

/// `x · Wᵀ + b` with `W` of `[N, K]`, and what low-rank factors add to it.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: LinearWeight,
    bias: Option<Arc<[f32]>>,
    gradients: Gradients,
    low_rank: Vec<(Linear, Linear, LowRankScale)>,
}

/// Where the gradients of weight and bias go; none for what is frozen.
#[derive(Debug, Clone, Default)]
struct Gradients {
    weight: Option<Gradient>,
    bias: Option<Gradient>,
}

/// Low-rank factors beside a product (LoRA, Hu et al., 2021): `y += scale · B(A(dropout(x)))`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `A`, `[r, K]`.
    pub a: Weight,
    /// `B`, `[N, r]`.
    pub b: Weight,
    /// Factor on what they add, `alpha / r` as a rule.
    pub scale: f32,
    /// Share of the inputs that `A` does not see, in training alone; 0 elsewhere.
    pub dropout: f32,
    /// Which inputs those are: another seed for every step and layer.
    pub dropout_seed: u64,
    /// Where the gradient of `A` goes if it is trained.
    pub a_gradient: Option<Gradient>,
    /// Where the gradient of `B` goes if it is trained.
    pub b_gradient: Option<Gradient>,
}

#[derive(Debug, Clone, Copy)]
struct LowRankScale {
    scale: f32,
    dropout: f32,
    dropout_seed: u64,
}

impl Linear {
    /// A product with `weight` `[N, K]`, and `bias` `[N]` added to it.
    pub fn new(weight: impl Into<LinearWeight>, bias: Option<&Weight>) -> Self {
        Self {
            weight: weight.into(),
            bias: bias.map(|bias| bias.to_f32_vec().into()),
            gradients: Gradients::default(),
            low_rank: Vec::new(),
        }
    }

    /// Says where the gradients of weight and bias go; none for what is frozen.
    #[must_use]
    pub fn with_gradients(mut self, weight: Option<Gradient>, bias: Option<Gradient>) -> Self {
        self.gradients = Gradients { weight, bias };
        self
    }

    /// Adds what low-rank factors add.
    #[must_use]
    pub fn with_low_rank(mut self, factors: Vec<LowRank>) -> Self {
        self.low_rank.extend(factors.into_iter().map(|factors| {
            let LowRank { a, b, scale, dropout, dropout_seed, a_gradient, b_gradient } = factors;
            (
                Self::new(a, None).with_gradients(a_gradient, None),
                Self::new(b, None).with_gradients(b_gradient, None),
                LowRankScale { scale, dropout, dropout_seed },
            )
        }));
        self
    }

    /// `[T, K] -> [T, N]`.
    pub fn forward(&self, ctx: Context, x: &Tensor) -> Result<Tensor> {
        let [y] = Self::forward_all([self], ctx, x)?;
        Ok(y)
    }

    /// The same of several layers that read the same rows, at once.
    pub fn forward_all<const N: usize>(layers: [&Self; N], ctx: Context, x: &Tensor) -> Result<[Tensor; N]> {
        let extents = layers.iter().map(|layer| layer.check(x)).collect::<Result<Vec<_>>>()?;
        let Some(&(rows, _, k)) = extents.first() else { return Err(message("no layers".to_owned())) };
        let weights = layers.map(|layer| (matrix(&layer.weight), layer.bias.as_deref()));
        let products = products(ctx.isa, ctx.compute, &x.elements()?, &weights, k);
        let ys = layers.iter().zip(products).zip(extents).map(|((layer, y), (_, n, _))| {
            let y = layer.recorded(ctx, x, tensor(y, &[rows, n])?)?;
            layer.with_factors(ctx, x, y)
        });
        let ys = ys.collect::<Result<Vec<_>>>()?;
        Ok(ys.try_into().unwrap_or_else(|_| unreachable!("one for each layer")))
    }

    /// The product `y` of `x` with its way back.
    fn recorded(&self, ctx: Context, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let (weight, gradients) = (self.weight.clone(), self.gradients.clone());
        let k = dims2(x)?.1;
        let kept = gradients.are_wanted().then(|| Kept::new(ctx, x)).transpose()?;
        Ok(record(&[x], y, kept.is_some(), move |dy, slopes| {
            if let Some(kept) = kept {
                kept.with_matrix(|x| gradients.add(ctx, x, &dy, k))?;
            }
            if slopes.wants(0) {
                slopes.add(0, backward::linear_input(ctx.isa, ctx.compute, &dy, matrix(&weight), k));
            }
            Ok(())
        }))
    }

    /// `y` and what low-rank factors add to it.
    fn with_factors(&self, ctx: Context, x: &Tensor, mut y: Tensor) -> Result<Tensor> {
        for (a, b, low_rank) in &self.low_rank {
            let LowRankScale { scale, dropout: share, dropout_seed } = *low_rank;
            let seen = if share > 0.0 { dropout(x, share, dropout_seed)? } else { x.clone() };
            let inner = a.forward(ctx, &seen)?; // [T, r]
            y = add_times(ctx, &y, &b.forward(ctx, &inner)?, scale)?;
        }
        Ok(y)
    }

    /// The same of `activation(x)`, which is computed again on the way back instead of being kept: in a vision tower
    /// it is a sixth of what a tape keeps.
    pub fn forward_activated(&self, ctx: Context, activation: Activation, x: &Tensor) -> Result<Tensor> {
        if !self.low_rank.is_empty() {
            // Factors read it, too.
            return self.forward(ctx, &activate(ctx, activation, x)?);
        }
        let inner = move |x: &[&[f32]]| elementwise::activate(ctx.isa, activation, x[0]);
        self.forward_of(ctx, &[x], inner, move |x, mut dx| {
            backward::activate(ctx.isa, activation, x[0], &mut dx);
            vec![dx]
        })
    }

    /// The same of `activation(gate) · up`, which is computed again likewise.
    pub fn forward_gated(
        &self,
        ctx: Context,
        activation: Activation,
        gate: &Tensor,
        up: &Tensor,
    ) -> Result<Tensor> {
        if !self.low_rank.is_empty() {
            return self.forward(ctx, &activate_gate(ctx, activation, gate, up)?);
        }
        expect_alike("forward_gated", gate, up)?;
        let inner = move |x: &[&[f32]]| elementwise::activate_gate(ctx.isa, activation, x[0], x[1]);
        self.forward_of(ctx, &[gate, up], inner, move |x, mut dgate| {
            let dup = backward::activate_gate(ctx.isa, activation, x[0], x[1], &mut dgate);
            vec![dgate, dup]
        })
    }

    /// The same of what `inner` computes from `arguments`, which are kept in its place. `inner_backward` has the
    /// gradients of the arguments from that of what was computed.
    fn forward_of(
        &self,
        ctx: Context,
        arguments: &[&Tensor],
        inner: impl Fn(&[&[f32]]) -> Vec<f32> + Send + 'static,
        inner_backward: impl FnOnce(&[&[f32]], Vec<f32>) -> Vec<Vec<f32>> + Send + 'static,
    ) -> Result<Tensor> {
        let (rows, n, k) = self.check(arguments[0])?;
        let x = {
            let lent = arguments.iter().map(|x| x.elements()).collect::<Result<Vec<_>>>()?;
            inner(&lent.iter().map(|x| &**x).collect::<Vec<_>>())
        };
        let y = product(ctx.isa, ctx.compute, &x, matrix(&self.weight), k, self.bias.as_deref());
        drop(x);
        let kept = arguments.iter().map(|x| Kept::new(ctx, x)).collect::<Result<Vec<_>>>()?;
        let layer = self.clone();
        let trains = self.gradients.are_wanted();
        Ok(record(arguments, tensor(y, &[rows, n])?, trains, move |dy, slopes| {
            Kept::with_all(&kept, |arguments| {
                if trains {
                    layer.gradients.add(ctx, Matrix::F32(&inner(arguments)), &dy, k);
                }
                if (0..arguments.len()).any(|argument| slopes.wants(argument)) {
                    let dx = backward::linear_input(ctx.isa, ctx.compute, &dy, matrix(&layer.weight), k);
                    for (argument, slope) in inner_backward(arguments, dx).into_iter().enumerate() {
                        slopes.add(argument, slope);
                    }
                }
            })
        }))
    }

    /// The rows of `x`, `N` and `K`, if they fit together.
    fn check(&self, x: &Tensor) -> Result<(usize, usize, usize)> {
        let ((n, k), (rows, width)) = (self.extents()?, dims2(x)?);
        if width == k {
            Ok((rows, n, k))
        } else {
            Err(message(format!("linear: rows of {k} expected, got {width}")))
        }
    }

    /// The gradient of `x` `[T, K]` from that of the output, `dy` `[T, N]`, without a tape; gradients of trained
    /// weights are added where they go. For layers without low-rank factors.
    pub fn backward(&self, ctx: Context, x: &[f32], dy: &[f32]) -> Vec<f32> {
        debug_assert!(self.low_rank.is_empty(), "low-rank factors go through the tape");
        let k = self.weight.shape()[1];
        self.gradients.add(ctx, Matrix::F32(x), dy, k);
        backward::linear_input(ctx.isa, ctx.compute, dy, matrix(&self.weight), k)
    }

    /// `N` and `K`.
    fn extents(&self) -> Result<(usize, usize)> {
        match self.weight.shape() {
            [n, k] => Ok((*n, *k)),
            other => Err(message(format!("a weight of two dimensions expected, got {other:?}"))),
        }
    }

    /// Number of weights, bias not counted.
    pub fn parameters(&self) -> usize {
        self.weight.shape().iter().product()
    }

    /// Bytes that one product reads, bias not counted.
    pub fn num_bytes(&self) -> usize {
        self.weight.num_bytes()
    }

    /// The weight, whose clone shares its bytes.
    pub fn weight(&self) -> &LinearWeight {
        &self.weight
    }

    /// The width of the output, `N`.
    pub fn out_features(&self) -> usize {
        self.weight.shape()[0]
    }
}

impl Gradients {
    fn are_wanted(&self) -> bool {
        self.weight.is_some() || self.bias.is_some()
    }

    /// Adds those of `dy` `[T, N]` and the input `x` `[T, k]`.
    fn add(&self, ctx: Context, x: Matrix<'_>, dy: &[f32], k: usize) {
        if let Some(gradient) = &self.weight {
            gradient.add_outer(ctx, dy, x, k);
        }
        if let Some(gradient) = &self.bias {
            backward::add_column_sums(dy, &mut gradient.lock());
        }
    }
}

/// A table of rows `[V, D]`, looked up by index.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Weight,
    gradient: Option<Gradient>,
}

impl Embedding {
    /// A table with the rows of `weight`, and where its gradient goes if it is trained.
    pub fn new(weight: Weight, gradient: Option<Gradient>) -> Self {
        Self { weight, gradient }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.weight.shape()[0]
    }

    /// Whether the table has no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Width of a row.
    pub fn width(&self) -> usize {
        self.weight.shape()[1]
    }

    /// Appends row `index`, widened, to `out`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn append_row(&self, index: usize, out: &mut Vec<f32>) {
        out.extend(self.weight.rows(index..index + 1).to_f32_vec());
    }

    /// All rows, widened: `[V, D]`.
    pub fn to_tensor(&self) -> Result<Tensor> {
        tensor(self.weight.to_f32_vec(), self.weight.shape())
    }

    /// Adds the gradient of all rows `[V, D]` where it goes, if the table is trained.
    pub fn add_gradient(&self, gradient: &Tensor) -> Result<()> {
        let Some(sum) = &self.gradient else { return Ok(()) };
        sum.add_at(0, &gradient.plain_elements()?);
        Ok(())
    }

    /// Adds the gradient of row `index` where it goes, if the table is trained.
    pub fn add_row_gradient(&self, index: usize, row: &[f32]) {
        if let Some(gradient) = &self.gradient {
            gradient.add_at(index * self.width(), row);
        }
    }
}

fn matrix(weight: &LinearWeight) -> Matrix<'_> {
    const MATCHES: &str = "a weight lends its elements as their own type";
    let weight = match weight {
        LinearWeight::Dense(weight) => weight,
        LinearWeight::Packed(PackedWeight::Nf4(weight)) => return Matrix::Nf4(weight.view()),
        LinearWeight::Packed(PackedWeight::Q8(weight)) => return Matrix::Q8(weight.view()),
    };
    match weight.dtype() {
        DType::F32 => Matrix::F32(weight.as_f32().expect(MATCHES)),
        DType::F16 => Matrix::F16(weight.as_f16().expect(MATCHES)),
        DType::Bf16 => Matrix::Bf16(weight.as_bf16().expect(MATCHES)),
    }
}
