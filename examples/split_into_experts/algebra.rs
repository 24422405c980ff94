//! Matrices as row-major slices.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::Solve;
use faer::{Accum, MatMut, MatRef, Par, Side};

/// Coefficients `[n_out, n_in]` of the ridge regression of `y` `[n, n_out]` on `x` `[n, n_in]`.
pub fn ridge(x: MatRef<f32>, y: MatRef<f32>, share: f32, par: Par) -> Vec<f32> {
    let n = x.ncols();
    let mut gram = product(x.transpose(), x, par);
    // A few inputs with massive activations do not change the median.
    let mut diagonal: Vec<f32> = (0..n).map(|i| gram[i * n + i]).collect();
    let median = *diagonal.select_nth_unstable_by(n / 2, f32::total_cmp).1;
    (0..n).for_each(|i| gram[i * n + i] += share * median);
    let mut solution = product(y.transpose(), x, par);
    let factor = rows(&gram, n).llt(Side::Lower).expect("a ridge makes it positive definite");
    factor.solve_in_place(MatMut::from_column_major_slice_mut(&mut solution, n, y.ncols()));
    solution
}

/// Matrix of rows of `n` numbers.
pub fn rows(data: &[f32], n: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(data, data.len() / n, n)
}

/// Product of two matrices, row-major.
pub fn product(a: MatRef<f32>, b: MatRef<f32>, par: Par) -> Vec<f32> {
    let mut out = vec![0.0; a.nrows() * b.ncols()];
    let to = MatMut::from_row_major_slice_mut(&mut out, a.nrows(), b.ncols());
    matmul(to, Accum::Replace, a, b, 1.0, par);
    out
}

/// Rows of `n` numbers with the indices `indices`.
pub fn gather(data: &[f32], n: usize, indices: &[usize]) -> Vec<f32> {
    indices.iter().flat_map(|i| &data[i * n..][..n]).copied().collect()
}

/// Rows of `n` numbers, each times its factor.
pub fn scaled(data: &[f32], n: usize, factors: &[f32]) -> Vec<f32> {
    data.chunks_exact(n).zip(factors).flat_map(|(row, f)| row.iter().map(move |v| v * f)).collect()
}

/// Indices of the `n` largest values, in descending order of the values.
pub fn top(values: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(n);
    order
}

/// Length of a vector; never 0.
pub fn norm(v: &[f32]) -> f32 {
    v.iter().map(|v| v * v).sum::<f32>().sqrt().max(f32::MIN_POSITIVE)
}

pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
