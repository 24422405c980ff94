//! Low-rank adapters (LoRA, arXiv 2106.09685).

use super::{Adam, AdamState};
use crate::spill::SpillStore;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Number of rows or columns that a thread works on at a time.
const PART: usize = 192;

/// Change B A of a matrix `[n_out, n_in]`, with B `[n_out, rank]` and A `[rank, n_in]`.
#[derive(Debug)]
pub struct Adapter {
    a: Adam,
    b: Adam,
    rank: usize,
}

impl Adapter {
    /// Begins without a change, for a matrix `[n_out, n_in]` whose values have the root mean square `size`.
    /// Steps change the matrix by about as much as those of all its values would. `seed` sets A.
    ///
    /// # Errors
    /// Returns the system's error if a file cannot be made or the disk is full.
    pub fn new(
        [n_out, n_in]: [usize; 2],
        rank: usize,
        size: f32,
        seed: u64,
        spill: &SpillStore,
    ) -> std::io::Result<Adapter> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // A uniform number from -1 to 1 has the mean square 1/3.
        let length = 1.0 / (n_in as f32).sqrt();
        let a = (0..rank * n_in).map(|_| rng.random_range(-1.0f32..1.0) * 3f32.sqrt() * length).collect();
        let a = Adam::new(a, n_in, length, AdamState::F32, spill)?;
        let of_b = size * (n_in as f32 / rank as f32).sqrt();
        let b = Adam::new(vec![0.0; n_out * rank], rank, of_b, AdamState::F32, spill)?;
        Ok(Adapter { a, b, rank })
    }

    /// A and B.
    pub fn adams(&self) -> [&Adam; 2] {
        [&self.a, &self.b]
    }

    /// A and B, to be set.
    pub fn adams_mut(&mut self) -> [&mut Adam; 2] {
        [&mut self.a, &mut self.b]
    }

    /// Adds the change to the matrix `w`.
    pub fn add_to(&self, w: &mut [f32]) {
        let (rank, n_in) = (self.rank, self.a.n_in());
        let a = MatRef::from_row_major_slice(&self.a.values[..], rank, n_in);
        w.par_chunks_mut(PART * n_in).zip(self.b.values.par_chunks(PART * rank)).for_each(|(w, b)| {
            let n = b.len() / rank;
            let w = MatMut::from_row_major_slice_mut(w, n, n_in);
            matmul(w, Accum::Add, MatRef::from_row_major_slice(b, n, rank), a, 1.0, Par::Seq);
        });
    }

    /// Takes the `n`-th step, counted from 1, along the gradient by the matrix.
    pub fn step(&mut self, gradient: &[f32], rate: f32, n: i32) {
        let (rank, n_in) = (self.rank, self.a.n_in());
        let n_out = gradient.len() / n_in;
        let whole = MatRef::from_row_major_slice(gradient, n_out, n_in);
        let a = MatRef::from_row_major_slice(&self.a.values[..], rank, n_in);
        let b = MatRef::from_row_major_slice(&self.b.values[..], n_out, rank);
        let mut by_b = vec![0.0; n_out * rank];
        by_b.par_chunks_mut(PART * rank).zip(gradient.par_chunks(PART * n_in)).for_each(|(by_b, g)| {
            let n = g.len() / n_in;
            let g = MatRef::from_row_major_slice(g, n, n_in);
            let by_b = MatMut::from_row_major_slice_mut(by_b, n, rank);
            matmul(by_b, Accum::Replace, g, a.transpose(), 1.0, Par::Seq);
        });
        // Column by column, so that parts lie apart.
        let mut by_a = vec![0.0; rank * n_in];
        by_a.par_chunks_mut(PART * rank).enumerate().for_each(|(part, by_a)| {
            let n = by_a.len() / rank;
            let columns = whole.subcols(part * PART, n);
            let by_a = MatMut::from_column_major_slice_mut(by_a, rank, n);
            matmul(by_a, Accum::Replace, b.transpose(), columns, 1.0, Par::Seq);
        });
        let by_a: Vec<f32> = (0..rank * n_in).map(|i| by_a[i % n_in * rank + i / n_in]).collect();
        self.a.step(&by_a, rate, n);
        self.b.step(&by_b, rate, n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that an adapter finds a change of its own rank from gradients by the matrix alone.
    #[test]
    fn a_change_of_low_rank_is_found() {
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        for [n_out, n_in] in [[30, 20], [400, 250]] {
            let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
            let (u, v) = (random(n_out), random(n_in));
            let wanted: Vec<f32> = (0..n_out * n_in).map(|i| u[i / n_in] * v[i % n_in]).collect();
            let mut adapter = Adapter::new([n_out, n_in], 4, 1.0, 1, &SpillStore::default()).unwrap();
            let change = |adapter: &Adapter| {
                let mut w = vec![0.0; n_out * n_in];
                adapter.add_to(&mut w);
                w
            };
            let off = |w: &[f32]| w.iter().zip(&wanted).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            let before = off(&change(&adapter));
            for n in 1..=600 {
                let w = change(&adapter);
                let gradient: Vec<f32> = w.iter().zip(&wanted).map(|(a, b)| a - b).collect();
                adapter.step(&gradient, if n < 400 { 0.03 } else { 0.003 }, n);
            }
            let after = off(&change(&adapter));
            assert!(after < 0.02 * before, "{n_out} {n_in}: {before} to {after}");
        }
    }
}
