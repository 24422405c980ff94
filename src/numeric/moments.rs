//! Sums over tokens that a least-squares problem needs.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::ops::Range;

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

    /// Adds tokens with the inputs `x` `[n_tokens, n]` and the residuals `r` `[n_tokens, m]`, which are empty
    /// if there are none. Both are multiplied by the tokens' factors `scales` already.
    /// Up to `summed` tokens are summed in 32 bits before they are added.
    ///
    /// # Panics
    /// If sizes disagree, or `summed` is 0.
    pub fn add(&mut self, x: &[f32], r: &[f32], scales: &[f32], summed: usize) {
        let (n, m) = (self.x.len(), self.r.len());
        assert_eq!(x.len(), scales.len() * n);
        assert!(r.is_empty() || r.len() == scales.len() * m);
        for (i, scales) in scales.chunks(summed).enumerate() {
            let n_tokens = scales.len();
            let first = i * summed;
            let rows = first..first + n_tokens;
            let (x, factors) = (tokens(x, n, &rows), MatRef::from_column_major_slice(scales, n_tokens, 1));
            let gram = self.gram.rows_mut();
            add_product(gram, |row| row, x, x);
            add_product(self.x.chunks_exact_mut(1).collect(), |_| 0, x, factors);
            if !r.is_empty() {
                let r = tokens(r, m, &rows);
                add_product(self.cross.chunks_exact_mut(n).collect(), |_| 0, r, x);
                add_product(self.r.chunks_exact_mut(1).collect(), |_| 0, r, factors);
            }
            self.weight += scales.iter().map(|s| f64::from(*s).powi(2)).sum::<f64>();
            self.n_tokens += n_tokens;
        }
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

/// Rows `rows` of `all` `[n_tokens, width]`.
fn tokens<'t>(all: &'t [f32], width: usize, rows: &Range<usize>) -> MatRef<'t, f32> {
    MatRef::from_row_major_slice(&all[rows.start * width..rows.end * width], rows.len(), width)
}

/// Number of rows, and of columns, of the parts in which a product is computed.
pub(crate) const PANEL_ROWS: usize = 192;
const TILE_COLS: usize = 512;

/// Number of products that [`Moments::add`] makes of each token with `n` inputs and `m` residuals.
pub(crate) fn products_per_token(n: usize, m: usize) -> usize {
    let panels = (0..n).step_by(PANEL_ROWS);
    panels.map(|start| PANEL_ROWS.min(n - start) * (n - start)).sum::<usize>() + n * m + n + m
}

/// Adds aᵀ b, for `a` `[n_tokens, n]` and `b` `[n_tokens, width]`, to `rows`, of which row i holds the
/// columns from `first(i)` on. Where `first` grows, columns before that of a part's first row are left out.
fn add_product(
    mut rows: Vec<&mut [f64]>,
    first: impl Fn(usize) -> usize + Sync,
    a: MatRef<f32>,
    b: MatRef<f32>,
) {
    rows.par_chunks_mut(PANEL_ROWS).enumerate().for_each(|(panel, rows)| {
        let top = panel * PANEL_ROWS;
        let (start, a) = (first(top), a.subcols(top, rows.len()));
        let mut product = vec![0.0f32; rows.len() * (b.ncols() - start)];
        let tiles = product.par_chunks_mut(rows.len() * TILE_COLS).enumerate();
        tiles.for_each(|(tile, product)| {
            let n_cols = product.len() / a.ncols();
            let b = b.subcols(start + tile * TILE_COLS, n_cols);
            let product = MatMut::from_row_major_slice_mut(product, a.ncols(), n_cols);
            matmul(product, Accum::Replace, a.transpose(), b, 1.0, Par::Seq);
        });
        let n_rows = rows.len();
        rows.par_iter_mut().enumerate().for_each(|(i, sums)| {
            let skipped = first(top + i) - start;
            for (tile, product) in product.chunks(n_rows * TILE_COLS).enumerate() {
                let n_cols = product.len() / n_rows;
                let row = &product[i * n_cols..][..n_cols];
                let before = tile * TILE_COLS;
                let from = skipped.saturating_sub(before).min(n_cols);
                let at = (before + from).saturating_sub(skipped);
                add(&mut sums[at..at + n_cols - from], &row[from..]);
            }
        });
    });
}

fn add(sums: &mut [f64], values: &[f32]) {
    assert_eq!(sums.len(), values.len());
    sums.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(*v));
}
