//! Sums over tokens that a least-squares problem needs.

/// A symmetric matrix `[n, n]`, stored whole.
#[derive(Clone, Debug, PartialEq)]
pub struct SymMatrix {
    /// Rows and columns.
    pub n: usize,
    /// Values; element (i, j) at `i · n + j`.
    pub data: Vec<f64>,
}

impl SymMatrix {
    /// Zero.
    pub fn zero(n: usize) -> SymMatrix {
        SymMatrix { n, data: vec![0.0; n * n] }
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.n).map(|i| self.data[i * self.n + i]).collect()
    }

    /// The mean of the diagonal.
    pub fn mean_diagonal(&self) -> f64 {
        self.diagonal().iter().sum::<f64>() / self.n as f64
    }

    /// Rows and columns `keep`, in that order.
    pub fn select(&self, keep: &[usize]) -> SymMatrix {
        let data = keep.iter().flat_map(|&i| keep.iter().map(move |&j| self.data[i * self.n + j])).collect();
        SymMatrix { n: keep.len(), data }
    }
}

/// Sums over tokens of what a linear map sees: inputs x `[n]`, residuals r `[m]`, each token with a weight
/// of its own.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Σ x xᵀ `[n, n]`; the lower triangle until [`Moments::finish`].
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

    /// Adds a panel of the Gram matrix: columns `start .. start + width` of the rows from `start` on,
    /// row by row. Only what lies on or below the diagonal is used.
    ///
    /// # Panics
    /// If the panel is not made of whole rows.
    pub fn add_panel(&mut self, start: usize, panel: &[f32]) {
        let n = self.gram.n;
        let width = panel.len() / (n - start);
        assert_eq!(panel.len(), width * (n - start));
        for (i, row) in panel.chunks_exact(width).enumerate() {
            let dst = &mut self.gram.data[(start + i) * n + start..][..width.min(i + 1)];
            dst.iter_mut().zip(row).for_each(|(d, v)| *d += f64::from(*v));
        }
    }

    /// Adds to the cross products.
    ///
    /// # Panics
    /// If `values` has another size.
    pub fn add_cross(&mut self, values: &[f32]) {
        add(&mut self.cross, values);
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
    /// once its bias takes care of the means. After [`Moments::finish`].
    pub fn centre(&mut self) {
        let n = self.gram.n;
        let weight = self.weight.max(f64::MIN_POSITIVE);
        self.x.iter_mut().chain(&mut self.r).for_each(|sum| *sum /= weight);
        let rows = self.gram.data.chunks_exact_mut(n).zip(&self.x);
        let cross = self.cross.chunks_exact_mut(n).zip(&self.r);
        for (row, mean) in rows.chain(cross) {
            row.iter_mut().zip(&self.x).for_each(|(v, x)| *v -= weight * mean * x);
        }
    }

    /// Fills in the upper triangle once all chunks are in.
    pub fn finish(&mut self) {
        let n = self.gram.n;
        for i in 0..n {
            for j in 0..i {
                self.gram.data[j * n + i] = self.gram.data[i * n + j];
            }
        }
    }
}

fn add(sums: &mut [f64], values: &[f32]) {
    assert_eq!(sums.len(), values.len());
    sums.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(*v));
}
