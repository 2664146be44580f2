//! Attention over sequences laid end to end, with or without a cache of keys and values.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Shape};
use half::bf16;
use idefics_kernels::{
    attention::{Job, Rows, attention},
    backward,
};

use super::{
    AttentionGroup, Compute, Context, Heads, Result, Tensor, Visible, contiguous, gradient_slice, tensor,
    with_slice,
};

/// Rows by which keys and values grow.
pub const GROWTH_ROWS: usize = 64;

/// Keys and values of one sequence and one layer, `[S, H·K]` each; they grow as tokens come.
///
/// Kept as bf16 when the model computes in bf16, as the reference keeps them.
#[derive(Debug, Clone)]
pub struct KeyValues {
    keys: Buffer,
    values: Buffer,
}

#[derive(Debug, Clone)]
enum Buffer {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// Some rows of a query tensor and the keys and values they look at.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// Number of query rows.
    pub n_queries: usize,
    /// What they look at.
    pub memory: &'a KeyValues,
    /// Which keys each of them sees.
    pub visible: Visible,
}

impl KeyValues {
    /// An empty memory in the element type that `ctx` computes in.
    pub fn new(ctx: Context) -> Self {
        let empty = || match ctx.compute {
            Compute::F32 => Buffer::F32(Vec::new()),
            Compute::Bf16 => Buffer::Bf16(Vec::new()),
        };
        Self { keys: empty(), values: empty() }
    }

    /// Appends rows `first..first + count` of `keys` and `values`, both `[T, H·K]`.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor, first: usize, count: usize) -> Result<()> {
        self.keys.append(keys, first, count)?;
        self.values.append(values, first, count)
    }

    /// The first `rows` rows of `width` elements alone; those behind them are forgotten.
    pub fn truncate(&mut self, rows: usize, width: usize) {
        self.keys.truncate(rows * width);
        self.values.truncate(rows * width);
    }

    /// A copy of the first `rows` rows of `width` elements.
    #[must_use]
    pub fn copy_rows(&self, rows: usize, width: usize) -> Self {
        Self { keys: self.keys.copy(rows * width), values: self.values.copy(rows * width) }
    }

    /// Bytes that the rows take.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }
}

impl Buffer {
    fn append(&mut self, rows: &Tensor, first: usize, count: usize) -> Result<()> {
        with_slice(rows, |rows, dims| {
            let width = dims[1];
            let new = &rows[first * width..(first + count) * width];
            match self {
                Self::F32(data) => {
                    grow(data, new.len(), width);
                    data.extend_from_slice(new);
                }
                Self::Bf16(data) => {
                    grow(data, new.len(), width);
                    data.extend(new.iter().map(|value| bf16::from_f32(*value)));
                }
            }
            Ok(())
        })
    }

    fn truncate(&mut self, len: usize) {
        match self {
            Self::F32(data) => data.truncate(len),
            Self::Bf16(data) => data.truncate(len),
        }
    }

    fn copy(&self, len: usize) -> Self {
        match self {
            Self::F32(data) => Self::F32(data[..len].to_vec()),
            Self::Bf16(data) => Self::Bf16(data[..len].to_vec()),
        }
    }

    fn rows(&self) -> Rows<'_> {
        match self {
            Self::F32(data) => Rows::F32(data),
            Self::Bf16(data) => Rows::Bf16(data),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(data) => size_of_val(data.as_slice()),
            Self::Bf16(data) => size_of_val(data.as_slice()),
        }
    }
}

/// Makes room for `new` more elements: exactly so many at first, since keys and values of a picture never grow,
/// then in blocks of [`GROWTH_ROWS`] rows. Doubling would take up to twice the memory that was counted.
fn grow<T>(data: &mut Vec<T>, new: usize, width: usize) {
    let needed = data.len() + new;
    if needed > data.capacity() {
        let block = if data.is_empty() { 1 } else { GROWTH_ROWS * width.max(1) };
        data.reserve_exact(needed.next_multiple_of(block) - data.len());
    }
}

/// Attention of every span's queries over its memory: `queries` `[T, H·K]` `-> [T, H·K]`, `T = Σ n_queries`.
pub fn attention_with_cache(
    ctx: Context,
    heads: Heads,
    queries: &Tensor,
    spans: &[Span<'_>],
) -> Result<Tensor> {
    let width = heads.n_heads * heads.head_dim;
    with_slice(queries, |queries, dims| {
        expect_rows("queries", dims, spans.iter().map(|span| span.n_queries).sum(), width)?;
        let mut first = 0;
        let jobs: Vec<_> = spans
            .iter()
            .map(|span| {
                let rows = &queries[first * width..(first + span.n_queries) * width];
                first += span.n_queries;
                let (keys, values) = (span.memory.keys.rows(), span.memory.values.rows());
                Job { queries: rows, keys, values, visible: span.visible }
            })
            .collect();
        let mut out = vec![0.0; queries.len()];
        attention(ctx.isa, heads, &jobs, &mut out);
        Ok(out)
    })
    .and_then(|out| tensor(out, &[spans.iter().map(|span| span.n_queries).sum(), width]))
}

/// Attention inside groups: every group's queries see its keys, as `visible` says. `queries` `[T, H·K]`, `keys`
/// and `values` `[S, H·K]`. The groups' queries follow one another and cover all `T`; groups that share keys stand
/// together.
pub fn attention_within(
    ctx: Context,
    heads: Heads,
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    groups: &Arc<[AttentionGroup]>,
) -> Result<Tensor> {
    let op = AttentionWithin { ctx, heads, groups: Arc::clone(groups) };
    Ok(queries.apply_op3(keys, values, op)?)
}

struct AttentionWithin {
    ctx: Context,
    heads: Heads,
    groups: Arc<[AttentionGroup]>,
}

impl CustomOp3 for AttentionWithin {
    fn name(&self) -> &'static str {
        "attention_within"
    }

    fn cpu_fwd(
        &self,
        queries: &CpuStorage,
        queries_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let width = self.heads.n_heads * self.heads.head_dim;
        let n_queries = self.groups.iter().map(|group| group.queries.1).sum();
        let n_keys = self.groups.iter().map(|group| group.keys.0 + group.keys.1).max().unwrap_or(0);
        expect_rows("queries", queries_layout.dims(), n_queries, width)?;
        for (what, layout) in [("keys", keys_layout), ("values", values_layout)] {
            expect_rows(what, layout.dims(), layout.dims()[0].max(n_keys), width)?;
        }
        let queries = contiguous(queries, queries_layout)?;
        let (keys, values) = (contiguous(keys, keys_layout)?, contiguous(values, values_layout)?);
        let rows = |data, (first, count): (usize, usize)| -> &[f32] {
            let data: &[f32] = data;
            &data[first * width..(first + count) * width]
        };
        let jobs: Vec<_> = self
            .groups
            .iter()
            .map(|group| Job {
                queries: rows(queries, group.queries),
                keys: Rows::F32(rows(keys, group.keys)),
                values: Rows::F32(rows(values, group.keys)),
                visible: group.visible,
            })
            .collect();
        let mut out = vec![0.0; queries.len()];
        attention(self.ctx.isa, self.heads, &jobs, &mut out);
        Ok((CpuStorage::F32(out), queries_layout.shape().clone()))
    }

    fn bwd(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dq, dk, dv) = gradient_slice(dy, |dy| {
            with_slice(queries, |q, _| {
                // One closure per tensor: each lends its elements only while it is held.
                let gradients = with_slice(keys, |k, _| {
                    Ok(with_slice(values, |v, _| {
                        Ok(backward::attention(self.ctx.isa, self.heads, &self.groups, (q, k, v), dy))
                    })?)
                })?;
                Ok(gradients)
            })
        })?;
        Ok((
            Some(tensor(dq, queries.dims())?),
            Some(tensor(dk, keys.dims())?),
            Some(tensor(dv, values.dims())?),
        ))
    }
}

fn expect_rows(what: &str, dims: &[usize], rows: usize, width: usize) -> candle_core::Result<()> {
    if dims != [rows, width] {
        candle_core::bail!("attention: {what} of [{rows}, {width}] expected, got {dims:?}");
    }
    Ok(())
}
