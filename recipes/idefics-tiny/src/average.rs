//! The mean of the tower that was trained and of the one that its training began with.
//!
//! Tuning a tower to five designs makes it know things apart that it took for the same, and forget something of what
//! holds for all pictures. Halfway between the two weights both is there (WiSE-FT, Wortsman et al., 2022): of the things
//! in `held_out.txt`, which no training has named, the nearest picture of another design shows the same thing for 51 %
//! with the tower as it came, for 81 % as it was tuned, for 86 % with the mean. Tower and reader are tuned together once
//! more after that (`8-together`), and a quarter of the first is mixed in again: that is the tower that ships, and the
//! stages behind it teach the reader to read it.

use std::path::Path;

use anyhow::{Result, ensure};
use idefics::{adapter::Merger, checkpoint::DType};

use crate::{
    steps::Folders,
    vision::{read, save},
};

/// Writes the model in `from` into the folder `to`, as `f32`; `share` of its tower is that which training began with.
pub(crate) fn average(folders: &Folders, from: &Path, share: f32, to: &str) -> Result<()> {
    let out = folders.empty(to)?;
    Merger::open(from, &[])?.with_dtype(DType::F32).write(&out, &mut |_| ())?;
    let path = out.join("model.safetensors");
    let mut model = read(&path)?;
    for (name, origin) in read(&folders.work.join("vision/model.safetensors"))? {
        // What the resampler does not read, the tower has not.
        let Some(tuned) = model.get_mut(&format!("model.{name}")) else { continue };
        ensure!(tuned.shape == origin.shape, "{name}: {:?} and {:?}", tuned.shape, origin.shape);
        for (tuned, origin) in tuned.data.iter_mut().zip(origin.data) {
            *tuned += share * (origin - *tuned);
        }
    }
    save(&model, &path)
}
