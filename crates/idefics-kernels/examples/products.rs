//! Times products of few and many rows in every weight format, beside what the registers give.
//!
//! ```sh
//! cargo run --release -p idefics-kernels --example products                          # the 9B model's two widths
//! cargo run --release -p idefics-kernels --example products -- --rows 8,16 --formats nf4 --shapes 4096x4096
//! ```
//!
//! Every turn times the machine, then each product once; medians are printed, and the share that they are of the
//! machine in the same turns. `GB/s` is what is read of the weight. Weights of a format are as many as 1 GiB holds, at
//! most 64, and take turns, so that they come from memory as a model's do.
#![allow(clippy::print_stdout, clippy::print_stderr, missing_docs)]

use std::time::Instant;

use half::bf16;
use idefics_kernels::{
    Compute, Isa, Matrix,
    allocator::{Allocator, keep_freed_blocks},
    linear::product,
    nf4::{self, Nf4, Scales},
    probe,
    q8::{self, Q8},
};

/// The allocator of the program `idefics`.
#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

const USAGE: &str = "products [--rows 1,8,16,32,512] [--formats bf16,q8,nf4] [--shapes NxK,..] [--turns 5] [--compute bf16|f32|int8]";

struct Options {
    rows: Vec<usize>,
    formats: Vec<String>,
    /// Rows of the weight and elements of each.
    shapes: Vec<(usize, usize)>,
    turns: usize,
    compute: Compute,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        rows: vec![1, 8, 16, 32, 512],
        formats: ["bf16", "q8", "nf4"].map(String::from).to_vec(),
        shapes: vec![(4096, 4096), (4096, 11008)],
        turns: 5,
        compute: Compute::Bf16,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(USAGE)?;
        let number = |text: &str| text.parse::<usize>().ok().filter(|n| *n > 0).ok_or(USAGE.to_owned());
        match name.as_str() {
            "--rows" => options.rows = value.split(',').map(number).collect::<Result<_, _>>()?,
            "--formats" => options.formats = value.split(',').map(String::from).collect(),
            "--shapes" => {
                let shape = |text: &str| {
                    let (n, k) = text.split_once('x').ok_or(USAGE)?;
                    Ok::<_, String>((number(n)?, number(k)?))
                };
                options.shapes = value.split(',').map(shape).collect::<Result<_, _>>()?;
            }
            "--turns" => options.turns = number(&value)?,
            "--compute" if value == "bf16" => options.compute = Compute::Bf16,
            "--compute" if value == "f32" => options.compute = Compute::F32,
            "--compute" if value == "int8" => options.compute = Compute::Int8,
            _ => return Err(USAGE.to_owned()),
        }
    }
    Ok(options)
}

/// A weight in one format.
enum Weight {
    Bf16(Vec<bf16>),
    Q8(Vec<i8>, Vec<f32>),
    Nf4(Vec<u8>, Vec<f32>),
}

impl Weight {
    /// Numbers without a pattern, spread like those of a trained layer.
    fn new(format: &str, (n, k): (usize, usize)) -> Result<Self, String> {
        let mut state = 1_u64;
        let values: Vec<f32> = (0..n * k)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.1
            })
            .collect();
        Ok(match format {
            "bf16" => Self::Bf16(values.iter().map(|value| bf16::from_f32(*value)).collect()),
            "q8" => {
                let (codes, scales) = q8::quantize(&values, k);
                Self::Q8(codes, scales)
            }
            "nf4" => {
                let (codes, scales) = nf4::quantize(&values);
                Self::Nf4(codes, scales)
            }
            other => return Err(format!("no format {other:?}; {USAGE}")),
        })
    }

    fn matrix(&self) -> Matrix<'_> {
        match self {
            Self::Bf16(values) => Matrix::Bf16(values),
            Self::Q8(codes, scales) => Matrix::Q8(Q8 { codes, scales }),
            Self::Nf4(codes, scales) => {
                Matrix::Nf4(Nf4 { codes, scales: Scales::Plain(scales), map: &nf4::CODE_VALUES })
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len() * 2,
            Self::Q8(codes, scales) => codes.len() + scales.len() * 4,
            Self::Nf4(codes, scales) => codes.len() + scales.len() * 4,
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn main() -> Result<(), String> {
    keep_freed_blocks();
    let options = options()?;
    let isa = Isa::best();
    println!("{:26} {:>6} {:>9} {:>9} {:>6} {:>8}", "weight", "rows", "ms", "GFLOP/s", "share", "GB/s");
    for &(n, k) in &options.shapes {
        for format in &options.formats {
            let first = Weight::new(format, (n, k))?;
            let copies = ((1 << 30) / first.bytes()).clamp(1, 64);
            let mut weights = vec![first];
            for _ in 1..copies {
                weights.push(match &weights[0] {
                    Weight::Bf16(values) => Weight::Bf16(values.clone()),
                    Weight::Q8(codes, scales) => Weight::Q8(codes.clone(), scales.clone()),
                    Weight::Nf4(codes, scales) => Weight::Nf4(codes.clone(), scales.clone()),
                });
            }
            let mut peaks = Vec::new();
            let mut times = vec![Vec::new(); options.rows.len()];
            let mut next = 0;
            for _ in 0..options.turns {
                peaks.push(probe::bf16_peak(isa));
                for (rows, times) in options.rows.iter().zip(&mut times) {
                    let x: Vec<f32> = (0..rows * k).map(|i| (i % 37) as f32 / 37.0 - 0.5).collect();
                    // As many calls as take some tens of milliseconds.
                    let calls = (64 / rows).clamp(2, copies.max(2));
                    let start = Instant::now();
                    for _ in 0..calls {
                        let out = product(isa, options.compute, &x, weights[next % copies].matrix(), k, None);
                        std::hint::black_box(out);
                        next += 1;
                    }
                    times.push(start.elapsed().as_secs_f64() / calls as f64);
                }
            }
            let peak = median(&peaks);
            for (&rows, times) in options.rows.iter().zip(&times) {
                let seconds = median(times);
                let flops = (2 * rows * n * k) as f64 / seconds;
                println!(
                    "{:26} {rows:6} {:9.3} {:9.0} {:5.0}% {:8.1}",
                    format!("{format} {n} x {k}"),
                    seconds * 1e3,
                    flops / 1e9,
                    100.0 * flops / peak,
                    weights[0].bytes() as f64 / seconds / 1e9,
                );
            }
        }
    }
    Ok(())
}
