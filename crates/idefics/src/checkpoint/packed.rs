//! Weights of linear layers in few bits, used where they are mapped.
//!
//! NF4 lies as bitsandbytes serialises it, Q8 as `idefics quantize` writes it: codes as one tensor, scales and
//! what belongs to them as others beside it. `assemble` finds and checks them; here they are sound.

use std::sync::Arc;

use idefics_kernels::{
    nested,
    nf4::{self, CODE_VALUES, Nf4, Scales},
    q8::{self, Q8},
};

use super::{
    NonFinite, Weight,
    weight::{Bytes, DType},
};

/// The weight of a linear layer, `[N, K]`.
#[derive(Debug, Clone)]
pub enum LinearWeight {
    /// Floats as they are.
    Dense(Weight),
    /// Few bits and scales.
    Packed(PackedWeight),
}

/// A packed weight, `[N, K]`. Cloning it shares the bytes.
#[derive(Debug, Clone)]
pub enum PackedWeight {
    /// 4 bits an element.
    Nf4(Nf4Weight),
    /// 8 bits an element.
    Q8(Q8Weight),
}

/// 4 bits an element, a scale for every 64.
#[derive(Clone)]
pub struct Nf4Weight {
    pub(super) shape: [usize; 2],
    /// `[N · K / 2]`.
    pub(super) codes: Bytes,
    pub(super) scales: Nf4Scales,
}

/// Scales of the blocks of an NF4 weight.
#[derive(Clone)]
pub(super) enum Nf4Scales {
    /// `[⌈N · K / 64⌉]` in `f32`.
    Plain(Weight),
    Nested {
        /// `[⌈N · K / 64⌉]`.
        codes: Bytes,
        map: Arc<[f32; 256]>,
        /// One for 256 scales, in `f32`.
        absmax: Weight,
        offset: f32,
    },
}

/// 8 bits an element, a scale for every 64 of a row.
#[derive(Clone)]
pub struct Q8Weight {
    pub(super) shape: [usize; 2],
    /// `[N, K]`.
    pub(super) codes: Bytes,
    /// `[N, ⌈K / 64⌉]` in `f32`.
    pub(super) scales: Weight,
}

/// The numbers of scales, which are made as `f32` only.
fn numbers(scales: &Weight) -> &[f32] {
    scales.as_f32().expect("scales are made as f32 only")
}

impl Nf4Weight {
    /// A weight of codes and scales as [`nf4::quantize`] gives them.
    ///
    /// # Panics
    /// If there are not as many as the shape says.
    pub fn new(shape: [usize; 2], codes: Vec<u8>, scales: Vec<f32>) -> Self {
        let elements = shape[0] * shape[1];
        assert_eq!((codes.len() * 2, scales.len()), (elements, elements.div_ceil(nf4::BLOCK)), "{shape:?}");
        let blocks = scales.len();
        Self { shape, codes: codes.into(), scales: Nf4Scales::Plain(Weight::from_f32(scales, [blocks])) }
    }

    /// The same codes with their scales quantized, too.
    #[must_use]
    pub fn with_double_quantization(&self) -> Self {
        let scales = match &self.scales {
            Nf4Scales::Nested { .. } => self.scales.clone(),
            Nf4Scales::Plain(scales) => {
                let nested = nested::quantize(numbers(scales));
                let groups = nested.absmax.len();
                Nf4Scales::Nested {
                    codes: nested.codes.into(),
                    map: Arc::new(*nested::dynamic_map()),
                    absmax: Weight::from_f32(nested.absmax, [groups]),
                    offset: nested.offset,
                }
            }
        };
        Self { shape: self.shape, codes: self.codes.clone(), scales }
    }

    /// Whether the scales are quantized, too.
    pub fn is_double_quantized(&self) -> bool {
        matches!(self.scales, Nf4Scales::Nested { .. })
    }

    /// What the kernels read.
    pub fn view(&self) -> Nf4<'_> {
        let scales = match &self.scales {
            Nf4Scales::Plain(scales) => Scales::Plain(numbers(scales)),
            Nf4Scales::Nested { codes, map, absmax, offset } => {
                Scales::Nested { codes, map, absmax: numbers(absmax), offset: *offset }
            }
        };
        Nf4 { codes: &self.codes, scales, map: &CODE_VALUES }
    }
}

impl Q8Weight {
    /// A weight of codes and scales as [`q8::quantize`] gives them.
    ///
    /// # Panics
    /// If there are not as many as the shape says.
    pub fn new(shape: [usize; 2], codes: Vec<i8>, scales: Vec<f32>) -> Self {
        let [n, k] = shape;
        let blocks = k.div_ceil(q8::BLOCK);
        assert_eq!((codes.len(), scales.len()), (n * k, n * blocks), "{shape:?}");
        Self { shape, codes: codes.into(), scales: Weight::from_f32(scales, [n, blocks]) }
    }

    /// What the kernels read.
    pub fn view(&self) -> Q8<'_> {
        Q8 { codes: bytemuck::cast_slice(&self.codes), scales: numbers(&self.scales) }
    }
}

impl PackedWeight {
    /// `[N, K]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Nf4(weight) => weight.shape,
            Self::Q8(weight) => weight.shape,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How elements are stored, as it is shown: `nf4`, `nf4+dq` with double quantization, `q8`.
    pub fn format_name(&self) -> &'static str {
        match self {
            Self::Nf4(weight) if weight.is_double_quantized() => "nf4+dq",
            Self::Nf4(_) => "nf4",
            Self::Q8(_) => "q8",
        }
    }

    /// Bytes of codes, scales and what belongs to them.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Nf4(weight) => {
                let scales = match &weight.scales {
                    Nf4Scales::Plain(scales) => scales.bytes().len(),
                    Nf4Scales::Nested { codes, map, absmax, .. } => {
                        codes.len() + size_of_val(&**map) + absmax.bytes().len()
                    }
                };
                weight.codes.len() + scales
            }
            Self::Q8(weight) => weight.codes.len() + weight.scales.bytes().len(),
        }
    }

    /// As [`Weight::release_pages`].
    pub fn release_pages(&self) {
        match self {
            Self::Nf4(weight) => weight.codes.release_pages(),
            Self::Q8(weight) => weight.codes.release_pages(),
        }
    }

    /// As [`Weight::fetch_pages`], for codes and their scales.
    pub fn fetch_pages(&self) {
        let (codes, scales) = self.mapped();
        codes.fetch_pages();
        if let Some(scales) = scales {
            scales.fetch_pages();
        }
    }

    /// As [`Weight::evict_pages`], for the codes alone: scales are small.
    pub fn evict_pages(&self) {
        self.mapped().0.evict_pages();
    }

    /// What may lie in a file: codes, and scales that are numbers.
    fn mapped(&self) -> (&Bytes, Option<&Weight>) {
        match self {
            Self::Nf4(Nf4Weight { codes, scales: Nf4Scales::Plain(scales), .. })
            | Self::Q8(Q8Weight { codes, scales, .. }) => (codes, Some(scales)),
            Self::Nf4(Nf4Weight { codes, .. }) => (codes, None),
        }
    }

    /// Counts the scales that are not finite; each spoils a block.
    pub fn count_non_finite(&self) -> NonFinite {
        match self {
            Self::Nf4(Nf4Weight { scales: Nf4Scales::Plain(scales), .. })
            | Self::Q8(Q8Weight { scales, .. }) => scales.count_non_finite(),
            Self::Nf4(Nf4Weight { scales: Nf4Scales::Nested { absmax, .. }, .. }) => {
                absmax.count_non_finite()
            }
        }
    }

    /// Row `index` as the products see it, `out` being `[K]`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn read_row(&self, index: usize, out: &mut [f32]) {
        let [n, k] = self.shape();
        assert!(index < n && out.len() == k, "row {index} of [{n}, {k}] into {}", out.len());
        match self {
            Self::Nf4(weight) => weight.view().read(index * k, out),
            Self::Q8(weight) => weight.view().read_row(index, out),
        }
    }

    /// All elements as the products see them: `[N, K]` in `f32`.
    pub fn to_dense(&self) -> Weight {
        let [n, k] = self.shape();
        let mut values = vec![0.0; n * k];
        if k > 0 {
            values.chunks_exact_mut(k).enumerate().for_each(|(index, row)| self.read_row(index, row));
        }
        Weight::from_f32(values, [n, k])
    }
}

impl LinearWeight {
    /// Extents, `[N, K]`.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Dense(weight) => weight.shape(),
            Self::Packed(PackedWeight::Nf4(weight)) => &weight.shape,
            Self::Packed(PackedWeight::Q8(weight)) => &weight.shape,
        }
    }

    /// Bytes of the elements with all that is needed to read them.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.bytes().len(),
            Self::Packed(weight) => weight.num_bytes(),
        }
    }
}

impl LinearWeight {
    /// As [`Weight::fetch_pages`].
    pub fn fetch_pages(&self) {
        match self {
            Self::Dense(weight) => weight.fetch_pages(),
            Self::Packed(weight) => weight.fetch_pages(),
        }
    }

    /// As [`Weight::evict_pages`].
    pub fn evict_pages(&self) {
        match self {
            Self::Dense(weight) => weight.evict_pages(),
            Self::Packed(weight) => weight.evict_pages(),
        }
    }
}

impl From<Weight> for LinearWeight {
    fn from(weight: Weight) -> Self {
        Self::Dense(weight)
    }
}

impl From<PackedWeight> for LinearWeight {
    fn from(weight: PackedWeight) -> Self {
        Self::Packed(weight)
    }
}

impl std::fmt::Debug for Nf4Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let double = if self.is_double_quantized() { ", scales quantized" } else { "" };
        write!(f, "Nf4Weight({:?}{double})", self.shape)
    }
}

impl std::fmt::Debug for Q8Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Q8Weight({:?})", self.shape)
    }
}

/// An element type by torch's name of it, as quantization states spell it.
pub(crate) fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
    }
}
