//! Gradients of attention.
//!
//! Scores are computed again, a block of queries at a time, so memory grows with the keys and not with their
//! product with the queries. One thread does a head of a group of jobs that share keys: nobody else adds to the
//! same gradients.

use rayon::prelude::*;

use super::product::{ROWS, View, add_product};
use crate::{
    Isa, Tier,
    attention::{Heads, Visible},
    math::{exp, sum_by},
    parallel::SharedMut,
    rows::zeros,
    simd::{Simd, portable::Portable},
};

/// Most queries whose scores are in memory at a time: whole tiles of a product.
const QUERIES: usize = 12 * ROWS;

/// Rows of queries and the rows of keys and values they look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// First row and number of rows among the queries.
    pub queries: (usize, usize),
    /// First row and number of rows among the keys and values.
    pub keys: (usize, usize),
    /// Which keys each query sees.
    pub visible: Visible,
}

/// Gradients of `softmax(scale · q·kᵀ) · v` over all jobs: `q` and `dy` `[T, H·K]`, `k` and `v` `[S, H·K]`;
/// returns those of `q`, `k` and `v`. Jobs either share their keys or have none in common, and those that share
/// stand together.
///
/// # Panics
/// If a job names rows that are not there, a query sees no key, a query stands in two jobs, or jobs share some of their
/// keys and not all, or share them and do not stand together.
pub fn attention(
    isa: Isa,
    heads: Heads,
    jobs: &[Job],
    (q, k, v): (&[f32], &[f32], &[f32]),
    dy: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let width = heads.n_heads * heads.head_dim;
    assert_eq!((dy.len(), v.len()), (q.len(), k.len()), "gradients of the extents of the output expected");
    for job in jobs {
        assert!((job.queries.0 + job.queries.1) * width <= q.len(), "queries {:?}", job.queries);
        assert!((job.keys.0 + job.keys.1) * width <= k.len() && job.keys.1 > 0, "keys {:?}", job.keys);
    }
    let groups: Vec<&[Job]> = jobs.chunk_by(|a, b| a.keys == b.keys).collect();
    assert!(are_apart(jobs.iter().map(|job| job.queries)), "a query in two jobs");
    assert!(are_apart(groups.iter().map(|jobs| jobs[0].keys)), "keys that groups of jobs have in common");
    let (mut dq, mut dk, mut dv) = (zeros(q.len()), zeros(k.len()), zeros(v.len()));
    let out = (SharedMut::new(&mut dq), SharedMut::new(&mut dk), SharedMut::new(&mut dv));
    (0..groups.len() * heads.n_heads).into_par_iter().for_each(|unit| {
        let (jobs, head) = (groups[unit / heads.n_heads], unit % heads.n_heads);
        let column = head * heads.head_dim;
        let gather = |data: &[f32], (first, count): (usize, usize)| -> Vec<f32> {
            let mut rows = Vec::with_capacity(count * heads.head_dim);
            for row in first..first + count {
                rows.extend_from_slice(&data[row * width + column..][..heads.head_dim]);
            }
            rows
        };
        let scatter = |values: &[f32], first: usize, to: SharedMut<f32>| {
            for (row, values) in values.chunks_exact(heads.head_dim).enumerate() {
                // SAFETY: the rows are inside by the assertions above. By them groups have no key rows in common, too,
                // and a query belongs to one job, so this head's columns of these rows are this unit's alone.
                unsafe {
                    let to = to.at((first + row) * width + column);
                    to.copy_from_nonoverlapping(values.as_ptr(), values.len());
                }
            }
        };
        let keys = Keys::new(gather(k, jobs[0].keys), &gather(v, jobs[0].keys), heads);
        let mut sums = KeySums { keys: vec![0.0; keys.keys.len()], values: vec![0.0; keys.keys.len()] };
        for job in jobs {
            // Blocks of nearly one size, so that the last one is worth its while.
            let count = job.queries.1;
            let each = count.div_ceil(count.div_ceil(QUERIES).max(1)).next_multiple_of(ROWS).max(ROWS);
            for first in (0..count).step_by(each) {
                let rows = (job.queries.0 + first, each.min(count - first));
                let (q, dy) = (gather(q, rows), gather(dy, rows));
                let mut dq = vec![0.0; q.len()];
                let block = Block { first, visible: job.visible, q: &q, dy: &dy };
                block_gradients(isa, &keys, &block, &mut dq, &mut sums);
                scatter(&dq, rows.0, out.0);
            }
        }
        scatter(&sums.keys, jobs[0].keys.0, out.1);
        scatter(&sums.values, jobs[0].keys.0, out.2);
    });
    (dq, dk, dv)
}

/// Whether no row is in two of the runs, each a first row and a number of rows.
fn are_apart(runs: impl Iterator<Item = (usize, usize)>) -> bool {
    let mut runs: Vec<_> = runs.filter(|(_, count)| *count > 0).collect();
    runs.sort_unstable();
    runs.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
}

/// Keys and values of one head.
struct Keys {
    /// `[S, K]`.
    keys: Vec<f32>,
    /// `[K, S]`.
    keys_t: Vec<f32>,
    /// `[K, S]`.
    values_t: Vec<f32>,
    count: usize,
    dim: usize,
    scale: f32,
}

/// Gradients of one head's keys and values, `[S, K]`.
struct KeySums {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Some queries of one head, `[T, K]`.
struct Block<'a> {
    /// The first query's place in its job.
    first: usize,
    visible: Visible,
    q: &'a [f32],
    dy: &'a [f32],
}

impl Keys {
    fn new(keys: Vec<f32>, values: &[f32], heads: Heads) -> Self {
        let (dim, count) = (heads.head_dim, keys.len() / heads.head_dim);
        let (keys_t, values_t) = (transpose(&keys, dim), transpose(values, dim));
        Self { keys_t, values_t, keys, count, dim, scale: heads.scale }
    }
}

/// `[S, K]` to `[K, S]`, square by square: a column of all rows would leave the cache.
fn transpose(rows: &[f32], dim: usize) -> Vec<f32> {
    const SIDE: usize = 16;
    let count = rows.len() / dim;
    let mut columns = vec![0.0; rows.len()];
    for row in (0..count).step_by(SIDE) {
        for column in (0..dim).step_by(SIDE) {
            for d in column..dim.min(column + SIDE) {
                for s in row..count.min(row + SIDE) {
                    columns[d * count + s] = rows[s * dim + d];
                }
            }
        }
    }
    columns
}

fn block_gradients(isa: Isa, keys: &Keys, block: &Block<'_>, dq: &mut [f32], sums: &mut KeySums) {
    // SAFETY: an `Isa` of a tier exists only if the processor has it.
    unsafe {
        match isa.tier() {
            Tier::Portable => block_body::<Portable, false>(keys, block, dq, sums),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => avx2(keys, block, dq, sums),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 | Tier::Avx512Bf16 => avx512(keys, block, dq, sums),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("only the portable tier exists here"),
        }
    }
}

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2(keys: &Keys, block: &Block<'_>, dq: &mut [f32], sums: &mut KeySums) {
    // SAFETY: passed on.
    unsafe { block_body::<crate::simd::avx2::Avx2, true>(keys, block, dq, sums) }
}

/// # Safety
/// The processor has AVX-512 F, BW, DQ and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn avx512(keys: &Keys, block: &Block<'_>, dq: &mut [f32], sums: &mut KeySums) {
    // SAFETY: passed on.
    unsafe { block_body::<crate::simd::avx512::Avx512, true>(keys, block, dq, sums) }
}

/// # Safety
/// The processor has the instruction set of `S`.
#[inline(always)]
unsafe fn block_body<S: Simd, const FMA: bool>(
    keys: &Keys,
    block: &Block<'_>,
    dq: &mut [f32],
    sums: &mut KeySums,
) {
    let (dim, stride) = (keys.dim, keys.count);
    let n_queries = block.q.len() / dim;
    let limit = |query: usize| match block.visible {
        Visible::All => keys.count,
        Visible::Causal { past } => past + block.first + query + 1,
    };
    let n = limit(n_queries - 1);
    let by_query = |data| View { data, row_stride: dim, column_stride: 1 };

    let mut weights = vec![0.0; n_queries * n]; // softmax, [T, S]
    // SAFETY: passed on.
    unsafe {
        add_product::<S>((n_queries, n, dim), by_query(block.q), &keys.keys_t, stride, &mut weights, n);
    }
    let mut slopes = vec![0.0; n_queries * n]; // gradient of the weights, then of the scores: [T, S]
    // SAFETY: passed on.
    unsafe {
        add_product::<S>((n_queries, n, dim), by_query(block.dy), &keys.values_t, stride, &mut slopes, n);
    }

    for (query, (weights, slopes)) in weights.chunks_exact_mut(n).zip(slopes.chunks_exact_mut(n)).enumerate()
    {
        let (weights, unseen) = weights.split_at_mut(limit(query));
        let (slopes, unseen_slopes) = slopes.split_at_mut(limit(query));
        unseen.fill(0.0);
        unseen_slopes.fill(0.0);
        let largest = weights.iter().fold(f32::NEG_INFINITY, |a, b| if a > *b { a } else { *b });
        for weight in weights.iter_mut() {
            *weight = exp::<FMA>((*weight - largest) * keys.scale);
        }
        let total = sum_by(weights, |v| v);
        for weight in weights.iter_mut() {
            *weight /= total;
        }
        let mean = dot(weights, slopes);
        for (weight, slope) in weights.iter().zip(slopes) {
            *slope = weight * (*slope - mean) * keys.scale;
        }
    }

    let by_score = |data| View { data, row_stride: n, column_stride: 1 };
    let by_key = |data| View { data, row_stride: 1, column_stride: n };
    // SAFETY: passed on.
    unsafe {
        add_product::<S>((n_queries, dim, n), by_score(&slopes), &keys.keys, dim, dq, dim);
    }
    // SAFETY: passed on.
    unsafe {
        add_product::<S>((n, dim, n_queries), by_key(&slopes), block.q, dim, &mut sums.keys, dim);
    }
    // SAFETY: passed on.
    unsafe {
        add_product::<S>((n, dim, n_queries), by_key(&weights), block.dy, dim, &mut sums.values, dim);
    }
}

/// `Σ a · b` with sixteen running sums, so that it vectorises and its order is fixed.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f64> {
        let mut state = seed.wrapping_mul(747_796_405) | 1;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f64::from(state >> 8) / 8_388_608.0 - 1.0
            })
            .collect()
    }

    /// `Σ dy · attention(q, k, v)` with whole score rows, in f64.
    fn plain(heads: Heads, jobs: &[Job], q: &[f64], k: &[f64], v: &[f64], dy: &[f64]) -> f64 {
        let (dim, width) = (heads.head_dim, heads.n_heads * heads.head_dim);
        let mut sum = 0.0;
        for job in jobs {
            for t in 0..job.queries.1 {
                let n = match job.visible {
                    Visible::All => job.keys.1,
                    Visible::Causal { past } => past + t + 1,
                };
                for h in 0..heads.n_heads {
                    let q = &q[(job.queries.0 + t) * width + h * dim..][..dim];
                    let dy = &dy[(job.queries.0 + t) * width + h * dim..][..dim];
                    let dot = |rows: &[f64], with: &[f64], s: usize| -> f64 {
                        let row = &rows[(job.keys.0 + s) * width + h * dim..][..dim];
                        row.iter().zip(with).map(|(a, b)| a * b).sum()
                    };
                    let weights: Vec<f64> =
                        (0..n).map(|s| (dot(k, q, s) * f64::from(heads.scale)).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    sum += (0..n).map(|s| weights[s] / total * dot(v, dy, s)).sum::<f64>();
                }
            }
        }
        sum
    }

    fn check(heads: Heads, jobs: &[Job], n_queries: usize, n_keys: usize) {
        let width = heads.n_heads * heads.head_dim;
        let (q, dy) = (noise(n_queries * width, 1), noise(n_queries * width, 2));
        let (k, v) = (noise(n_keys * width, 3), noise(n_keys * width, 4));
        let narrow = |values: &[f64]| values.iter().map(|v| *v as f32).collect::<Vec<_>>();
        let (q32, k32, v32, dy32) = (narrow(&q), narrow(&k), narrow(&v), narrow(&dy));
        // Every few elements: a difference costs two whole passes.
        let slope = |which: usize, at: usize| {
            let of = |step: f64| {
                let mut all = [q.clone(), k.clone(), v.clone()];
                all[which][at] += step;
                plain(heads, jobs, &all[0], &all[1], &all[2], &dy)
            };
            (of(1e-5) - of(-1e-5)) / 2e-5
        };
        for isa in Isa::available() {
            let (dq, dk, dv) = attention(isa, heads, jobs, (&q32, &k32, &v32), &dy32);
            for (which, gradient) in [dq, dk, dv].iter().enumerate() {
                for at in (0..gradient.len()).step_by(gradient.len() / 40 + 1) {
                    let (got, expected) = (f64::from(gradient[at]), slope(which, at));
                    assert!((got - expected).abs() < 2e-4, "{} {which} {at}: {got} {expected}", isa.tier());
                }
            }
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        let heads = Heads { n_heads: 2, head_dim: 5, scale: 0.7 };
        let all = |queries, keys| Job { queries, keys, visible: Visible::All };
        check(heads, &[all((0, 3), (0, 7)), all((3, 4), (7, 33))], 7, 40);
        // Two runs of tokens that see the same picture, one that sees another.
        check(heads, &[all((0, 2), (0, 4)), all((4, 3), (0, 4)), all((2, 2), (4, 4))], 7, 8);
        // None that sees it.
        check(heads, &[all((0, 0), (0, 4)), all((0, 3), (4, 4))], 3, 8);
        let causal = |queries, keys, past| Job { queries, keys, visible: Visible::Causal { past } };
        check(heads, &[causal((0, 70), (0, 70), 0), causal((70, 2), (70, 5), 3)], 72, 75);
    }

    #[test]
    fn jobs_that_would_write_the_same_rows_are_refused() {
        let heads = Heads { n_heads: 1, head_dim: 2, scale: 1.0 };
        let rows = [0.0f32; 16];
        let all = |queries, keys| Job { queries, keys, visible: Visible::All };
        for jobs in [
            [all((0, 2), (0, 4)), all((1, 2), (0, 4)), all((4, 1), (4, 1))],
            [all((0, 2), (0, 4)), all((2, 2), (2, 4)), all((4, 1), (6, 1))],
            [all((0, 2), (0, 4)), all((2, 2), (4, 1)), all((4, 1), (0, 4))],
        ] {
            let run = || attention(Isa::PORTABLE, heads, &jobs, (&rows, &rows, &rows), &rows);
            assert!(std::panic::catch_unwind(run).is_err(), "{jobs:?}");
        }
    }
}
