//! One tensor of a checkpoint, used where it is mapped.
//!
//! Surprising: nothing here converts or copies unless its name says so. A weight that the file leaves
//! misaligned for its element type is the one exception: it is copied once, when it is made.

use std::{fmt, ops::Range, sync::Arc};

use half::{bf16, f16, slice::HalfFloatSliceExt, vec::HalfFloatVecExt};

#[cfg(target_endian = "big")]
compile_error!(
    "safetensors files are little-endian and their bytes are used in place: big-endian targets cannot work"
);

/// Element types that checkpoints carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit float, IEEE half precision.
    F16,
    /// 16-bit float, the upper half of an `f32`.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name in safetensors headers: `F32`, `F16` or `BF16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// The type of a safetensors name, if weights may have it.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|dtype| dtype.name() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// Bytes that weights share: a file map, a vector, or a part of the program.
pub(super) trait Storage: AsRef<[u8]> + Send + Sync {
    /// Lets the system take back the memory of some bytes, where it can bring them back.
    fn release(&self, _range: Range<usize>) {}

    /// The bytes for writing, where they are not those of a file.
    fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        None
    }

    /// Brings some bytes into memory and waits for them, where they are not always there.
    fn fetch(&self, _range: Range<usize>) {}
    /// Lets go of the memory of some bytes at once, where they can be brought back.
    fn evict(&self, _range: Range<usize>) {}
}

/// A part of the program: always there.
impl Storage for &'static [u8] {}

/// Who owns the bytes of a weight.
pub(super) type Owner = Arc<dyn Storage>;

/// Bytes of a file map or a vector, shared.
#[derive(Clone)]
pub(super) struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

impl Bytes {
    /// `range` of `owner`'s bytes. The caller has checked that it lies inside.
    pub(super) fn new(owner: Owner, range: Range<usize>) -> Self {
        Self { owner, range }
    }

    /// As [`Weight::release_pages`].
    pub(super) fn release_pages(&self) {
        self.owner.release(self.range.clone());
    }

    /// As [`Weight::fetch_pages`].
    pub(super) fn fetch_pages(&self) {
        self.owner.fetch(self.range.clone());
    }

    /// As [`Weight::evict_pages`].
    pub(super) fn evict_pages(&self) {
        self.owner.evict(self.range.clone());
    }

    /// A weight of these bytes, which are as many as the shape says.
    pub(super) fn into_weight(self, dtype: DType, shape: Vec<usize>) -> Weight {
        Weight::from_owner(self.owner, self.range, dtype, shape)
    }
}

impl<T: bytemuck::Pod + Send + Sync> From<Vec<T>> for Bytes {
    fn from(values: Vec<T>) -> Self {
        let range = 0..size_of_val(values.as_slice());
        Self { owner: Arc::new(Elements(values)), range }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

/// A dense row-major tensor that shares the bytes of the file it came from.
///
/// Cloning copies a pointer and the shape. The bytes are little-endian and aligned to the element size.
#[derive(Clone)]
pub struct Weight {
    owner: Owner,
    /// Byte range of the elements within the owner.
    range: Range<usize>,
    dtype: DType,
    shape: Vec<usize>,
}

impl Weight {
    /// A weight that owns its numbers.
    ///
    /// # Panics
    ///
    /// When the shape does not hold as many elements as `values`.
    pub fn from_f32(values: Vec<f32>, shape: impl Into<Vec<usize>>) -> Self {
        Self::from_vec(values, DType::F32, shape.into())
    }

    /// A weight that owns its numbers.
    ///
    /// # Panics
    ///
    /// When the shape does not hold as many elements as `values`.
    pub fn from_bf16(values: Vec<bf16>, shape: impl Into<Vec<usize>>) -> Self {
        Self::from_vec(values, DType::Bf16, shape.into())
    }

    /// A weight that owns its numbers.
    ///
    /// # Panics
    ///
    /// When the shape does not hold as many elements as `values`.
    pub fn from_f16(values: Vec<f16>, shape: impl Into<Vec<usize>>) -> Self {
        Self::from_vec(values, DType::F16, shape.into())
    }

    /// A weight over `range` of `owner`'s bytes. The caller has checked that the range lies inside the owner and
    /// is as long as the shape says.
    pub(super) fn from_owner(owner: Owner, range: Range<usize>, dtype: DType, shape: Vec<usize>) -> Self {
        let bytes = &(*owner).as_ref()[range.clone()];
        assert_eq!(
            Some(bytes.len()),
            num_bytes(&shape, dtype),
            "a weight is made only after its size was checked"
        );
        if bytes.as_ptr().addr().is_multiple_of(dtype.size()) {
            return Self { owner, range, dtype, shape };
        }
        match dtype {
            DType::F32 => Self::from_f32(bytemuck::pod_collect_to_vec(bytes), shape),
            DType::F16 => Self::from_f16(bytemuck::pod_collect_to_vec(bytes), shape),
            DType::Bf16 => Self::from_bf16(bytemuck::pod_collect_to_vec(bytes), shape),
        }
    }

    fn from_vec<T: bytemuck::Pod + Send + Sync>(values: Vec<T>, dtype: DType, shape: Vec<usize>) -> Self {
        let range = 0..size_of::<T>() * values.len();
        assert_eq!(
            num_bytes(&shape, dtype),
            Some(range.end),
            "{} values do not fill shape {shape:?}",
            values.len()
        );
        Self { owner: Arc::new(Elements(values)), range, dtype, shape }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range.len() / self.dtype.size()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The elements as they lie in memory: little-endian, aligned.
    pub fn bytes(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    /// Lets the system take back the memory of a mapped weight, which is read from the file again when it is
    /// needed. Whoever walks through a model larger than the memory does it after each weight.
    pub fn release_pages(&self) {
        self.owner.release(self.range.clone());
    }

    /// Reads a mapped weight into memory, in large pieces, and waits until it is there.
    pub fn fetch_pages(&self) {
        self.owner.fetch(self.range.clone());
    }

    /// Drops the memory of a mapped weight at once, so that others may stay where they do not all fit.
    pub fn evict_pages(&self) {
        self.owner.evict(self.range.clone());
    }

    /// The elements, if they are `f32`.
    pub fn as_f32(&self) -> Option<&[f32]> {
        (self.dtype == DType::F32).then(|| bytemuck::cast_slice(self.bytes()))
    }

    /// The elements, if they are `bf16`.
    pub fn as_bf16(&self) -> Option<&[bf16]> {
        (self.dtype == DType::Bf16).then(|| bytemuck::cast_slice(self.bytes()))
    }

    /// The elements, if they are `f16`.
    pub fn as_f16(&self) -> Option<&[f16]> {
        (self.dtype == DType::F16).then(|| bytemuck::cast_slice(self.bytes()))
    }

    /// The elements for writing, if they are `f32` in memory of this weight's own: not mapped from a file, and
    /// with no clone that could see the change.
    pub fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        if self.dtype != DType::F32 {
            return None;
        }
        self.bytes_mut().map(bytemuck::cast_slice_mut)
    }

    /// As [`as_f32_mut`](Self::as_f32_mut) for `bf16`.
    pub fn as_bf16_mut(&mut self) -> Option<&mut [bf16]> {
        if self.dtype != DType::Bf16 {
            return None;
        }
        self.bytes_mut().map(bytemuck::cast_slice_mut)
    }

    fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        let range = self.range.clone();
        Arc::get_mut(&mut self.owner)?.bytes_mut().map(|bytes| &mut bytes[range])
    }

    /// A copy of the elements, widened; exact for every type.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => bytemuck::cast_slice(self.bytes()).to_vec(),
            DType::F16 => bytemuck::cast_slice::<_, f16>(self.bytes()).to_f32_vec(),
            DType::Bf16 => bytemuck::cast_slice::<_, bf16>(self.bytes()).to_f32_vec(),
        }
    }

    /// The same numbers in another type, rounded to nearest even; a clone if the type is already right.
    #[must_use]
    pub fn to_dtype(&self, dtype: DType) -> Self {
        if dtype == self.dtype {
            return self.clone();
        }
        let values = self.to_f32_vec();
        let shape = self.shape.clone();
        match dtype {
            DType::F32 => Self::from_f32(values, shape),
            DType::F16 => Self::from_f16(Vec::from_f32_slice(&values), shape),
            DType::Bf16 => Self::from_bf16(Vec::from_f32_slice(&values), shape),
        }
    }

    /// Some rows (indices of the first dimension), sharing the bytes: `[n, ...] -> [rows.len(), ...]`.
    ///
    /// # Panics
    ///
    /// When the weight has no dimension or not that many rows.
    #[must_use]
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let (&count, inner) = self.shape.split_first().expect("only a weight with a dimension has rows");
        assert!(rows.start <= rows.end && rows.end <= count, "rows {rows:?} of a weight with {count}");
        let row_bytes = inner.iter().product::<usize>() * self.dtype.size();
        let start = self.range.start + rows.start * row_bytes;
        let end = self.range.start + rows.end * row_bytes;
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        Self { owner: Arc::clone(&self.owner), range: start..end, dtype: self.dtype, shape }
    }

    /// The same elements under another shape, sharing the bytes.
    ///
    /// # Panics
    ///
    /// When the new shape holds another number of elements.
    #[must_use]
    pub fn reshape(&self, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        assert_eq!(
            num_bytes(&shape, self.dtype),
            Some(self.range.len()),
            "{:?} does not reshape to {shape:?}",
            self.shape
        );
        Self { owner: Arc::clone(&self.owner), range: self.range.clone(), dtype: self.dtype, shape }
    }

    /// Whether both weights are views of the very same bytes.
    pub fn shares_bytes_with(&self, other: &Self) -> bool {
        std::ptr::eq(self.bytes(), other.bytes())
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weight({} {:?})", self.dtype, self.shape)
    }
}

/// Bytes of a dense tensor, unless that overflows.
pub(crate) fn num_bytes(shape: &[usize], dtype: DType) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |bytes, &extent| bytes.checked_mul(extent))
}

/// A vector of numbers that owns the bytes of a weight.
struct Elements<T>(Vec<T>);

impl<T: bytemuck::Pod + Send + Sync> Storage for Elements<T> {
    fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        Some(bytemuck::cast_slice_mut(&mut self.0))
    }
}

impl<T: bytemuck::Pod> AsRef<[u8]> for Elements<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_numbers_come_back() {
        let weight = Weight::from_f32(vec![1.0, -2.5, 3.0, 4.0, 5.0, 6.0], [3, 2]);
        assert_eq!(weight.dtype(), DType::F32);
        assert_eq!(weight.shape(), [3, 2]);
        assert_eq!(weight.len(), 6);
        assert_eq!(weight.as_f32(), Some(&[1.0, -2.5, 3.0, 4.0, 5.0, 6.0][..]));
        assert_eq!(weight.as_bf16(), None);
        assert_eq!(weight.as_f16(), None);
        assert_eq!(&weight.bytes()[4..8], (-2.5f32).to_le_bytes());
    }

    #[test]
    fn only_a_sole_owner_writes() {
        let mut weight = Weight::from_f32(vec![1.0, 2.0], [2]);
        weight.as_f32_mut().unwrap()[1] = 5.0;
        assert_eq!(weight.as_f32(), Some(&[1.0, 5.0][..]));
        assert!(weight.as_bf16_mut().is_none());
        let clone = weight.clone();
        assert!(weight.as_f32_mut().is_none());
        drop(clone);
        assert!(weight.as_f32_mut().is_some());
        let mut rows = Weight::from_bf16(vec![bf16::ONE; 4], [2, 2]).rows(1..2);
        rows.as_bf16_mut().unwrap()[0] = bf16::ZERO;
        assert_eq!(rows.to_f32_vec(), [0.0, 1.0]);
    }

    #[test]
    fn rows_and_reshape_share_the_bytes() {
        let weight = Weight::from_bf16((0..12).map(|n| bf16::from_f32(n as f32)).collect(), [3, 2, 2]);
        let rows = weight.rows(1..3);
        assert_eq!(rows.shape(), [2, 2, 2]);
        assert_eq!(rows.to_f32_vec(), [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
        assert!(std::ptr::eq(rows.bytes(), &raw const weight.bytes()[8..24]));
        assert!(rows.rows(0..0).is_empty());
        let flat = weight.reshape([3, 4]);
        assert_eq!(flat.rows(2..3).to_f32_vec(), [8.0, 9.0, 10.0, 11.0]);
        assert!(flat.shares_bytes_with(&weight));
    }

    #[test]
    fn misaligned_bytes_are_copied_and_aligned_ones_are_not() {
        // One of the two offsets is odd in memory, whatever the allocator returned.
        let owner: Owner = Arc::new(Elements(vec![0u8, 0x80, 0x3f, 0x80, 0x3f]));
        let weights =
            [0, 1].map(|at| Weight::from_owner(Arc::clone(&owner), at..at + 4, DType::Bf16, vec![2]));
        let inside: Vec<bool> = weights
            .iter()
            .map(|weight| (*owner).as_ref().as_ptr_range().contains(&weight.bytes().as_ptr()))
            .collect();
        assert!(inside.contains(&true) && inside.contains(&false), "{inside:?}");
        assert_eq!(weights[1].to_f32_vec(), [1.0, 1.0]);
        assert_eq!(weights[0].bytes(), [0, 0x80, 0x3f, 0x80]);
    }

    #[test]
    fn conversions_round_to_nearest_even() {
        // 1 + 2^-8 lies half-way between two bf16 numbers; the even one is 1.
        let weight = Weight::from_f32(vec![1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 0.1, f32::NAN], [4]);
        let narrow = weight.to_dtype(DType::Bf16);
        let values = narrow.as_bf16().unwrap();
        assert_eq!(values[0].to_f32(), 1.0);
        assert_eq!(values[1].to_f32(), 1.0 + 4.0 / 256.0);
        assert_eq!(values[2].to_bits(), 0x3dcd);
        assert!(values[3].is_nan());
        assert_eq!(weight.to_dtype(DType::F16).as_f16().unwrap()[2].to_bits(), 0x2e66);
        assert!(weight.to_dtype(DType::F32).shares_bytes_with(&weight));
        assert_eq!(narrow.to_dtype(DType::F32).to_f32_vec()[1], 1.0 + 4.0 / 256.0);
    }

    #[test]
    #[should_panic(expected = "do not fill shape")]
    fn a_shape_that_overflows_is_refused() {
        let _ = Weight::from_f32(vec![], [usize::MAX, 2]);
    }
}
