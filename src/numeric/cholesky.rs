//! Cholesky factors in as little memory as possible: those of wide layers take gigabytes.

use super::{Real, SymMatrix};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::{factor, solve};
use faer::linalg::matmul::triangular::{BlockStructure, matmul};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Cholesky factor L `[n, n]`, lower triangular, with L Lᵀ = H + λI.
pub struct Cholesky<T = f64> {
    n: usize,
    /// Elements of L, column-major.
    /// A plain vector: the system hands out fresh memory zeroed, and all threads touch it first where they
    /// fill it.
    data: Vec<T>,
}

impl<T: Real> Cholesky<T> {
    /// Factors the rows and columns `keep` of `h`, in that order, or all of them.
    /// Returns `None` if H + λI is not positive definite.
    ///
    /// # Panics
    /// If one of `keep` is not in `h`.
    pub fn new(h: &SymMatrix, keep: Option<&[usize]>, lambda: f64) -> Option<Cholesky<T>> {
        let n = keep.map_or(h.n(), <[usize]>::len);
        if n == 0 {
            return Some(Cholesky { n, data: Vec::new() });
        }
        let mut data = vec![T::of(0.0); n * n];
        data.par_chunks_exact_mut(n).enumerate().for_each(|(j, column)| {
            // H is symmetric: its rows are its columns.
            match keep {
                None => column[j..].iter_mut().zip(h.row(j)).for_each(|(v, h)| *v = T::of(*h)),
                Some(keep) => {
                    column[j..].iter_mut().zip(&keep[j..]).for_each(|(v, &i)| *v = T::of(h.get(i, keep[j])));
                }
            }
            column[j] += T::of(lambda);
        });
        let (par, params) = (Par::rayon(0), Default::default());
        let mut memory = MemBuffer::new(factor::cholesky_in_place_scratch::<T>(n, par, params));
        let stack = MemStack::new(&mut memory);
        let lower = MatMut::from_column_major_slice_mut(&mut data, n, n);
        factor::cholesky_in_place(lower, Default::default(), par, stack, params).ok()?;
        // faer leaves intermediate values above the diagonal.
        data.par_chunks_exact_mut(n).enumerate().for_each(|(j, column)| column[..j].fill(T::of(0.0)));
        Some(Cholesky { n, data })
    }

    /// Lower triangular factor L.
    pub fn lower(&self) -> MatRef<'_, T> {
        MatRef::from_column_major_slice(&self.data, self.n, self.n)
    }

    /// Replaces `rhs` by the solution X of (H + λI) X = `rhs`.
    ///
    /// # Panics
    /// If `rhs` has another number of rows.
    pub fn solve_in_place(&self, rhs: MatMut<T>) {
        solve::solve_in_place(self.lower(), rhs, Par::rayon(0), MemStack::new(&mut []));
    }

    /// Computes (H + λI)⁻¹, column-major, lower triangle only; elements above the diagonal are zero.
    pub fn into_inverse(self) -> Vec<T> {
        let Cholesky { n, data: mut factor } = self;
        let par = Par::rayon(0);
        let mut inverse = vec![T::of(0.0); n * n];
        let lower = MatMut::from_column_major_slice_mut(&mut inverse, n, n);
        invert_lower_triangular(lower, MatRef::from_column_major_slice(&factor, n, n), par);
        let lower = MatRef::from_column_major_slice(&inverse, n, n);
        // The product L⁻ᵀ L⁻¹ takes the place of the factor.
        matmul(
            MatMut::from_column_major_slice_mut(&mut factor, n, n),
            BlockStructure::TriangularLower,
            Accum::Replace,
            lower.transpose(),
            BlockStructure::TriangularUpper,
            lower,
            BlockStructure::TriangularLower,
            T::of(1.0),
            par,
        );
        factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use faer::Mat;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Gram matrix Xᵀ X of random rows, well conditioned.
    fn gram(n: usize) -> SymMatrix {
        let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
        let x = Mat::from_fn(2 * n + 3, n, |_, _| rng.random::<f64>() - 0.4);
        let h = x.transpose() * &x;
        SymMatrix::from_fn(n, |i, j| h[(i, j)])
    }

    #[test]
    fn factors_solutions_and_inverses_give_the_matrix_back() {
        for n in [1usize, 2, 7, 40, 130] {
            let h = gram(n);
            for keep in [None, Some((0..n).rev().step_by(3).collect::<Vec<_>>())] {
                let keep = keep.as_deref();
                let (lambda, part) = (0.3, keep.map_or(h.clone(), |k| h.select(k)));
                let k = part.n();
                let damped = |i: usize, j: usize| part.get(i, j) + if i == j { lambda } else { 0.0 };
                let product = |x: &dyn Fn(usize, usize) -> f64, i: usize, j: usize| -> f64 {
                    (0..k).map(|l| damped(i, l) * x(l, j)).sum()
                };
                let identity = |i, j| if i == j { 1.0 } else { 0.0 };
                let factored = Cholesky::<f64>::new(&h, keep, lambda).unwrap();
                let l = factored.lower();
                let mut solution = Mat::from_fn(k, 2, |i, j| (i * 3 + j) as f64 % 5.0);
                let rhs = solution.clone();
                factored.solve_in_place(solution.as_mut());
                for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
                    let back: f64 = (0..k).map(|a| l[(i, a)] * l[(j, a)]).sum();
                    assert!(i >= j || l[(i, j)] == 0.0);
                    assert!((back - damped(i, j)).abs() < 1e-9, "{n}: {back} {}", damped(i, j));
                }
                for (i, j) in (0..k).flat_map(|i| (0..2).map(move |j| (i, j))) {
                    assert!((product(&|l, j| solution[(l, j)], i, j) - rhs[(i, j)]).abs() < 1e-9);
                }
                let inverse = factored.into_inverse();
                let whole = |i: usize, j: usize| inverse[i.min(j) * k + i.max(j)];
                for (i, j) in (0..k).flat_map(|i| (0..k).map(move |j| (i, j))) {
                    assert!((product(&whole, i, j) - identity(i, j)).abs() < 1e-9);
                    assert!(i >= j || inverse[j * k + i] == 0.0);
                }
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        let h = SymMatrix::from_fn(2, |i, j| if i == j { 1.0 } else { 2.0 });
        assert!(Cholesky::<f64>::new(&h, None, 0.0).is_none());
        assert!(Cholesky::<f64>::new(&h, None, 1.5).is_some());
    }
}
