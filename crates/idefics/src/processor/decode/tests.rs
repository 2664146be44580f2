use base64::{Engine, prelude::BASE64_STANDARD};

use super::*;

/// Name, (width, height), sum of all samples, sum of sample `k` times `k mod 251 + 1`, the encoded file.
type Row = (&'static str, (usize, usize), u64, u64, &'static str);

/// Small files and what Pillow 12.0.0 makes of them: opened, converted to RGBA and laid over white unless RGB.
#[rustfmt::skip]
const PICTURES: &[Row] = &[
    ("JPEG 4:2:0", (11, 9), 26_715, 2_813_886, "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0Hyc5PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjL/wAARCAAJAAsDASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAwb/xAAfEAABAwQDAQAAAAAAAAAAAAABAAMhAgQRcRQzNHL/xAAVAQEBAAAAAAAAAAAAAAAAAAAEBf/EABgRAAMBAQAAAAAAAAAAAAAAAAABMwID/9oADAMBAAIRAxEAPwCXZuiLYEUZiIQ89ymA2cbTM+YfJQPdtW1RzRgOU0f/2Q=="),
    ("JPEG 4:2:2 progressive", (11, 9), 26_722, 2_812_301, "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//wgARCAAJAAsDASEAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAAAgEE/8QAFQEBAQAAAAAAAAAAAAAAAAAAAAP/2gAMAwEAAhADEAAAAcUrJA//xAAYEAEBAAMAAAAAAAAAAAAAAAABABIhMf/aAAgBAQABBQIdZRxv/8QAFxEAAwEAAAAAAAAAAAAAAAAAAAExAv/aAAgBAwEBPwHMFD//xAAXEQEAAwAAAAAAAAAAAAAAAAAAATFB/9oACAECAQE/AdRb/8QAFBABAAAAAAAAAAAAAAAAAAAAIP/aAAgBAQAGPwIf/8QAGBAAAgMAAAAAAAAAAAAAAAAAAFEQETH/2gAIAQEAAT8hTLKHR//aAAwDAQACAAMAAAAQpv/EABURAQEAAAAAAAAAAAAAAAAAAAAx/9oACAEDAQE/EDN//8QAFhEBAQEAAAAAAAAAAAAAAAAAADEB/9oACAECAQE/EMpV/8QAHBAAAgICAwAAAAAAAAAAAAAAAAERMSFBUXGR/9oACAEBAAE/EGQa04IsJ/Sjplp//9k="),
    ("JPEG grey", (11, 9), 25_632, 2_692_916, "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//wAALCAAJAAsBAREA/8QAFgABAQEAAAAAAAAAAAAAAAAAAwIF/8QAIBAAAQMCBwAAAAAAAAAAAAAAAQACAxMUITIzQVFxkf/aAAgBAQAAPwDGjmNEEN24UXLhgGH1JHojoopM5X//2Q=="),
    ("JPEG CMYK", (5, 4), 4097, 127_920, "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwAGBAUGBQQGBgUGBwcGCAoQCgoJCQoUDg8MEBcUGBgXFBYWGh0lHxobIxwWFiAsICMmJykqKRkfLTAtKDAlKCko/8AAFAgABAAFBEMRAE0RAFkRAEsRAP/EABcAAAMBAAAAAAAAAAAAAAAAAAEFBgf/xAAhEAABBAIABwAAAAAAAAAAAAABAAIDERIhBAUGQVFhwf/aAA4EQwBNAFkASwAAPwDVupoGP5i8G9E9/dfFQTR5yvdm5pyI0UeHiDY6aSBd6rwEqMbI4YxiHCyNr//Z"),
    ("WebP lossy", (11, 9), 26_705, 2_817_745, "UklGRkIAAABXRUJQVlA4IDYAAADQAQCdASoLAAkAAoBCJZACdAEPSaOkoAD+3CpEN5a+cuEjx0SQxTE+/VOBc2sz7nvunl15oAA="),
    ("WebP lossy with alpha", (6, 5), 14_983, 689_061, "UklGRnAAAABXRUJQVlA4WAoAAAAQAAAABQAABAAAQUxQSB8AAAAAn6Kam5OMkKCQhpSZpZ2NiIWLkYaBjoWJi4J2fnx5AFZQOCAqAAAAsAEAnQEqBgAFAAKAQiWIAnQBDv4C7AD+3LQAGC25fGWugLPLsWnXGLgA"),
    ("WebP lossless", (6, 5), 14_956, 690_063, "UklGRrYAAABXRUJQVlA4TKkAAAAvBQABEO/AJgCANLh+fNaJ+uRw32qobSNJuWfm/Pvv7kMGhZFsM/9/mQZUql095AzbAADLxE5q3dw7O9lGxBJKFNSuO5CfqGK/x9ZzTbjwyyz8Ixl6otWcjIUsKvK9+I97JGcfvf9hjSO++j7K0JoPDyQKdBDxwThhxiHiicPmBTlnnfcdVoNJO1ZQGEmSGbt720ZE/4Mqu9cU8oTXmdO3Dk6MbwUwpvwBAA=="),
    ("GIF with a transparent colour", (11, 9), 38_801, 4_196_972, "R0lGODlhCwAJAIIAAE9ud09kdC5ofktZcUVMaShRdAAAAAAAACH5BAEAAAIALAAAAAALAAkAAAhDAAsIADAQQACDAwgKWAjAIIABAxYyPNgwQEIBAhsOsAhxgMCFAQIQGEmggECBEEmWNIlRJcmPAgIISLmS4UaRFgsEBAA7"),
    ("GIF frame smaller than its screen", (14, 9), 35_381, 3_710_270, "R0lGODdhDgAJAIIAAE9ud09kdC5ofktZcUVMaShRdAAAAAAAACwAAAAACwAJAAAIQwALCAAwEEAAgwMIClgIwCCAAQMWMjzYMEBCAQIbDrAIcYDAhQECEBhJoIBAgRBJljSJUSXJjwICCEi5kuFGkRYLBAQAOw=="),
    ("GIF of two frames", (11, 9), 27_065, 2_909_888, "R0lGODdhCwAJAIIAAE9ud09kdC5ofktZcUVMaShRdAAAAAAAACwAAAAACwAJAAAIQwALCAAwEEAAgwMIClgIwCCAAQMWMjzYMEBCAQIbDrAIcYDAhQECEBhJoIBAgRBJljSJUSXJjwICCEi5kuFGkRYLBAQAIfkEAQAABgAsAAAAAAsACQCCT253T2R0Lmh+S1lxRUxpKFF0AAAAAAAACEYADQwIQCBAgAEGBAgoUIAAgQEDBCRU2NChRQIFFjK8KHDhQgMcAyiUCBFiAAMAAHgEMDAlgAAqR0IEgDKmQpYnYapUaSAgADs="),
    ("PNG RGBA", (6, 5), 14_956, 690_063, "iVBORw0KGgoAAAANSUhEUgAAAAYAAAAFCAYAAABmWJ3mAAAAeUlEQVR4nAXBDQrCIBQA4L2ny0mUbGNB0M26TvfoeolR0+nw99X3we3+eM7zyPiwxqsdYPy9YqZzwqSkjX2jJfB95ca4ywQJywl7ExYZ1vbpsMmokDZjsYBDSse39kUzEX3h+4GB6GrdiBfQWQVR89cHl2qTlghqaH9vPEZyDq/SLwAAAABJRU5ErkJggg=="),
    ("PNG LA", (6, 5), 14_721, 678_918, "iVBORw0KGgoAAAANSUhEUgAAAAYAAAAFCAQAAADMUVVtAAAASElEQVR4nAXBUQ6AIAgAUCByba2v1rE6Y+dr9mNmwxToPdyPdWBxJPFKUwKDt8UZbeG8jeIKVJIF0us++YFA0Iz16z2XqmKqPxjuJU/9VbZgAAAAAElFTkSuQmCC"),
    ("PNG palette with alpha", (11, 9), 40_341, 3_905_739, "iVBORw0KGgoAAAANSUhEUgAAAAsAAAAJBAMAAAAWSsseAAAAElBMVEVPbndPZHQuaH5LWXFFTGkoUXQkwLvwAAAAA3RSTlMAZMhuWCD/AAAASklEQVR4nAE/AMD/AFICABATAAEiAN4QI+0EAP4Q8ODtBAP+8xMgHQItAg4xESAEADDhAAAAAgPTEQAA8AL9/c7vABACAP4f4c8AEn4S1zYi2wsAAAAASUVORK5CYII="),
    ("PNG 1 bit", (11, 9), 24_480, 2_675_970, "iVBORw0KGgoAAAANSUhEUgAAAAsAAAAJAQAAAADMH+uAAAAAJElEQVR4nGNUiWEMfc2o8odx0jtGTXEGFwYGoQUMHgxMdxcAAGYgB2Nkfv0GAAAAAElFTkSuQmCC"),
    ("PNG grey 2 bit, transparent 85", (9, 2), 8670, 213_945, "iVBORw0KGgoAAAANSUhEUgAAAAkAAAACAgAAAADljbGuAAAAAnRSTlMAVW2SaEMAAAAQSURBVHicY5B+4sAQynAAAAkcAlUt1bT0AAAAAElFTkSuQmCC"),
    ("PNG grey 8 bit, transparent 7 in the low byte", (3, 1), 816, 1866, "iVBORw0KGgoAAAANSUhEUgAAAAMAAAABCAAAAAA+i0toAAAAAnRSTlMBB/HsadoAAAAMSURBVHicY2Dn4AQAADIAGY/kHQYAAAAASUVORK5CYII="),
    ("PNG grey 16 bit", (4, 1), 1545, 14_610, "iVBORw0KGgoAAAANSUhEUgAAAAQAAAABEAAAAACMx4xSAAAAEUlEQVR4nGNgYGBgZWT4/x8AAyMCBVeY9AYAAAAASUVORK5CYII="),
    ("PNG RGB 16 bit", (2, 1), 385, 1284, "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABEAIAAAAr0DSeAAAAFUlEQVR4nGNgYGRk+P+/gYHxP0MDABWUBAFnOXXOAAAAAElFTkSuQmCC"),
    ("PNG RGB with tRNS", (2, 1), 21, 91, "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAIAAAB7QOjdAAAABnRSTlMAAQACAAPJS6v1AAAAD0lEQVR4nGNgZGJmYWUDAAA/ABYhutRUAAAAAElFTkSuQmCC"),
    ("PNG index beyond the palette", (4, 1), 210, 910, "iVBORw0KGgoAAAANSUhEUgAAAAQAAAABCAMAAADO4v//AAAABlBMVEUKFB4oMjzVG7TpAAAADUlEQVR4nGNgYGQ6AQAA1ADMBNvP7AAAAABJRU5ErkJggg=="),
    ("BMP 5-5-5", (3, 2), 2573, 24_720, "Qk1GAAAAAAAAADYAAAAoAAAAAwAAAAIAAAABABAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAh7LtW/uCAABeiyBWrHoAAA=="),
    ("BMP 5-6-5", (3, 2), 2160, 20_375, "Qk1SAAAAAAAAAEIAAAAoAAAAAwAAAAIAAAABABAAAwAAABAAAAAAAAAAAAAAAAAAAAAAAAAAAPgAAOAHAAAfAAAAh7LtW/uCAABeiyBWrHoAAA=="),
];

fn bytes_of(row: &Row) -> Vec<u8> {
    BASE64_STANDARD.decode(row.4).unwrap()
}

fn decode_plainly(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    decode(bytes, &ImageLimits::default(), ExifOrientation::Ignore)
}

#[test]
fn pictures_equal_pillow() {
    for row in PICTURES {
        let (name, size, sum, weighted, _) = row;
        let image = decode_plainly(&bytes_of(row)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((image.width(), image.height()), *size, "{name}");
        let samples = || image.data().iter().map(|&v| u64::from(v));
        assert_eq!(samples().sum::<u64>(), *sum, "{name}: sum");
        let got: u64 = samples().enumerate().map(|(k, v)| v * (k as u64 % 251 + 1)).sum();
        assert_eq!(got, *weighted, "{name}: weighted sum");
    }
}

#[test]
fn every_truncation_is_an_error_or_a_whole_picture() {
    for row in PICTURES {
        let bytes = bytes_of(row);
        let whole = decode_plainly(&bytes).unwrap();
        for length in 0..bytes.len() {
            // Trailers, paddings and later frames may be missing, pixels not.
            if let Ok(image) = decode_plainly(&bytes[..length]) {
                assert!(image == whole, "{} cut to {length} bytes", row.0);
            }
        }
        if row.0.starts_with("JPEG") {
            let error = decode_plainly(&bytes[..bytes.len() - 1]).unwrap_err();
            assert!(matches!(error, ImageError::Truncated(ImageFormat::Jpeg)), "{}: {error}", row.0);
        }
    }
}

#[test]
fn every_flipped_byte_is_survived() {
    for row in PICTURES {
        let bytes = bytes_of(row);
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[at] ^= flip;
                // Small limits: a flipped size may ask for gigabytes.
                let limits = ImageLimits { max_pixels: 10_000, ..ImageLimits::default() };
                if let Ok(image) = decode(&bad, &limits, ExifOrientation::Apply) {
                    assert!(image.width() * image.height() <= 10_000);
                }
            }
        }
    }
}

/// A PNG of one header chunk that announces `size` x `size` grey pixels.
fn png_header(size: u32) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
    bytes.extend(size.to_be_bytes());
    bytes.extend(size.to_be_bytes());
    bytes.extend([8, 0, 0, 0, 0]);
    let crc = crc32(&bytes[12..]);
    bytes.extend(crc.to_be_bytes());
    bytes.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e");
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    })
}

#[test]
fn bombs_are_refused_before_pixels_are_made() {
    let jpeg = bytes_of(&PICTURES[0]);
    let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    let mut huge_jpeg = jpeg;
    huge_jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xdc, 0xff, 0xdc]);
    let mut huge_gif = bytes_of(PICTURES.iter().find(|row| row.0.starts_with("GIF")).unwrap());
    huge_gif[6..10].copy_from_slice(&[0xff; 4]);
    let mut huge_bmp = bytes_of(PICTURES.last().unwrap());
    huge_bmp[18..26].copy_from_slice(&[0x60, 0xea, 0, 0, 0x60, 0xea, 0, 0]);

    for (name, bytes) in
        [("PNG", png_header(60_000)), ("JPEG", huge_jpeg), ("GIF", huge_gif), ("BMP", huge_bmp)]
    {
        let error = decode_plainly(&bytes).unwrap_err();
        assert!(matches!(error, ImageError::TooManyPixels { limit: 100_000_000, .. }), "{name}: {error:?}");
    }
    assert_eq!(
        decode_plainly(&png_header(60_000)).unwrap_err().to_string(),
        "PNG image of 60000x60000 pixels exceeds the limit of 100000000 pixels"
    );
}

#[test]
fn jpeg_scans_are_counted() {
    let limits = ImageLimits { max_jpeg_scans: 5, ..ImageLimits::default() };
    // Pillow writes progressive files of colour pictures in ten scans.
    let error = decode(&bytes_of(&PICTURES[1]), &limits, ExifOrientation::Ignore).unwrap_err();
    assert_eq!(error.to_string(), "JPEG image has 10 scans, the limit is 5");
    assert!(decode(&bytes_of(&PICTURES[0]), &limits, ExifOrientation::Ignore).is_ok());
}

#[test]
fn what_is_no_picture_is_refused() {
    assert_eq!(decode_plainly(b"").unwrap_err().to_string(), "image is empty (zero bytes)");
    for bytes in [&b"hello"[..], b"<svg xmlns=", b"II*\0\x08\0\0\0", b"\xff\xd8", b"%PDF-1.7", b"\0"] {
        assert_eq!(
            decode_plainly(bytes).unwrap_err().to_string(),
            "not an image in an accepted format (accepted: JPEG, PNG, WebP, GIF, BMP)"
        );
    }
    let limits = ImageLimits { max_bytes: 4, ..ImageLimits::default() };
    let error = decode(b"GIF89a", &limits, ExifOrientation::Ignore).unwrap_err();
    assert_eq!(error.to_string(), "image has more than 4 bytes, the limit");
}

#[test]
fn exif_orientation_is_applied_only_on_request() {
    // The first JPEG with an EXIF block that says 6, "turn a quarter to the right".
    let plain = bytes_of(&PICTURES[0]);
    let tiff = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let mut bytes = plain[..2].to_vec();
    bytes.extend([0xff, 0xe1, 0, tiff.len() as u8 + 2]);
    bytes.extend(tiff);
    bytes.extend(&plain[2..]);

    let stored = decode_plainly(&plain).unwrap();
    assert_eq!(decode_plainly(&bytes).unwrap(), stored);
    let upright = decode(&bytes, &ImageLimits::default(), ExifOrientation::Apply).unwrap();
    assert_eq!((upright.width(), upright.height()), (stored.height(), stored.width()));
    // The stored lower left corner comes to the upper left.
    let corner = &stored.data()[(stored.height() - 1) * stored.width() * 3..][..3];
    assert_eq!(&upright.data()[..3], corner);
}
