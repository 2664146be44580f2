//! `out = x · Wᵀ + bias` over weights that stay where they are, in the layout of the checkpoint.
//!
//! `x` is `[M, K]`, `W` is `[N, K]`, `out` is `[M, N]`, all row-major. Both operands are read along `K`, so a
//! tile of dot products needs no packed copy of the weight (the idea of llamafile's tinyBLAS). Each output
//! element is one vector accumulator run along `K` and reduced at the end: the same bits for any `M`, any
//! tiling and any number of threads.

#[cfg(target_arch = "x86_64")]
mod packed;
pub(crate) mod tile;

#[cfg(test)]
mod tests;

mod scratch;

use half::{bf16, f16};

use crate::{
    Isa, Tier,
    isa::multiversion,
    nf4::Nf4,
    parallel::{SharedMut, for_each, for_each_run},
    q8::Q8,
    simd::{Element, portable::Portable},
};
use tile::{DenseRows, Panel, WeightRows, Widened, panel};

/// A borrowed row-major weight `[N, K]`.
#[derive(Debug, Clone, Copy)]
pub enum Matrix<'a> {
    /// 32-bit elements.
    F32(&'a [f32]),
    /// IEEE half precision elements.
    F16(&'a [f16]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
    /// 4 bits an element, a scale for every 64.
    Nf4(Nf4<'a>),
    /// 8 bits an element, a scale for every 64 of a row.
    Q8(Q8<'a>),
}

/// What the factors of a product are rounded to. Sums are always `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    /// Activations as they are, weights widened exactly.
    F32,
    /// Both factors rounded to bf16, to nearest even.
    Bf16,
}

/// Weight rows of `k` elements that a thread takes at a time: as bf16 they fill half of a 1 MiB second-level
/// cache, and they make a multiple of every tile width.
fn panel_rows(k: usize) -> usize {
    const TILES: usize = 20;
    ((256 << 10) / k / TILES).clamp(1, 6) * TILES
}

impl Matrix<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::Nf4(weight) => weight.len(),
            Self::Q8(weight) => weight.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `out [M, N] = x [M, K] · weight [N, K]ᵀ + bias [N]`.
///
/// # Panics
/// If the lengths do not fit together: `k` must divide `x` and `weight`, `out` must be `M · N`.
pub fn linear(
    isa: Isa,
    compute: Compute,
    x: &[f32],
    weight: Matrix<'_>,
    k: usize,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    assert!(
        k > 0 && x.len().is_multiple_of(k) && weight.len().is_multiple_of(k),
        "{k} does not divide {} and {}",
        x.len(),
        weight.len()
    );
    let (m, n) = (x.len() / k, weight.len() / k);
    assert_eq!(out.len(), m * n, "an output of [{m}, {n}] was expected");
    assert!(bias.is_none_or(|bias| bias.len() == n), "a bias of [{n}] was expected");
    if m == 0 || n == 0 {
        return;
    }
    let job = Job { isa, k, m, n, bias, out: SharedMut::new(out) };
    match (compute, weight) {
        (Compute::F32, Matrix::F32(weight)) => job.widened(x, weight),
        (Compute::F32, Matrix::F16(weight)) => job.widened(x, weight),
        (Compute::F32, Matrix::Bf16(weight)) => job.widened(x, weight),
        (Compute::Bf16, Matrix::F32(weight)) => job.rounded(&round_all(isa, x), weight),
        (Compute::Bf16, Matrix::F16(weight)) => job.rounded(&round_all(isa, x), weight),
        (Compute::Bf16, Matrix::Bf16(weight)) => {
            let x = round_all(isa, x);
            job.for_each_panel(|first, rows| {
                job.bf16_panel(&x, &weight[first * k..(first + rows) * k], first);
            });
        }
        (compute, Matrix::Nf4(weight)) => job.nf4(compute, x, weight),
        (compute, Matrix::Q8(weight)) => job.q8(compute, x, weight),
    }
}

/// Activations rounded to bf16, to nearest even.
pub(crate) fn round_all(isa: Isa, values: &[f32]) -> Vec<bf16> {
    let mut out = vec![bf16::ZERO; values.len()];
    for_each_run(&mut out, 1 << 14, |first, out| round(isa, &values[first..first + out.len()], out));
    out
}

multiversion! { fn round(values: &[f32], out: &mut [bf16]) = round_body }

#[inline(always)]
fn round_body<const FMA: bool>(values: &[f32], out: &mut [bf16]) {
    for (out, value) in out.iter_mut().zip(values) {
        let bits = value.to_bits();
        // Half a unit of the last kept place, less one where that place is even; NaN stays a quiet NaN.
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let kept = if bits & 0x7fff_ffff > 0x7f80_0000 { bits >> 16 | 0x40 } else { rounded };
        *out = bf16::from_bits(kept as u16);
    }
}

/// What all panels of one product share.
struct Job<'a> {
    isa: Isa,
    k: usize,
    m: usize,
    n: usize,
    bias: Option<&'a [f32]>,
    out: SharedMut<f32>,
}

impl Job<'_> {
    /// Runs `work(first weight row, number of rows)` over all panels, in parallel.
    fn for_each_panel(&self, work: impl Fn(usize, usize) + Sync + Send) {
        let flops = 2 * self.m * self.n * self.k;
        let rows = panel_rows(self.k);
        for_each(self.n.div_ceil(rows), flops, |index| {
            let first = index * rows;
            work(first, rows.min(self.n - first));
        });
    }

    fn widened<W: Element>(&self, x: &[f32], weight: &[W]) {
        self.for_each_panel(|first, rows| {
            self.widened_panel(x, &weight[first * self.k..(first + rows) * self.k], first);
        });
    }

    /// Rounds each panel of a wider weight on its way: the panel stays in cache for all rows of `x`.
    fn rounded<W: Element>(&self, x: &[bf16], weight: &[W]) {
        self.for_each_panel(|first, rows| {
            let weight = &weight[first * self.k..(first + rows) * self.k];
            scratch::with(&scratch::WIDENED, weight.len(), |values| {
                for (value, weight) in values.iter_mut().zip(weight) {
                    *value = weight.widen();
                }
                self.round_then_multiply(x, values, first);
            });
        });
    }

    fn nf4(&self, compute: Compute, x: &[f32], weight: Nf4<'_>) {
        let k = self.k;
        #[cfg(target_arch = "x86_64")]
        if k.is_multiple_of(packed::STEP) && self.isa.tier() >= Tier::Avx512 {
            let x = packed::evens_then_odds(self.isa, x);
            let blocks = k / packed::STEP;
            return self.packed::<packed::Nf4Format, _>(compute, &x, |first, rows| packed::Nf4Rows {
                codes: &weight.codes[first * k / 2..(first + rows) * k / 2],
                scales: weight.scales.range(first * blocks, rows * blocks),
                map: weight.map,
                k,
            });
        }
        self.unpacked(compute, x, |first, out| weight.read(first * k, out));
    }

    fn q8(&self, compute: Compute, x: &[f32], weight: Q8<'_>) {
        let k = self.k;
        #[cfg(target_arch = "x86_64")]
        if k.is_multiple_of(packed::STEP) && self.isa.tier() >= Tier::Avx512 {
            let blocks = k / packed::STEP;
            return self.packed::<packed::Q8Format, _>(compute, x, |first, rows| packed::Q8Rows {
                codes: &weight.codes[first * k..(first + rows) * k],
                scales: &weight.scales[first * blocks..(first + rows) * blocks],
                k,
            });
        }
        self.unpacked(compute, x, |first, out| {
            for (row, out) in out.chunks_exact_mut(k).enumerate() {
                weight.read_row(first + row, out);
            }
        });
    }

    /// The plain way for packed weights: each panel is widened by `read(first row, values)`, then multiplied.
    fn unpacked(&self, compute: Compute, x: &[f32], read: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let rounded = match compute {
            Compute::F32 => Vec::new(),
            Compute::Bf16 => round_all(self.isa, x),
        };
        self.for_each_panel(|first, rows| {
            scratch::with(&scratch::WIDENED, rows * self.k, |values| {
                read(first, values);
                match compute {
                    Compute::F32 => self.widened_panel(x, values, first),
                    Compute::Bf16 => self.round_then_multiply(&rounded, values, first),
                }
            });
        });
    }

    /// Packed weights on AVX-512. `rows_of(first row, number of rows)` lends a panel.
    #[cfg(target_arch = "x86_64")]
    fn packed<F, R>(&self, compute: Compute, x: &[f32], rows_of: impl Fn(usize, usize) -> R + Sync + Send)
    where
        F: packed::Packed,
        R: WeightRows<Row = F::Row>,
    {
        /// Rows of activations up to which weights are unpacked on their way into the products; for more, the
        /// unpacking is worth doing once.
        const FUSED_ROWS: usize = 16;
        let has_pairs = self.isa.tier() == Tier::Avx512Bf16;
        let rounded = match compute {
            Compute::F32 => Vec::new(),
            Compute::Bf16 => round_all(self.isa, x),
        };
        self.for_each_panel(|first, rows| {
            let w = rows_of(first, rows);
            match compute {
                Compute::F32 if self.m <= FUSED_ROWS => {
                    // SAFETY: the tier is proven by the `Isa`; rows are whole blocks; panels do not overlap.
                    unsafe { x86::packed_widened::<F>(&self.panel(x, &w, first)) }
                }
                Compute::Bf16 if self.m <= FUSED_ROWS && has_pairs => {
                    // SAFETY: as above.
                    unsafe { x86::packed_pairs::<F>(&self.panel(&rounded, &w, first)) }
                }
                Compute::Bf16 if has_pairs => scratch::with(&scratch::ROUNDED, rows * self.k, |pairs| {
                    // SAFETY: as above; the scratch holds all rows.
                    unsafe { packed::unpack_pairs::<F>(&w, self.k, pairs) };
                    self.bf16_panel(&rounded, pairs, first);
                }),
                Compute::F32 => scratch::with(&scratch::WIDENED, rows * self.k, |values| {
                    // SAFETY: as above; the scratch holds all rows.
                    unsafe { packed::unpack_widened::<F>(&w, self.k, values) };
                    self.widened_panel(x, values, first);
                }),
                Compute::Bf16 => scratch::with(&scratch::WIDENED, rows * self.k, |values| {
                    // SAFETY: as above; the scratch holds all rows.
                    unsafe { packed::unpack_widened::<F>(&w, self.k, values) };
                    self.round_then_multiply(&rounded, values, first);
                }),
            }
        });
    }

    /// Rounds a panel of widened weights and multiplies it.
    fn round_then_multiply(&self, x: &[bf16], values: &[f32], first: usize) {
        scratch::with(&scratch::ROUNDED, values.len(), |pairs| {
            round(self.isa, values, pairs);
            self.bf16_panel(x, pairs, first);
        });
    }

    fn widened_panel<X: Element, W: Element>(&self, x: &[X], w: &[W], first: usize) {
        let p = self.panel(x, DenseRows { data: w, k: self.k }, first);
        // SAFETY: an `Isa` of a tier exists only if the processor has it; panels do not overlap.
        unsafe {
            match self.isa.tier() {
                Tier::Portable => panel::<Widened<Portable, X, W>, 2, 4>(&p),
                #[cfg(target_arch = "x86_64")]
                Tier::Avx2 => x86::avx2(&p),
                #[cfg(target_arch = "x86_64")]
                Tier::Avx512 | Tier::Avx512Bf16 => x86::avx512(&p),
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("only the portable tier exists here"),
            }
        }
    }

    fn bf16_panel(&self, x: &[bf16], w: &[bf16], first: usize) {
        #[cfg(target_arch = "x86_64")]
        if self.isa.tier() == Tier::Avx512Bf16 {
            // SAFETY: an `Isa` of this tier exists only if the processor has it; panels do not overlap.
            return unsafe { x86::avx512_bf16(&self.panel(x, DenseRows { data: w, k: self.k }, first)) };
        }
        self.widened_panel(x, w, first);
    }

    fn panel<'a, X, R: WeightRows>(&'a self, x: &'a [X], w: R, first: usize) -> Panel<'a, X, R> {
        let bias = self.bias.map(|bias| &bias[first..first + w.count()]);
        Panel { x, w, k: self.k, bias, out: self.out, n: self.n, first }
    }
}

/// One `#[target_feature]` wrapper per tier; tile sizes fill the registers of each.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use half::bf16;

    use super::{
        packed::{Packed, PackedPairs, PackedWidened},
        tile::{DenseRows, Pairs, Panel, WeightRows, Widened, packed_panel, panel},
    };
    use crate::simd::{Element, avx2::Avx2, avx512::Avx512};

    /// # Safety
    /// As [`panel`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn avx2<X: Element, W: Element>(p: &Panel<'_, X, DenseRows<'_, W>>) {
        // SAFETY: passed on.
        unsafe { panel::<Widened<Avx2, X, W>, 3, 4>(p) }
    }

    /// # Safety
    /// As [`panel`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) unsafe fn avx512<X: Element, W: Element>(p: &Panel<'_, X, DenseRows<'_, W>>) {
        // SAFETY: passed on.
        unsafe { panel::<Widened<Avx512, X, W>, 5, 5>(p) }
    }

    /// # Safety
    /// As [`panel`]; `k` is a multiple of 64.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) unsafe fn packed_widened<F: Packed>(p: &Panel<'_, f32, &impl WeightRows<Row = F::Row>>) {
        // SAFETY: passed on.
        unsafe { packed_panel::<PackedWidened<F>>(p) }
    }

    /// # Safety
    /// As [`panel`]; `k` is a multiple of 64.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) unsafe fn packed_pairs<F: Packed>(p: &Panel<'_, bf16, &impl WeightRows<Row = F::Row>>) {
        // SAFETY: passed on.
        unsafe { packed_panel::<PackedPairs<F>>(p) }
    }

    /// # Safety
    /// As [`panel`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) unsafe fn avx512_bf16(p: &Panel<'_, bf16, DenseRows<'_, bf16>>) {
        // SAFETY: passed on.
        unsafe { panel::<Pairs, 5, 5>(p) }
    }
}
