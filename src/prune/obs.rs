//! Optimal brain surgeon (OBS) over blocks of inputs (Hassibi and Stork 1993; SlimGPT's algebra).

use super::refit::factor;
use super::{InverseIn, dense};
use crate::model::Matrix;
use crate::numeric::{Real, SymMatrix};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Inputs that are removed between two updates of the inverse.
/// Each update goes through all of the inverse's memory, whatever the number of inputs.
pub(crate) const PENDING: usize = 256;

/// Criterion by which neurons (inputs of `ffn_down`) are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeuronCriterion {
    /// Increase of the loss if one input is removed and the others compensate: Σ_i W_ij² / \[H⁻¹\]_jj.
    Obs,
    /// Squared norm of an input's weights times its squared energy: Σ_i W_ij² H_jj².
    /// The energy is about the mean if H is centred. The criterion ignores compensation by other inputs. It
    /// lies between the loss of the input alone, Σ_i W_ij² H_jj, and its energy alone, by which 2SSP (arXiv
    /// 2501.17771) chooses.
    Magnitude,
}

impl NeuronCriterion {
    /// All criteria, the default first.
    pub const ALL: [NeuronCriterion; 2] = [NeuronCriterion::Obs, NeuronCriterion::Magnitude];

    /// Criterion with the name `name`.
    pub fn named(name: &str) -> Option<NeuronCriterion> {
        NeuronCriterion::ALL.into_iter().find(|c| c.name() == name)
    }

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            NeuronCriterion::Obs => "obs",
            NeuronCriterion::Magnitude => "magnitude",
        }
    }
}

/// Map W at the minimum of a quadratic loss with curvature H + λI, whose inputs are removed a few at a
/// time.
/// Each removal moves the remaining weights to the new minimum.
pub struct Obs<T> {
    /// Map whose columns give the saliency of the inputs.
    judged: Follower<T>,
    /// Map that is pruned, if it is another one.
    carried: Option<Follower<T>>,
    /// Inverse (H + λI)⁻¹ of the inputs left at the last update, column-major; elements above the diagonal
    /// are unused.
    h_inv: Vec<T>,
    /// Source input of each column, ascending, and whether the input is left.
    inputs: Vec<usize>,
    left: Vec<bool>,
    alive: usize,
    /// Squared norm of each column of the judged map, and the diagonal of the inverse, both up to date.
    lengths: Vec<f64>,
    diagonal: Vec<f64>,
    /// Lower bound of the diagonal, by input.
    /// It keeps rounding from overrating an input that no other input resembles.
    least: Vec<f64>,
    /// Diagonal of H by input, if inputs are removed by energy.
    energies: Option<Vec<f64>>,
    /// Pending correction of `h_inv`: subtract across · gainsᵀ, in their first `pending` columns.
    across: Mat<T>,
    gains: Mat<T>,
    pending: usize,
    /// Ridge in use, relative to the mean of H's diagonal.
    pub ridge: f64,
}

/// Map `[n_out, n]` that follows the removals, as of the last update.
struct Follower<T> {
    w: Mat<T>,
    /// Pending correction of `w`: subtract gone · gainsᵀ, in the first `pending` columns.
    gone: Mat<T>,
}

impl<T: Real> Follower<T> {
    fn new(w: &Matrix) -> Follower<T> {
        Follower { w: dense(w), gone: Mat::zeros(w.n_out, PENDING) }
    }

    /// Takes out the columns `go`, whose rows of the pending gains are `rows` `[go.len(), pending]`.
    /// Returns the columns up to date, `[n_out, go.len()]`.
    fn take(&mut self, go: &[usize], rows: &Mat<T>, par: Par) -> Mat<T> {
        let (k, pending) = (go.len(), rows.ncols());
        let mut gone = Mat::from_fn(self.w.nrows(), k, |i, a| self.w[(i, go[a])]);
        let before = self.gone.subcols(0, pending);
        matmul(gone.as_mut(), Accum::Add, before, rows.transpose(), T::of(-1.0), par);
        if pending + k > self.gone.ncols() {
            // A removal larger than the room for pending columns comes after an update: nothing else is
            // pending.
            self.gone = Mat::zeros(self.w.nrows(), k);
        }
        self.gone.subcols_mut(pending, k).copy_from(&gone);
        gone
    }

    /// Applies all pending `gains` `[n, pending]` to the map and keeps the columns `keep`.
    fn update(&mut self, gains: MatRef<T>, keep: &[usize]) {
        let gone = self.gone.subcols(0, gains.ncols());
        matmul(self.w.as_mut(), Accum::Add, gone, gains.transpose(), T::of(-1.0), Par::rayon(0));
        for (to, &from) in keep.iter().enumerate() {
            for i in 0..self.w.nrows() {
                self.w[(i, to)] = self.w[(i, from)];
            }
        }
        self.w.truncate(self.w.nrows(), keep.len());
    }

    /// Squared norms of the columns.
    fn lengths(&self) -> Vec<f64> {
        (0..self.w.ncols()).into_par_iter().map(|j| self.w.col(j).squared_norm_l2().into()).collect()
    }
}

impl<T: Real> Obs<T> {
    /// Starts from `w` `[n_out, n_in]`, the minimum of the loss whose curvature `inverse` inverts.
    /// Inputs are removed by `criterion`, judged by their outputs through `costs` if given, else through
    /// `w` itself.
    ///
    /// # Panics
    /// If the sizes disagree.
    pub fn new(
        w: &Matrix,
        costs: Option<&Matrix>,
        inverse: InverseIn<T>,
        criterion: NeuronCriterion,
    ) -> Obs<T> {
        let least = inverse.least();
        let InverseIn { columns: h_inv, energies, ridge } = inverse;
        let n = energies.len();
        assert!(w.n_in == n && costs.is_none_or(|c| c.n_in == n));
        let judged = Follower::new(costs.unwrap_or(w));
        Obs {
            lengths: judged.lengths(),
            judged,
            carried: costs.map(|_| Follower::new(w)),
            diagonal: (0..n).map(|j| h_inv[j * n + j].into()).collect(),
            least,
            energies: (criterion == NeuronCriterion::Magnitude).then_some(energies),
            h_inv,
            inputs: (0..n).collect(),
            left: vec![true; n],
            alive: n,
            across: Mat::zeros(n, PENDING),
            gains: Mat::zeros(n, PENDING),
            pending: 0,
            ridge,
        }
    }

    /// Number of inputs that are left.
    pub fn alive(&self) -> usize {
        self.alive
    }

    /// Columns whose inputs are left.
    fn columns(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.left.len()).filter(|&j| self.left[j])
    }

    /// Inputs that are left, in the source's numbering, ascending.
    pub fn kept(&self) -> Vec<usize> {
        self.columns().map(|j| self.inputs[j]).collect()
    }

    /// Map `[n_out, kept]` on the inputs [`Obs::kept`], in that order.
    pub fn weights(&mut self) -> Matrix {
        self.update();
        let w = &self.carried.as_ref().unwrap_or(&self.judged).w;
        let mut data = vec![0.0; w.nrows() * w.ncols()];
        data.par_chunks_exact_mut(w.ncols()).enumerate().for_each(|(i, row)| {
            row.iter_mut().enumerate().for_each(|(j, v)| *v = w[(i, j)].into() as f32);
        });
        Matrix::new(w.ncols(), w.nrows(), data)
    }

    /// Saliency of the input at column `j`.
    fn saliency(&self, j: usize) -> f64 {
        match &self.energies {
            None => self.lengths[j] / self.diagonal[j],
            Some(energies) => self.lengths[j] * energies[self.inputs[j]].powi(2),
        }
    }

    /// Removes the `k` inputs with the least saliency together and moves the others to the new minimum.
    /// Returns the increase of the loss.
    pub fn remove_least(&mut self, k: usize) -> f64 {
        assert!(k > 0 && k < self.alive);
        if self.pending + k > PENDING {
            self.update();
        }
        let mut ranked: Vec<(f64, usize)> = self.columns().map(|j| (self.saliency(j), j)).collect();
        ranked.select_nth_unstable_by(k - 1, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut go: Vec<usize> = ranked[..k].iter().map(|r| r.1).collect();
        go.sort_unstable();
        self.take_out(&go)
    }

    fn take_out(&mut self, go: &[usize]) -> f64 {
        let (n, k, pending) = (self.left.len(), go.len(), self.pending);
        // In parallel, a single column would be summed in as many parts as there are threads.
        let par = if k == 1 { Par::Seq } else { Par::rayon(0) };
        // [H⁻¹]_(all, go) up to date, S = [H⁻¹]_(go, go), and the gains S⁻¹ [H⁻¹]_(go, all).
        let mut across = Mat::from_fn(n, k, |i, a| self.h_inv[i.min(go[a]) * n + i.max(go[a])]);
        let rows = Mat::from_fn(k, pending, |a, p| self.gains[(go[a], p)]);
        matmul(
            across.as_mut(),
            Accum::Add,
            self.across.subcols(0, pending),
            rows.transpose(),
            T::of(-1.0),
            par,
        );
        let least = |j: usize| self.least[self.inputs[j]];
        let s = SymMatrix::from_fn(k, |a, b| {
            let s: f64 = across[(go[b], a)].into();
            if a == b { s.max(least(go[a])) } else { s }
        });
        // S is positive definite up to rounding, which the ridge compensates where needed.
        let factored = factor(&s, None, 0.0, s.mean_diagonal());
        let factored =
            factored.expect("a principal block of a positive definite matrix is positive definite").0;
        let mut gains = across.transpose().to_owned();
        factored.solve_in_place(gains.as_mut());
        // Columns change by −G g_j, with G the removed columns. Their squared norms change by g_jᵀ GᵀG g_j
        // − 2 g_jᵀ Gᵀ w_j.
        let gone = self.judged.take(go, &rows, par);
        let square = gone.transpose() * &gone;
        let mut scaled = square.clone();
        factored.solve_in_place(scaled.as_mut());
        let loss = (0..k).map(|a| scaled[(a, a)].into()).sum();
        let mut change = &square * &gains;
        matmul(change.as_mut(), Accum::Add, gone.transpose(), self.judged.w.as_ref(), T::of(-2.0), par);
        let overlap = gone.transpose() * self.judged.gone.subcols(0, pending);
        let old_gains = self.gains.subcols(0, pending);
        matmul(change.as_mut(), Accum::Add, overlap.as_ref(), old_gains.transpose(), T::of(2.0), par);
        let gains_t = gains.transpose().to_owned();
        self.lengths.par_iter_mut().enumerate().for_each(|(j, length)| {
            *length += (0..k).map(|a| (gains[(a, j)] * change[(a, j)]).into()).sum::<f64>();
        });
        for a in 0..k {
            let products = across.col(a).iter().zip(gains_t.col(a).iter()).map(|(x, y)| (*x * *y).into());
            self.diagonal.iter_mut().zip(products).for_each(|(d, p)| *d -= p);
        }
        (0..n).for_each(|j| self.diagonal[j] = self.diagonal[j].max(self.least[self.inputs[j]]));
        go.iter().for_each(|&j| self.left[j] = false);
        self.alive -= k;
        if let Some(c) = &mut self.carried {
            c.take(go, &rows, par);
        }
        if pending + k > self.across.ncols() {
            // A removal larger than the room for pending columns comes right after an `update`.
            (self.across, self.gains) = (Mat::zeros(n, k), Mat::zeros(n, k));
        }
        self.across.subcols_mut(pending, k).copy_from(&across);
        self.gains.subcols_mut(pending, k).copy_from(&gains_t);
        self.pending = pending + k;
        loss
    }

    /// Applies the pending corrections to the inverse and the maps, and drops removed inputs.
    fn update(&mut self) {
        if self.pending == 0 {
            return;
        }
        let (stride, par) = (self.left.len(), Par::rayon(0));
        let (across, gains) = (self.across.subcols(0, self.pending), self.gains.subcols(0, self.pending));
        triangular::matmul(
            MatMut::from_column_major_slice_mut(&mut self.h_inv, stride, stride),
            BlockStructure::TriangularLower,
            Accum::Add,
            across,
            BlockStructure::Rectangular,
            gains.transpose(),
            BlockStructure::Rectangular,
            T::of(-1.0),
            par,
        );
        let columns: Vec<usize> = self.columns().collect();
        let followers = [Some(&mut self.judged), self.carried.as_mut()];
        followers.into_iter().flatten().for_each(|f| f.update(gains, &columns));
        // Recomputed, which drops the accumulated rounding errors.
        self.lengths = self.judged.lengths();
        // In place: each source element lies behind its destination.
        let n = columns.len();
        for (to, &from) in columns.iter().enumerate() {
            for (i, &row) in columns.iter().enumerate().skip(to) {
                self.h_inv[to * n + i] = self.h_inv[from * stride + row];
            }
            self.inputs[to] = self.inputs[from];
            self.diagonal[to] = self.diagonal[from];
        }
        self.h_inv.truncate(n * n);
        self.across.truncate(n, self.across.ncols());
        self.gains.truncate(n, self.gains.ncols());
        self.inputs.truncate(n);
        self.diagonal.truncate(n);
        self.left = vec![true; n];
        self.pending = 0;
    }
}
