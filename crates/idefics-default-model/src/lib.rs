//! `models/idefics-tiny`, the model that the command `idefics` uses when none is named, as a part of the program.
//!
//! A crate of its own, with nothing but bytes in it: it is compiled once, beside the others, and again only when the
//! model changes.

/// The numbers in the weights are read where they are, so they have to be aligned; `include_bytes!` alone promises
/// nothing.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// A list of names and bytes from names and paths.
macro_rules! embed {
    ($($name:literal: $path:literal,)*) => {
        &[$(($name, {
            static FILE: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
            &FILE.0
        })),*]
    };
}

/// What the model is called, for people and for clients of the server.
pub const NAME: &str = "idefics-tiny";

/// Name and bytes of each file, as a checkpoint directory has them; the bytes start at multiples of 64. Empty if the
/// program was built from a tree without the model.
pub static FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/files.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_whole_and_aligned() {
        let size = |name: &str| FILES.iter().find(|(file, _)| *file == name).map(|(_, bytes)| bytes.len());
        for name in ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"] {
            assert!(size(name).is_some_and(|bytes| bytes > 0), "{name} is not in the program");
        }
        for (name, bytes) in FILES {
            assert!(bytes.as_ptr().addr().is_multiple_of(64), "{name}");
        }
        // What a repository can carry.
        let total: usize = FILES.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(total <= 32 << 20, "{total} bytes");
    }
}
