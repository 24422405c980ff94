//! Inverses of curvatures, in as many bits as they take.

use super::Singular;
use super::refit::factor;
use crate::numeric::{Cholesky, Real, SymMatrix};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// How far off an inverse in 32 bits may be at any input, by [`InverseIn::rounding`].
const ROUNDING: f64 = 0.01;

/// Random signs that are tried.
const PROBES: usize = 2;

/// Parts in which a matrix is multiplied by a vector.
const PARTS: usize = 32;

/// (H + λI)⁻¹ with λ = ridge · mean diag H: in 32 bits, which take half the time and memory, where that is precise enough.
#[derive(Clone)]
pub enum Inverse {
    /// In 32 bits.
    Single(InverseIn<f32>),
    /// In 64 bits.
    Double(InverseIn<f64>),
}

/// An inverse in floats of one kind.
#[derive(Clone)]
pub struct InverseIn<T> {
    /// By columns; what is above the diagonal is not used.
    pub(super) columns: Vec<T>,
    /// The diagonal of H.
    pub(super) energies: Vec<f64>,
    /// The ridge in use, relative to the mean of H's diagonal; more than was asked for where the factorisation needed it.
    pub(super) ridge: f64,
}

impl Inverse {
    /// That of `h` with `ridge`.
    ///
    /// # Errors
    /// [`Singular`] if no ridge makes the curvature positive definite.
    pub fn new(h: &SymMatrix, ridge: f64) -> Result<Inverse, Singular> {
        let lambda = ridge * h.mean_diagonal();
        // No more ridge only to have it in 32 bits.
        if let Some(factored) = Cholesky::<f32>::new(h, None, lambda) {
            let inverse = InverseIn { columns: factored.into_inverse(), energies: h.diagonal(), ridge };
            if inverse.rounding(h, lambda) < ROUNDING {
                return Ok(Inverse::Single(inverse));
            }
        }
        InverseIn::new(h, ridge).map(Inverse::Double)
    }
}

impl InverseIn<f64> {
    /// That of `h` with `ridge`.
    ///
    /// # Errors
    /// [`Singular`] if no ridge makes the curvature positive definite.
    pub fn new(h: &SymMatrix, ridge: f64) -> Result<InverseIn<f64>, Singular> {
        let (factored, ridge) = factor(h, None, ridge, h.mean_diagonal())?;
        Ok(InverseIn { columns: factored.into_inverse(), energies: h.diagonal(), ridge })
    }
}

impl<T: Real> InverseIn<T> {
    /// The least that each diagonal element can be, whichever inputs are left: 1 / (H_jj + λ), what it is where nothing is like
    /// the input. Nothing where the ridge is infinite.
    pub(super) fn least(&self) -> Vec<f64> {
        let lambda = self.ridge * self.energies.iter().sum::<f64>() / self.energies.len() as f64;
        self.energies
            .iter()
            .map(|e| 1.0 / (e + lambda))
            .map(|v| if v.is_finite() { v } else { 0.0 })
            .collect()
    }

    /// How far its product with H + λI is from the identity E: the largest element of (product − E) s, with random signs
    /// s. Inputs are measured in their own sizes; the rounding of Cholesky factors does not depend on them either. The largest,
    /// since where a few of many inputs are nearly the same it is they whose part is lost.
    fn rounding(&self, h: &SymMatrix, lambda: f64) -> f64 {
        let n = h.n();
        let sizes: Vec<f64> = self.energies.iter().map(|e| (e + lambda).sqrt()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut most = 0.0;
        for _ in 0..PROBES {
            let signs: Vec<f64> =
                sizes.iter().map(|s| if rng.random() { 1.0 / s } else { -1.0 / s }).collect();
            let mut through = product(n, |i| h.row(i), &signs);
            through.iter_mut().zip(&signs).for_each(|(t, s)| *t += lambda * s);
            let back = product(n, |i| &self.columns[i * n + i..(i + 1) * n], &through);
            for ((b, s), size) in back.iter().zip(&signs).zip(&sizes) {
                let off = ((b - s) * size).abs();
                // What is not a number is the worst there is.
                if off > most || off.is_nan() {
                    most = off;
                }
            }
            if !most.is_finite() {
                return f64::INFINITY;
            }
        }
        most
    }
}

/// A symmetric matrix `[n, n]` times `v`; `row` gives its elements from the diagonal on.
fn product<'a, T: Real + 'a>(n: usize, row: impl Fn(usize) -> &'a [T] + Sync, v: &[f64]) -> Vec<f64> {
    let part = |first: usize| {
        let mut sums = vec![0.0; n];
        for i in (first..n).step_by(PARTS) {
            let row = row(i);
            sums[i] += row.iter().zip(&v[i..]).map(|(a, v)| (*a).into() * v).sum::<f64>();
            sums[i + 1..].iter_mut().zip(&row[1..]).for_each(|(sum, a)| *sum += (*a).into() * v[i]);
        }
        sums
    };
    // In parts that do not depend on the number of threads.
    let parts: Vec<Vec<f64>> = (0..PARTS).into_par_iter().map(part).collect();
    (0..n).map(|i| parts.iter().map(|p| p[i]).sum()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs of very different sizes; the last is the first once more, but for `apart`.
    fn gram(n: usize, apart: f64) -> SymMatrix {
        let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
        let size = |j: usize| 10f64.powi(j as i32 % 7 - 3);
        let rows: Vec<Vec<f64>> = (0..3 * n)
            .map(|_| {
                let mut x: Vec<f64> = (0..n).map(|_| rng.random::<f64>() - 0.4).collect();
                x[n - 1] = x[0] + apart * x[n - 1];
                x.iter().enumerate().map(|(j, v)| v * size(j)).collect()
            })
            .collect();
        SymMatrix::from_fn(n, |i, j| rows.iter().map(|x| x[i] * x[j]).sum())
    }

    #[test]
    fn what_32_bits_cannot_hold_is_done_in_64() {
        for n in [2usize, 30, 130] {
            for (apart, single) in [(1.0, true), (0.1, true), (1e-3, false), (1e-6, false)] {
                let h = gram(n, apart);
                let inverse = Inverse::new(&h, 0.0).unwrap();
                assert_eq!(matches!(inverse, Inverse::Single(_)), single, "{n} inputs, {apart} apart");
            }
            // Where a ridge tells them apart, 32 bits do again.
            assert!(matches!(Inverse::new(&gram(n, 1e-6), 1.0), Ok(Inverse::Single(_))));
        }
        assert!(Inverse::new(&SymMatrix::from_fn(3, |_, _| f64::NAN), 1e-3).is_err());
    }

    #[test]
    fn rounding_is_how_far_the_product_is_from_the_identity() {
        for n in [1usize, 7, 40] {
            let (h, lambda) = (gram(n, 1.0), 1e-3);
            let mut inverse = InverseIn::new(&h, lambda / h.mean_diagonal()).unwrap();
            assert!(inverse.rounding(&h, lambda) < 1e-9);
            // A whole inverse that is a tenth too large is so by a tenth of the identity.
            inverse.columns.iter_mut().for_each(|v| *v *= 1.1);
            assert!((inverse.rounding(&h, lambda) - 0.1).abs() < 1e-9);
        }
    }
}
