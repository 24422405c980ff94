//! Quantising of a changed matrix.

use super::FeedbackError;
use crate::ggml::{GgmlError, Type};
use crate::model::Matrix;
use crate::spill::{SpillStore, SpillVec};
use std::sync::Arc;

/// Matrix as it is written to the file.
#[derive(Clone, Debug)]
pub struct Quantised {
    /// Element type.
    pub ty: Type,
    /// Number of columns, ne\[0\].
    pub n_in: usize,
    /// Number of rows, ne\[1\].
    pub n_out: usize,
    /// Encoded rows.
    pub bytes: Arc<SpillVec<u8>>,
}

impl Quantised {
    /// Wraps rows of `n_in` elements that are encoded in `ty`.
    pub fn new(ty: Type, n_in: usize, n_out: usize, bytes: Vec<u8>) -> Quantised {
        Quantised { ty, n_in, n_out, bytes: Arc::new(bytes.into()) }
    }

    /// Moves the bytes to `spill`.
    ///
    /// # Errors
    /// Returns the system's error if a file cannot be made or the disk is full.
    pub fn on(self, spill: &SpillStore) -> std::io::Result<Quantised> {
        if spill.is_memory() {
            return Ok(self);
        }
        Ok(Quantised { bytes: Arc::new(spill.put(self.bytes.to_vec())?), ..self })
    }

    /// Values that a reader of the file sees.
    ///
    /// # Errors
    /// [`GgmlError`] if ggml cannot decode the type.
    pub fn to_matrix(&self) -> Result<Matrix, GgmlError> {
        let mut data = vec![0.0; self.n_in * self.n_out];
        self.ty.dequantize(&self.bytes, self.n_in, &mut data)?;
        Ok(Matrix::new(self.n_in, self.n_out, data))
    }
}

/// Largest growth of the largest value that a repair may cause; beyond it the new matrix is rejected.
const MOST_GROWTH: f32 = 1e3;

/// Decodes `q` if its values are at most a thousand times as large as those of `old`, which they replace.
///
/// # Errors
/// [`FeedbackError::Grown`] if they are larger, or [`FeedbackError::Ggml`].
pub fn within_reason(q: &Quantised, old: &Matrix) -> Result<Matrix, FeedbackError> {
    let new = q.to_matrix()?;
    let largest = |m: &Matrix| m.data.iter().fold(0f32, |most, v| most.max(v.abs()));
    let (before, now) = (largest(old), largest(&new));
    // A zero matrix may get any values.
    if before == 0.0 || now <= MOST_GROWTH * before {
        Ok(new)
    } else {
        Err(FeedbackError::Grown(now / before))
    }
}

/// Type in which a tensor of type `wanted` can be written with rows of `n_per_row` elements.
///
/// This is `wanted` itself if rows are whole blocks and ggml can encode it. Otherwise it is
/// llama-quantize's fallback (`tensor_type_fallback` in `src/llama-quant.cpp`), else F16.
pub fn output_type(wanted: Type, n_per_row: usize) -> Type {
    let fits = |t: Type| n_per_row.is_multiple_of(t.block_size()) && t.can_quantize();
    if fits(wanted) {
        return wanted;
    }
    let fallback = match wanted.name() {
        "iq1_s" | "iq1_m" | "iq2_xxs" | "iq2_xs" | "iq2_s" | "iq3_xxs" | "iq3_s" | "iq4_xs" => Type::IQ4_NL,
        "q2_0" | "q2_K" | "q3_K" | "tq1_0" | "tq2_0" => Type::Q4_0,
        "q4_K" => Type::Q5_0,
        "q5_K" => Type::Q5_1,
        "q6_K" => Type::Q8_0,
        _ => Type::F16,
    };
    if fits(fallback) { fallback } else { Type::F16 }
}

/// Encodes `m` in `wanted` or its fallback.
/// `importance[j]` weighs the error of column j: the mean of x_j² over calibration tokens, as in
/// llama.cpp's importance matrix.
///
/// # Errors
/// [`GgmlError`] if ggml cannot encode it.
pub fn quantise(m: &Matrix, wanted: Type, importance: &[f32]) -> Result<Quantised, GgmlError> {
    let ty = output_type(wanted, m.n_in);
    let bytes = ty.quantize(&m.data, m.n_in, Some(importance))?;
    Ok(Quantised::new(ty, m.n_in, m.n_out, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_all_proportion_are_refused() {
        let of = |values: Vec<f32>| Matrix::new(2, 2, values);
        let old = of(vec![0.5, -1.0, 0.25, 0.0]);
        for (largest, fine) in [(0.1, true), (900.0, true), (1100.0, false), (f32::INFINITY, false)] {
            let bytes = bytemuck::cast_slice(&[0.0, largest, 0.1, 0.0]).to_vec();
            assert_eq!(
                within_reason(&Quantised::new(Type::F32, 2, 2, bytes), &old).is_ok(),
                fine,
                "{largest}"
            );
        }
        let written = quantise(&old, Type::F32, &[1.0; 2]).unwrap();
        assert!(within_reason(&written, &of(vec![0.0; 4])).is_ok());
    }
}
