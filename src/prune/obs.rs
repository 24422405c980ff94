//! Optimal brain surgeon over blocks of inputs (Hassibi and Stork 1993; SlimGPT's algebra).

use super::refit::factor;
use super::{Singular, in_f64};
use crate::model::Matrix;
use crate::numeric::SymMatrix;
use faer::linalg::matmul::matmul;
use faer::linalg::solvers::{DenseSolveCore, Llt, Solve};
use faer::{Accum, Mat, Par};

/// A map W at the minimum of a quadratic loss with curvature H + λI, whose inputs are taken out one
/// block after another; what stays is moved to the new minimum each time.
pub struct Obs {
    /// `[n_out, n]`; columns `alive..` are gone.
    w: Mat<f64>,
    /// (H + λI)⁻¹ of the inputs that are left.
    h_inv: Mat<f64>,
    /// Input that each column is.
    order: Vec<usize>,
    alive: usize,
    /// The ridge in use, relative to the mean of H's diagonal.
    pub ridge: f64,
}

impl Obs {
    /// Starts from `w` `[n_in, n_out]`, which is the minimum, and the curvature `h` with
    /// λ = `ridge` · mean diag H.
    ///
    /// # Errors
    /// [`Singular`] if no ridge makes the curvature positive definite.
    pub fn new(w: &Matrix, h: &SymMatrix, ridge: f64) -> Result<Obs, Singular> {
        assert_eq!(w.n_in, h.n);
        let (llt, ridge) = factor(h, ridge, h.mean_diagonal())?;
        let h_inv = llt.inverse();
        Ok(Obs { w: in_f64(w), h_inv, order: (0..h.n).collect(), alive: h.n, ridge })
    }

    /// Inputs that are left.
    pub fn alive(&self) -> usize {
        self.alive
    }

    /// The inputs that are left, in the source's numbering, ascending.
    pub fn kept(&self) -> Vec<usize> {
        let mut kept = self.order[..self.alive].to_vec();
        kept.sort_unstable();
        kept
    }

    /// The map on the inputs [`Obs::kept`], in that order.
    pub fn weights(&self) -> Matrix {
        let mut columns: Vec<usize> = (0..self.alive).collect();
        columns.sort_unstable_by_key(|&c| self.order[c]);
        let row = |i: usize| columns.iter().map(move |&c| self.w[(i, c)] as f32);
        Matrix::new(self.alive, self.w.nrows(), (0..self.w.nrows()).flat_map(row).collect())
    }

    /// What the loss grows by if input at column `j` goes alone: Σ_i W_ij² / [H⁻¹]_jj.
    fn saliency(&self, j: usize) -> f64 {
        let energy: f64 = self.w.col(j).iter().map(|v| v * v).sum();
        energy / self.h_inv[(j, j)]
    }

    /// Takes out the `k` inputs with the least saliency, together. Returns what the loss grew by.
    pub fn remove_least(&mut self, k: usize) -> f64 {
        assert!(k > 0 && k < self.alive);
        let mut ranked: Vec<(f64, usize)> = (0..self.alive).map(|j| (self.saliency(j), j)).collect();
        ranked.select_nth_unstable_by(k - 1, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut columns: Vec<usize> = ranked[..k].iter().map(|r| r.1).collect();
        // The last first, so that no swap moves a column that is still to come.
        columns.sort_unstable_by(|a, b| b.cmp(a));
        for (i, &c) in columns.iter().enumerate() {
            self.swap(c, self.alive - 1 - i);
        }
        let zero = Mat::zeros(self.w.nrows(), k);
        self.settle_tail(k, &zero)
    }

    /// The weights `[n_out, k]` of the last `k` columns as they are now.
    pub fn tail(&self, k: usize) -> Mat<f64> {
        self.w.subcols(self.alive - k, k).to_owned()
    }

    /// What an error in each of the last `k` columns costs once the columns before them have made up
    /// for it as well as they can: the diagonal of ([H⁻¹]_(tail, tail))⁻¹.
    pub fn tail_curvature(&self, k: usize) -> Vec<f64> {
        let inverse = self.tail_factor(k).inverse();
        (0..k).map(|i| inverse[(i, i)]).collect()
    }

    /// Cholesky factor of [H⁻¹]_(tail, tail).
    fn tail_factor(&self, k: usize) -> Llt<f64> {
        let left = self.alive - k;
        let s = self.h_inv.submatrix(left, left, k, k);
        let block = SymMatrix { n: k, data: (0..k * k).map(|i| s[(i % k, i / k)]).collect() };
        // Positive definite but for rounding, which the ridge makes up for where it must.
        let factored = factor(&block, 0.0, block.mean_diagonal());
        factored.expect("a principal block of a positive definite matrix is positive definite").0
    }

    /// Fixes the last `k` columns at `values` `[n_out, k]` and moves the others to the minimum under
    /// that condition. Returns what the loss grew by.
    pub fn settle_tail(&mut self, k: usize, values: &Mat<f64>) -> f64 {
        let (n, left) = (self.alive, self.alive - k);
        let error = self.w.subcols(left, k) - values;
        // Gains: S⁻¹ [H⁻¹]_(tail, lead) with S = [H⁻¹]_(tail, tail).
        let llt = self.tail_factor(k);
        let scaled = llt.solve(error.transpose().to_owned());
        let loss =
            (0..k).map(|a| (0..error.nrows()).map(|i| error[(i, a)] * scaled[(a, i)]).sum::<f64>()).sum();
        let across = self.h_inv.submatrix(left, 0, k, left).to_owned();
        let gains = llt.solve(&across);
        let par = Par::rayon(0);
        matmul(self.w.as_mut().subcols_mut(0, left), Accum::Add, error.as_ref(), gains.as_ref(), -1.0, par);
        let (mut lead, tail) = self.h_inv.as_mut().subcols_mut(0, n).split_at_col_mut(left);
        let tail = tail.as_ref().subrows(0, left);
        matmul(lead.as_mut().subrows_mut(0, left), Accum::Add, tail, gains.as_ref(), -1.0, par);
        self.alive = left;
        loss
    }

    /// Exchanges columns `a` and `b`.
    fn swap(&mut self, a: usize, b: usize) {
        if a == b {
            return;
        }
        self.order.swap(a, b);
        for i in 0..self.w.nrows() {
            let t = self.w[(i, a)];
            self.w[(i, a)] = self.w[(i, b)];
            self.w[(i, b)] = t;
        }
        let n = self.alive;
        for i in 0..n {
            let t = self.h_inv[(i, a)];
            self.h_inv[(i, a)] = self.h_inv[(i, b)];
            self.h_inv[(i, b)] = t;
        }
        for j in 0..n {
            let t = self.h_inv[(a, j)];
            self.h_inv[(a, j)] = self.h_inv[(b, j)];
            self.h_inv[(b, j)] = t;
        }
    }
}
