//! The two moments of AdamW, as `f32` or in 8 bits.

use idefics_kernels::{
    Isa,
    adamw::{self, BLOCK, Coded, Step},
};
use serde::{Deserialize, Serialize};

/// What moments are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MomentFormat {
    /// `f32`: 8 bytes for each number that is trained.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// A byte each, and two scales for every 256: a quarter of that.
    #[serde(rename = "8bit")]
    EightBit,
}

/// First and second moment of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub enum Moments {
    /// As they are.
    F32 {
        /// Running mean of the gradients.
        first: Vec<f32>,
        /// Running mean of their squares.
        second: Vec<f32>,
    },
    /// In 8 bits.
    EightBit {
        /// Codes of the running mean of the gradients.
        first: Vec<i8>,
        /// Codes of the running mean of their squares.
        second: Vec<u8>,
        /// The largest magnitudes of both in each block.
        scales: Vec<[f32; 2]>,
    },
}

impl MomentFormat {
    /// Bytes of both moments of `len` numbers.
    pub fn num_bytes(self, len: u64) -> u64 {
        match self {
            Self::F32 => 8 * len,
            Self::EightBit => 2 * len + 8 * len.div_ceil(BLOCK as u64),
        }
    }

    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::EightBit => "8bit",
        }
    }
}

impl Moments {
    /// Moments of `len` numbers before the first step.
    pub fn new(len: usize, format: MomentFormat) -> Self {
        match format {
            MomentFormat::F32 => Self::F32 { first: vec![0.0; len], second: vec![0.0; len] },
            MomentFormat::EightBit => Self::EightBit {
                first: vec![0; len],
                second: vec![0; len],
                scales: vec![[0.0; 2]; len.div_ceil(BLOCK)],
            },
        }
    }

    /// What they are kept as.
    pub fn format(&self) -> MomentFormat {
        match self {
            Self::F32 { .. } => MomentFormat::F32,
            Self::EightBit { .. } => MomentFormat::EightBit,
        }
    }

    /// Number of numbers that have moments.
    pub fn len(&self) -> usize {
        match self {
            Self::F32 { first, .. } => first.len(),
            Self::EightBit { first, .. } => first.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Scales of `len` numbers in 8 bits.
    pub(crate) fn num_scales(len: usize) -> usize {
        len.div_ceil(BLOCK)
    }

    /// Moves `values` against their gradient. `number` is that of the step, by which moments in 8 bits are rounded.
    pub(crate) fn step(&mut self, step: &Step, number: u64, values: &mut [f32], gradient: &[f32]) {
        match self {
            Self::F32 { first, second } => {
                adamw::step(Isa::best(), step, values, gradient, first, second);
            }
            Self::EightBit { first, second, scales } => {
                let coded = Coded { first, second, scales };
                adamw::step_coded(Isa::best(), step, number, values, gradient, coded);
            }
        }
    }
}
