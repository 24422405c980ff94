//! Pruning algorithms, compared with slow and naive versions of them.

use crate::common::test_model::Rng;
use putri_gguf::model::Matrix;
use putri_gguf::numeric::{Moments, SymMatrix};
use putri_gguf::pipeline::Settings;
use putri_gguf::prune::{
    Inverse, InverseIn, Metric, NeuronCriterion, Obs, bias_change, greedy, narrow, paper_keep, refit,
    top_by_activation_norm,
};

/// Inverse of an invertible curvature.
fn inverse(h: &SymMatrix, ridge: f64) -> Inverse {
    Inverse::new(h, ridge).unwrap()
}

/// Least-squares problem with its data: inputs x `[t, n]`, residuals r `[t, m]`, and a map W.
struct Problem {
    t: usize,
    n: usize,
    m: usize,
    x: Vec<f64>,
    r: Vec<f64>,
    w: Matrix,
}

impl Problem {
    fn new(t: usize, n: usize, m: usize, seed: u64) -> Problem {
        let mut rng = Rng(seed);
        // The inputs are correlated and of unequal size, like activations.
        let mix: Vec<f64> = (0..n * n).map(|_| f64::from(rng.uniform())).collect();
        let mut x = Vec::with_capacity(t * n);
        for _ in 0..t {
            let z: Vec<f64> = (0..n).map(|_| f64::from(rng.uniform())).collect();
            x.extend((0..n).map(|j| {
                let sum: f64 = (0..n).map(|k| mix[j * n + k] * z[k]).sum();
                (z[j] + 0.5 * sum) * (1.0 + j as f64 / n as f64)
            }));
        }
        let r = (0..t * m).map(|_| f64::from(rng.uniform()) * 0.3).collect();
        let w = Matrix::new(n, m, rng.vec(n * m, 1.0));
        Problem { t, n, m, x, r, w }
    }

    fn moments(&self) -> Moments {
        let Problem { t, n, m, .. } = *self;
        let mut mo = Moments::new(n, m);
        for s in 0..t {
            for i in 0..n {
                (0..m).for_each(|o| mo.cross[o * n + i] += self.x[s * n + i] * self.r[s * m + o]);
            }
            let floats = |v: &[f64]| v.iter().map(|v| *v as f32).collect::<Vec<_>>();
            mo.add_sums(&floats(&self.x[s * n..][..n]), &floats(&self.r[s * m..][..m]), 1.0);
        }
        let product = |i: usize, j: usize| (0..t).map(|s| self.x[s * n + i] * self.x[s * n + j]).sum();
        mo.gram = SymMatrix::from_fn(n, product);
        mo.n_tokens = t;
        mo
    }

    /// Copy of the problem with every input and residual shifted by its mean, and these means.
    fn centred(&self) -> (Problem, Vec<f64>, Vec<f64>) {
        let mean = |v: &[f64], n: usize| -> Vec<f64> {
            (0..n).map(|j| v.iter().skip(j).step_by(n).sum::<f64>() / self.t as f64).collect()
        };
        let moved = |v: &[f64], means: &[f64]| -> Vec<f64> {
            v.iter().zip(means.iter().cycle()).map(|(v, mean)| v - mean).collect()
        };
        let (mx, mr) = (mean(&self.x, self.n), mean(&self.r, self.m));
        let (x, r) = (moved(&self.x, &mx), moved(&self.r, &mr));
        (Problem { x, r, w: self.w.clone(), ..*self }, mx, mr)
    }

    /// Σ ‖x_keep W'ᵀ − (x Wᵀ + μ r)‖² + λ ‖W' − W_keep‖², straight from the data.
    fn loss(&self, keep: &[usize], w_keep: &dyn Fn(usize, usize) -> f64, mu: f64, lambda: f64) -> f64 {
        let mut loss = 0.0;
        for s in 0..self.t {
            for o in 0..self.m {
                let own: f64 = (0..self.n)
                    .map(|j| self.x[s * self.n + j] * f64::from(self.w.data[o * self.n + j]))
                    .sum();
                let new: f64 =
                    keep.iter().enumerate().map(|(a, &j)| self.x[s * self.n + j] * w_keep(o, a)).sum();
                loss += (new - own - mu * self.r[s * self.m + o]).powi(2);
            }
        }
        for o in 0..self.m {
            for (a, &j) in keep.iter().enumerate() {
                loss += lambda * (w_keep(o, a) - f64::from(self.w.data[o * self.n + j])).powi(2);
            }
        }
        loss
    }

    /// Minimum of that loss by Gauss-Jordan elimination, output by output: `[m, keep.len()]`.
    fn naive_refit(&self, keep: &[usize], mu: f64, lambda: f64) -> Vec<f64> {
        let k = keep.len();
        let mut out = Vec::new();
        for o in 0..self.m {
            let mut a = vec![vec![0.0; k + 1]; k];
            for s in 0..self.t {
                let x = |j: usize| self.x[s * self.n + j];
                let own: f64 = (0..self.n).map(|j| x(j) * f64::from(self.w.data[o * self.n + j])).sum();
                let target = own + mu * self.r[s * self.m + o];
                for (i, &ji) in keep.iter().enumerate() {
                    keep.iter().enumerate().for_each(|(l, &jl)| a[i][l] += x(ji) * x(jl));
                    a[i][k] += x(ji) * target;
                }
            }
            for (i, &j) in keep.iter().enumerate() {
                a[i][i] += lambda;
                a[i][k] += lambda * f64::from(self.w.data[o * self.n + j]);
            }
            for p in 0..k {
                let pivot = a[p].clone();
                for (i, row) in a.iter_mut().enumerate() {
                    let f = if i == p { 1.0 - 1.0 / pivot[p] } else { row[p] / pivot[p] };
                    row.iter_mut().zip(&pivot).for_each(|(v, q)| *v -= f * q);
                }
            }
            out.extend(a.iter().map(|row| row[k]));
        }
        out
    }

    /// All subsets of `keep` inputs with their losses after a refit, in ascending order of loss.
    fn all_subsets(&self, keep: usize, lambda: f64) -> Vec<(f64, Vec<usize>)> {
        let mut all: Vec<(f64, Vec<usize>)> = (0u32..1 << self.n)
            .filter(|bits| bits.count_ones() as usize == keep)
            .map(|bits| {
                let set: Vec<usize> = (0..self.n).filter(|j| bits >> j & 1 == 1).collect();
                let w = self.naive_refit(&set, 0.0, lambda);
                let k = set.len();
                (self.loss(&set, &|o, a| w[o * k + a], 0.0, lambda), set)
            })
            .collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        all
    }
}

#[test]
fn refit_is_the_least_squares_solution() {
    for (t, n, m, seed) in [(40, 6, 3, 1), (100, 12, 5, 2), (200, 24, 8, 3)] {
        let p = Problem::new(t, n, m, seed);
        let moments = p.moments();
        let keep: Vec<usize> = (0..n).filter(|j| j % 3 != 1).collect();
        for (mu, ridge) in [(0.0, 0.0), (0.5, 1e-3), (1.0, 0.1)] {
            let got = refit(&p.w, &moments, mu, &keep, ridge).unwrap();
            assert_eq!(got.ridge, ridge, "no more ridge than asked for");
            let lambda = ridge * moments.gram.mean_diagonal();
            let exact = p.naive_refit(&keep, mu, lambda);
            for (a, b) in got.weights.data.iter().zip(&exact) {
                assert!(
                    (f64::from(*a) - b).abs() < 1e-4 * (1.0 + b.abs()),
                    "n {n} mu {mu} ridge {ridge}: {a} {b}"
                );
            }
        }
    }
}

#[test]
fn with_a_bias_only_what_varies_is_fitted() {
    for (t, n, m, seed) in [(60, 6, 3, 1), (120, 15, 4, 2)] {
        let mut p = Problem::new(t, n, m, seed);
        // The means of inputs and residuals are not negligible.
        p.x.iter_mut().enumerate().for_each(|(i, x)| *x += (i % n) as f64 / 3.0);
        p.r.iter_mut().enumerate().for_each(|(i, r)| *r += 1.0 - (i % m) as f64);
        let mut moments = p.moments();
        moments.centre();
        let (around_means, mean_x, mean_r) = p.centred();
        let keep: Vec<usize> = (0..n).filter(|j| j % 3 != 1).collect();
        for (mu, ridge) in [(0.0, 0.0), (0.5, 1e-3)] {
            let got = refit(&p.w, &moments, mu, &keep, ridge).unwrap();
            let lambda = ridge * around_means.moments().gram.mean_diagonal();
            let exact = around_means.naive_refit(&keep, mu, lambda);
            for (a, b) in got.weights.data.iter().zip(&exact) {
                assert!((f64::from(*a) - b).abs() < 1e-4 * (1.0 + b.abs()), "n {n} mu {mu}: {a} {b}");
            }
            let bias = bias_change(&p.w, &got.weights, &keep, &moments, mu);
            for (o, bias) in bias.iter().enumerate() {
                let k = keep.len();
                let old: f64 = (0..n).map(|j| f64::from(p.w.data[o * n + j]) * mean_x[j]).sum();
                let new: f64 = (0..k).map(|a| exact[o * k + a] * mean_x[keep[a]]).sum();
                let expected = old + mu * mean_r[o] - new;
                assert!(
                    (f64::from(*bias) - expected).abs() < 1e-3 * (1.0 + expected.abs()),
                    "{bias} {expected}"
                );
            }
        }
    }
}

#[test]
fn refit_of_everything_changes_nothing() {
    let p = Problem::new(60, 10, 4, 7);
    let all: Vec<usize> = (0..10).collect();
    let got = refit(&p.w, &p.moments(), 0.0, &all, 1e-3).unwrap();
    for (a, b) in got.weights.data.iter().zip(p.w.data.iter()) {
        assert!((a - b).abs() < 1e-5);
    }
}

#[test]
fn a_singular_gram_gets_the_ridge_it_needs_and_says_so() {
    let mut p = Problem::new(50, 8, 3, 4);
    // Neuron 3 is dead, neuron 5 is a copy of neuron 2.
    for s in 0..p.t {
        p.x[s * 8 + 3] = 0.0;
        p.x[s * 8 + 5] = p.x[s * 8 + 2];
    }
    let keep: Vec<usize> = (0..8).collect();
    let got = refit(&p.w, &p.moments(), 0.3, &keep, 0.0).unwrap();
    assert!(got.ridge > 0.0);
    assert!(got.weights.data.iter().all(|v| v.is_finite()));
    let dead = Moments { gram: SymMatrix::zero(8), ..p.moments() };
    let got = refit(&p.w, &dead, 0.0, &keep[..5], 1e-3).unwrap();
    assert!(got.ridge.is_infinite(), "nothing can be fitted to nothing");
    assert_eq!(got.weights, p.w.select_cols(&keep[..5]));
    let nan = Moments { gram: SymMatrix::from_fn(8, |_, _| f64::NAN), ..p.moments() };
    assert!(refit(&p.w, &nan, 0.0, &keep, 1e-3).is_err());
}

#[test]
fn obs_updates_are_refits() {
    for (n, m, seed) in [(10, 3, 1), (20, 6, 2), (33, 9, 3)] {
        let p = Problem::new(150, n, m, seed);
        let moments = p.moments();
        let ridge = 1e-3;
        let lambda = ridge * moments.gram.mean_diagonal();
        let mut obs =
            Obs::new(&p.w, None, InverseIn::new(&moments.gram, ridge).unwrap(), NeuronCriterion::Obs);
        let mut loss = 0.0;
        for k in [1, 2, 3] {
            loss += obs.remove_least(k);
        }
        let keep = obs.kept();
        assert_eq!(keep.len(), n - 6);
        // The sum of OBS's losses is the true loss of the removed weights, including the ridge.
        let w = p.naive_refit(&keep, 0.0, lambda);
        let gone: f64 = (0..n)
            .filter(|j| !keep.contains(j))
            .map(|j| (0..m).map(|o| lambda * f64::from(p.w.data[o * n + j]).powi(2)).sum::<f64>())
            .sum();
        let exact = p.loss(&keep, &|o, a| w[o * keep.len() + a], 0.0, lambda) + gone;
        assert!((loss - exact).abs() < 1e-6 * exact, "n {n}: {loss} {exact}");
        // The weights are exact as well.
        let found = obs.weights();
        let off = found.data.iter().zip(&w).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>();
        let size = w.iter().map(|v| v * v).sum::<f64>();
        assert!(off < 1e-10 * size, "n {n}: {off} of {size}");
    }
}

#[test]
fn obs_forgets_nothing_when_it_brings_its_inverse_up_to_date() {
    let (n, ridge) = (330, 1e-2);
    let p = Problem::new(400, n, 2, 4);
    let gram = p.moments().gram;
    let lambda = ridge * gram.mean_diagonal();
    for k in [7, 300] {
        let mut obs = Obs::new(&p.w, None, InverseIn::new(&gram, ridge).unwrap(), NeuronCriterion::Obs);
        while obs.alive() > 30 {
            obs.remove_least(k.min(obs.alive() - 30));
        }
        let (keep, found) = (obs.kept(), obs.weights());
        let w = p.naive_refit(&keep, 0.0, lambda);
        let off = found.data.iter().zip(&w).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>();
        let size = w.iter().map(|v| v * v).sum::<f64>();
        assert!(off < 1e-9 * size, "{k} at a time: {off} of {size}");
    }
}

#[test]
fn by_energy_the_least_product_of_length_and_energy_goes() {
    for (t, n, m, n_keep, seed) in [(60, 12, 3, 4, 1), (150, 30, 5, 11, 2), (300, 70, 4, 30, 3)] {
        let p = Problem::new(t, n, m, seed);
        let gram = p.moments().gram;
        let lambda = 1e-2 * gram.mean_diagonal();
        let mut keep: Vec<usize> = (0..n).collect();
        while keep.len() > n_keep {
            // Each removal starts from a refit of the others.
            let w = p.naive_refit(&keep, 0.0, lambda);
            let worth = |a: usize| {
                let square: f64 = (0..m).map(|o| w[o * keep.len() + a].powi(2)).sum();
                square * gram.get(keep[a], keep[a]).powi(2)
            };
            let least = (0..keep.len()).min_by(|&a, &b| worth(a).total_cmp(&worth(b))).unwrap();
            keep.remove(least);
        }
        let found = greedy(&p.w, None, inverse(&gram, 1e-2), n_keep, NeuronCriterion::Magnitude).unwrap();
        assert_eq!(found.0, keep, "{n_keep} of {n}");
        assert_ne!(keep, greedy(&p.w, None, inverse(&gram, 1e-2), n_keep, NeuronCriterion::Obs).unwrap().0);
        let w = p.naive_refit(&keep, 0.0, lambda);
        for (a, b) in found.1.weights.data.iter().zip(&w) {
            assert!((f64::from(*a) - b).abs() < 1e-4 * (0.1 + b.abs()), "{n_keep} of {n}: {a} {b}");
        }
    }
}

#[test]
fn by_energy_a_wide_map_goes_as_fresh_refits_say() {
    let (n, m, n_keep) = (330, 2, 20);
    let p = Problem::new(400, n, m, 6);
    let moments = p.moments();
    let costs = Matrix::new(n, 3, Rng(9).vec(3 * n, 1.0));
    let energies = moments.gram.diagonal();
    let mut keep: Vec<usize> = (0..n).collect();
    while keep.len() > n_keep {
        let w = refit(&costs, &moments, 0.0, &keep, 1e-2).unwrap().weights;
        let square = |a: usize| (0..3).map(|o| f64::from(w.data[o * keep.len() + a]).powi(2)).sum::<f64>();
        let mut worth: Vec<(f64, usize)> =
            keep.iter().enumerate().map(|(a, &j)| (square(a) * energies[j].powi(2), j)).collect();
        worth.sort_by(|a, b| a.0.total_cmp(&b.0));
        let k = (keep.len() / 64).clamp(1, 16).min(keep.len() - n_keep);
        keep.retain(|j| worth[..k].iter().all(|(_, gone)| gone != j));
    }
    let found =
        greedy(&p.w, Some(&costs), inverse(&moments.gram, 1e-2), n_keep, NeuronCriterion::Magnitude).unwrap();
    assert_eq!(found.0, keep);
}

#[test]
fn greedy_is_near_the_best_of_all_subsets() {
    let mut best_hits = 0;
    for seed in 1..=6 {
        let p = Problem::new(80, 9, 4, seed);
        let moments = p.moments();
        let lambda = 1e-6 * moments.gram.mean_diagonal();
        let keep = greedy(&p.w, None, inverse(&moments.gram, 1e-6), 5, NeuronCriterion::Obs).unwrap().0;
        let all = p.all_subsets(5, lambda);
        let rank = all.iter().position(|(_, set)| *set == keep).unwrap();
        best_hits += usize::from(rank == 0);
        // There are 126 subsets of 5 out of 9.
        assert!(rank < 12, "seed {seed}: greedy is number {rank} of {}", all.len());
    }
    assert!(best_hits >= 2, "the best only {best_hits} times");
}

#[test]
fn curves_rise_and_end_where_greedy_ends() {
    let p = Problem::new(300, 48, 6, 5);
    let gram = p.moments().gram;
    let curve = narrow(&p.w, inverse(&gram, 1e-3), &[48, 32, 16], 32).losses;
    assert_eq!(curve[0], 0.0);
    assert!(curve[1] > 0.0 && curve[2] > curve[1], "{curve:?}");
    let keep = greedy(&p.w, None, inverse(&gram, 1e-3), 16, NeuronCriterion::Obs).unwrap().0;
    let mut obs = Obs::new(&p.w, None, InverseIn::new(&gram, 1e-3).unwrap(), NeuronCriterion::Obs);
    (0..32).for_each(|_| {
        obs.remove_least(1);
    });
    assert_eq!(keep, obs.kept());
}

#[test]
fn the_layer_at_the_probe_is_what_a_refit_would_give() {
    for (t, n, m) in [(90, 24, 3), (300, 48, 6)] {
        let p = Problem::new(t, n, m, 7);
        let moments = p.moments();
        let lambda = 1e-3 * moments.gram.mean_diagonal();
        let probed = narrow(&p.w, inverse(&moments.gram, 1e-3), &[n, n / 2, n / 4], n / 2);
        assert_eq!(
            probed.kept,
            greedy(&p.w, None, inverse(&moments.gram, 1e-3), n / 2, NeuronCriterion::Obs).unwrap().0
        );
        // From the minimum of a loss with curvature H + λI, the remaining weights move to (H + λI)_KK⁻¹ (H +
        // λI)_K: Wᵀ; on the kept inputs, λI adds λ W_K.
        let w = p.naive_refit(&probed.kept, 0.0, lambda);
        for (a, b) in probed.weights.data.iter().zip(&w) {
            assert!((f64::from(*a) - b).abs() < 1e-4 * (0.1 + b.abs()), "n {n}: {a} {b}");
        }
    }
}

#[test]
fn half_as_many_bits_find_the_same_losses() {
    for (t, n, m) in [(90, 24, 3), (400, 330, 5), (1200, 700, 4)] {
        let p = Problem::new(t, n, m, 11);
        let gram = p.moments().gram;
        let widths = [n, n * 3 / 4, n / 2, n / 8];
        let single = inverse(&gram, 1e-3);
        assert!(matches!(single, Inverse::Single(_)));
        let double = Inverse::Double(InverseIn::new(&gram, 1e-3).unwrap());
        let [a, b] = [single, double].map(|i| narrow(&p.w, i, &widths, n / 2).losses);
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= 1e-4 * b, "{n} inputs: {a} {b}");
        }
    }
}

#[test]
fn loud_inputs_that_are_nearly_the_same_lose_what_they_should() {
    for (n, loud) in [(40, 2), (700, 3), (2000, 4)] {
        for apart in [1e-2, 1e-3, 1e-4, 1e-5, 1e-6] {
            let gram = SymMatrix::from_fn(n, |i, j| match (i < loud, j < loud) {
                (true, true) => 1e3 * if i == j { 1.0 + apart } else { 1.0 },
                (true, false) => 0.0,
                _ => 0.3f64.powi((j - i) as i32),
            });
            // Inputs of large size have small weights, so that all of them but the last are removed early.
            let mut w = Matrix::new(n, 3, Rng(n as u64).vec(3 * n, 1.0));
            let weights = std::sync::Arc::make_mut(&mut w.data);
            weights.chunks_exact_mut(n).for_each(|row| row[..loud].iter_mut().for_each(|v| *v *= 1e-2));
            let widths = [n, n - loud, n / 2, n / 8, 1];
            let exact = Inverse::Double(InverseIn::new(&gram, 1e-6).unwrap());
            let [found, exact] = [inverse(&gram, 1e-6), exact].map(|i| narrow(&w, i, &widths, n / 2));
            for (a, b) in found.losses.iter().zip(&exact.losses) {
                assert!((a - b).abs() <= 0.01 * b, "{n} inputs, {apart} apart: {a} {b}");
            }
            assert!(found.weights.data.iter().all(|v| v.is_finite()));
        }
    }
}

#[test]
fn threads_change_nothing() {
    // The matrix is wide enough for parallel products, and is narrowed until neurons are removed one by one.
    let (n, m) = (500, 900);
    let gram = SymMatrix::from_fn(n, |i, j| 0.8f64.powi((j - i) as i32));
    let (w, costs) = (Matrix::new(n, m, Rng(1).vec(n * m, 1.0)), Matrix::new(n, m, Rng(2).vec(n * m, 1.0)));
    let narrowed = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let curve = narrow(&w, inverse(&gram, 1e-3), &[n, n / 2, 10], 10);
            let (keep, refit) =
                greedy(&w, Some(&costs), inverse(&gram, 1e-3), 10, NeuronCriterion::Obs).unwrap();
            (curve.losses, curve.weights, keep, refit.weights)
        })
    };
    let one = narrowed(1);
    for threads in [2, 3, 5] {
        assert!(narrowed(threads) == one, "{threads} threads");
    }
}

#[test]
fn neurons_judged_by_other_costs_leave_the_map_at_its_own_minimum() {
    for (n, n_keep, seed) in [(24, 9, 1), (330, 40, 2)] {
        let p = Problem::new(400, n, 3, seed);
        let moments = p.moments();
        let costs = Matrix::new(n, 5, Rng(seed).vec(5 * n, 1.0));
        let (keep, refitted) =
            greedy(&p.w, Some(&costs), inverse(&moments.gram, 1e-2), n_keep, NeuronCriterion::Obs).unwrap();
        assert_eq!(
            keep,
            greedy(&costs, None, inverse(&moments.gram, 1e-2), n_keep, NeuronCriterion::Obs).unwrap().0
        );
        let w = p.naive_refit(&keep, 0.0, 1e-2 * moments.gram.mean_diagonal());
        for (a, b) in refitted.weights.data.iter().zip(&w) {
            assert!((f64::from(*a) - b).abs() < 1e-4 * (0.1 + b.abs()), "n {n}: {a} {b}");
        }
    }
}

#[test]
fn a_metric_weighs_errors_by_what_it_has_seen() {
    for (n_samples, n) in [(5, 4), (200, 12), (90, 31)] {
        let mut rng = Rng(n as u64);
        let samples = rng.vec(n_samples * n, 2.0);
        let w = Matrix::new(9, n, rng.vec(9 * n, 1.0));
        let squares: f64 = samples.iter().map(|v| f64::from(*v).powi(2)).sum();
        let applied = Metric::new(&samples, n).unwrap().apply(&w);
        for j in 0..w.n_in {
            let column =
                |m: &Matrix| (0..m.n_out).map(|i| f64::from(m.data[i * m.n_in + j])).collect::<Vec<_>>();
            let e = column(&w);
            // eᵀ F e comes from the samples, with a mean diagonal of 1 and a ridge of a hundredth.
            let seen: f64 = samples
                .chunks_exact(n)
                .map(|s| s.iter().zip(&e).map(|(s, e)| f64::from(*s) * e).sum::<f64>().powi(2))
                .sum();
            let norm = |e: &[f64]| e.iter().map(|e| e * e).sum::<f64>();
            let cost = seen / (squares / n as f64) + 0.01 * norm(&e);
            let found = norm(&column(&applied));
            assert!((found - cost).abs() < 1e-5 * cost, "n {n}, column {j}: {found} {cost}");
        }
    }
    let w = Matrix::new(2, 3, vec![1.0, -2.0, 0.5, 4.0, 3.0, 0.25]);
    let alike = Metric::new(&[0.0; 12], 3).unwrap().apply(&w);
    w.data.iter().zip(alike.data.iter()).for_each(|(a, b)| assert!((b - 0.1 * a).abs() < 1e-6, "{a} {b}"));
    assert!(Metric::new(&[f32::NAN; 12], 3).is_err());
}

#[test]
fn under_a_metric_neurons_stay_that_it_minds() {
    // All neurons are alike, but the predictions are not sensitive to the outputs of the first half.
    let (n, m) = (16, 2);
    let rows: Vec<f32> = (0..m * n).map(|k| f32::from(u8::from((k % n < n / 2) == (k < n)))).collect();
    let w = Matrix::new(n, m, rows);
    let gram = Problem::new(200, n, m, 3).moments().gram;
    let samples: Vec<f32> = (0..40).flat_map(|t| [0.0, 1.0 + t as f32]).collect();
    let costs = Metric::new(&samples, m).unwrap().apply(&w);
    assert_eq!(
        greedy(&costs, None, inverse(&gram, 1e-3), n / 2, NeuronCriterion::Obs).unwrap().0,
        (n / 2..n).collect::<Vec<_>>()
    );
}

#[test]
fn what_few_tokens_make_up_for_holds_for_others() {
    let settings = Settings::default();
    for (t, n, m, seed) in [(12, 96, 8, 1), (48, 96, 8, 2), (90, 48, 4, 3), (2000, 96, 8, 4)] {
        let p = Problem::new(t + 500, n, m, seed);
        let part = |tokens: std::ops::Range<usize>| Problem {
            t: tokens.len(),
            x: p.x[tokens.start * n..tokens.end * n].to_vec(),
            r: p.r[tokens.start * m..tokens.end * m].to_vec(),
            w: p.w.clone(),
            ..p
        };
        let (seen, others) = (part(0..t), part(t..t + 500));
        let loss = |keep: &[usize], w: &Matrix| {
            others.loss(keep, &|o, a| f64::from(w.data[o * keep.len() + a]), 0.0, 0.0)
        };
        let with = |ridge: f64| {
            let (keep, refit) =
                greedy(&seen.w, None, inverse(&seen.moments().gram, ridge), n * 3 / 4, NeuronCriterion::Obs)
                    .unwrap();
            [loss(&keep, &refit.weights), loss(&keep, &seen.w.select_cols(&keep))]
        };
        let ridge = settings.ridge_of_neurons(n, t);
        let ([fitted, unfitted], [close, _]) = (with(ridge), with(settings.blocks.ridge_ffn));
        println!(
            "{t} tokens for {n} neurons: ridge {ridge:.1e}, {fitted:.3e}, close {close:.3e}, unfitted {unfitted:.3e}"
        );
        // A few tokens do not improve the fit, but must not make it worse.
        assert!(fitted < 1.02 * unfitted, "{t} tokens for {n} neurons: {fitted}, but {unfitted} as it was");
        if t > 8 * n {
            assert_eq!(ridge, settings.blocks.ridge_ffn);
        } else {
            assert!(fitted < close, "{t} tokens for {n} neurons: {fitted}, {close} with less ridge");
        }
    }
    assert_eq!(settings.ridge_of_neurons(1 << 20, 1), 1.0);
}

#[test]
fn the_loudest_inputs_have_the_largest_norms() {
    for (t, n) in [(20, 7), (100, 33)] {
        let p = Problem::new(t, n, 2, 4);
        let energy = |j: usize| (0..t).map(|s| p.x[s * n + j].powi(2)).sum::<f64>();
        let kept = top_by_activation_norm(&p.moments().gram, n / 3);
        assert!(kept.windows(2).all(|w| w[0] < w[1]) && kept.len() == n / 3);
        let quietest = kept.iter().map(|&j| energy(j)).fold(f64::INFINITY, f64::min);
        assert!((0..n).filter(|j| !kept.contains(j)).all(|j| energy(j) <= quietest));
    }
}

#[test]
fn the_papers_score_is_its_formula() {
    let p = Problem::new(90, 7, 3, 9);
    let moments = p.moments();
    let n = p.n;
    // H⁻¹ comes from elimination, U from the textbook recurrence, and energies from the data.
    let h = &moments.gram;
    let mut a: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            (0..2 * n).map(|j| if j < n { h.get(i, j) } else { f64::from(u8::from(j - n == i)) }).collect()
        })
        .collect();
    for q in 0..n {
        let pivot: Vec<f64> = a[q].iter().map(|v| v / a[q][q]).collect();
        for (i, row) in a.iter_mut().enumerate() {
            let f = row[q];
            if i == q {
                *row = pivot.clone();
            } else {
                row.iter_mut().zip(&pivot).for_each(|(v, s)| *v -= f * s);
            }
        }
    }
    let mut u = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in i..n {
            let sum: f64 = (0..i).map(|k| u[k][i] * u[k][j]).sum();
            u[i][j] = if i == j { (a[i][n + i] - sum).sqrt() } else { (a[i][n + j] - sum) / u[i][i] };
        }
    }
    let energy = |o: usize| -> f64 {
        let y = |s: usize| -> f64 { (0..n).map(|j| p.x[s * n + j] * f64::from(p.w.data[o * n + j])).sum() };
        (0..p.t).map(|s| y(s).powi(2)).sum::<f64>() / p.t as f64
    };
    let energies: Vec<f64> = (0..p.m).map(energy).collect();
    let score = |j: usize| -> f64 {
        (0..p.m).map(|o| energies[o] * f64::from(p.w.data[o * n + j]).powi(2)).sum::<f64>() / u[j][j].powi(2)
    };
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|x, y| score(*y).total_cmp(&score(*x)));
    let mut expected = order[..4].to_vec();
    expected.sort();
    assert_eq!(paper_keep(&p.w, &moments.gram, p.t, 4).unwrap(), expected);
}
