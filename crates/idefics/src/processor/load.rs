//! From where a picture is to its pixels.

use std::{borrow::Cow, fs, io::Read, path::Path, sync::Arc};

use url::Url;

use super::{
    ImageSource,
    decode::{ExifOrientation, ImageLimits, RgbImage, decode},
    error::ImageError,
    fetch::{FetchPolicy, decode_data_uri, fetch},
};

/// Reads and decodes a picture, within the limits.
pub fn load_image(
    source: &ImageSource,
    limits: &ImageLimits,
    policy: &FetchPolicy,
    orientation: ExifOrientation,
) -> Result<Arc<RgbImage>, ImageError> {
    let bytes = match source {
        ImageSource::Rgb(image) => return Ok(image.clone()),
        ImageSource::Bytes(bytes) => Cow::Borrowed(bytes.as_ref()),
        ImageSource::Path(path) => Cow::Owned(read_file(path, limits.max_bytes)?),
        ImageSource::DataUri(uri) => Cow::Owned(decode_data_uri(uri, limits.max_bytes)?),
        ImageSource::Url(url) => {
            let max_bytes = policy.max_bytes.min(limits.max_bytes);
            Cow::Owned(fetch(url, &FetchPolicy { max_bytes, ..policy.clone() })?)
        }
    };
    decode(&bytes, limits, orientation).map(Arc::new)
}

/// A name for messages: without the query of an address, which may hold a secret, and without a picture's data.
pub(super) fn origin(source: &ImageSource) -> String {
    match source {
        ImageSource::Path(path) => path.display().to_string(),
        ImageSource::Url(address) => match Url::parse(address) {
            Ok(url) if url.has_host() => {
                format!("{}://{}{}", url.scheme(), url.host_str().unwrap_or_default(), url.path())
            }
            _ => "URL".to_owned(),
        },
        ImageSource::DataUri(_) => "data URI".to_owned(),
        ImageSource::Bytes(_) => "image bytes".to_owned(),
        ImageSource::Rgb(_) => "RGB image".to_owned(),
    }
}

fn read_file(path: &Path, max_bytes: usize) -> Result<Vec<u8>, ImageError> {
    // Asked before the file is opened: opening a pipe waits for its other end.
    let metadata = fs::metadata(path).map_err(ImageError::File)?;
    if !metadata.is_file() {
        return Err(ImageError::NotAFile);
    }
    let limit = max_bytes as u64;
    if metadata.len() > limit {
        return Err(ImageError::TooManyBytes { limit: max_bytes });
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(ImageError::File)?;
    // The file may have grown since; one byte more than allowed is enough for `decode` to refuse it.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(ImageError::File)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(source: &ImageSource) -> Result<Arc<RgbImage>, ImageError> {
        let limits = ImageLimits { max_bytes: 1000, ..ImageLimits::default() };
        load_image(source, &limits, &FetchPolicy::disabled(), ExifOrientation::Ignore)
    }

    #[test]
    fn every_source_is_read() {
        // A BMP of one pixel, blue 3, green 2, red 1.
        let mut bmp = b"BM\x3a\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\x18\0".to_vec();
        bmp.extend([0; 24]);
        bmp.extend([3, 2, 1, 0]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("picture-without-extension");
        fs::write(&path, &bmp).unwrap();
        let escaped = bmp.iter().fold(String::new(), |uri, b| uri + &format!("%{b:02x}"));
        let sources = [
            ImageSource::Path(path),
            ImageSource::Bytes(bmp.into()),
            ImageSource::DataUri(format!("data:image/bmp,{escaped}")),
            ImageSource::Rgb(Arc::new(RgbImage::new(1, 1, vec![1, 2, 3]).unwrap())),
        ];
        for source in sources {
            assert_eq!(load(&source).unwrap().data(), [1, 2, 3], "{source:?}");
        }
        let remote = load(&ImageSource::Url("http://h.example/".to_owned())).unwrap_err();
        assert_eq!(remote.to_string(), "fetching remote images is disabled");
    }

    #[test]
    fn files_that_cannot_be_pictures_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str, content: Option<&[u8]>, expected: &str| {
            let path = dir.path().join(name);
            if let Some(content) = content {
                fs::write(&path, content).unwrap();
            }
            assert_eq!(load(&ImageSource::Path(path)).unwrap_err().to_string(), expected, "{name}");
        };
        check("missing", None, "cannot read the image file");
        check("", None, "not a regular file");
        check("empty.png", Some(b""), "image is empty (zero bytes)");
        check("large.png", Some(&[0; 1001]), "image has more than 1000 bytes, the limit");
        check(
            "text.png",
            Some(b"hello"),
            "not an image in an accepted format (accepted: JPEG, PNG, WebP, GIF, BMP)",
        );
    }

    #[test]
    fn messages_name_the_source_without_secrets() {
        let url = |u: &str| origin(&ImageSource::Url(u.to_owned()));
        assert_eq!(url("https://user:pw@h.example:8443/a/b.png?token=1#x"), "https://h.example/a/b.png");
        assert_eq!(url("nonsense"), "URL");
        assert_eq!(origin(&ImageSource::DataUri("data:,secret".to_owned())), "data URI");
    }
}
