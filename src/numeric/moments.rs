//! Sums over tokens that a least-squares problem needs.

use rayon::prelude::*;

/// Number of sums that one thread adds to at a time.
const PART: usize = 1 << 16;

/// Smallest variance, as a share of an input's mean square, that is told apart from rounding: sums of
/// products are in 32 bits.
const VARIES: f64 = 1e-6;

/// Symmetric matrix `[n, n]` that stores its upper triangle.
#[derive(Clone, Debug, PartialEq)]
pub struct SymMatrix {
    n: usize,
    /// Elements row by row; row i starts at its diagonal element.
    upper: Vec<f64>,
}

impl SymMatrix {
    /// Zero matrix.
    pub fn zero(n: usize) -> SymMatrix {
        SymMatrix { n, upper: vec![0.0; n * (n + 1) / 2] }
    }

    /// Builds a matrix from its elements (i, j) with i ≤ j.
    pub fn from_fn(n: usize, value: impl Fn(usize, usize) -> f64) -> SymMatrix {
        SymMatrix {
            n,
            upper: (0..n).flat_map(|i| (i..n).map(move |j| (i, j))).map(|(i, j)| value(i, j)).collect(),
        }
    }

    /// Number of rows and of columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Offset of row `i` in `upper`.
    fn start(&self, i: usize) -> usize {
        i * (2 * self.n + 1 - i) / 2
    }

    /// Elements (i, i), (i, i + 1) .. (i, n - 1).
    pub fn row(&self, i: usize) -> &[f64] {
        &self.upper[self.start(i)..][..self.n - i]
    }

    /// All rows as [`SymMatrix::row`] gives them, mutable.
    pub fn rows_mut(&mut self) -> Vec<&mut [f64]> {
        let mut rest = &mut self.upper[..];
        (0..self.n).map(|i| rest.split_off_mut(..self.n - i).expect("rows make up the whole")).collect()
    }

    /// Element (i, j) of the matrix.
    pub fn get(&self, i: usize, j: usize) -> f64 {
        let (i, j) = (i.min(j), i.max(j));
        self.upper[self.start(i) + j - i]
    }

    /// Diagonal elements.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.n).map(|i| self.get(i, i)).collect()
    }

    /// Mean of the diagonal.
    pub fn mean_diagonal(&self) -> f64 {
        self.diagonal().iter().sum::<f64>() / self.n as f64
    }

    /// Selects the rows and columns `keep`, in that order.
    pub fn select(&self, keep: &[usize]) -> SymMatrix {
        SymMatrix::from_fn(keep.len(), |i, j| self.get(keep[i], keep[j]))
    }
}

/// Weighted sums over tokens for one linear map: inputs x `[n]` and residuals r `[m]`, each token with its
/// own weight.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Gram matrix Σ x xᵀ `[n, n]`.
    pub gram: SymMatrix,
    /// Cross products Σ r xᵀ `[m, n]`, row-major: row i belongs to output i.
    pub cross: Vec<f64>,
    /// Number of tokens in the sums.
    pub n_tokens: usize,
    /// Sum Σ x `[n]`; the mean after [`Moments::centre`].
    pub x: Vec<f64>,
    /// Sum Σ r `[m]`; the mean after [`Moments::centre`].
    pub r: Vec<f64>,
    /// Total weight of all tokens.
    pub weight: f64,
}

impl Moments {
    /// Sums over no tokens.
    pub fn new(n: usize, m: usize) -> Moments {
        Moments {
            gram: SymMatrix::zero(n),
            cross: vec![0.0; n * m],
            n_tokens: 0,
            x: vec![0.0; n],
            r: vec![0.0; m],
            weight: 0.0,
        }
    }

    /// Adds a panel of the Gram matrix: its rows from `start` on, from column `start` on, row-major.
    /// Elements before the diagonal are unused.
    ///
    /// # Panics
    /// If the panel is not made of whole rows.
    pub fn add_panel(&mut self, start: usize, panel: &[f32]) {
        let width = self.gram.n - start;
        assert!(panel.len().is_multiple_of(width) && panel.len() <= width * width);
        let mut rows = self.gram.rows_mut();
        let rows = rows[start..].par_iter_mut().zip(panel.par_chunks_exact(width));
        rows.enumerate().for_each(|(i, (sums, row))| add(sums, &row[i..]));
    }

    /// Adds `values` `[m, n]` to the cross products.
    ///
    /// # Panics
    /// If `values` has another size.
    pub fn add_cross(&mut self, values: &[f32]) {
        assert_eq!(self.cross.len(), values.len());
        let parts = self.cross.par_chunks_mut(PART).zip(values.par_chunks(PART));
        parts.for_each(|(sums, values)| add(sums, values));
    }

    /// Adds to the sums of the inputs `x` `[n]` and of the residuals `r` `[m]`, and to the weight.
    ///
    /// # Panics
    /// If `x` or `r` has another length.
    pub fn add_sums(&mut self, x: &[f32], r: &[f32], weight: f64) {
        add(&mut self.x, x);
        add(&mut self.r, r);
        self.weight += weight;
    }

    /// Turns moments about zero into moments about the mean.
    /// These are left for a linear map to explain after its bias accounts for the means. An input that does
    /// not vary would keep only rounding errors; its moments become zero.
    pub fn centre(&mut self) {
        let before = self.gram.diagonal();
        let weight = self.weight.max(f64::MIN_POSITIVE);
        self.x.iter_mut().chain(&mut self.r).for_each(|sum| *sum /= weight);
        let x = &self.x;
        let less = |row: &mut [f64], mean: f64, x: &[f64]| {
            row.iter_mut().zip(x).for_each(|(v, x)| *v -= weight * mean * x);
        };
        self.gram.rows_mut().into_par_iter().enumerate().for_each(|(i, row)| less(row, x[i], &x[i..]));
        let cross = self.cross.par_chunks_exact_mut(x.len()).zip(&self.r);
        cross.for_each(|(row, mean)| less(row, *mean, x));
        let varies: Vec<bool> =
            self.gram.diagonal().iter().zip(before).map(|(now, before)| *now > VARIES * before).collect();
        if varies.iter().any(|v| !v) {
            let keep = |row: &mut [f64], varies: &[bool]| {
                row.iter_mut().zip(varies).filter(|(_, v)| !**v).for_each(|(value, _)| *value = 0.0);
            };
            for (i, row) in self.gram.rows_mut().into_iter().enumerate() {
                if varies[i] { keep(row, &varies[i..]) } else { row.fill(0.0) }
            }
            self.cross.chunks_exact_mut(varies.len()).for_each(|row| keep(row, &varies));
        }
    }
}

fn add(sums: &mut [f64], values: &[f32]) {
    assert_eq!(sums.len(), values.len());
    sums.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(*v));
}
