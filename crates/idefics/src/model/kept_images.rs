//! What a frozen tower makes of pictures, kept while others learn from it: it is the same in every step.

use std::collections::HashMap;

use super::ModelError;
use crate::{
    ops::{self, Tensor},
    processor::{ImageHash, PixelValues},
};

/// Vectors of pictures that no trained weight has touched, by the pictures' content: the resampler's `[L, E]` where
/// it is frozen too, else the tower's `[P, E]`. They belong to one model with one set of frozen weights.
///
/// The first pictures stay. Samples come in another order each time, so that none is likelier to come next, and
/// making room would only cost time.
pub struct KeptImages {
    vectors: HashMap<ImageHash, Tensor>,
    num_bytes: usize,
    limit: usize,
}

impl KeptImages {
    /// None yet, and at most `limit` bytes of them.
    pub fn new(limit: usize) -> Self {
        Self { vectors: HashMap::new(), num_bytes: 0, limit }
    }

    /// Bytes of what is kept.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// The vectors of each picture; `compute` makes those that are not there, laid end to end, with the number that
    /// each picture has.
    pub(super) fn of(
        &mut self,
        images: &[&PixelValues],
        compute: impl FnOnce(&[&PixelValues]) -> Result<(Tensor, Vec<usize>), ModelError>,
    ) -> Result<(Tensor, Vec<usize>), ModelError> {
        if self.limit == 0 {
            return compute(images);
        }
        let is_new = |image: &&&PixelValues| !self.vectors.contains_key(&image.content_hash());
        let missing: Vec<&PixelValues> = images.iter().filter(is_new).copied().collect();
        let mut made = Vec::with_capacity(missing.len());
        if !missing.is_empty() {
            let (hidden, lengths) = compute(&missing)?;
            let mut first = 0;
            for length in lengths {
                // A copy: a part of the whole would keep the whole.
                made.push(ops::concat_rows(&[&ops::rows(&hidden, first, length)?])?);
                first += length;
            }
        }
        let mut made_next = made.iter();
        let parts: Vec<&Tensor> = images
            .iter()
            .filter_map(|image| self.vectors.get(&image.content_hash()).or_else(|| made_next.next()))
            .collect();
        let lengths = parts.iter().map(|part| Ok(ops::dims2(part)?.0)).collect::<ops::Result<_>>()?;
        let hidden = ops::concat_rows(&parts)?;
        for (image, vectors) in missing.iter().zip(made) {
            self.keep(image.content_hash(), vectors)?;
        }
        Ok((hidden, lengths))
    }

    fn keep(&mut self, hash: ImageHash, vectors: Tensor) -> ops::Result<()> {
        let (rows, width) = ops::dims2(&vectors)?;
        let bytes = rows * width * size_of::<f32>();
        if self.num_bytes + bytes <= self.limit && self.vectors.insert(hash, vectors).is_none() {
            self.num_bytes += bytes;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(value: u8) -> PixelValues {
        PixelValues::new(vec![f32::from(value); 3], 1, 1)
    }

    #[test]
    fn a_picture_is_computed_once_and_stays_while_there_is_room() {
        let mut kept = KeptImages::new(3 * 8);
        let asked = |kept: &mut KeptImages, values: &[u8]| -> (Vec<f32>, Vec<u8>) {
            let pictures: Vec<PixelValues> = values.iter().map(|value| picture(*value)).collect();
            let mut computed = Vec::new();
            let (hidden, lengths) = kept
                .of(&pictures.iter().collect::<Vec<_>>(), |missing| {
                    computed.extend(missing.iter().map(|image| image.data[0] as u8));
                    let rows = missing.iter().flat_map(|image| [image.data[0], -image.data[0]]).collect();
                    Ok((ops::tensor(rows, &[missing.len(), 2])?, vec![1; missing.len()]))
                })
                .unwrap();
            assert_eq!(lengths, vec![1; values.len()]);
            (ops::to_vec(&hidden).unwrap(), computed)
        };
        assert_eq!(asked(&mut kept, &[1, 2]), (vec![1., -1., 2., -2.], vec![1, 2]));
        assert_eq!(asked(&mut kept, &[3, 1, 4, 2]).1, [3, 4], "3 and 4 are new");
        assert_eq!(kept.num_bytes(), 3 * 8, "there was room for 3");
        let (hidden, computed) = asked(&mut kept, &[4, 3, 2]);
        assert_eq!((hidden, computed), (vec![4., -4., 3., -3., 2., -2.], vec![4]));
        let mut none = KeptImages::new(0);
        asked(&mut none, &[1]);
        assert_eq!(asked(&mut none, &[1]).1, [1], "nothing is kept without room");
    }
}
