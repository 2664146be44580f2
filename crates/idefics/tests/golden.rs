//! The forward pass against values printed by the reference (transformers 4.57.6 and 5.23.0, f32, one CPU).
//!
//! Two models of deterministic weights, A (resampler, head norms, interval 2, one gate a block) and B (none,
//! none, interval 1, a gate a channel). The tables give six significant digits, so comparisons allow half a
//! unit of the sixth and the rounding of the sums before it.

#![allow(clippy::excessive_precision)] // Values stand as they were printed.

use std::sync::Arc;

use idefics::{
    SequenceInputs,
    checkpoint::Checkpoint,
    generate::{LogitsOf, Row, StepModel},
    model::{Model, Stage},
    ops::{self, Compute, Context, Isa},
    processor::PixelValues,
};
use idefics_testing::{Golden, Tolerance, assert_close, golden_fill, tolerance, write_golden_checkpoint};

const CONTEXT: fn() -> Context = || Context { isa: Isa::best(), compute: Compute::F32 };

fn model(golden: Golden, ctx: Context) -> Model {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_golden_checkpoint(dir.path(), golden);
    let checkpoint = Checkpoint::open(dir.path()).expect("a sound checkpoint");
    Model::new(checkpoint.config, &checkpoint.weights, ctx).expect("a model")
}

/// Four pictures of 3 x 8 x 8; the reference's batch is `[row 0: 0, 1], [row 1: 2, 3]` with picture 3 all zero.
fn pictures() -> Vec<Arc<PixelValues>> {
    let mut pixels = golden_fill("pixel_values", &[2, 2, 3, 8, 8]);
    pixels[3 * 192..].fill(0.0);
    pixels.chunks(192).map(|data| Arc::new(PixelValues::new(data.to_vec(), 8, 8))).collect()
}

/// The two rows of the reference's batch without their padding.
fn rows() -> [SequenceInputs; 2] {
    let pictures = pictures();
    [
        SequenceInputs {
            token_ids: vec![1, 5, 41, 40, 7, 8, 9],
            image_index: vec![None, None, Some(0), Some(0), Some(1), Some(1), Some(1)],
            images: pictures[..2].to_vec(),
        },
        SequenceInputs {
            token_ids: vec![1, 5, 6, 40, 9],
            image_index: vec![None, None, None, Some(0), Some(0)],
            images: pictures[2..].to_vec(),
        },
    ]
}

/// Logits of all positions of each row, fed together: `[T, 43]` per row.
fn logits(model: &Model, inputs: &[SequenceInputs]) -> Vec<Vec<f32>> {
    let mut caches: Vec<_> = inputs.iter().map(|row| model.start(row).expect("image states")).collect();
    let mut rows: Vec<_> = inputs
        .iter()
        .zip(&mut caches)
        .map(|(inputs, cache)| Row {
            cache,
            token_ids: &inputs.token_ids,
            image_index: &inputs.image_index,
            logits: LogitsOf::All,
        })
        .collect();
    model.step(&mut rows).expect("logits")
}

fn check_ends(what: &str, got: &[f32], first: [f32; 4], last: [f32; 4]) {
    assert_close(&format!("{what}, first values"), &got[..4], &first, tolerance::PRINTED);
    assert_close(&format!("{what}, last values"), &got[got.len() - 4..], &last, tolerance::PRINTED);
}

#[test]
fn the_vision_tower_and_the_resampler_give_the_printed_values() {
    let pictures = pictures();
    let pictures: Vec<&PixelValues> = pictures.iter().map(AsRef::as_ref).collect();
    for golden in [Golden::A, Golden::B] {
        let model = model(golden, CONTEXT());
        let mut seen = Vec::new();
        model
            .encode_images_observed(&pictures, &mut |stage, x| {
                seen.push((stage, ops::to_vec(x).expect("values")));
            })
            .expect("image states");
        let of =
            |wanted: Stage| &seen.iter().find(|(stage, _)| *stage == wanted).expect("the stage was shown").1;
        check_ends(
            "vision embeddings",
            of(Stage::VisionEmbeddings),
            [0.171_099, 0.105_313, 0.124_461, -0.004_576_46],
            [-0.082_778_6, -0.256_868, 0.272_983, 0.228_152],
        );
        check_ends(
            "vision output",
            of(Stage::VisionLayer(1)),
            [0.666_305, -0.137_559, -0.779_329, -1.223_81],
            [-0.522_967, -0.509_341, 1.419_73, 1.566_66],
        );
        if golden == Golden::A {
            check_ends(
                "perceiver output",
                of(Stage::ImageHiddenStates),
                [0.038_927_3, -1.109_45, 0.744_122, -0.405_559],
                [-0.669_656, -1.263_5, 1.265_8, 1.838_41],
            );
        }
    }
}

#[test]
fn hidden_states_have_the_printed_values() {
    #[rustfmt::skip]
    let expected = [
        (Golden::A, [
            (Stage::GatedBlock(0), [0.156_697, 0.091_839_1, 0.206_598, -0.087_147_6], [0.229_219, 0.458_378, -0.198_756, -0.288_761]),
            (Stage::DecoderLayer(0), [0.123_331, -0.151_293, -0.480_699, 0.117_084], [0.255_468, 0.064_778_3, -0.795_423, 0.015_443_4]),
            (Stage::Norm, [0.872_239, 1.016_68, -1.121_86, 0.253_6], [0.387_913, 0.622_439, -1.762_51, -0.994_764]),
        ]),
        (Golden::B, [
            (Stage::GatedBlock(0), [0.156_697, 0.093_948_3, 0.211_852, -0.123_695], [0.183_422, 0.211_85, -0.056_192_8, -0.094_159_5]),
            (Stage::DecoderLayer(0), [0.138_549, -0.110_488, -0.495_421, 0.136_486], [0.017_119_1, -0.007_367_67, -0.527_596, 0.274_123]),
            (Stage::Norm, [1.118_59, 0.991_805, -1.182_62, 0.025_466_4], [0.094_658_5, -0.110_26, -1.773_05, -0.536_515]),
        ]),
    ];
    for (golden, stages) in expected {
        let model = model(golden, CONTEXT());
        let inputs = rows();
        let mut caches: Vec<_> = inputs.iter().map(|row| model.start(row).expect("image states")).collect();
        let mut rows: Vec<_> = inputs
            .iter()
            .zip(&mut caches)
            .map(|(inputs, cache)| Row {
                cache,
                token_ids: &inputs.token_ids,
                image_index: &inputs.image_index,
                logits: LogitsOf::Nothing,
            })
            .collect();
        let mut seen = Vec::new();
        model
            .forward_observed(&mut rows, &mut |stage, x| seen.push((stage, ops::to_vec(x).expect("values"))))
            .expect("hidden states");
        for (stage, first, last) in stages {
            let (_, got) = seen.iter().find(|(shown, _)| *shown == stage).expect("the stage was shown");
            check_ends(&format!("{golden:?} {stage}"), got, first, last);
        }
    }
}

#[test]
#[rustfmt::skip]
fn logits_have_the_printed_values() {
    for (golden, end, tail, before_images, second_row, sums) in [
        (Golden::A,
         [-0.676_44, -0.166_609, 0.629_371, 0.075_886, 0.249_138, 1.354_52], [0.435_094, 0.660_772, -0.520_363],
         [-0.677_094, 0.200_661, 0.896_444, -0.504_291, 0.175_712, 0.622_092],
         [-1.080_61, -0.731_849, 0.073_774_8, 0.221_425, -0.509_374, 0.737_876], [28.468, 262.237]),
        (Golden::B,
         [-0.960_576, -0.575_651, 0.365_948, -0.285_978, -0.122_514, 1.266_19], [0.463_634, 0.482_997, -0.690_901],
         [-0.719_838, -0.129_235, 0.835_19, -0.806_258, -0.417_572, 0.438_383],
         [-0.982_032, -1.051_72, 0.199_724, -0.288_799, -0.891_401, 0.282_368], [-5.313_78, 279.127]),
    ] {
        let got = logits(&model(golden, CONTEXT()), &rows());
        assert_close("last position", &got[0][6 * 43..][..6], &end, tolerance::PRINTED);
        assert_close("additional vocabulary", &got[0][7 * 43 - 3..], &tail, tolerance::PRINTED);
        assert_close("a token before the first image", &got[0][43..][..6], &before_images, tolerance::PRINTED);
        assert_close("last position of row 1", &got[1][4 * 43..][..6], &second_row, tolerance::PRINTED);
        let all: Vec<f64> = got.iter().flatten().map(|value| f64::from(*value)).collect();
        let (sum, absolute) = (all.iter().sum::<f64>() as f32, all.iter().map(|v| v.abs()).sum::<f64>() as f32);
        // 516 values are summed, each right to some 1e-6: the sum to the printed digits.
        assert_close("sums", &[sum, absolute], &sums, Tolerance { absolute: 1e-4, relative: 3e-6 });
    }
}

#[test]
fn text_alone_gives_the_printed_values_with_and_without_a_dummy_image() {
    for (golden, expected) in [
        (Golden::A, [-0.825_887, 0.243_837, 0.726_708, -0.048_289_1, 0.393_991, 1.539_98]),
        (Golden::B, [-0.684_957, 0.363_174, 0.704_527, 0.046_551_4, 0.107_73, 1.322_76]),
    ] {
        let model = model(golden, CONTEXT());
        let text = SequenceInputs {
            token_ids: vec![1, 5, 41, 40, 7, 8, 9],
            image_index: vec![None; 7],
            images: Vec::new(),
        };
        let with_dummy =
            SequenceInputs { images: vec![Arc::new(PixelValues::new(vec![0.0; 192], 8, 8))], ..text.clone() };
        let got = logits(&model, &[text, with_dummy]);
        assert_close("text alone", &got[0][6 * 43..][..6], &expected, tolerance::PRINTED);
        assert_eq!(got[0], got[1], "an image that nobody looks at changes nothing");
    }
}

/// Cross-entropy of the next token, in f64, over the positions that have one.
fn losses(logits: &[f32], token_ids: &[u32]) -> Vec<f64> {
    logits
        .chunks(43)
        .zip(&token_ids[1..])
        .map(|(row, target)| {
            let total: f64 = row.iter().map(|value| f64::from(*value).exp()).sum();
            total.ln() - f64::from(row[*target as usize])
        })
        .collect()
}

#[test]
fn losses_have_the_printed_values() {
    for (golden, both_rows, first_row) in
        [(Golden::A, 3.692_404_6, 3.792_889_0), (Golden::B, 3.871_503_8, 3.881_944_7)]
    {
        let inputs = rows();
        let got = logits(&model(golden, CONTEXT()), &inputs);
        let per_row: Vec<_> =
            got.iter().zip(&inputs).map(|(row, inputs)| losses(row, &inputs.token_ids)).collect();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        assert_close("both rows", &[mean(&per_row.concat()) as f32], &[both_rows], tolerance::PRINTED);
        assert_close("row 0", &[mean(&per_row[0]) as f32], &[first_row], tolerance::PRINTED);
    }
}

#[test]
fn every_instruction_tier_agrees() {
    for golden in [Golden::A, Golden::B] {
        let best = logits(&model(golden, CONTEXT()), &rows());
        for isa in Isa::available() {
            let got = logits(&model(golden, Context { isa, compute: Compute::F32 }), &rows());
            for (row, (got, best)) in got.iter().zip(&best).enumerate() {
                assert_close(
                    &format!("{golden:?} row {row} on {}", isa.tier()),
                    got,
                    best,
                    tolerance::LOGITS,
                );
            }
        }
    }
}
