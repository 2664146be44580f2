//! `data:` URIs (RFC 2397): base64 or percent-encoded bytes in the address itself.

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use crate::processor::error::ImageError;

/// Accepts padding and its absence.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The bytes of a `data:` URI, at most `max_bytes`. The media type is not looked at: a picture says itself what it is.
pub fn decode_data_uri(uri: &str, max_bytes: usize) -> Result<Vec<u8>, ImageError> {
    let rest = strip_scheme(uri).ok_or(ImageError::DataUri("does not start with `data:`"))?;
    let (media_type, data) =
        rest.split_once(',').ok_or(ImageError::DataUri("has no comma before its data"))?;
    let is_base64 =
        media_type.rsplit_once(';').is_some_and(|(_, last)| last.trim().eq_ignore_ascii_case("base64"));
    // Checked on the text, before anything is allocated for its content.
    let too_long = if is_base64 { max_bytes / 3 * 4 + 8 } else { max_bytes };
    if data.len() / 3 > too_long || (is_base64 && unescaped_length(data) > too_long) {
        return Err(ImageError::TooManyBytes { limit: max_bytes });
    }
    let mut bytes = percent_decode(data).ok_or(ImageError::DataUri("has a broken percent escape"))?;
    if is_base64 {
        bytes.retain(|b| !b.is_ascii_whitespace());
        bytes = BASE64.decode(&bytes).map_err(|_| ImageError::DataUri("is not valid base64"))?;
    }
    if bytes.len() > max_bytes { Err(ImageError::TooManyBytes { limit: max_bytes }) } else { Ok(bytes) }
}

fn strip_scheme(uri: &str) -> Option<&str> {
    uri.get(..5).filter(|scheme| scheme.eq_ignore_ascii_case("data:")).map(|_| &uri[5..])
}

/// Characters that are left when escapes are undone and white space is dropped.
fn unescaped_length(data: &str) -> usize {
    let count = |wanted: fn(u8) -> bool| data.bytes().filter(|&b| wanted(b)).count();
    data.len().saturating_sub(2 * count(|b| b == b'%') + count(|b| b.is_ascii_whitespace()))
}

fn percent_decode(data: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(data.len());
    let mut rest = data.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'%' {
            let (digits, tail) = tail.split_at_checked(2)?;
            let digit = |d: u8| char::from(d).to_digit(16);
            bytes.push((digit(digits[0])? * 16 + digit(digits[1])?) as u8);
            rest = tail;
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        let cases: [(&str, &[u8]); 8] = [
            ("data:image/png;base64,AAEC", &[0, 1, 2]),
            ("data:image/png;base64,AAE=", &[0, 1]),
            ("data:image/png;base64,AAE", &[0, 1]),
            ("DATA:image/png;charset=x;BASE64,/+8%3D", &[255, 239]),
            ("data:;base64,AA\r\n EC", &[0, 1, 2]),
            ("data:,a%20b%ff", b"a b\xff"),
            ("data:text/plain;base64x,AAEC", b"AAEC"),
            ("data:,", b""),
        ];
        for (uri, expected) in cases {
            assert_eq!(decode_data_uri(uri, 100).unwrap(), expected, "{uri}");
        }
    }

    #[test]
    fn bad_uris_are_refused() {
        let cases = [
            ("dat", "data URI does not start with `data:`"),
            ("http://x/", "data URI does not start with `data:`"),
            ("data:image/png;base64", "data URI has no comma before its data"),
            ("data:;base64,A*A=", "data URI is not valid base64"),
            ("data:,%4", "data URI has a broken percent escape"),
            ("data:,%zz", "data URI has a broken percent escape"),
            ("datä:,x", "data URI does not start with `data:`"),
        ];
        for (uri, expected) in cases {
            assert_eq!(decode_data_uri(uri, 100).unwrap_err().to_string(), expected, "{uri}");
        }
    }

    #[test]
    fn the_limit_holds_for_both_forms() {
        let limit = 300;
        for (bytes, fits) in [(300, true), (301, false), (400, false), (4000, false)] {
            let base64 = format!("data:image/png;base64,{}", BASE64.encode(vec![7; bytes]));
            let percent = format!("data:,{}", "%41".repeat(bytes));
            let plain = format!("data:,{}", "A".repeat(bytes));
            for uri in [base64, percent, plain] {
                let result = decode_data_uri(&uri, limit);
                assert_eq!(result.is_ok(), fits, "{bytes} bytes");
                assert!(fits || matches!(result, Err(ImageError::TooManyBytes { limit: 300 })));
            }
        }
    }
}
