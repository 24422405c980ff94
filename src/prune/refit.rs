//! Least-squares refit of a linear map on its kept inputs.

use super::Singular;
use crate::model::Matrix;
use crate::numeric::{Cholesky, Moments, Real, SymMatrix};
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, Par};
use rayon::prelude::*;
use std::sync::Arc;

/// Number of factorisations that are tried, each with ten times the ridge of the one before.
const MAX_TRIES: i32 = 12;

/// Refitted map and the ridge that it needed.
#[derive(Clone, Debug)]
pub struct Refit {
    /// Weights `[n_out, keep.len()]`.
    pub weights: Matrix,
    /// Ridge in use, relative to the mean of H's diagonal; larger than requested if the factorisation
    /// needed it.
    pub ridge: f64,
}

/// Weights on the inputs `keep` that minimise Σ ‖x_keep W'ᵀ − (x Wᵀ + μ r)‖² + λ ‖W' − W_keep‖², with λ =
/// `ridge` · mean diag H.
///
/// This is equation 5 of the paper with two changes: the target includes the residual r, and λ pulls
/// towards the old weights. `moments` holds H = Σ x xᵀ and Σ x rᵀ over all inputs; `mu` weighs the residual
/// r.
///
/// # Errors
/// [`Singular`] if no ridge makes H_keep positive definite.
pub fn refit(w: &Matrix, moments: &Moments, mu: f64, keep: &[usize], ridge: f64) -> Result<Refit, Singular> {
    let (n, k) = (w.n_in, keep.len());
    let h = &moments.gram;
    let all = keep.iter().copied().eq(0..n);
    let (factored, ridge) = factor::<f64>(h, (!all).then_some(keep), ridge, h.mean_diagonal())?;
    // The unknown is the change of W_keep, one column per output. It has to explain the output of the
    // removed inputs, (x W_goneᵀ)ᵀ x_keep = W_gone H[gone, keep], and the residual.
    let mut change = vec![0.0; k * w.n_out];
    if mu != 0.0 {
        change.par_chunks_exact_mut(k).zip(moments.cross.par_chunks_exact(n)).for_each(|(column, cross)| {
            column.iter_mut().zip(keep).for_each(|(c, &j)| *c = mu * cross[j]);
        });
    }
    let mut rhs = MatMut::from_column_major_slice_mut(&mut change, k, w.n_out);
    if !all {
        let mut loads_fewer_heads = vec![false; n];
        keep.iter().for_each(|&j| loads_fewer_heads[j] = true);
        let gone: Vec<usize> = (0..n).filter(|&j| !loads_fewer_heads[j]).collect();
        let w_gone = Mat::from_fn(gone.len(), w.n_out, |b, i| f64::from(w.data[i * n + gone[b]]));
        let h_across = Mat::from_fn(k, gone.len(), |a, b| h.get(keep[a], gone[b]));
        matmul(rhs.as_mut(), Accum::Add, h_across.as_ref(), w_gone.as_ref(), 1.0, Par::rayon(0));
    }
    factored.solve_in_place(rhs);
    let mut weights = w.select_cols(keep);
    Arc::make_mut(&mut weights.data).par_iter_mut().zip(&change).for_each(|(w, c)| *w += *c as f32);
    if weights.data.iter().all(|v| v.is_finite()) { Ok(Refit { weights, ridge }) } else { Err(Singular) }
}

/// Increase of the bias after `new` on the inputs `keep` replaces `old`, `[n_out]`.
/// With it, the mean of the outputs is the old mean plus `mu` times the mean residual. `moments` are
/// centred.
pub fn bias_change(old: &Matrix, new: &Matrix, keep: &[usize], moments: &Moments, mu: f64) -> Vec<f32> {
    let dot = |row: &[f32], x: &mut dyn Iterator<Item = f64>| -> f64 {
        row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
    };
    (0..old.n_out)
        .map(|i| {
            let before = dot(&old.data[i * old.n_in..][..old.n_in], &mut moments.x.iter().copied());
            let after = dot(&new.data[i * new.n_in..][..new.n_in], &mut keep.iter().map(|&j| moments.x[j]));
            (mu * moments.r.get(i).copied().unwrap_or(0.0) + before - after) as f32
        })
        .collect()
}

/// Cholesky factor of H + ridge · scale · I on the inputs `keep`, or on all, and the ridge in use.
///
/// The ridge is raised until the factor exists. If H is zero, there is nothing to fit: the factor is that
/// of I, every change costs its squared norm, and the ridge is infinite.
pub(crate) fn factor<T: Real>(
    h: &SymMatrix,
    keep: Option<&[usize]>,
    ridge: f64,
    scale: f64,
) -> Result<(Cholesky<T>, f64), Singular> {
    if scale == 0.0 {
        return Cholesky::new(h, keep, 1.0).map(|factored| (factored, f64::INFINITY)).ok_or(Singular);
    }
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(Singular);
    }
    let mut ridge = ridge;
    for _ in 0..MAX_TRIES {
        if let Some(factored) = Cholesky::new(h, keep, ridge * scale) {
            return Ok((factored, ridge));
        }
        ridge = (ridge * 10.0).max(1e-10);
    }
    Err(Singular)
}
