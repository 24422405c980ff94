//! Fit of one block's experts.

use crate::Args;
use crate::algebra::{gather, norm, product, ridge, rows, scaled, sigmoid, top};
use crate::experts::{Split, Weights};
use faer::Par;
use putri_gguf::model::BlockWeights;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// One of this many tokens is not fitted to; the errors on these tokens are printed.
const HELD_OUT: usize = 16;
/// Weight of the dense model's residual stream in the target.
const DENSE_TARGET_WEIGHT: f32 = 0.35;
/// Tokens on which neurons are compared, and largest number of rounds of clustering.
const CLUSTER_TOKENS: usize = 4096;
const CLUSTER_ROUNDS: usize = 20;
/// Ridges, relative to the median of the Gram matrix's diagonal.
const ROUTER_RIDGE: f32 = 1e-3;
const DOWN_RIDGE: f32 = 2.0;
/// Geometric mean of the ratio of a token's largest and smallest router weight, before training.
const WEIGHT_RATIO: f32 = 1.8;
/// Tokens per step of training.
const BATCH: usize = 256;
/// First step of training, relative to the root mean square of a matrix, for experts and router. Steps shrink
/// to zero.
const RATES: [f32; 2] = [0.02, 0.005];

/// Fit of one block's experts.
pub struct Fit<'a> {
    args: &'a Args,
    n_embd: usize,
    n_ff: usize,
    n_tokens: usize,
    par: Par,
    /// Gate, up and transposed down, `[n_ff, n_embd]` each.
    weights: [Vec<f32>; 3],
    /// Input of the FFN, `[n_tokens, n_embd]`.
    x: Vec<f32>,
    /// Activations of the neurons, `[n_tokens, n_ff]`.
    h: Vec<f32>,
    /// Target of the FFN's output, `[n_tokens, n_embd]`.
    target: Vec<f32>,
    /// Factor of each token's errors.
    scales: Vec<f32>,
}

/// Statistics of a fit.
pub struct Report {
    /// Relative squared errors on the tokens that are held out: routed, refitted, trained.
    pub errors: [f32; 3],
    /// Geometric mean of the ratio of a token's largest and smallest router weight.
    pub ratio: f32,
    /// Share of tokens that choose each expert.
    pub used: Vec<f32>,
}

impl<'a> Fit<'a> {
    pub fn new(w: &BlockWeights, mid: &[f32], dense: &[f32], eps: f32, args: &'a Args) -> Fit<'a> {
        let gate = w.ffn_gate.as_ref().expect("the architecture has a gate");
        let norm = w.ffn_norm.as_ref().expect("the architecture has a norm");
        let (n_embd, n_ff, par) = (gate.n_in, gate.n_out, Par::rayon(args.threads));
        let down = (0..n_ff * n_embd).map(|i| w.ffn_down.data[i % n_embd * n_ff + i / n_embd]).collect();
        let weights = [gate.data.to_vec(), w.ffn_up.data.to_vec(), down];
        let inverse_rms =
            |row: &[f32]| 1.0 / (row.iter().map(|v| v * v).sum::<f32>() / n_embd as f32 + eps).sqrt();
        let mut x = mid.to_vec();
        for row in x.chunks_exact_mut(n_embd) {
            let scale = inverse_rms(row);
            row.iter_mut().zip(norm).for_each(|(v, n)| *v *= scale * n);
        }
        let mut h = product(rows(&x, n_embd), rows(&weights[0], n_embd).transpose(), par);
        let up = product(rows(&x, n_embd), rows(&weights[1], n_embd).transpose(), par);
        h.par_iter_mut().zip(&up).for_each(|(h, u)| *h *= u * sigmoid(*h));
        let mut target = product(rows(&h, n_ff), rows(&weights[2], n_embd), par);
        for ((t, d), m) in target.iter_mut().zip(dense).zip(mid) {
            *t += DENSE_TARGET_WEIGHT * (d - m - *t);
        }
        let scales = dense.chunks_exact(n_embd).map(inverse_rms).collect();
        Fit { args, n_embd, n_ff, n_tokens: mid.len() / n_embd, par, weights, x, h, target, scales }
    }

    /// Fits the experts; returns them, their outputs for all tokens, and statistics.
    pub fn run(&mut self, seed: u64) -> (Split, Vec<f32>, Report) {
        let (n_embd, n_ff) = (self.n_embd, self.n_ff);
        let order = self.clusters(seed);
        for m in &mut self.weights {
            *m = gather(m, n_embd, &order);
        }
        self.h.par_chunks_exact_mut(n_ff).for_each(|row| {
            let old = row.to_vec();
            row.iter_mut().zip(&order).for_each(|(v, &j)| *v = old[j]);
        });
        let (router, constant) = self.router();
        let mut split = self.assemble(router);
        split.balance(&self.x, &constant, self.par);
        let chosen = split.choose(&self.x, self.par);
        let [routed, refitted] = self.refit(&chosen);
        split = self.assemble(split.router.now);
        self.train(&mut split, seed, &constant);
        let weights = split.choose(&self.x, self.par);
        let (y, passes) = split.forward(&self.x, &weights);
        let used = passes.iter().map(|p| p.tokens.len() as f32 / self.n_tokens as f32).collect();
        let log_ratio = |row: &[f32]| {
            let chosen = || row.iter().copied().filter(|w| *w > 0.0);
            (chosen().fold(0.0, f32::max) / chosen().fold(1.0, f32::min)).ln()
        };
        let ratios = weights.chunks_exact(self.args.experts).map(log_ratio);
        let ratio = (ratios.sum::<f32>() / self.n_tokens as f32).exp();
        let report = Report { errors: [routed, refitted, self.error(&y)], ratio, used };
        split.finish();
        (split, y, report)
    }

    /// Neurons in the order of their experts: balanced k-means.
    fn clusters(&self, seed: u64) -> Vec<usize> {
        let (n_ff, n_expert) = (self.n_ff, self.args.experts);
        // Share of each neuron in the squared output, as far as a router can predict it.
        let squares: Vec<f32> =
            self.weights[2].chunks_exact(self.n_embd).map(|d| d.iter().map(|v| v * v).sum()).collect();
        let mut shares = self.h.clone();
        shares.par_chunks_exact_mut(n_ff).for_each(|row| {
            row.iter_mut().zip(&squares).for_each(|(v, s)| *v = *v * *v * s);
            let sum = row.iter().sum::<f32>().max(f32::MIN_POSITIVE);
            row.iter_mut().for_each(|v| *v /= sum);
        });
        let found = ridge(rows(&self.x, self.n_embd), rows(&shares, n_ff), ROUTER_RIDGE, self.par);
        let step = (self.n_tokens / CLUSTER_TOKENS).max(1);
        let tokens: Vec<usize> = (0..self.n_tokens).step_by(step).collect();
        let (x, n) = (gather(&self.x, self.n_embd, &tokens), tokens.len());
        let mut points = product(rows(&found, self.n_embd), rows(&x, self.n_embd).transpose(), self.par);
        points.par_chunks_exact_mut(n).for_each(|row| {
            let mean = row.iter().sum::<f32>() / n as f32;
            row.iter_mut().for_each(|v| *v -= mean);
            // Between covariances and correlations.
            let divisor = norm(row).sqrt();
            row.iter_mut().for_each(|v| *v /= divisor);
        });
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let first: Vec<usize> = (0..n_expert).map(|_| rng.random_range(0..n_ff)).collect();
        let mut centres = gather(&points, n, &first);
        let mut expert_of = vec![usize::MAX; n_ff];
        for _ in 0..CLUSTER_ROUNDS {
            centres.chunks_exact_mut(n).for_each(|row| {
                let length = norm(row);
                row.iter_mut().for_each(|v| *v /= length);
            });
            let similar = product(rows(&points, n), rows(&centres, n).transpose(), self.par);
            let mut room = vec![n_ff / n_expert; n_expert];
            let old = std::mem::replace(&mut expert_of, vec![usize::MAX; n_ff]);
            for pair in top(&similar, similar.len()) {
                let (neuron, expert) = (pair / n_expert, pair % n_expert);
                if expert_of[neuron] == usize::MAX && room[expert] > 0 {
                    expert_of[neuron] = expert;
                    room[expert] -= 1;
                }
            }
            if old == expert_of {
                break;
            }
            centres.fill(0.0);
            for (row, &expert) in points.chunks_exact(n).zip(&expert_of) {
                centres[expert * n..][..n].iter_mut().zip(row).for_each(|(c, v)| *c += v);
            }
        }
        let mut order: Vec<usize> = (0..n_ff).collect();
        order.sort_by_key(|&j| expert_of[j]);
        order
    }

    /// Router `[n_expert, n_embd]`, and the vector `[n_embd]` whose product with an input is about 1.
    fn router(&self) -> (Vec<f32>, Vec<f32>) {
        let (n_embd, n_expert) = (self.n_embd, self.args.experts);
        let width = self.n_ff / n_expert;
        // Logarithm of each expert's output norm, less the mean over experts, and a 1.
        let n_targets = n_expert + 1;
        let mut targets = vec![1.0; self.n_tokens * n_targets];
        for e in 0..n_expert {
            let down = rows(&self.weights[2], n_embd).subrows(e * width, width);
            let y = product(rows(&self.h, self.n_ff).subcols(e * width, width), down, self.par);
            let target = targets.chunks_exact_mut(n_targets).map(|row| &mut row[e]);
            target.zip(y.chunks_exact(n_embd)).for_each(|(t, y)| *t = norm(y).ln());
        }
        for row in targets.chunks_exact_mut(n_targets) {
            let mean = row[..n_expert].iter().sum::<f32>() / n_expert as f32;
            row[..n_expert].iter_mut().for_each(|v| *v -= mean);
        }
        // A token counts by the FFN's change of its residual stream: massive activations need their experts.
        let changes = self.target.chunks_exact(n_embd).zip(&self.scales).map(|(row, s)| s * norm(row));
        let mut changes: Vec<f32> = changes.collect();
        let floor = 0.5 * changes.iter().sum::<f32>() / changes.len() as f32;
        changes.iter_mut().for_each(|c| *c = c.max(floor));
        let (x, targets) = (scaled(&self.x, n_embd, &changes), scaled(&targets, n_targets, &changes));
        let mut router = ridge(rows(&x, n_embd), rows(&targets, n_targets), ROUTER_RIDGE, self.par);
        let constant = router.split_off(n_expert * n_embd);
        // The mean difference of the largest and smallest chosen score sets the temperature.
        let scores = product(rows(&self.x, n_embd), rows(&router, n_embd).transpose(), self.par);
        let range = |row: &[f32]| {
            let top = top(row, self.args.used);
            row[top[0]] - row[top[self.args.used - 1]]
        };
        let range = scores.chunks_exact(n_expert).map(range).sum::<f32>() / self.n_tokens as f32;
        let factor = if range > 0.0 { WEIGHT_RATIO.ln() / range } else { 1.0 };
        router.iter_mut().for_each(|v| *v *= factor);
        (router, constant)
    }

    /// Experts of the present weights.
    fn assemble(&self, router: Vec<f32>) -> Split {
        let n = self.n_ff / self.args.experts * self.n_embd;
        let part = |m: &Vec<f32>, e: usize| Weights::new(m[e * n..][..n].to_vec());
        let experts = (0..self.args.experts).map(|e| self.weights.each_ref().map(|m| part(m, e))).collect();
        Split { n_used: self.args.used, n_embd: self.n_embd, router: Weights::new(router), experts }
    }

    /// Scales and refits down for the router weights `chosen`; returns the errors after both.
    fn refit(&mut self, chosen: &[f32]) -> [f32; 2] {
        let (n_ff, n_embd, n_expert) = (self.n_ff, self.n_embd, self.args.experts);
        let mut z = self.h.clone();
        z.par_chunks_exact_mut(n_ff).zip(chosen.par_chunks_exact(n_expert)).for_each(|(row, chosen)| {
            for (part, weight) in row.chunks_exact_mut(n_ff / n_expert).zip(chosen) {
                part.iter_mut().for_each(|v| *v *= weight);
            }
        });
        let z = scaled(&z, n_ff, &self.scales);
        let target = scaled(&self.target, n_embd, &self.scales);
        let mut y = product(rows(&z, n_ff), rows(&self.weights[2], n_embd), self.par);
        let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum() };
        let factor = (dot(&y, &target) / dot(&y, &y)) as f32;
        y.iter_mut().for_each(|v| *v *= factor);
        let missing: Vec<f32> = target.iter().zip(&y).map(|(t, y)| t - y).collect();
        let n_fit = self.n_fit();
        let share =
            |r: &[f32]| (dot(r, r) / dot(&target[n_fit * n_embd..], &target[n_fit * n_embd..])) as f32;
        let routed = share(&missing[n_fit * n_embd..]);
        let (fit, held_out) = z.split_at(n_fit * n_ff);
        let change = ridge(rows(fit, n_ff), rows(&missing[..n_fit * n_embd], n_embd), DOWN_RIDGE, self.par);
        let more = product(rows(held_out, n_ff), rows(&change, n_ff).transpose(), self.par);
        let still: Vec<f32> = missing[n_fit * n_embd..].iter().zip(&more).map(|(m, y)| m - y).collect();
        for (i, v) in self.weights[2].iter_mut().enumerate() {
            *v = factor * *v + change[i % n_embd * n_ff + i / n_embd];
        }
        [routed, share(&still)]
    }
}

/// Training, and errors.
impl Fit<'_> {
    /// Number of tokens that are fitted to, the first ones.
    fn n_fit(&self) -> usize {
        self.n_tokens - self.n_tokens / HELD_OUT
    }

    /// Trains all matrices towards the target.
    fn train(&self, split: &mut Split, seed: u64, constant: &[f32]) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut order: Vec<usize> = (0..self.n_fit()).collect();
        let n_steps = self.args.passes * (order.len() / BATCH);
        let mut step = 0;
        for _ in 0..self.args.passes {
            order.shuffle(&mut rng);
            for tokens in order.chunks_exact(BATCH) {
                let [x, target] = [&self.x, &self.target].map(|m| gather(m, self.n_embd, tokens));
                let rates = RATES.map(|r| r * (1.0 - step as f32 / n_steps as f32));
                step += 1;
                split.step(&x, &target, &gather(&self.scales, 1, tokens), rates, step);
            }
            split.balance(&self.x, constant, self.par);
        }
    }

    /// Relative squared error of the outputs `y` on the tokens that are held out.
    fn error(&self, y: &[f32]) -> f32 {
        let n = self.n_embd;
        let (mut missed, mut whole) = (0.0f64, 0.0f64);
        for t in self.n_fit()..self.n_tokens {
            let square = f64::from(self.scales[t]).powi(2);
            for (y, target) in y[t * n..][..n].iter().zip(&self.target[t * n..][..n]) {
                missed += square * f64::from(y - target).powi(2);
                whole += square * f64::from(*target).powi(2);
            }
        }
        (missed / whole) as f32
    }
}
