//! Any bytes as a safetensors file: an error, or tensors that tile the file.
#![no_main]

use idefics::checkpoint::parse_header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let Ok(tensors) = parse_header(file) else { return };
    let mut end = tensors.first().map_or(file.len(), |tensor| tensor.bytes.start);
    for tensor in tensors {
        assert_eq!(tensor.bytes.start, end);
        assert!(tensor.bytes.end <= file.len());
        end = tensor.bytes.end;
    }
    assert_eq!(end, file.len());
});
