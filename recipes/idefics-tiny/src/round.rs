//! One type for all weights.
//!
//! Training keeps frozen weights as they came, in `f32`, beside trained ones in bf16. transformers cannot compute with
//! such a mixture once the matrices are packed.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use half::bf16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

const WEIGHTS: &str = "model.safetensors";

/// Copies the model in `source` to `out`, with weights in bf16.
pub(crate) fn round(source: &Path, out: &Path) -> Result<()> {
    if out.exists() {
        fs::remove_dir_all(out).with_context(|| format!("removing {}", out.display()))?;
    }
    fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    for entry in fs::read_dir(source).with_context(|| format!("reading {}", source.display()))? {
        let entry = entry?;
        if entry.file_name() != WEIGHTS {
            fs::copy(entry.path(), out.join(entry.file_name()))?;
        }
    }
    let path = source.join(WEIGHTS);
    let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| format!("reading {}", path.display()))?;
    let rounded = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let data = match view.dtype() {
                Dtype::BF16 => view.data().to_vec(),
                Dtype::F32 => {
                    let values = bytemuck::pod_collect_to_vec::<u8, f32>(view.data());
                    values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
                }
                other => anyhow::bail!("{name}: expected f32 or bf16, got {other:?}"),
            };
            Ok((name, view.shape().to_vec(), data))
        })
        .collect::<Result<Vec<_>>>()?;
    ensure!(!rounded.is_empty(), "{} has no weights", path.display());
    let views = rounded
        .iter()
        .map(|(name, shape, data)| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), data)?)))
        .collect::<Result<Vec<_>>>()?;
    let path = out.join(WEIGHTS);
    safetensors::serialize_to_file(views, None, &path).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_weights_are_of_one_type_and_other_files_are_kept() {
        let folder = std::env::temp_dir().join(format!("idefics-tiny-round-{}", std::process::id()));
        let (source, out) = (folder.join("source"), folder.join("out"));
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("config.json"), "{}").unwrap();
        let wide: Vec<u8> = [1.0_f32, 1.001].iter().flat_map(|value| value.to_le_bytes()).collect();
        let narrow = bf16::from_f32(-3.0).to_le_bytes();
        let views = [
            ("wide", TensorView::new(Dtype::F32, vec![2], &wide).unwrap()),
            ("narrow", TensorView::new(Dtype::BF16, vec![1], &narrow).unwrap()),
        ];
        safetensors::serialize_to_file(views, None, &source.join(WEIGHTS)).unwrap();

        round(&source, &out).unwrap();

        assert_eq!(fs::read_to_string(out.join("config.json")).unwrap(), "{}");
        let bytes = fs::read(out.join(WEIGHTS)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let wide = file.tensor("wide").unwrap();
        assert_eq!((wide.dtype(), wide.shape()), (Dtype::BF16, &[2][..]));
        assert_eq!(wide.data(), [1.0_f32, 1.0].map(|value| bf16::from_f32(value).to_le_bytes()).concat());
        assert_eq!(file.tensor("narrow").unwrap().data(), narrow);
        fs::remove_dir_all(folder).unwrap();
    }
}
