//! Attention over sequences laid end to end, with or without a cache of keys and values.

use std::sync::Arc;

use half::bf16;
use idefics_kernels::{
    attention::{Job, Rows, attention},
    backward,
};

use super::{
    AttentionGroup, Compute, Context, Heads, Result, Tensor, Visible, dims2, kept::Kept, message, record,
    tensor,
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
            Compute::Bf16 | Compute::Int8 => Buffer::Bf16(Vec::new()),
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
        let width = dims2(rows)?.1;
        let rows = rows.plain_elements()?;
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
    let n_queries = spans.iter().map(|span| span.n_queries).sum();
    expect_rows("queries", queries.dims(), n_queries, width)?;
    let queries = queries.plain_elements()?;
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
    tensor(attention(ctx.isa, heads, &jobs), &[n_queries, width])
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
    let width = heads.n_heads * heads.head_dim;
    let n_queries = groups.iter().map(|group| group.queries.1).sum();
    let n_keys = groups.iter().map(|group| group.keys.0 + group.keys.1).max().unwrap_or(0);
    expect_rows("queries", queries.dims(), n_queries, width)?;
    for (what, x) in [("keys", keys), ("values", values)] {
        expect_rows(what, x.dims(), x.dims()[0].max(n_keys), width)?;
    }
    let (q, k, v) = (queries.elements()?, keys.elements()?, values.elements()?);
    let rows = |(first, count): (usize, usize)| first * width..(first + count) * width;
    let jobs: Vec<_> = groups
        .iter()
        .map(|group| Job {
            queries: &q[rows(group.queries)],
            keys: Rows::F32(&k[rows(group.keys)]),
            values: Rows::F32(&v[rows(group.keys)]),
            visible: group.visible,
        })
        .collect();
    let y = tensor(attention(ctx.isa, heads, &jobs), queries.dims())?;
    let arguments = [queries, keys, values];
    let kept = arguments.iter().map(|x| Kept::new(ctx, x)).collect::<Result<Vec<_>>>()?;
    let groups = Arc::clone(groups);
    Ok(record(&arguments, y, false, move |dy, slopes| {
        let (dq, dk, dv) = Kept::with_all(&kept, |qkv| {
            backward::attention(ctx.isa, heads, &groups, (qkv[0], qkv[1], qkv[2]), &dy)
        })?;
        slopes.add(0, dq);
        slopes.add(1, dk);
        slopes.add(2, dv);
        Ok(())
    }))
}

fn expect_rows(what: &str, dims: &[usize], rows: usize, width: usize) -> Result<()> {
    if dims != [rows, width] {
        return Err(message(format!("attention: {what} of [{rows}, {width}] expected, got {dims:?}")));
    }
    Ok(())
}
