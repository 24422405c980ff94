//! Least-squares refit of a linear map on the inputs that stay.

use super::Singular;
use crate::model::Matrix;
use crate::numeric::{Moments, SymMatrix};
use faer::linalg::solvers::Solve;
use faer::{Mat, MatRef, Side};

/// Factorisations that are tried, each with ten times the ridge of the one before.
const MAX_TRIES: i32 = 12;

/// A refitted map and what it took.
#[derive(Clone, Debug)]
pub struct Refit {
    /// `[keep.len(), n_out]`.
    pub weights: Matrix,
    /// The ridge that was applied, relative to the mean of H's diagonal; more than was asked for
    /// where the factorisation needed it.
    pub ridge: f64,
}

/// Weights on the inputs `keep` that minimise
/// Σ ‖x_keep W'ᵀ − (x Wᵀ + μ r)‖² + λ ‖W' − W_keep‖², with λ = `ridge` · mean diag H: equation 5 of the
/// paper with a target beyond the map's own output and a pull towards the weights before. `moments`
/// holds H = Σ x xᵀ and Σ x rᵀ over all inputs; `mu` weighs the residual r.
///
/// # Errors
/// [`Singular`] if no ridge makes H_keep positive definite.
pub fn refit(w: &Matrix, moments: &Moments, mu: f64, keep: &[usize], ridge: f64) -> Result<Refit, Singular> {
    let (n, m, k) = (w.n_in, w.n_out, keep.len());
    let h = &moments.gram;
    let (llt, ridge) = factor(&h.select(keep), ridge, h.mean_diagonal())?;
    // The unknown is the change of W_keep: what is left to explain is the output of the inputs that go,
    // (x W_goneᵀ)ᵀ x_keep = W_gone H[gone, keep], and the residual.
    let stays: std::collections::HashSet<usize> = keep.iter().copied().collect();
    let gone: Vec<usize> = (0..n).filter(|j| !stays.contains(j)).collect();
    let w_gone = Mat::from_fn(gone.len(), m, |b, i| f64::from(w.data[i * n + gone[b]]));
    let h_across = Mat::from_fn(k, gone.len(), |a, b| h.data[keep[a] * n + gone[b]]);
    let mut rhs = &h_across * &w_gone;
    if mu != 0.0 {
        for i in 0..m {
            for (a, &j) in keep.iter().enumerate() {
                rhs[(a, i)] += mu * moments.cross[i * n + j];
            }
        }
    }
    let change = llt.solve(&rhs);
    let mut weights = w.select_cols(keep);
    for i in 0..m {
        for a in 0..k {
            weights.data[i * k + a] += change[(a, i)] as f32;
        }
    }
    if weights.data.iter().all(|v| v.is_finite()) { Ok(Refit { weights, ridge }) } else { Err(Singular) }
}

/// What the bias of a map must grow by once `new` on the inputs `keep` takes the place of `old`, for the
/// mean of its outputs to be what it was plus `mu` times the mean residual. `moments` are centred.
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

/// Cholesky factor of H + ridge · scale · I, with the ridge raised until it exists.
pub(crate) fn factor(
    h: &SymMatrix,
    ridge: f64,
    scale: f64,
) -> Result<(faer::linalg::solvers::Llt<f64>, f64), Singular> {
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(Singular);
    }
    let mut ridge = ridge;
    for _ in 0..MAX_TRIES {
        let damped = damped(h, ridge * scale);
        if let Ok(llt) = damped.llt(Side::Lower) {
            return Ok((llt, ridge));
        }
        ridge = (ridge * 10.0).max(1e-10);
    }
    Err(Singular)
}

/// H + λ I.
fn damped(h: &SymMatrix, lambda: f64) -> Mat<f64> {
    // Symmetric, so that rows are as good as columns.
    let mut damped = MatRef::from_column_major_slice(&h.data, h.n, h.n).to_owned();
    (0..h.n).for_each(|i| damped[(i, i)] += lambda);
    damped
}
