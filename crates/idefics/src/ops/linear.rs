//! Matrix products and lookups over weights that stay where the checkpoint is mapped.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape};
use idefics_kernels::{Matrix, linear::linear};

use super::{Context, Result, Tensor, contiguous, tensor};
use crate::checkpoint::{DType, LinearWeight, PackedWeight, Weight};

/// `x · Wᵀ + b` with `W` of `[N, K]`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: LinearWeight,
    bias: Option<Arc<[f32]>>,
}

impl Linear {
    /// A product with `weight` `[N, K]`, and `bias` `[N]` added to it.
    pub fn new(weight: impl Into<LinearWeight>, bias: Option<&Weight>) -> Self {
        Self { weight: weight.into(), bias: bias.map(|bias| bias.to_f32_vec().into()) }
    }

    /// `[T, K] -> [T, N]`.
    pub fn forward(&self, ctx: Context, x: &Tensor) -> Result<Tensor> {
        Ok(x.apply_op1(LinearOp { ctx, linear: self.clone() })?)
    }

    /// Number of weights, bias not counted.
    pub fn parameters(&self) -> usize {
        self.weight.shape().iter().product()
    }

    /// Bytes that one product reads, bias not counted.
    pub fn num_bytes(&self) -> usize {
        self.weight.num_bytes()
    }

    /// The width of the output, `N`.
    pub fn out_features(&self) -> usize {
        self.weight.shape()[0]
    }
}

struct LinearOp {
    ctx: Context,
    linear: Linear,
}

impl CustomOp1 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Linear { weight, bias } = &self.linear;
        let (n, k) = match weight.shape() {
            [n, k] => (*n, *k),
            other => candle_core::bail!("a weight of two dimensions expected, got {other:?}"),
        };
        let (rows, width) = layout.shape().dims2()?;
        if width != k {
            candle_core::bail!("linear: rows of {k} expected, got {width}");
        }
        let mut out = vec![0.0; rows * n];
        linear(
            self.ctx.isa,
            self.ctx.compute,
            contiguous(storage, layout)?,
            matrix(weight),
            k,
            bias.as_deref(),
            &mut out,
        );
        Ok((CpuStorage::F32(out), (rows, n).into()))
    }
}

/// A table of rows `[V, D]`, looked up by index.
#[derive(Debug, Clone)]
pub struct Embedding {
    weight: Weight,
}

impl Embedding {
    /// A table with the rows of `weight`.
    pub fn new(weight: Weight) -> Self {
        Self { weight }
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
