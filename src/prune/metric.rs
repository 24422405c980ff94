//! Metric on the outputs of a map, for outputs whose errors cost differently.

use super::refit::factor;
use super::{Singular, dense};
use crate::model::Matrix;
use crate::numeric::SymMatrix;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, Par};

/// Damping that is added to every output's cost, as a share of the mean cost.
/// A few samples leave directions unseen, and errors are too large for the first order alone to count.
const DAMPING: f64 = 0.01;

/// Quadratic form on outputs: an error e costs eᵀ F e.
pub struct Metric {
    /// R `[n, n]` with Rᵀ R = F.
    root: Mat<f64>,
}

impl Metric {
    /// Builds F = Σ s sᵀ over the rows s of `samples` `[n_samples, n]`, scaled to a mean diagonal of 1 and
    /// damped.
    /// If all samples are zero, all outputs cost alike.
    ///
    /// # Errors
    /// [`Singular`] if the samples are not finite.
    ///
    /// # Panics
    /// If `samples` is not made of whole rows.
    pub fn new(samples: &[f32], n: usize) -> Result<Metric, Singular> {
        assert!(n > 0 && samples.len().is_multiple_of(n));
        let s = Mat::from_fn(samples.len() / n, n, |t, i| f64::from(samples[t * n + i]));
        let mut f = Mat::<f64>::zeros(n, n);
        matmul(f.as_mut(), Accum::Replace, s.transpose(), s.as_ref(), 1.0, Par::rayon(0));
        let mean = f.diagonal().column_vector().sum() / n as f64;
        let mean = if mean == 0.0 { 1.0 } else { mean };
        let f = SymMatrix::from_fn(n, |i, j| f[(i, j)] / mean);
        let (factored, _) = factor::<f64>(&f, None, DAMPING, 1.0)?;
        Ok(Metric { root: factored.lower().transpose().to_owned() })
    }

    /// Product R W: the squares of its outputs are the costs of the outputs of `w`.
    ///
    /// # Panics
    /// If `w` has another number of outputs.
    pub fn apply(&self, w: &Matrix) -> Matrix {
        assert_eq!(w.n_out, self.root.nrows());
        let m = dense::<f64>(w);
        let mut product = Mat::zeros(w.n_out, w.n_in);
        matmul(product.as_mut(), Accum::Replace, self.root.as_ref(), m.as_ref(), 1.0, Par::rayon(0));
        let data = (0..w.data.len()).map(|i| product[(i / w.n_in, i % w.n_in)] as f32).collect();
        Matrix::new(w.n_in, w.n_out, data)
    }
}
