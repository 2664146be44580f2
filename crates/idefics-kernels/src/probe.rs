//! What this machine can give: streaming reads from memory, and arithmetic in registers.
//!
//! Figures of kernels are quoted as shares of these, measured in the same run, since machines are shared and
//! clocks move.

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;

use crate::{Isa, Tier};

/// Multiply-adds per accumulator in one timing of arithmetic: some tens of milliseconds.
const ROUNDS: usize = 4_000_000;

/// Bytes a second that all threads together read from `buffer` in one pass. To tell memory, the buffer must be
/// several times larger than the caches.
pub fn read_bandwidth(isa: Isa, buffer: &[u8]) -> f64 {
    /// Long enough for the prefetchers, short enough to spread evenly.
    const CHUNK: usize = 1 << 20;
    let start = Instant::now();
    let sum = buffer.par_chunks(CHUNK).map(|chunk| read(isa, chunk)).reduce(|| 0, u64::wrapping_add);
    black_box(sum);
    buffer.len() as f64 / start.elapsed().as_secs_f64()
}

/// Floating-point operations a second of all threads in the products that bf16 arithmetic uses on this tier:
/// `vdpbf16ps` where there is one, fused multiply-adds of `f32` otherwise.
pub fn bf16_peak(isa: Isa) -> f64 {
    on_all_threads(|| match isa.tier() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tier is proven by the `Isa`.
        Tier::Avx512Bf16 => unsafe { x86::bf16_pairs(ROUNDS) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Tier::Avx512 => unsafe { x86::f32_avx512(ROUNDS) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; this tier includes FMA.
        Tier::Avx2 => unsafe { x86::f32_avx2(ROUNDS) },
        _ => portable(ROUNDS),
    })
}

/// Integer operations a second of all threads in dot products of bytes; none where the processor has no
/// instruction for them.
pub fn int8_peak() -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
        // SAFETY: the features were found just now.
        return Some(on_all_threads(|| unsafe { x86::int8(ROUNDS) }));
    }
    None
}

/// Operations a second of `work`, which returns how many it did, run on every thread at once.
fn on_all_threads(work: impl Fn() -> f64 + Sync + Send) -> f64 {
    // Once to wake all threads and raise their clocks, once to time.
    rayon::broadcast(|_| work());
    let start = Instant::now();
    let operations: f64 = rayon::broadcast(|_| work()).into_iter().sum();
    operations / start.elapsed().as_secs_f64()
}

fn read(isa: Isa, bytes: &[u8]) -> u64 {
    match isa.tier() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the tier is proven by the `Isa`.
        Tier::Avx512 | Tier::Avx512Bf16 => unsafe { x86::read_avx512(bytes) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Tier::Avx2 => unsafe { x86::read_avx2(bytes) },
        _ => read_body(bytes),
    }
}

/// The exclusive or of all whole runs of 256 bytes, folded to one word.
#[inline(always)]
fn read_body(bytes: &[u8]) -> u64 {
    let mut words = [0u64; 32];
    for chunk in bytes.chunks_exact(256) {
        for (word, bytes) in words.iter_mut().zip(chunk.chunks_exact(8)) {
            *word ^= u64::from_le_bytes(bytes.try_into().expect("a chunk of eight bytes"));
        }
    }
    words.into_iter().fold(0, |a, b| a ^ b)
}

fn portable(rounds: usize) -> f64 {
    let mut sums = [1.0f32; 64];
    let factor = black_box(0.999_f32);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = *sum * factor + 1.0;
        }
    }
    black_box(sums);
    (2 * sums.len() * rounds) as f64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{
        arch::x86_64::{
            __m512bh, __m512i, _mm256_fmadd_ps, _mm256_set1_ps, _mm512_dpbf16_ps, _mm512_dpbusd_epi32,
            _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_set1_epi8, _mm512_set1_epi16, _mm512_set1_ps,
            _mm512_setzero_ps, _mm512_setzero_si512, _mm512_xor_si512,
        },
        hint::black_box,
    };

    /// Independent accumulators: more than latency times throughput of any unit so far.
    const ACCUMULATORS: usize = 14;

    #[target_feature(enable = "avx512f")]
    pub(super) fn read_avx512(bytes: &[u8]) -> u64 {
        let mut words = [_mm512_setzero_si512(); 4];
        for chunk in bytes.chunks_exact(256) {
            for (i, word) in words.iter_mut().enumerate() {
                // SAFETY: 64 bytes from 64 · i on lie inside the chunk of 256.
                let bytes = unsafe { _mm512_loadu_si512(chunk.as_ptr().add(64 * i).cast()) };
                *word = _mm512_xor_si512(*word, bytes);
            }
        }
        // SAFETY: 512 bits of any kind are eight words.
        let words: [[u64; 8]; 4] = unsafe { std::mem::transmute(words) };
        words.as_flattened().iter().fold(0, |a, b| a ^ b)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn read_avx2(bytes: &[u8]) -> u64 {
        super::read_body(bytes)
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16_pairs(rounds: usize) -> f64 {
        // SAFETY: 512 bits without invalid patterns.
        let ones = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi16(0x3f80)) };
        let mut sums = [_mm512_setzero_ps(); ACCUMULATORS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, ones, ones);
            }
        }
        black_box(sums);
        (64 * ACCUMULATORS * rounds) as f64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8(rounds: usize) -> f64 {
        let ones = _mm512_set1_epi8(1);
        let mut sums = [_mm512_setzero_si512(); ACCUMULATORS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, ones, ones);
            }
        }
        black_box(sums);
        (128 * ACCUMULATORS * rounds) as f64
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn f32_avx512(rounds: usize) -> f64 {
        let factor = _mm512_set1_ps(black_box(0.999));
        let mut sums = [factor; ACCUMULATORS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        (32 * ACCUMULATORS * rounds) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn f32_avx2(rounds: usize) -> f64 {
        let factor = _mm256_set1_ps(black_box(0.999));
        let mut sums = [factor; ACCUMULATORS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        (16 * ACCUMULATORS * rounds) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_probe_gives_a_finite_positive_rate() {
        let buffer = vec![1u8; 3 << 20];
        for isa in Isa::available() {
            for rate in [read_bandwidth(isa, &buffer), bf16_peak(isa)] {
                assert!(rate.is_finite() && rate > 0.0, "{} {rate}", isa.tier());
            }
        }
        assert!(int8_peak().is_none_or(|rate| rate.is_finite() && rate > 0.0));
    }

    #[test]
    fn reading_visits_every_byte_that_fills_a_chunk() {
        for position in 0..512 {
            let mut bytes = vec![0u8; 512];
            bytes[position] = 1;
            for isa in Isa::available() {
                assert_ne!(read(isa, &bytes), 0, "byte {position} on {}", isa.tier());
            }
        }
    }
}
