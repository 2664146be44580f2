//! What an operation keeps of its arguments for the way back.

use std::sync::Arc;

use half::bf16;
use idefics_kernels::{Matrix, rows};

use super::{Compute, Context, Result, Tensor};

/// The numbers of an argument. Where products round their factors to bf16, so are numbers that are kept, at half the
/// memory: to the products of the way back it is all the same, and what is computed from them is no coarser than
/// those. Residuals are not kept this way: norms and sums read them as they are.
pub(super) enum Kept {
    Whole(Tensor),
    Rounded(Arc<Vec<bf16>>),
}

impl Kept {
    pub(super) fn new(ctx: Context, x: &Tensor) -> Result<Self> {
        match (ctx.compute, &x.place) {
            // What is on no tape is not kept for long.
            (Compute::F32, _) | (_, None) => Ok(Self::Whole(x.without_tape())),
            (Compute::Bf16 | Compute::Int8, Some(place)) => {
                Ok(Self::Rounded(place.rounded(ctx, &x.elements()?)))
            }
        }
    }

    /// Lends them to a product that rounds them in any case.
    pub(super) fn with_matrix<R>(&self, work: impl FnOnce(Matrix<'_>) -> R) -> Result<R> {
        Ok(match self {
            Self::Whole(x) => work(Matrix::F32(&x.elements()?)),
            Self::Rounded(x) => work(Matrix::Bf16(x)),
        })
    }

    /// Lends the numbers of several arguments.
    pub(super) fn with_all<R>(kept: &[Self], work: impl FnOnce(&[&[f32]]) -> R) -> Result<R> {
        let wide: Vec<_> = kept
            .iter()
            .map(|kept| match kept {
                Self::Whole(_) => Vec::new(),
                Self::Rounded(x) => rows::widened(x),
            })
            .collect();
        let whole = kept
            .iter()
            .map(|kept| match kept {
                Self::Whole(x) => x.elements().map(Some),
                Self::Rounded(_) => Ok(None),
            })
            .collect::<Result<Vec<_>>>()?;
        let lent = whole.iter().zip(&wide).map(|(whole, wide)| whole.as_deref().unwrap_or(wide));
        Ok(work(&lent.collect::<Vec<_>>()))
    }
}
