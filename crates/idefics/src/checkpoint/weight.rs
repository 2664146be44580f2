//! One tensor of a checkpoint, used where it is mapped.

use std::sync::Arc;

/// Element types that checkpoints carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
}

/// A dense row-major tensor that shares the bytes of the file it came from.
///
/// Cloning copies a pointer. The bytes are little-endian and aligned to the element size.
#[derive(Clone)]
pub struct Weight {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    start: usize,
    dtype: DType,
    shape: Vec<usize>,
}
