//! Inverses of curvatures, in 32 bits where those are precise enough, else in 64.

use super::Singular;
use super::refit::factor;
use crate::numeric::{Cholesky, Real, SymMatrix};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Largest error of an inverse in 32 bits at any input, as measured by [`InverseIn::rounding`].
const ROUNDING: f64 = 0.01;

/// Number of random sign vectors that the error estimate tries.
const PROBES: usize = 2;

/// Number of parts in which a matrix is multiplied by a vector.
const PARTS: usize = 32;

/// Inverse (H + λI)⁻¹ `[n, n]` with λ = ridge · mean diag H.
/// It is stored in 32 bits, which take half the time and memory, where that is precise enough.
#[derive(Clone)]
pub enum Inverse {
    /// Inverse in 32 bits.
    Single(InverseIn<f32>),
    /// Inverse in 64 bits.
    Double(InverseIn<f64>),
}

/// Inverse in one floating-point type.
#[derive(Clone)]
pub struct InverseIn<T> {
    /// Elements `[n, n]`, column-major; those above the diagonal are unused.
    pub(super) columns: Vec<T>,
    /// Diagonal of H.
    pub(super) energies: Vec<f64>,
    /// Ridge in use, relative to the mean of H's diagonal; larger than requested if the factorisation
    /// needed it.
    pub(super) ridge: f64,
}

impl Inverse {
    /// Inverts `h` with `ridge`.
    ///
    /// # Errors
    /// [`Singular`] if no ridge makes the curvature positive definite.
    pub fn new(h: &SymMatrix, ridge: f64) -> Result<Inverse, Singular> {
        let lambda = ridge * h.mean_diagonal();
        // The 32-bit inverse is not worth a larger ridge.
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
    /// Inverts `h` with `ridge`.
    ///
    /// # Errors
    /// [`Singular`] if no ridge makes the curvature positive definite.
    pub fn new(h: &SymMatrix, ridge: f64) -> Result<InverseIn<f64>, Singular> {
        let (factored, ridge) = factor(h, None, ridge, h.mean_diagonal())?;
        Ok(InverseIn { columns: factored.into_inverse(), energies: h.diagonal(), ridge })
    }
}

impl<T: Real> InverseIn<T> {
    /// Lower bound of each diagonal element for any set of remaining inputs: 1 / (H_jj + λ).
    /// An element reaches it if no other input resembles its own. The bound is 0 if the ridge is infinite.
    pub(super) fn least(&self) -> Vec<f64> {
        let lambda = self.ridge * self.energies.iter().sum::<f64>() / self.energies.len() as f64;
        self.energies
            .iter()
            .map(|e| 1.0 / (e + lambda))
            .map(|v| if v.is_finite() { v } else { 0.0 })
            .collect()
    }

    /// Distance of the product with H + λI from the identity E: the largest element of (product − E) s for
    /// random signs s.
    ///
    /// Inputs are measured in their own sizes, because the rounding of Cholesky factors does not depend on
    /// them either. The largest element counts: if a few of many inputs are nearly the same, only their
    /// part is lost.
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
                // NaN counts as the largest error.
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

/// Product of a symmetric matrix `[n, n]` and `v`; `row` gives its elements from the diagonal on.
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
    // The parts do not depend on the number of threads.
    let parts: Vec<Vec<f64>> = (0..PARTS).into_par_iter().map(part).collect();
    (0..n).map(|i| parts.iter().map(|p| p[i]).sum()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gram matrix of inputs of very different sizes; the last input equals the first up to `apart`.
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
            // A ridge that tells the two inputs apart makes 32 bits precise enough.
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
            // An inverse that is a tenth too large gives a product that is off by a tenth of the identity.
            inverse.columns.iter_mut().for_each(|v| *v *= 1.1);
            assert!((inverse.rounding(&h, lambda) - 0.1).abs() < 1e-9);
        }
    }
}
