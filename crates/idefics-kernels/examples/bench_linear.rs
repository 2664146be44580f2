#![allow(unsafe_code)]
//! scratch
use half::bf16;
use idefics_kernels::{
    Compute, Isa, Matrix,
    linear::linear,
    nf4::{self, Nf4, Scales},
    q8::Q8,
};
use std::time::Instant;
fn huge<T: Copy>(v: &[T]) -> &'static [T] {
    let bytes = std::mem::size_of_val(v);
    let mut map = memmap2::MmapMut::map_anon(bytes + (2 << 20)).unwrap();
    if std::env::var("HUGE").is_ok() {
        map.advise(memmap2::Advice::HugePage).unwrap();
    }
    let off = map.as_ptr().align_offset(2 << 20);
    unsafe {
        let p = map.as_mut_ptr().add(off);
        std::ptr::copy_nonoverlapping(v.as_ptr().cast::<u8>(), p, bytes);
        std::mem::forget(map);
        std::slice::from_raw_parts(p.cast(), v.len())
    }
}
fn med(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}
fn main() {
    let (n, k, layers) = (11008, 4096, 24);
    let total = n * k * layers;
    let nf: Vec<u8> = (0..total / 2).map(|i| (i * 31 % 251) as u8).collect();
    let sc: Vec<f32> = vec![0.01; total / 64];
    let q: Vec<i8> = (0..total).map(|i| (i * 31 % 251) as u8 as i8).collect();
    let bf: Vec<bf16> = (0..total).map(|i| bf16::from_f32((i % 13) as f32 / 13.0)).collect();
    let (nf, sc, q, bf) = (huge(&nf), huge(&sc), huge(&q), huge(&bf));
    for round in 0..2 {
        let bytes: &[u8] = unsafe { std::slice::from_raw_parts(bf.as_ptr().cast(), total * 2) };
        let bw = med((0..5).map(|_| idefics_kernels::probe::read_bandwidth(Isa::best(), bytes)).collect());
        println!(
            "round {round} read {:.1} GB/s, bf16 {:.0} GFLOP/s, int8 {:.0}",
            bw * 1e-9,
            idefics_kernels::probe::bf16_peak(Isa::best()) * 1e-9,
            idefics_kernels::probe::int8_peak().unwrap() * 1e-9
        );
        let only = std::env::var("ONLY").ok();
        for m in if only.is_some() { vec![1, 4, 8, 16] } else { vec![1, 2, 4, 8, 16, 64, 512] } {
            let layers = if m > 16 { 1 } else { layers };
            let x = vec![0.5f32; m * k];
            let mut out = vec![0.0; m * n];
            for (name, bytes) in [("bf16", 2.0), ("nf4", 0.5625), ("q8", 1.0625)] {
                if only.as_deref().is_some_and(|o| !o.contains(name)) {
                    continue;
                }
                for compute in [Compute::Bf16, Compute::F32] {
                    let t = med((0..5)
                        .map(|_| {
                            let t = Instant::now();
                            for l in 0..layers {
                                let r = l * n * k..(l + 1) * n * k;
                                let w = match name {
                                    "bf16" => Matrix::Bf16(&bf[r]),
                                    "nf4" => Matrix::Nf4(Nf4 {
                                        codes: &nf[r.start / 2..r.end / 2],
                                        scales: Scales::Plain(&sc[r.start / 64..r.end / 64]),
                                        map: &nf4::CODE_VALUES,
                                    }),
                                    _ => Matrix::Q8(Q8 {
                                        codes: &q[r.clone()],
                                        scales: &sc[r.start / 64..r.end / 64],
                                    }),
                                };
                                linear(Isa::best(), compute, &x, w, k, None, &mut out);
                            }
                            t.elapsed().as_secs_f64() / layers as f64
                        })
                        .collect());
                    println!(
                        "  m={m} {name} {compute:?}: {:.1} GFLOP/s, {:.1} GB/s",
                        2e-9 * (m * n * k) as f64 / t,
                        bytes * 1e-9 * (n * k) as f64 / t
                    );
                }
            }
        }
    }
}
