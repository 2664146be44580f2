//! Times single products: `products M N K [bf16|f32|nf4|q8] [rounds]`, in GFLOP/s and GB/s of weights.

use std::time::Instant;

use half::bf16;
use idefics_kernels::{Compute, Isa, Matrix, linear::linear, nf4, probe, q8};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| args[i].parse::<usize>().expect("a number");
    let (m, n, k) = (number(0), number(1), number(2));
    let form = args.get(3).map_or("bf16", String::as_str);
    let rounds = args.get(4).map_or(9, |r| r.parse().expect("a number"));
    let isa = Isa::best();
    let noise =
        |n: usize| -> Vec<f32> { (0..n).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 500.0).collect() };
    let x = noise(m * k);
    let mut out = vec![0.0; m * n];
    let wb: Vec<bf16> =
        if form == "bf16" { noise(n * k).iter().map(|v| bf16::from_f32(*v)).collect() } else { vec![] };
    let wf = if form == "f32" { noise(n * k) } else { vec![] };
    let (codes4, scales4): (Vec<u8>, Vec<f32>) = if form == "nf4" {
        ((0..n * k / 2).map(|i| (i * 31) as u8).collect(), vec![0.01; n * k / 64])
    } else {
        (vec![], vec![])
    };
    let (codes8, scales8): (Vec<i8>, Vec<f32>) = if form == "q8" {
        ((0..n * k).map(|i| (i * 31) as i8).collect(), vec![0.01; n * k / 64])
    } else {
        (vec![], vec![])
    };
    let (matrix, bytes, compute) = match form {
        "bf16" => (Matrix::Bf16(&wb), 2.0, Compute::Bf16),
        "f32" => (Matrix::F32(&wf), 4.0, Compute::F32),
        "nf4" => (
            Matrix::Nf4(nf4::Nf4 {
                codes: &codes4,
                scales: nf4::Scales::Plain(&scales4),
                map: &nf4::CODE_VALUES,
            }),
            0.5625,
            Compute::Bf16,
        ),
        "q8" => (Matrix::Q8(q8::Q8 { codes: &codes8, scales: &scales8 }), 1.0625, Compute::Bf16),
        other => panic!("unknown format {other}"),
    };
    let peak = probe::bf16_peak(isa) * 1e-9;
    let mut times = vec![];
    for _ in 0..rounds {
        let start = Instant::now();
        linear(isa, compute, &x, matrix, k, None, &mut out);
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let (median, best) = (times[times.len() / 2], times[0]);
    let work = 2e-9 * (m * n * k) as f64;
    println!(
        "{m}x{n}x{k} {form}: median {:.0} best {:.0} GFLOP/s of {peak:.0}; {:.1} GB/s",
        work / median,
        work / best,
        bytes * (n * k) as f64 * 1e-9 / median
    );
}
