//! Which picture each token sees: the last one at or before it.
//!
//! Reference: transformers `processing_idefics.py`, `image_attention_mask_for_packed_input_ids_pt` and
//! `incremental_to_binary_attention_mask`. Surprising: after `</s>` a token sees nothing until the next image,
//! though the `</s>` itself still does and the count goes on; an image token behind which there is no picture
//! sees nothing either, and so do the tokens after it.

/// For each token, the picture it sees if there are `num_images`: `[T]`.
pub(super) fn image_index(ids: &[u32], image_id: u32, eos_id: u32, num_images: usize) -> Vec<Option<u32>> {
    let mut current: Option<u32> = None;
    let mut ended = false;
    ids.iter()
        .map(|&id| {
            if id == image_id {
                current = Some(current.map_or(0, |c| c + 1));
                ended = false;
            }
            let seen = current.filter(|&c| !ended && (c as usize) < num_images);
            ended |= id == eos_id;
            seen
        })
        .collect()
}

/// The same as one row of zeros and at most a one per token: `[T, num_images]`.
pub(super) fn one_hot(index: &[Option<u32>], num_images: usize) -> Vec<u8> {
    let mut mask = vec![0; index.len() * num_images];
    for (row, seen) in mask.chunks_exact_mut(num_images).zip(index) {
        if let Some(seen) = seen {
            row[*seen as usize] = 1;
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One character a token: `I` image, `$` end of document, anything else a word. `.` expects no picture.
    fn check(tokens: &str, num_images: usize, expected: &str) {
        let ids: Vec<u32> = tokens.bytes().map(u32::from).collect();
        let got: String = image_index(&ids, u32::from(b'I'), u32::from(b'$'), num_images)
            .into_iter()
            .map(|seen| seen.map_or('.', |i| char::from_digit(i, 10).unwrap()))
            .collect();
        assert_eq!(got, expected, "{tokens} with {num_images} images");
    }

    #[test]
    fn tokens_see_the_last_image() {
        check("sabc", 0, "....");
        check("sFIFabFIFc", 2, "..00000111");
        check("sFIFIFa", 2, "..00111");
        check("ppsFIFa", 1, "....000");
        check("sFIFapp", 1, "..00000");
    }

    #[test]
    fn the_end_of_a_document_hides_the_image() {
        check("IFa$bc", 1, "0000..");
        check("IFa$bcFIFd", 2, "0000...111");
        check("$aIb", 1, "..00");
        check("I$$aI", 2, "00..1");
    }

    #[test]
    fn image_tokens_without_a_picture_see_nothing() {
        check("aIbIcId", 1, ".00....");
        check("aIb", 0, "...");
        check("IaI$I", 2, "0011.");
    }

    // Rows from transformers 5.23.0: word 8 for the token around images, 9 for images, 2 for the end.
    #[test]
    fn masks_equal_the_reference() {
        let cases: [(&[u32], [[u8; 2]; 9]); 3] = [
            (
                &[1, 8, 9, 8, 5, 2, 6, 9, 7],
                [[0, 0], [0, 0], [1, 0], [1, 0], [1, 0], [1, 0], [0, 0], [0, 1], [0, 1]],
            ),
            (
                &[0, 0, 1, 9, 8, 9, 2, 2, 4],
                [[0, 0], [0, 0], [0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0]],
            ),
            (
                &[1, 9, 9, 2, 9, 0, 0, 0, 0],
                [[0, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]],
            ),
        ];
        for (ids, expected) in cases {
            assert_eq!(one_hot(&image_index(ids, 9, 2, 2), 2), expected.concat(), "{ids:?}");
        }
    }

    #[test]
    fn the_mask_has_a_column_for_each_image() {
        assert_eq!(one_hot(&[None, Some(1), Some(0)], 2), [0, 0, 0, 1, 1, 0]);
    }
}
