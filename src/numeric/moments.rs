//! Sums over tokens that a least-squares problem needs.

use rayon::prelude::*;

/// Sums that a thread adds to at a time.
const PART: usize = 1 << 16;

/// Share of an input's square that its variance is told from rounding by: sums of products are in 32 bits.
const VARIES: f64 = 1e-6;

/// A symmetric matrix `[n, n]`, of which the upper triangle is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct SymMatrix {
    n: usize,
    /// Row i from its diagonal element on, after the rows before it.
    upper: Vec<f64>,
}

impl SymMatrix {
    /// Zero.
    pub fn zero(n: usize) -> SymMatrix {
        SymMatrix { n, upper: vec![0.0; n * (n + 1) / 2] }
    }

    /// From its elements (i, j) with i ≤ j.
    pub fn from_fn(n: usize, value: impl Fn(usize, usize) -> f64) -> SymMatrix {
        SymMatrix {
            n,
            upper: (0..n).flat_map(|i| (i..n).map(move |j| (i, j))).map(|(i, j)| value(i, j)).collect(),
        }
    }

    /// Rows and columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Where row `i` begins.
    fn start(&self, i: usize) -> usize {
        i * (2 * self.n + 1 - i) / 2
    }

    /// Elements (i, i), (i, i + 1) .. (i, n - 1).
    pub fn row(&self, i: usize) -> &[f64] {
        &self.upper[self.start(i)..][..self.n - i]
    }

    /// All that [`SymMatrix::row`] gives, to be changed.
    pub fn rows_mut(&mut self) -> Vec<&mut [f64]> {
        let mut rest = &mut self.upper[..];
        (0..self.n).map(|i| rest.split_off_mut(..self.n - i).expect("rows make up the whole")).collect()
    }

    /// Element (i, j).
    pub fn get(&self, i: usize, j: usize) -> f64 {
        let (i, j) = (i.min(j), i.max(j));
        self.upper[self.start(i) + j - i]
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.n).map(|i| self.get(i, i)).collect()
    }

    /// The mean of the diagonal.
    pub fn mean_diagonal(&self) -> f64 {
        self.diagonal().iter().sum::<f64>() / self.n as f64
    }

    /// Rows and columns `keep`, in that order.
    pub fn select(&self, keep: &[usize]) -> SymMatrix {
        SymMatrix::from_fn(keep.len(), |i, j| self.get(keep[i], keep[j]))
    }
}

/// Sums over tokens of what a linear map sees: inputs x `[n]`, residuals r `[m]`, each token with a weight
/// of its own.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Σ x xᵀ `[n, n]`.
    pub gram: SymMatrix,
    /// Σ x rᵀ `[m, n]`: row i belongs to output i.
    pub cross: Vec<f64>,
    /// Tokens summed over.
    pub n_tokens: usize,
    /// Σ x `[n]`; their mean once [`Moments::centre`] was called.
    pub x: Vec<f64>,
    /// Σ r `[m]`; their mean once [`Moments::centre`] was called.
    pub r: Vec<f64>,
    /// Weight of all tokens.
    pub weight: f64,
}

impl Moments {
    /// No tokens yet.
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

    /// Adds a panel of the Gram matrix: its rows from `start` on, from column `start` on. What lies before the
    /// diagonal is not used.
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

    /// Adds to the cross products.
    ///
    /// # Panics
    /// If `values` has another size.
    pub fn add_cross(&mut self, values: &[f32]) {
        assert_eq!(self.cross.len(), values.len());
        let parts = self.cross.par_chunks_mut(PART).zip(values.par_chunks(PART));
        parts.for_each(|(sums, values)| add(sums, values));
    }

    /// Adds to the sums of the inputs and of the residuals, and to the weight.
    ///
    /// # Panics
    /// If there are not as many as inputs or residuals.
    pub fn add_sums(&mut self, x: &[f32], r: &[f32], weight: f64) {
        add(&mut self.x, x);
        add(&mut self.r, r);
        self.weight += weight;
    }

    /// From moments about zero to moments about the mean: what is left for a linear map to explain
    /// once its bias takes care of the means. Of an input that does not vary only rounding would be left; it is nothing
    /// then.
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
