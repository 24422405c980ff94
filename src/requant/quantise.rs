//! Quantising a changed matrix.

use crate::ggml::{GgmlError, Type};
use crate::model::Matrix;
use crate::spill::{Array, Shelf};
use std::sync::Arc;

/// A matrix as it will stand in the file.
#[derive(Clone, Debug)]
pub struct Quantised {
    /// Element type.
    pub ty: Type,
    /// ne\[0\].
    pub n_in: usize,
    /// ne\[1\].
    pub n_out: usize,
    /// Encoded rows.
    pub bytes: Arc<Array<u8>>,
}

impl Quantised {
    /// Rows of `n_in` elements, encoded by `ty`.
    pub fn new(ty: Type, n_in: usize, n_out: usize, bytes: Vec<u8>) -> Quantised {
        Quantised { ty, n_in, n_out, bytes: Arc::new(bytes.into()) }
    }

    /// The same on a shelf.
    ///
    /// # Errors
    /// What the system says if a file cannot be made or the disk is full.
    pub fn on(self, shelf: &Shelf) -> std::io::Result<Quantised> {
        if shelf.is_memory() {
            return Ok(self);
        }
        Ok(Quantised { bytes: Arc::new(shelf.put(self.bytes.to_vec())?), ..self })
    }

    /// The values that a reader of the file will see.
    ///
    /// # Errors
    /// [`GgmlError`] if ggml cannot decode the type.
    pub fn to_matrix(&self) -> Result<Matrix, GgmlError> {
        let mut data = vec![0.0; self.n_in * self.n_out];
        self.ty.dequantize(&self.bytes, self.n_in, &mut data)?;
        Ok(Matrix::new(self.n_in, self.n_out, data))
    }
}

/// The type in which a tensor of type `wanted` can be written with rows of `n_per_row` elements:
/// itself where rows are whole blocks and ggml can encode it, else llama-quantize's fallback
/// (`tensor_type_fallback` in `src/llama-quant.cpp`), else F16.
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

/// Encodes `m` in `wanted` or its fallback. `importance[j]` weighs the error of column j (mean of x_j²
/// over calibration tokens, as llama.cpp's importance matrix).
///
/// # Errors
/// [`GgmlError`] if ggml cannot encode it.
pub fn quantise(m: &Matrix, wanted: Type, importance: &[f32]) -> Result<Quantised, GgmlError> {
    let ty = output_type(wanted, m.n_in);
    let bytes = ty.quantize(&m.data, m.n_in, Some(importance))?;
    Ok(Quantised::new(ty, m.n_in, m.n_out, bytes))
}
