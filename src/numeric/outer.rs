//! Sums of outer products: gradients of linear maps.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Number of rows that a thread adds up at a time.
const ROWS: usize = 192;

/// Sum over tokens of a xᵀ, `[n_out, n_in]`, and what to add to it.
pub struct OuterSum<'s> {
    /// The sum so far, row-major.
    pub sum: &'s mut [f32],
    /// Length of a row.
    pub n_in: usize,
    /// Tokens in parts: a `[n_tokens, n_out]` and x `[n_tokens, n_in]` of each.
    pub parts: Vec<[&'s [f32]; 2]>,
}

/// Adds the products of all parts to their sums, part by part, whatever the number of threads is.
///
/// # Panics
/// If sizes disagree.
pub fn add_outer(sums: Vec<OuterSum>) {
    let tasks = sums.into_iter().flat_map(|OuterSum { sum, n_in, parts }| {
        let n_out = sum.len() / n_in;
        let panels = sum.chunks_mut(ROWS * n_in).enumerate();
        panels.map(|(i, panel)| (panel, i * ROWS, [n_out, n_in], parts.clone())).collect::<Vec<_>>()
    });
    tasks.collect::<Vec<_>>().into_par_iter().for_each(|(panel, top, [n_out, n_in], parts)| {
        let rows = panel.len() / n_in;
        let mut panel = MatMut::from_row_major_slice_mut(panel, rows, n_in);
        for [a, x] in parts {
            let n_tokens = x.len() / n_in;
            let a = MatRef::from_row_major_slice(a, n_tokens, n_out).subcols(top, rows);
            let x = MatRef::from_row_major_slice(x, n_tokens, n_in);
            matmul(panel.as_mut(), Accum::Add, a.transpose(), x, 1.0, Par::Seq);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn sums_are_those_of_the_definition() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for [n_out, n_in, tokens] in [[1, 1, 1], [5, 7, 3], [300, 40, 64], [193, 250, 33]] {
            let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random::<f32>() - 0.5).collect() };
            let parts: Vec<_> =
                (1..=3).map(|i| [random(i * tokens * n_out), random(i * tokens * n_in)]).collect();
            let before = random(n_out * n_in);
            let mut expected: Vec<f64> = before.iter().map(|v| f64::from(*v)).collect();
            for [a, x] in &parts {
                for (a, x) in a.chunks(n_out).zip(x.chunks(n_in)) {
                    for (row, a) in expected.chunks_mut(n_in).zip(a) {
                        row.iter_mut().zip(x).for_each(|(v, x)| *v += f64::from(*a) * f64::from(*x));
                    }
                }
            }
            let on = |n_threads: usize| {
                let mut sum = before.clone();
                let parts = parts.iter().map(|[a, x]| [&a[..], &x[..]]).collect();
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
                pool.install(|| add_outer(vec![OuterSum { sum: &mut sum, n_in, parts }]));
                sum
            };
            let found = on(1);
            assert!(found.iter().zip(&expected).all(|(f, e)| (f64::from(*f) - e).abs() < 1e-4));
            assert_eq!(found, on(3));
        }
    }
}
