//! Softmax attention without a score matrix: keys are read in blocks, sums are kept running.
//!
//! Online softmax as in FlashAttention (Dao et al., 2022, algorithm 1). Blocks start at multiples of
//! 64 counted from the first key, so a query's result has the same bits whether its prompt came whole
//! or in chunks, alone or in a batch. Many queries on AVX-512 take another way to the same bits (`many.rs`).

#[cfg(target_arch = "x86_64")]
mod many;

use half::bf16;

use crate::{
    Isa, Tier,
    linear::tile::{Widened, tile},
    math,
    parallel::{SharedMut, filled, for_each},
    simd::{Element, Simd, portable::Portable},
};

/// Keys in one step of the running softmax.
const BLOCK: usize = 64;
/// Queries that share the keys they read.
const QUERIES: usize = 4;

/// Shape of the heads and the scale of their scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Number of heads, `H`.
    pub n_heads: usize,
    /// Width of one head, `K`.
    pub head_dim: usize,
    /// Factor on every score, usually `K^-0.5`.
    pub scale: f32,
}

/// Keys or values `[S, H·K]`, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// 32-bit elements.
    F32(&'a [f32]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
}

/// Which keys a query may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visible {
    /// All of them.
    All,
    /// Query `t` sees keys `0..=past + t`.
    Causal {
        /// Keys before the first query's own.
        past: usize,
    },
}

/// One sequence of queries and what it looks at.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// Queries `[T, H·K]`.
    pub queries: &'a [f32],
    /// Keys `[S, H·K]`.
    pub keys: Rows<'a>,
    /// Values `[S, H·K]`, of the same element type as the keys.
    pub values: Rows<'a>,
    /// Which keys each query sees.
    pub visible: Visible,
}

/// `softmax(scale · q·kᵀ) · v` of every job, one after the other: `[ΣT, H·K]`.
///
/// # Panics
/// If lengths do not fit together, keys and values differ in type, or a query sees no key.
pub fn attention(isa: Isa, heads: Heads, jobs: &[Job<'_>]) -> Vec<f32> {
    let width = heads.n_heads * heads.head_dim;
    let mut units = Vec::new();
    let (mut rows, mut flops) = (0, 0);
    for job in jobs {
        let (n_queries, n_keys) = (job.queries.len() / width, job.keys.len() / width);
        assert_eq!(job.queries.len(), n_queries * width, "queries of [T, {width}] expected");
        assert_eq!(
            (job.keys.len(), job.values.len()),
            (n_keys * width, n_keys * width),
            "keys of [S, {width}] expected"
        );
        if let Visible::Causal { past } = job.visible {
            assert!(
                past + n_queries <= n_keys,
                "{n_queries} queries after {past} need as many keys, not {n_keys}"
            );
        }
        assert!(n_queries == 0 || n_keys > 0, "a query needs a key");
        for (first, count) in shares(isa, n_queries) {
            units.extend((0..heads.n_heads).map(|head| Unit {
                job,
                head,
                first,
                count,
                out_row: rows + first,
            }));
        }
        rows += n_queries;
        flops += 4 * n_queries * n_keys * width;
    }
    // SAFETY: the units cover every query and head, and each writes all of its output.
    unsafe {
        filled(rows * width, |out| {
            for_each(units.len(), flops, |index| units[index].run(isa, heads, out));
        })
    }
}

/// How a job's queries are shared out: the first query and the number of each part.
fn shares(isa: Isa, n_queries: usize) -> impl Iterator<Item = (usize, usize)> {
    #[cfg(target_arch = "x86_64")]
    let many = (isa.tier() >= Tier::Avx512 && n_queries >= many::FEWEST).then_some(many::MOST);
    #[cfg(not(target_arch = "x86_64"))]
    let many: Option<usize> = None;
    let _ = isa;
    // Few queries go in fours, where a last one alone is cheap; many in parts of nearly one size.
    let parts = n_queries.div_ceil(many.unwrap_or(QUERIES));
    let (each, more) = if many.is_some() { (n_queries / parts, n_queries % parts) } else { (QUERIES, 0) };
    (0..parts).map(move |part| {
        let first = part * each + part.min(more);
        (first, (each + usize::from(part < more)).min(n_queries - first))
    })
}

impl Rows<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }
}

/// A few queries of one head of one job: what one thread does at a time.
struct Unit<'a> {
    job: &'a Job<'a>,
    head: usize,
    /// First query of the unit, counted in the job.
    first: usize,
    count: usize,
    /// Row of the output that the first query writes.
    out_row: usize,
}

impl Unit<'_> {
    fn run(&self, isa: Isa, heads: Heads, out: SharedMut<f32>) {
        match (self.job.keys, self.job.values) {
            (Rows::F32(keys), Rows::F32(values)) => self.dispatch(isa, heads, keys, values, out),
            (Rows::Bf16(keys), Rows::Bf16(values)) => self.dispatch(isa, heads, keys, values, out),
            _ => panic!("keys and values must have one element type"),
        }
    }

    fn dispatch<E: Element>(&self, isa: Isa, heads: Heads, keys: &[E], values: &[E], out: SharedMut<f32>) {
        // SAFETY: an `Isa` of a tier exists only if the processor has it; units write rows and heads of their own.
        unsafe {
            match isa.tier() {
                Tier::Portable => self.attend::<Portable, E, false>(heads, keys, values, out),
                #[cfg(target_arch = "x86_64")]
                Tier::Avx2 => avx2(self, heads, keys, values, out),
                #[cfg(target_arch = "x86_64")]
                Tier::Avx512 | Tier::Avx512Bf16 => avx512(self, heads, keys, values, out),
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("only the portable tier exists here"),
            }
        }
    }

    /// A single query is the whole of decoding, so it is not made to pay for four.
    #[inline(always)]
    unsafe fn attend<S: Simd, E: Element, const FMA: bool>(
        &self,
        heads: Heads,
        keys: &[E],
        values: &[E],
        out: SharedMut<f32>,
    ) {
        // SAFETY: passed on.
        unsafe {
            if self.count == 1 {
                self.attend_queries::<S, E, FMA, 1>(heads, keys, values, out);
            } else {
                self.attend_queries::<S, E, FMA, QUERIES>(heads, keys, values, out);
            }
        }
    }

    /// # Safety
    /// The processor has the instruction set of `S`; no other thread writes this unit's output.
    #[inline(always)]
    unsafe fn attend_queries<S: Simd, E: Element, const FMA: bool, const Q: usize>(
        &self,
        heads: Heads,
        keys: &[E],
        values: &[E],
        out: SharedMut<f32>,
    ) {
        let (dim, width) = (heads.head_dim, heads.n_heads * heads.head_dim);
        let column = self.head * dim;
        let n_keys = keys.len() / width;
        // Past the last query the unit repeats it; the doubled results are dropped at the end.
        let index: [usize; Q] = std::array::from_fn(|i| self.first + i.min(self.count - 1));
        let queries: [*const f32; Q] =
            std::array::from_fn(|i| self.job.queries[index[i] * width + column..][..dim].as_ptr());
        let limit: [usize; Q] = std::array::from_fn(|i| match self.job.visible {
            Visible::All => n_keys,
            Visible::Causal { past } => past + index[i] + 1,
        });
        let furthest = limit[Q - 1];

        let mut running = [Running::new(); Q];
        let mut sums = vec![0.0f32; Q * dim]; // [Q, K], not yet divided by the total weight
        for start in (0..furthest).step_by(BLOCK) {
            let n = BLOCK.min(furthest - start);
            let mut scores = [[0.0; BLOCK]; Q];
            for at in (0..n).step_by(4) {
                let rows: [*const E; 4] = std::array::from_fn(|j| {
                    keys[(start + (at + j).min(n - 1)) * width + column..][..dim].as_ptr()
                });
                // SAFETY: every pointer starts `dim` readable elements, by the slicing above.
                let dots = unsafe { tile::<Widened<S, f32, E>, Q, 4>(queries, rows, dim, false) };
                for (scores, dots) in scores.iter_mut().zip(&dots) {
                    scores[at..at + 4].copy_from_slice(dots);
                }
            }
            for q in 0..Q {
                let seen = limit[q].saturating_sub(start).min(n);
                running[q].weigh::<FMA>(&mut scores[q], seen, heads.scale, &mut sums[q * dim..(q + 1) * dim]);
            }
            // SAFETY: rows `start..start + n` of the values exist and hold `dim` elements from `column` on.
            unsafe {
                weighted_rows::<S, E, Q>(
                    &scores,
                    &values[start * width + column..],
                    width,
                    n,
                    dim,
                    &mut sums,
                );
            };
        }
        for q in 0..self.count.min(Q) {
            let row = (self.out_row + q) * width + column;
            for (d, sum) in sums[q * dim..(q + 1) * dim].iter().enumerate() {
                // SAFETY: inside the output by the assertion in `attention`, and this unit's own.
                unsafe { out.write(row + d, sum / running[q].total) };
            }
        }
    }
}

/// One query's softmax so far.
#[derive(Clone, Copy)]
struct Running {
    largest: f32,
    /// Sum of the weights.
    total: f32,
}

impl Running {
    fn new() -> Self {
        Self { largest: f32::NEG_INFINITY, total: 0.0 }
    }

    /// Turns the products of a query with a block of keys into weights, of which the first `seen` count, and scales
    /// what was summed before, `sums` `[K]`, to the new largest score.
    #[inline(always)]
    fn weigh<const FMA: bool>(
        &mut self,
        products: &mut [f32; BLOCK],
        seen: usize,
        scale: f32,
        sums: &mut [f32],
    ) {
        if seen == 0 {
            *products = [0.0; BLOCK];
            return;
        }
        for (i, score) in products.iter_mut().enumerate() {
            *score = if i < seen { *score * scale } else { f32::NEG_INFINITY };
        }
        let block_largest = products.iter().fold(f32::NEG_INFINITY, |a, b| if a > *b { a } else { *b });
        let now = if block_largest > self.largest { block_largest } else { self.largest };
        let keep = math::exp::<FMA>(self.largest - now);
        for score in &mut *products {
            *score = math::exp::<FMA>(*score - now);
        }
        self.total = self.total * keep + math::sum_by(products, |v| v);
        self.largest = now;
        for sum in sums {
            *sum *= keep;
        }
    }
}

/// `sums[q] += Σₛ weights[q][s] · values[s]` over `n` rows of `dim` elements, `stride` apart.
///
/// # Safety
/// The processor has the instruction set of `S`; `(n - 1) · stride + dim` elements of `values` exist.
#[inline(always)]
unsafe fn weighted_rows<S: Simd, E: Element, const Q: usize>(
    weights: &[[f32; BLOCK]; Q],
    values: &[E],
    stride: usize,
    n: usize,
    dim: usize,
    sums: &mut [f32],
) {
    debug_assert!(n > 0 && (n - 1) * stride + dim <= values.len());
    let mut at = 0;
    // SAFETY: columns stay below `dim` and rows below `n`, by the loop conditions.
    unsafe {
        while at + S::LANES <= dim {
            let mut acc = [S::splat(0.0); Q];
            for (q, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(sums.as_ptr().add(q * dim + at));
            }
            for s in 0..n {
                let value = E::load::<S>(values.as_ptr().add(s * stride + at));
                for q in 0..Q {
                    acc[q] = S::fma(S::splat(weights[q][s]), value, acc[q]);
                }
            }
            for (q, acc) in acc.iter().enumerate() {
                S::store(sums.as_mut_ptr().add(q * dim + at), *acc);
            }
            at += S::LANES;
        }
        if at < dim {
            let rest = dim - at;
            let mut acc = [S::splat(0.0); Q];
            for (q, acc) in acc.iter_mut().enumerate() {
                *acc = S::load_head(sums.as_ptr().add(q * dim + at), rest);
            }
            for s in 0..n {
                let value = E::load_head::<S>(values.as_ptr().add(s * stride + at), rest);
                for q in 0..Q {
                    acc[q] = S::fma(S::splat(weights[q][s]), value, acc[q]);
                }
            }
            for (q, acc) in acc.iter().enumerate() {
                S::store_head(sums.as_mut_ptr().add(q * dim + at), *acc, rest);
            }
        }
    }
}

/// # Safety
/// As [`Unit::attend`], with AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<E: Element>(unit: &Unit<'_>, heads: Heads, keys: &[E], values: &[E], out: SharedMut<f32>) {
    // SAFETY: passed on.
    unsafe { unit.attend::<crate::simd::avx2::Avx2, E, true>(heads, keys, values, out) }
}

/// # Safety
/// As [`Unit::attend`], with AVX-512 F, BW, DQ and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn avx512<E: Element>(unit: &Unit<'_>, heads: Heads, keys: &[E], values: &[E], out: SharedMut<f32>) {
    // SAFETY: passed on.
    unsafe {
        if unit.count >= many::FEWEST {
            many::attend(unit, heads, keys, values, out);
        } else {
            unit.attend::<crate::simd::avx512::Avx512, E, true>(heads, keys, values, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(747_796_405) | 1;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / 8_388_608.0 - 1.0
            })
            .collect()
    }

    /// The plain twin, in f64, with the whole score row.
    fn reference(heads: Heads, q: &[f32], k: &[f32], v: &[f32], visible: Visible) -> Vec<f64> {
        let (dim, width) = (heads.head_dim, heads.n_heads * heads.head_dim);
        let mut out = vec![0.0; q.len()];
        for t in 0..q.len() / width {
            let n = match visible {
                Visible::All => k.len() / width,
                Visible::Causal { past } => past + t + 1,
            };
            for h in 0..heads.n_heads {
                let at = |data: &[f32], row: usize, d: usize| f64::from(data[row * width + h * dim + d]);
                let scores: Vec<f64> = (0..n)
                    .map(|s| {
                        (0..dim).map(|d| at(q, t, d) * at(k, s, d)).sum::<f64>() * f64::from(heads.scale)
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    out[t * width + h * dim + d] =
                        (0..n).map(|s| weights[s] * at(v, s, d)).sum::<f64>() / total;
                }
            }
        }
        out
    }

    #[test]
    fn every_tier_agrees_with_the_plain_twin() {
        for isa in Isa::available() {
            for (n_heads, head_dim, queries, n_keys) in [
                (1, 1, 1, 1),
                (2, 5, 3, 3),
                (3, 16, 9, 70),
                (2, 80, 5, 257),
                (1, 24, 130, 130),
                (4, 8, 1, 200),
                (1, 1, 7, 9),
                (2, 96, 64, 321),
                (1, 33, 60, 140),
                (2, 128, 20, 90),
            ] {
                let heads = Heads { n_heads, head_dim, scale: 3.0 / (head_dim as f32).sqrt() };
                let width = n_heads * head_dim;
                let (q, k, v) =
                    (noise(queries * width, 1), noise(n_keys * width, 2), noise(n_keys * width, 3));
                for visible in [Visible::All, Visible::Causal { past: n_keys - queries }] {
                    let job = Job { queries: &q, keys: Rows::F32(&k), values: Rows::F32(&v), visible };
                    let out = attention(isa, heads, &[job]);
                    for (got, expected) in out.iter().zip(reference(heads, &q, &k, &v, visible)) {
                        assert!(
                            (f64::from(*got) - expected).abs() < 2e-6,
                            "{} {visible:?}: {got} {expected}",
                            isa.tier()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_query_is_in_one_share_of_a_size_that_its_way_takes() {
        for isa in Isa::available() {
            for n in (0..400).chain([3305, 6000]) {
                let mut next = 0;
                for (first, count) in shares(isa, n) {
                    assert_eq!(first, next);
                    assert!((1..=QUERIES).contains(&count) || (7..=56).contains(&count), "{count} of {n}");
                    next += count;
                }
                assert_eq!(next, n);
            }
        }
    }

    #[test]
    fn bf16_keys_and_values_are_widened_exactly() {
        let heads = Heads { n_heads: 2, head_dim: 20, scale: 0.2 };
        let round = |x: Vec<f32>| x.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
        let (q, k, v) = (noise(9 * 40, 1), round(noise(90 * 40, 2)), round(noise(90 * 40, 3)));
        let wide = |x: &[bf16]| x.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
        let (wide_k, wide_v) = (wide(&k), wide(&v));
        for isa in Isa::available() {
            let visible = Visible::All;
            let job = Job { queries: &q, keys: Rows::Bf16(&k), values: Rows::Bf16(&v), visible };
            let narrow = attention(isa, heads, &[job]);
            let job = Job { queries: &q, keys: Rows::F32(&wide_k), values: Rows::F32(&wide_v), visible };
            let exact = attention(isa, heads, &[job]);
            assert_eq!(narrow, exact, "{}", isa.tier());
        }
    }

    #[test]
    fn chunks_and_batches_give_the_same_bits_as_the_whole() {
        for head_dim in [12, 80, 128] {
            chunks_and_batches(Heads { n_heads: 2, head_dim, scale: 0.3 });
        }
    }

    fn chunks_and_batches(heads: Heads) {
        let (width, n) = (2 * heads.head_dim, 150);
        let (q, k, v) = (noise(n * width, 4), noise(n * width, 5), noise(n * width, 6));
        for isa in Isa::available() {
            let run = |from: usize, to: usize| {
                let job = Job {
                    queries: &q[from * width..to * width],
                    keys: Rows::F32(&k[..to * width]),
                    values: Rows::F32(&v[..to * width]),
                    visible: Visible::Causal { past: from },
                };
                let out = attention(isa, heads, &[job, job]);
                let (first, second) = out.split_at((to - from) * width);
                assert_eq!(first, second, "{}: two copies in one batch", isa.tier());
                first.to_vec()
            };
            let whole = run(0, n);
            let in_chunks: Vec<f32> =
                [0, 1, 5, 7, 64, 65, 149, 150].windows(2).flat_map(|w| run(w[0], w[1])).collect();
            assert_eq!(whole, in_chunks, "{}", isa.tier());
        }
    }
}
