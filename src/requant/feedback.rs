//! Quantising with error feedback.
//!
//! Columns that are still to be rounded compensate the rounding error of one block of columns (GPTQ's idea,
//! at the granularity of ggml's blocks).

use super::{Quantised, output_type};
use crate::ggml::{GgmlError, Type};
use crate::model::Matrix;
use crate::numeric::{Cholesky, SymMatrix};
use crate::prune::{Singular, dense, factor};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Accum, Mat, Par};

/// Reason why quantising failed.
#[derive(Debug, thiserror::Error)]
pub enum FeedbackError {
    /// The Gram matrix cannot be factored.
    #[error(transparent)]
    Singular(#[from] Singular),
    /// ggml cannot encode the type.
    #[error(transparent)]
    Ggml(#[from] GgmlError),
    /// New values are this many times as large as the old ones.
    #[error("new values are {0:.0} times as large as those before")]
    Grown(f32),
}

/// Encodes `m` `[n_out, n_in]` in `wanted` or its fallback with a small error of its outputs over the
/// calibration tokens.
///
/// Column j of `m` is the input `keep[j]` of the Gram matrix `gram`. Blocks of columns are rounded from the
/// last to the first, each by ggml's own quantiser with the curvature of the loss as importance. Where a block
/// of `old`, the same matrix before it moved, is nearer to what is wanted than the block by the quantiser, it
/// keeps its bytes. Types without blocks are written plainly, since they round very little.
///
/// # Errors
/// [`FeedbackError`] if the Gram matrix is degenerate or ggml cannot encode the type.
pub fn quantise_with_feedback(
    m: &Matrix,
    gram: &SymMatrix,
    keep: &[usize],
    ridge: f64,
    wanted: Type,
    old: Option<&Quantised>,
) -> Result<Quantised, FeedbackError> {
    let ty = output_type(wanted, m.n_in);
    let old = old.filter(|old| (old.ty, old.n_in, old.n_out) == (ty, m.n_in, m.n_out));
    let old = old.map(|old| Ok::<_, GgmlError>((old, old.to_matrix()?))).transpose()?;
    let width = ty.block_size();
    if width == 1 {
        return Ok(Quantised::new(ty, m.n_in, m.n_out, ty.quantize(&m.data, m.n_in, None)?));
    }
    let row_bytes = ty.row_bytes(m.n_in);
    let mut bytes = vec![0u8; row_bytes * m.n_out];
    let mut rounding = Rounding::new(m, gram, keep, ridge)?;
    while rounding.left > 0 {
        let (k, start) = (width, rounding.left - width);
        let tail = rounding.wanted(k);
        let importance: Vec<f32> = rounding.curvature(k).into_iter().map(|c| c as f32).collect();
        let rows: Vec<f32> =
            (0..m.n_out).flat_map(|i| (0..k).map(move |j| (i, j))).map(|at| tail[at] as f32).collect();
        let mut encoded = ty.quantize(&rows, k, Some(&importance))?;
        let mut decoded = vec![0.0; rows.len()];
        ty.dequantize(&encoded, k, &mut decoded)?;
        let (offset, size) = (ty.row_bytes(start), ty.row_bytes(k));
        if let Some((old, values)) = &old {
            let cost = |row: &[f32], i: usize| -> f32 {
                let off = row.iter().zip(&rows[i * k..]).map(|(a, b)| (a - b).powi(2));
                off.zip(&importance).map(|(off, c)| off * c).sum()
            };
            for i in 0..m.n_out {
                let before = &values.data[i * m.n_in + start..][..k];
                if cost(before, i) <= cost(&decoded[i * k..][..k], i) {
                    decoded[i * k..][..k].copy_from_slice(before);
                    encoded[i * size..][..size].copy_from_slice(&old.bytes[i * row_bytes + offset..][..size]);
                }
            }
        }
        for (row, block) in bytes.chunks_exact_mut(row_bytes).zip(encoded.chunks_exact(size)) {
            row[offset..offset + size].copy_from_slice(block);
        }
        rounding.settle(&Mat::from_fn(m.n_out, k, |i, j| f64::from(decoded[i * k + j])));
    }
    Ok(Quantised::new(ty, m.n_in, m.n_out, bytes))
}

/// Map W at the minimum of a quadratic loss with curvature H + λI = L Lᵀ, whose columns are fixed from the
/// last to the first.
///
/// The loss of a change Δ is ‖Δ L‖², and L is lower triangular. Earlier columns can therefore undo the
/// contribution of later ones to their own columns of Δ L (Babai's nearest plane algorithm, to which GPTQ
/// is equivalent). One factor of the whole matrix is enough.
struct Rounding {
    w: Mat<f64>,
    factor: Cholesky,
    /// Δ `[n_out, n_in]`; columns before `left` are still zero.
    change: Mat<f64>,
    left: usize,
}

impl Rounding {
    fn new(w: &Matrix, gram: &SymMatrix, keep: &[usize], ridge: f64) -> Result<Rounding, Singular> {
        assert_eq!(w.n_in, keep.len());
        let scale = keep.iter().map(|&j| gram.get(j, j)).sum::<f64>() / keep.len() as f64;
        let (factor, _) = factor(gram, Some(keep), ridge, scale)?;
        let change = Mat::zeros(w.n_out, w.n_in);
        Ok(Rounding { w: dense::<f64>(w), factor, change, left: w.n_in })
    }

    /// Target values of the last `k` unfixed columns that compensate the columns behind them: `[n_out, k]`.
    fn wanted(&self, k: usize) -> Mat<f64> {
        let (start, end) = (self.left - k, self.left);
        let behind = self.w.ncols() - end;
        let mut undo = Mat::zeros(self.w.nrows(), k);
        let (change, below) =
            (self.change.subcols(end, behind), self.factor.lower().submatrix(end, start, behind, k));
        matmul(undo.as_mut(), Accum::Replace, change, below, -1.0, Par::rayon(0));
        // Solves X L_kk = undo by its transpose.
        let mut x = undo.transpose().to_owned();
        let corner = self.factor.lower().submatrix(start, start, k, k);
        solve_upper_triangular_in_place(corner.transpose(), x.as_mut(), Par::Seq);
        self.w.subcols(start, k) + x.transpose()
    }

    /// Cost of an error in each of the last `k` unfixed columns after the earlier ones compensate it as
    /// well as they can: the diagonal of L_kk L_kkᵀ.
    fn curvature(&self, k: usize) -> Vec<f64> {
        let (start, l) = (self.left - k, self.factor.lower());
        (start..self.left).map(|i| (start..=i).map(|j| l[(i, j)].powi(2)).sum()).collect()
    }

    /// Fixes the last unfixed columns at `values` `[n_out, k]`.
    fn settle(&mut self, values: &Mat<f64>) {
        let k = values.ncols();
        self.left -= k;
        let change = values - self.w.subcols(self.left, k);
        self.change.subcols_mut(self.left, k).copy_from(&change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use faer::Side;
    use faer::linalg::solvers::{DenseSolveCore, Solve};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn columns_before_make_up_for_those_behind() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for (n, m, k) in [(6, 2, 1), (12, 3, 4), (40, 5, 8)] {
            let x = Mat::<f64>::from_fn(3 * n, n, |_, _| rng.random::<f64>() - 0.4);
            let h = x.transpose() * &x;
            let gram = SymMatrix::from_fn(n, |i, j| h[(i, j)]);
            let w = Matrix::new(n, m, (0..n * m).map(|_| rng.random::<f32>() - 0.5).collect());
            let all: Vec<usize> = (0..n).collect();
            let mut rounding = Rounding::new(&w, &gram, &all, 0.0).unwrap();
            let mut settled = Mat::<f64>::zeros(m, n);
            while rounding.left > 0 {
                let left = rounding.left;
                // The minimum over all unfixed columns from its own equations: Δ_lead H_ll = -Δ_tail H_tl.
                let lead = h.submatrix(0, 0, left, left).llt(Side::Lower).unwrap();
                let tail = Mat::from_fn(m, n - left, |i, j| {
                    settled[(i, left + j)] - f64::from(w.data[i * n + left + j])
                });
                let pull = tail * h.submatrix(left, 0, n - left, left);
                let change = lead.solve(pull.transpose());
                // The cost of errors in the last k when the others before them are free: ([H_ll⁻¹]_kk)⁻¹.
                let inverse = lead.inverse();
                let cost = inverse
                    .submatrix(left - k, left - k, k, k)
                    .to_owned()
                    .llt(Side::Lower)
                    .unwrap()
                    .inverse();
                let (wanted, curvature) = (rounding.wanted(k), rounding.curvature(k));
                for j in 0..k {
                    let at = left - k + j;
                    assert!((curvature[j] / cost[(j, j)] - 1.0).abs() < 1e-9, "{n} {left}: {}", curvature[j]);
                    for i in 0..m {
                        let expected = f64::from(w.data[i * n + at]) - change[(at, i)];
                        assert!(
                            (wanted[(i, j)] - expected).abs() < 1e-9,
                            "{n} {left}: {} {expected}",
                            wanted[(i, j)]
                        );
                    }
                }
                let rounded = Mat::from_fn(m, k, |i, j| (wanted[(i, j)] * 8.0).round() / 8.0);
                settled.subcols_mut(left - k, k).copy_from(&rounded);
                rounding.settle(&rounded);
            }
        }
    }
}
