//! Optimal brain surgeon over blocks of inputs (Hassibi and Stork 1993; SlimGPT's algebra).

use super::refit::factor;
use super::{Singular, in_f64};
use crate::model::Matrix;
use crate::numeric::SymMatrix;
use faer::linalg::matmul::matmul;
use faer::linalg::solvers::{DenseSolveCore, Solve};
use faer::{Accum, Mat, Par};
use rayon::prelude::*;

/// Inputs that go before the inverse is brought up to date: each update of it goes through all of its memory,
/// whatever the number of inputs.
const PENDING: usize = 256;

/// A map W at the minimum of a quadratic loss with curvature H + λI, whose inputs are taken out a few at a
/// time; what stays is moved to the new minimum each time.
pub struct Obs {
    /// `[n_out, n]`; columns of inputs that are gone are zero until they are dropped.
    w: Mat<f64>,
    /// (H + λI)⁻¹ of the inputs that were left at the last update.
    h_inv: Mat<f64>,
    /// Input that each column is, ascending, and whether it is left.
    inputs: Vec<usize>,
    left: Vec<bool>,
    alive: usize,
    /// Diagonal of the inverse as it is now.
    diagonal: Vec<f64>,
    /// What to take from `h_inv`: across · gainsᵀ, in their first `pending` columns.
    across: Mat<f64>,
    gains: Mat<f64>,
    pending: usize,
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
        let n = h.n;
        let (llt, ridge) = factor(h, ridge, h.mean_diagonal())?;
        let h_inv = llt.inverse();
        let diagonal = (0..n).map(|j| h_inv[(j, j)]).collect();
        Ok(Obs {
            w: in_f64(w),
            h_inv,
            inputs: (0..n).collect(),
            left: vec![true; n],
            alive: n,
            diagonal,
            across: Mat::zeros(n, PENDING),
            gains: Mat::zeros(n, PENDING),
            pending: 0,
            ridge,
        })
    }

    /// Inputs that are left.
    pub fn alive(&self) -> usize {
        self.alive
    }

    /// Columns whose inputs are left.
    fn columns(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.left.len()).filter(|&j| self.left[j])
    }

    /// The inputs that are left, in the source's numbering, ascending.
    pub fn kept(&self) -> Vec<usize> {
        self.columns().map(|j| self.inputs[j]).collect()
    }

    /// The map on the inputs [`Obs::kept`], in that order.
    pub fn weights(&self) -> Matrix {
        let row = |i: usize| self.columns().map(move |j| self.w[(i, j)] as f32);
        Matrix::new(self.alive, self.w.nrows(), (0..self.w.nrows()).flat_map(row).collect())
    }

    /// What the loss grows by if input at column `j` goes alone: Σ_i W_ij² / [H⁻¹]_jj.
    fn saliency(&self, j: usize) -> f64 {
        self.w.col(j).squared_norm_l2() / self.diagonal[j]
    }

    /// Takes out the `k` inputs with the least saliency, together, and moves the others to the minimum without
    /// them. Returns what the loss grew by.
    pub fn remove_least(&mut self, k: usize) -> f64 {
        assert!(k > 0 && k < self.alive);
        if self.pending + k > PENDING {
            self.update();
        }
        let columns: Vec<usize> = self.columns().collect();
        let mut ranked: Vec<(f64, usize)> = columns.into_par_iter().map(|j| (self.saliency(j), j)).collect();
        ranked.select_nth_unstable_by(k - 1, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut go: Vec<usize> = ranked[..k].iter().map(|r| r.1).collect();
        go.sort_unstable();
        self.take_out(&go)
    }

    fn take_out(&mut self, go: &[usize]) -> f64 {
        let (n, m, k) = (self.left.len(), self.w.nrows(), go.len());
        let par = Par::rayon(0);
        // [H⁻¹]_(all, go) as it is now, S = [H⁻¹]_(go, go), and the gains S⁻¹ [H⁻¹]_(go, all).
        let mut across = Mat::from_fn(n, k, |i, a| self.h_inv[(i, go[a])]);
        if self.pending > 0 {
            let rows = Mat::from_fn(k, self.pending, |a, p| self.gains[(go[a], p)]);
            let before = self.across.subcols(0, self.pending);
            matmul(across.as_mut(), Accum::Add, before, rows.transpose(), -1.0, par);
        }
        let s = SymMatrix { n: k, data: (0..k * k).map(|i| across[(go[i % k], i / k)]).collect() };
        // Positive definite but for rounding, which the ridge makes up for where it must.
        let factored = factor(&s, 0.0, s.mean_diagonal());
        let llt = factored.expect("a principal block of a positive definite matrix is positive definite").0;
        let gains = llt.solve(across.transpose());
        let gone = Mat::from_fn(m, k, |i, a| self.w[(i, go[a])]);
        let scaled = llt.solve(gone.transpose());
        let loss = (0..k).map(|a| (0..m).map(|i| gone[(i, a)] * scaled[(a, i)]).sum::<f64>()).sum();
        matmul(self.w.as_mut(), Accum::Add, gone.as_ref(), gains.as_ref(), -1.0, par);
        let gains_t = gains.transpose().to_owned();
        for a in 0..k {
            let products = across.col(a).iter().zip(gains_t.col(a).iter()).map(|(x, y)| x * y);
            self.diagonal.iter_mut().zip(products).for_each(|(d, p)| *d -= p);
        }
        for &j in go {
            self.left[j] = false;
            self.w.col_mut(j).fill(0.0);
        }
        self.alive -= k;
        let places = self.pending..self.pending + k;
        if places.end > self.across.ncols() {
            // More at a time than there is room for: `update` has just been called.
            (self.across, self.gains) = (Mat::zeros(n, k), Mat::zeros(n, k));
        }
        self.across.subcols_mut(places.start, k).copy_from(&across);
        self.gains.subcols_mut(places.start, k).copy_from(&gains_t);
        self.pending = places.end;
        loss
    }

    /// Brings the inverse up to date and drops what is gone.
    fn update(&mut self) {
        if self.pending > 0 {
            let (across, gains) = (self.across.subcols(0, self.pending), self.gains.subcols(0, self.pending));
            matmul(self.h_inv.as_mut(), Accum::Add, across, gains.transpose(), -1.0, Par::rayon(0));
        }
        let columns: Vec<usize> = self.columns().collect();
        let n = columns.len();
        // In place: what is copied from lies behind what it is copied to.
        for (to, &from) in columns.iter().enumerate() {
            for i in 0..self.w.nrows() {
                self.w[(i, to)] = self.w[(i, from)];
            }
            for (i, &row) in columns.iter().enumerate() {
                self.h_inv[(i, to)] = self.h_inv[(row, from)];
            }
            self.inputs[to] = self.inputs[from];
            self.diagonal[to] = self.diagonal[from];
        }
        self.w.truncate(self.w.nrows(), n);
        self.h_inv.truncate(n, n);
        self.across.truncate(n, self.across.ncols());
        self.gains.truncate(n, self.gains.ncols());
        self.inputs.truncate(n);
        self.diagonal.truncate(n);
        self.left = vec![true; n];
        self.pending = 0;
    }
}
