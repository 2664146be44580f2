//! One product: how it is cut into panels, and which kernel computes them.

use half::bf16;

use super::{
    Compute, round, round_all, scratch,
    tile::{DenseRows, Panel, WeightRows, Widened, panel},
};
#[cfg(target_arch = "x86_64")]
use super::{broadcast, packed};
use crate::{
    Isa, Tier,
    nf4::Nf4,
    parallel::{SharedMut, for_each},
    q8::Q8,
    simd::{Element, portable::Portable},
};

/// Weight rows of `k` elements that a thread takes at a time: as bf16 they fill half of a 1 MiB second-level
/// cache, and they make a multiple of every tile width.
fn panel_rows(k: usize) -> usize {
    const TILES: usize = 20;
    ((256 << 10) / k / TILES).clamp(1, 6) * TILES
}

/// Rows of activations up to which packed weights are unpacked on their way into the products; for more, the
/// unpacking is worth doing once.
#[cfg(target_arch = "x86_64")]
const FUSED_ROWS: usize = 40;

/// Rows of activations from which transposing pays, by measurement: about where arithmetic, not memory, is what a
/// product waits for.
#[cfg(target_arch = "x86_64")]
const BROADCAST_ROWS: usize = 24;

/// What all panels of one product share.
pub(super) struct Job<'a> {
    pub(super) isa: Isa,
    pub(super) k: usize,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) out: SharedMut<f32>,
}

/// Activations in the form that the kernel of their product takes.
enum Activations<'a, X> {
    /// Rows `[M, K]` for tiles of dot products.
    Rows(&'a [X]),
    /// Transposed, to be broadcast, as `f32`.
    #[cfg(target_arch = "x86_64")]
    Singles(broadcast::Tiles<'a>),
    /// The same in pairs of bf16.
    #[cfg(target_arch = "x86_64")]
    Pairs(broadcast::Tiles<'a>),
}

/// Bytes of weights that will be read next.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    pub(crate) from: *const u8,
    pub(crate) bytes: usize,
}

impl Ahead {
    /// As much as `data`, behind it.
    fn behind<T>(data: &[T]) -> Self {
        Self { from: data.as_ptr_range().end.cast(), bytes: size_of_val(data) }
    }

    pub(crate) const NOTHING: Self = Self { from: std::ptr::null(), bytes: 0 };
}

impl Job<'_> {
    /// Weights widened to `f32`.
    pub(super) fn widened<W: Element>(&self, x: &[f32], weight: &[W]) {
        self.with_widened(x, |x| {
            self.for_each_panel(|first, rows| {
                let weight = &weight[first * self.k..(first + rows) * self.k];
                self.widened_panel(x, weight, first, Ahead::behind(weight));
            });
        });
    }

    /// Both factors in bf16, the weight as it is.
    pub(super) fn bf16(&self, x: &[f32], weight: &[bf16]) {
        self.with_rounded(x, |x| {
            self.for_each_panel(|first, rows| {
                let weight = &weight[first * self.k..(first + rows) * self.k];
                self.bf16_panel(x, weight, first, Ahead::behind(weight));
            });
        });
    }

    /// Rounds each panel of a wider weight on its way: the panel stays in cache for all rows of `x`.
    pub(super) fn rounded<W: Element>(&self, x: &[f32], weight: &[W]) {
        self.with_rounded(x, |x| {
            self.for_each_panel(|first, rows| {
                let weight = &weight[first * self.k..(first + rows) * self.k];
                scratch::with(&scratch::WIDENED, weight.len(), |values| {
                    for (value, weight) in values.iter_mut().zip(weight) {
                        *value = weight.widen();
                    }
                    self.round_then_multiply(x, values, first, Ahead::behind(weight));
                });
            });
        });
    }

    pub(super) fn nf4(&self, compute: Compute, x: &[f32], weight: Nf4<'_>) {
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

    pub(super) fn q8(&self, compute: Compute, x: &[f32], weight: Q8<'_>) {
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
        match compute {
            Compute::F32 => self.with_widened(x, |x| {
                self.for_each_panel(|first, rows| {
                    scratch::with(&scratch::WIDENED, rows * self.k, |values| {
                        read(first, values);
                        self.widened_panel(x, values, first, Ahead::NOTHING);
                    });
                });
            }),
            Compute::Bf16 | Compute::Int8 => self.with_rounded(x, |x| {
                self.for_each_panel(|first, rows| {
                    scratch::with(&scratch::WIDENED, rows * self.k, |values| {
                        read(first, values);
                        self.round_then_multiply(x, values, first, Ahead::NOTHING);
                    });
                });
            }),
        }
    }

    /// Packed weights on AVX-512. `rows_of(first row, number of rows)` lends a panel.
    #[cfg(target_arch = "x86_64")]
    fn packed<F, R>(&self, compute: Compute, x: &[f32], rows_of: impl Fn(usize, usize) -> R + Sync + Send)
    where
        F: packed::Packed,
        R: WeightRows<Row = F::Row>,
    {
        let has_pairs = self.isa.tier() == Tier::Avx512Bf16;
        if self.m <= FUSED_ROWS && (compute == Compute::F32 || has_pairs) {
            return self.fused::<F, R>(compute, x, rows_of);
        }
        match compute {
            Compute::F32 => self.with_widened(x, |x| {
                self.for_each_panel(|first, rows| {
                    let w = rows_of(first, rows);
                    scratch::with(&scratch::WIDENED, rows * self.k, |values| {
                        // SAFETY: the tier is proven by the `Isa`; rows are whole blocks; the scratch holds all rows.
                        unsafe { packed::unpack_widened::<F>(&w, self.k, values) };
                        self.widened_panel(x, values, first, packed::ahead::<F>(&w, self.k));
                    });
                });
            }),
            Compute::Bf16 | Compute::Int8 => self.with_rounded(x, |x| {
                self.for_each_panel(|first, rows| {
                    let w = rows_of(first, rows);
                    let ahead = packed::ahead::<F>(&w, self.k);
                    if has_pairs {
                        scratch::with(&scratch::ROUNDED, rows * self.k, |pairs| {
                            // SAFETY: as above; the scratch holds all rows.
                            unsafe { packed::unpack_pairs::<F>(&w, self.k, pairs) };
                            self.bf16_panel(x, pairs, first, ahead);
                        });
                    } else {
                        scratch::with(&scratch::WIDENED, rows * self.k, |values| {
                            // SAFETY: as above; the scratch holds all rows.
                            unsafe { packed::unpack_widened::<F>(&w, self.k, values) };
                            self.round_then_multiply(x, values, first, ahead);
                        });
                    }
                });
            }),
        }
    }

    /// Few rows of activations, which meet packed weights on their way out of the packing.
    #[cfg(target_arch = "x86_64")]
    fn fused<F, R>(&self, compute: Compute, x: &[f32], rows_of: impl Fn(usize, usize) -> R + Sync + Send)
    where
        F: packed::Packed,
        R: WeightRows<Row = F::Row>,
    {
        let rounded = (compute != Compute::F32).then(|| round_all(self.isa, x));
        self.for_each_run(panel_rows(self.k), |first, rows| {
            let w = rows_of(first, rows);
            // SAFETY: the tier is proven by the `Isa`, and that of pairs by the caller; rows are whole blocks; panels do
            // not overlap.
            unsafe {
                match &rounded {
                    None => x86::packed_widened::<F>(&self.panel(x, &w, first)),
                    Some(x) => x86::packed_pairs::<F>(&self.panel(x, &w, first)),
                }
            }
        });
    }

    /// Whether there are enough rows to transpose for.
    fn is_broadcast(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.isa.tier() >= Tier::Avx512 && self.m >= BROADCAST_ROWS;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Runs `work(first weight row, number of rows)` over all panels, in parallel.
    pub(super) fn for_each_panel(&self, work: impl Fn(usize, usize) + Sync + Send) {
        #[cfg(target_arch = "x86_64")]
        if self.is_broadcast() {
            return self.for_each_run(broadcast::PANEL_ROWS, work);
        }
        self.for_each_run(panel_rows(self.k), work);
    }

    /// The same over runs of `rows` weight rows, the last one shorter.
    pub(super) fn for_each_run(&self, rows: usize, work: impl Fn(usize, usize) + Sync + Send) {
        let flops = 2 * self.m * self.n * self.k;
        for_each(self.n.div_ceil(rows), flops, |index| {
            let first = index * rows;
            work(first, rows.min(self.n - first));
        });
    }

    /// Lends activations for products in `f32`.
    fn with_widened(&self, x: &[f32], work: impl FnOnce(&Activations<'_, f32>)) {
        #[cfg(target_arch = "x86_64")]
        if self.is_broadcast() {
            broadcast::with_tiles::<broadcast::Single<f32>>(
                x,
                self.k,
                // SAFETY: the tier is proven by the `Isa`.
                |x, out| unsafe { x86::transpose::<broadcast::Single<f32>>(x, self.k, out) },
                |tiles| work(&Activations::Singles(tiles)),
            );
            return;
        }
        work(&Activations::Rows(x));
    }

    /// Lends activations rounded to bf16.
    fn with_rounded(&self, x: &[f32], work: impl FnOnce(&Activations<'_, bf16>)) {
        #[cfg(target_arch = "x86_64")]
        if self.is_broadcast() {
            if self.isa.tier() == Tier::Avx512Bf16 {
                broadcast::with_tiles::<broadcast::RoundedPair>(
                    x,
                    self.k,
                    // SAFETY: the tier is proven by the `Isa`.
                    |x, out| unsafe { x86::transpose::<broadcast::RoundedPair>(x, self.k, out) },
                    |tiles| work(&Activations::Pairs(tiles)),
                );
            } else {
                broadcast::with_tiles::<broadcast::RoundedSingle>(
                    x,
                    self.k,
                    // SAFETY: as above.
                    |x, out| unsafe { x86::transpose::<broadcast::RoundedSingle>(x, self.k, out) },
                    |tiles| work(&Activations::Singles(tiles)),
                );
            }
            return;
        }
        work(&Activations::Rows(&round_all(self.isa, x)));
    }

    /// Rounds a panel of widened weights and multiplies it.
    fn round_then_multiply(&self, x: &Activations<'_, bf16>, values: &[f32], first: usize, ahead: Ahead) {
        scratch::with(&scratch::ROUNDED, values.len(), |pairs| {
            round(self.isa, values, pairs);
            self.bf16_panel(x, pairs, first, ahead);
        });
    }

    fn widened_panel<X: Element, W: Element>(
        &self,
        x: &Activations<'_, X>,
        w: &[W],
        first: usize,
        ahead: Ahead,
    ) {
        let x = match x {
            Activations::Rows(x) => *x,
            #[cfg(target_arch = "x86_64")]
            Activations::Singles(tiles) => {
                // SAFETY: tiles are made where the tier allows them alone; panels do not overlap.
                return self.broadcast::<broadcast::Single<W>>(tiles, w, first, ahead, |p| unsafe {
                    x86::broadcast_singles(p);
                });
            }
            #[cfg(target_arch = "x86_64")]
            Activations::Pairs(_) => unreachable!("pairs are made for `bf16_panel`"),
        };
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

    fn bf16_panel(&self, x: &Activations<'_, bf16>, w: &[bf16], first: usize, ahead: Ahead) {
        #[cfg(target_arch = "x86_64")]
        match x {
            Activations::Pairs(tiles) => {
                // SAFETY: as in `widened_panel`.
                return self.broadcast::<broadcast::Pair>(tiles, w, first, ahead, |p| unsafe {
                    x86::broadcast_pairs(p);
                });
            }
            Activations::Rows(x) if self.isa.tier() == Tier::Avx512Bf16 => {
                // SAFETY: an `Isa` of this tier exists only if the processor has it; panels do not overlap.
                return unsafe {
                    x86::avx512_bf16(&self.panel(x, DenseRows { data: w, k: self.k }, first));
                };
            }
            _ => {}
        }
        self.widened_panel(x, w, first, ahead);
    }

    fn panel<'a, X, R: WeightRows>(&'a self, x: &'a [X], w: R, first: usize) -> Panel<'a, X, R> {
        let bias = self.bias.map(|bias| &bias[first..first + w.count()]);
        Panel { x, w, k: self.k, bias, out: self.out, n: self.n, first }
    }

    /// Hands a panel to a kernel that broadcasts, with a buffer to transpose it in.
    #[cfg(target_arch = "x86_64")]
    fn broadcast<L: broadcast::Lane>(
        &self,
        x: &broadcast::Tiles<'_>,
        w: &[L::Element],
        first: usize,
        ahead: Ahead,
        kernel: impl FnOnce(&mut broadcast::Panel<'_, L>),
    ) {
        scratch::with(&scratch::PANEL, broadcast::panel_lines::<L>(self.k), |buffer| {
            kernel(&mut broadcast::Panel {
                x,
                w,
                k: self.k,
                buffer,
                ahead,
                bias: self.bias.map(|bias| &bias[first..first + w.len() / self.k]),
                out: self.out,
                n: self.n,
                first,
            });
        });
    }
}

/// One `#[target_feature]` wrapper per tier; tile sizes fill the registers of each.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use half::bf16;

    use super::super::{
        broadcast::{self, Lane, Line, Pair, Single},
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

    /// # Safety
    /// As [`broadcast::panel`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) unsafe fn broadcast_singles<W: Element>(p: &mut broadcast::Panel<'_, Single<W>>) {
        // SAFETY: passed on.
        unsafe { broadcast::panel(p) }
    }

    /// # Safety
    /// As [`broadcast::panel`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub(super) unsafe fn broadcast_pairs(p: &mut broadcast::Panel<'_, Pair>) {
        // SAFETY: passed on.
        unsafe { broadcast::panel(p) }
    }

    /// # Safety
    /// As [`broadcast::transpose_tile`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) unsafe fn transpose<L: Lane>(x: &[L::Element], k: usize, out: &mut [Line]) {
        // SAFETY: passed on.
        unsafe { broadcast::transpose_tile::<L>(x, k, out) }
    }
}
