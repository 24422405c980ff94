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

    /// Turns the residuals r of a linear map's inputs into r − W x, for the map W `[m, n]`, row-major.
    /// That costs one product with the Gram matrix instead of one with every token.
    ///
    /// # Panics
    /// If the map has another size.
    pub fn subtract_map(&mut self, map: &[f32]) {
        let (n, m) = (self.x.len(), self.r.len());
        let map = MatRef::from_row_major_slice(map, m, n);
        let x: Vec<f32> = self.x.iter().map(|v| *v as f32).collect();
        self.r.par_iter_mut().enumerate().for_each(|(i, r)| {
            *r -= map.row(i).iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
        });
        for top in (0..n).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(n - top);
            // Rows of the Gram matrix from the first column of the panel on.
            let mut panel = vec![0.0f32; rows * (n - top)];
            panel.par_chunks_exact_mut(n - top).enumerate().for_each(|(i, row)| {
                let sums = self.gram.row(top + i);
                row[i..].iter_mut().zip(sums).for_each(|(v, g)| *v = *g as f32);
                row[..i]
                    .iter_mut()
                    .enumerate()
                    .for_each(|(j, v)| *v = self.gram.get(top + i, top + j) as f32);
            });
            let panel = MatRef::from_row_major_slice(&panel, rows, n - top);
            let behind = panel.subcols(rows, n - top - rows).transpose();
            let parts = self.cross.par_chunks_mut(PANEL_ROWS * n).enumerate();
            parts.for_each(|(part, cross)| {
                let map = map.subrows(part * PANEL_ROWS, cross.len() / n);
                subtract(cross, n, top, map.subcols(top, rows), panel);
                subtract(cross, n, top, map.subcols(top + rows, n - top - rows), behind);
            });
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

/// Subtracts the product a b from the columns of `rows` from `first` on; rows have `n` columns.
fn subtract(rows: &mut [f64], n: usize, first: usize, a: MatRef<f32>, b: MatRef<f32>) {
    let mut product = vec![0.0f32; a.nrows() * b.ncols()];
    let to = MatMut::from_row_major_slice_mut(&mut product, a.nrows(), b.ncols());
    matmul(to, Accum::Replace, a, b, 1.0, Par::Seq);
    for (row, product) in rows.chunks_exact_mut(n).zip(product.chunks_exact(b.ncols().max(1))) {
        row[first..].iter_mut().zip(product).for_each(|(v, p)| *v -= f64::from(*p));
    }
}

fn add(sums: &mut [f64], values: &[f32]) {
    assert_eq!(sums.len(), values.len());
    sums.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(*v));
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn sums_are_those_of_the_definition() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for (n_tokens, n, m, summed) in [(1, 1, 1, 9), (7, 3, 5, 2), (50, 200, 7, 16), (90, 700, 201, 64)] {
            let mut random =
                |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random::<f32>() - 0.3).collect() };
            let (x, r, scales, map) =
                (random(n_tokens * n), random(n_tokens * m), random(n_tokens), random(m * n));
            let mut found = Moments::new(n, m);
            found.add(&x, &r, &scales, summed);
            found.add(&x, &r, &scales, summed);
            let sum = |value: &dyn Fn(usize) -> f64| 2.0 * (0..n_tokens).map(value).sum::<f64>();
            let at = |v: &[f32], i: usize| f64::from(v[i]);
            let close = |found: f64, expected: f64, what: &str| {
                assert!(
                    (found - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                    "{what}: {found} {expected}"
                );
            };
            let check = |found: &Moments, r: &dyn Fn(usize, usize) -> f64| {
                for i in 0..n {
                    let own = sum(&|t| at(&x, t * n + i) * at(&scales, t));
                    close(found.x[i], own, "x");
                    for j in (i..n).step_by(n / 9 + 1) {
                        close(found.gram.get(i, j), sum(&|t| at(&x, t * n + i) * at(&x, t * n + j)), "gram");
                    }
                }
                for i in 0..m {
                    close(found.r[i], sum(&|t| r(t, i) * at(&scales, t)), "r");
                    for j in (0..n).step_by(n / 9 + 1) {
                        close(found.cross[i * n + j], sum(&|t| r(t, i) * at(&x, t * n + j)), "cross");
                    }
                }
            };
            check(&found, &|t, i| at(&r, t * m + i));
            close(found.weight, sum(&|t| at(&scales, t).powi(2)), "weight");
            assert_eq!(found.n_tokens, 2 * n_tokens);
            found.subtract_map(&map);
            let mapped =
                |t: usize, i: usize| (0..n).map(|j| at(&map, i * n + j) * at(&x, t * n + j)).sum::<f64>();
            check(&found, &|t, i| at(&r, t * m + i) - mapped(t, i));
        }
    }
}
