//! The tiny checkpoints of `fixtures/` and the sequences that their expected values belong to.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;

use idefics::{ComputeType, Idefics, LoadOptions, SequenceInputs, ops::Isa, processor::PixelValues};
use idefics_testing::{Tensors, fixture, golden_fill};

/// Rows and columns of the pictures of both tiny checkpoints.
pub(crate) const SIDE: usize = 32;

/// A tiny checkpoint.
#[derive(Clone, Copy)]
pub(crate) struct Tiny {
    /// Its directory in `fixtures/`.
    pub(crate) name: &'static str,
    /// Its sequences, in the order of the reference's batch.
    pub(crate) cases: &'static [&'static str],
}

pub(crate) const TINY: Tiny =
    Tiny { name: "tiny", cases: &["two_images", "text_first", "text_only", "after_eos"] };
pub(crate) const TINY_BASE: Tiny =
    Tiny { name: "tiny-base", cases: &["two_images", "text_first", "text_only"] };
pub(crate) const TINIES: [Tiny; 2] = [TINY, TINY_BASE];

impl Tiny {
    pub(crate) fn open(self, options: &LoadOptions) -> Idefics {
        Idefics::from_pretrained(fixture(self.name), options).expect("a sound checkpoint")
    }

    /// In f32 on the strongest instruction tier.
    pub(crate) fn model(self) -> Idefics {
        self.open(&LoadOptions { compute: ComputeType::F32, ..Default::default() })
    }

    /// Once in f32 on every instruction tier of this processor.
    pub(crate) fn models(self) -> impl Iterator<Item = (String, Idefics)> {
        Isa::available().map(move |isa| {
            let options = LoadOptions { compute: ComputeType::F32, isa: Some(isa), ..Default::default() };
            (format!("{} on {}", self.name, isa.tier()), self.open(&options))
        })
    }

    pub(crate) fn expected(self) -> Tensors {
        Tensors::fixture(&format!("{}/expected.safetensors", self.name))
    }

    /// All cases, in the order of `cases`.
    pub(crate) fn inputs(self) -> Vec<SequenceInputs> {
        let expected = self.expected();
        self.cases.iter().map(|case| case_inputs(&expected, case)).collect()
    }

    pub(crate) fn input(self, case: &str) -> SequenceInputs {
        case_inputs(&self.expected(), case)
    }
}

/// The pictures that the cases choose theirs from, `golden_fill("pixel_values", [3, 3, 32, 32])`.
pub(crate) fn pictures() -> Vec<Arc<PixelValues>> {
    golden_fill("pixel_values", &[3, 3, SIDE, SIDE])
        .chunks(3 * SIDE * SIDE)
        .map(|data| Arc::new(PixelValues::new(data.to_vec(), SIDE, SIDE)))
        .collect()
}

/// Token ids, pictures and the image of each token, `C.input_ids [T]`, `C.images [n]`,
/// `C.image_attention_mask [T, max(n, 1)]`.
fn case_inputs(expected: &Tensors, case: &str) -> SequenceInputs {
    let all = pictures();
    let (_, images) = expected.i64(&format!("{case}.images"));
    let (_, ids) = expected.i64(&format!("{case}.input_ids"));
    SequenceInputs {
        token_ids: ids.iter().map(|&id| id as u32).collect(),
        image_index: image_index(expected, &format!("{case}.image_attention_mask")),
        images: images.iter().map(|&row| Arc::clone(&all[row as usize])).collect(),
    }
}

/// The column that is set in each row of a mask `[.., T, N]`.
pub(crate) fn image_index(expected: &Tensors, mask: &str) -> Vec<Option<u32>> {
    let (shape, mask) = expected.i64(mask);
    let columns = shape[shape.len() - 1];
    let seen = |row: &[i64]| {
        assert!(row.iter().sum::<i64>() <= 1, "a token sees at most one image");
        row.iter().position(|&column| column == 1).map(|column| column as u32)
    };
    mask.chunks(columns).map(seen).collect()
}
