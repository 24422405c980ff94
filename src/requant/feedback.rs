//! Quantising with error feedback: what rounding one block of columns does wrong, the columns that are
//! still to be rounded make up for (GPTQ's idea, at the granularity of ggml's blocks).

use super::{Quantised, output_type};
use crate::ggml::{GgmlError, Type};
use crate::model::Matrix;
use crate::numeric::SymMatrix;
use crate::prune::{Obs, Singular};
use faer::Mat;

/// Why quantising failed.
#[derive(Debug, thiserror::Error)]
pub enum FeedbackError {
    /// The Gram matrix cannot be factored.
    #[error(transparent)]
    Singular(#[from] Singular),
    /// ggml cannot encode the type.
    #[error(transparent)]
    Ggml(#[from] GgmlError),
}

/// Encodes `m` `[n_in, n_out]`, whose inputs have the Gram matrix `gram`, in `wanted` or its fallback,
/// so that the error of its outputs over the calibration tokens is small. Blocks of columns are
/// rounded from the last to the first, each by ggml's own quantiser with the curvature of the loss
/// as importance. Types without blocks round so little that they are written plainly.
///
/// # Errors
/// [`FeedbackError`] if the Gram matrix is degenerate or ggml cannot encode the type.
pub fn quantise_with_feedback(
    m: &Matrix,
    gram: &SymMatrix,
    ridge: f64,
    wanted: Type,
) -> Result<Quantised, FeedbackError> {
    let ty = output_type(wanted, m.n_in);
    let width = ty.block_size();
    if width == 1 {
        return Ok(Quantised {
            ty,
            n_in: m.n_in,
            n_out: m.n_out,
            bytes: ty.quantize(&m.data, m.n_in, None)?,
        });
    }
    let row_bytes = ty.row_bytes(m.n_in);
    let mut bytes = vec![0u8; row_bytes * m.n_out];
    let mut obs = Obs::new(m, gram, ridge)?;
    while obs.alive() > 0 {
        let (k, start) = (width, obs.alive() - width);
        let tail = obs.tail(k);
        let importance: Vec<f32> = obs.tail_curvature(k).into_iter().map(|c| c as f32).collect();
        let rows: Vec<f32> =
            (0..m.n_out).flat_map(|i| (0..k).map(move |j| (i, j))).map(|at| tail[at] as f32).collect();
        let encoded = ty.quantize(&rows, k, Some(&importance))?;
        let mut decoded = vec![0.0; rows.len()];
        ty.dequantize(&encoded, k, &mut decoded)?;
        let (offset, size) = (ty.row_bytes(start), ty.row_bytes(k));
        for (row, block) in bytes.chunks_exact_mut(row_bytes).zip(encoded.chunks_exact(size)) {
            row[offset..offset + size].copy_from_slice(block);
        }
        obs.settle_tail(k, &Mat::from_fn(m.n_out, k, |i, j| f64::from(decoded[i * k + j])));
    }
    Ok(Quantised { ty, n_in: m.n_in, n_out: m.n_out, bytes })
}
