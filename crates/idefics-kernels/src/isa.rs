//! Which instructions this processor has, as a value.

use std::{fmt, str::FromStr, sync::OnceLock};

/// Instruction set tiers that kernels are written for, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Plain Rust, any processor.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The above with the dot products of bf16 and of bytes (VNNI): no processor has one without the other.
    Avx512Bf16,
}

/// A tier that this processor has. Holding one is the proof: it can only be made by asking the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Tier);

impl Tier {
    /// All tiers, weakest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// The name that users read and write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tier {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|tier| tier.name() == name).ok_or_else(|| {
            format!("unknown kernel tier `{name}`; known: {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}

impl Isa {
    /// Plain Rust; always there.
    pub const PORTABLE: Self = Self(Tier::Portable);

    /// The named tier, if this processor has it.
    pub fn of(tier: Tier) -> Option<Self> {
        has(tier).then_some(Self(tier))
    }

    /// The strongest tier of this processor, or the weaker one that is [`asked`](Self::asked) for. What cannot be had
    /// is no reason to fail here: a program says so at its start.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let asked = Self::asked().ok().flatten();
            asked.or_else(|| Self::available().last()).unwrap_or(Self::PORTABLE)
        })
    }

    /// The tier that the environment variable `IDEFICS_ISA` names, for comparisons; none where it names none.
    ///
    /// # Errors
    /// A name that is unknown, or of a tier that this processor does not have.
    pub fn asked() -> Result<Option<Self>, String> {
        std::env::var_os("IDEFICS_ISA").map(|name| Self::named(&name.to_string_lossy())).transpose()
    }

    fn named(name: &str) -> Result<Self, String> {
        let known = || Self::available().map(|isa| isa.tier().name()).collect::<Vec<_>>().join(", ");
        Self::of(name.parse()?)
            .ok_or_else(|| format!("this processor has no kernel tier `{name}`, but {}", known()))
    }

    /// All tiers of this processor, weakest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Tier::ALL.into_iter().filter_map(Self::of)
    }

    /// The tier that is proven.
    pub fn tier(self) -> Tier {
        self.0
    }
}

#[cfg(target_arch = "x86_64")]
fn has(tier: Tier) -> bool {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match tier {
        Tier::Portable => true,
        Tier::Avx2 => avx2,
        Tier::Avx512 => avx512,
        Tier::Avx512Bf16 => {
            avx512 && is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni")
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has(tier: Tier) -> bool {
    tier == Tier::Portable
}

/// Stamps a routine once per tier. The body is a function `fn body<const FMA: bool>(…)` marked
/// `#[inline(always)]`, written as plain loops over slices; the compiler vectorises it with whatever the
/// surrounding `#[target_feature]` allows. `FMA` says whether `mul_add` is one instruction there.
macro_rules! multiversion {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        fn $name(isa: $crate::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) {
                    $body::<true>($($arg),*);
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) {
                    $body::<true>($($arg),*);
                }
                match isa.tier() {
                    $crate::Tier::Portable => {}
                    // SAFETY: an `Isa` of this tier exists only if the processor has the features.
                    $crate::Tier::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above; both tiers include the features enabled here.
                    $crate::Tier::Avx512 | $crate::Tier::Avx512Bf16 => return unsafe { avx512($($arg),*) },
                }
            }
            let _ = isa;
            $body::<false>($($arg),*);
        }
    };
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_list_the_known() {
        for tier in Tier::ALL {
            assert_eq!(tier.name().parse::<Tier>(), Ok(tier));
        }
        let message = Isa::named("Portable").unwrap_err();
        assert!(message.contains("Portable") && message.contains("avx512-bf16"), "{message}");
        for tier in Tier::ALL {
            match Isa::named(tier.name()) {
                Ok(isa) => assert_eq!((isa.tier(), Isa::of(tier)), (tier, Some(isa))),
                Err(message) => assert!(message.contains("but portable"), "{message}"),
            }
        }
    }

    #[test]
    fn every_processor_has_the_portable_tier_and_the_best_is_available() {
        assert_eq!(Isa::of(Tier::Portable), Some(Isa::PORTABLE));
        assert!(Isa::available().any(|isa| isa == Isa::best()));
    }
}
