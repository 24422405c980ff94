//! Router and experts of one block, and their training.

use crate::algebra::{gather, norm, product, rows, sigmoid, top};
use faer::Par;
use rayon::prelude::*;

/// Bound of the share of tokens that choose an expert, relative to that of balanced experts; the share of
/// those that do not is bounded in the same way.
const LEAST_USE: f32 = 0.3;
/// Decay of Adam's moments.
const DECAY: [f32; 2] = [0.9, 0.99];

/// Router and experts of one block.
pub struct Split {
    pub n_used: usize,
    pub n_embd: usize,
    /// `[n_expert, n_embd]`.
    pub router: Weights,
    /// Gate, up and transposed down of each expert, `[width, n_embd]` each.
    pub experts: Vec<[Weights; 3]>,
}

/// Activations of one expert on the `n` tokens that chose it.
pub struct Pass {
    pub tokens: Vec<usize>,
    /// Inputs, `[n, n_embd]`.
    x: Vec<f32>,
    /// Outputs of gate and up, and inputs of down, `[n, width]` each.
    gate: Vec<f32>,
    up: Vec<f32>,
    h: Vec<f32>,
    /// Outputs, `[n, n_embd]`.
    y: Vec<f32>,
}

impl Split {
    /// Router weight of each expert for each token of `x`, `[n_tokens, n_expert]`: the softmax over the
    /// chosen experts, and 0 for the others.
    pub fn choose(&self, x: &[f32], par: Par) -> Vec<f32> {
        let mut scores = product(rows(x, self.n_embd), rows(&self.router.now, self.n_embd).transpose(), par);
        scores.chunks_exact_mut(self.experts.len()).for_each(|row| {
            let top = top(row, self.n_used);
            let exps: Vec<f32> = top.iter().map(|&e| (row[e] - row[top[0]]).exp()).collect();
            let sum: f32 = exps.iter().sum();
            row.fill(0.0);
            top.iter().zip(&exps).for_each(|(&e, v)| row[e] = v / sum);
        });
        scores
    }

    /// Shifts the scores of experts that too few or too many tokens of `x` choose. The product of an input
    /// and `constant` is about 1.
    pub fn balance(&mut self, x: &[f32], constant: &[f32], par: Par) {
        let (n_expert, n_tokens) = (self.experts.len(), x.len() / self.n_embd);
        let router = rows(&self.router.now, self.n_embd);
        let mut scores = product(rows(x, self.n_embd), router.transpose(), par);
        let ones = product(rows(x, self.n_embd), rows(constant, self.n_embd).transpose(), par);
        let even = self.n_used as f32 / n_expert as f32;
        let bounds = [LEAST_USE * even, 1.0 - LEAST_USE * (1.0 - even)];
        let unit = 0.1 * norm(&scores) / (scores.len() as f32).sqrt();
        let mut shifts = vec![0.0; n_expert];
        for _ in 0..100 {
            let mut used = vec![0.0; n_expert];
            for row in scores.chunks_exact(n_expert) {
                top(row, self.n_used).iter().for_each(|&e| used[e] += 1.0 / n_tokens as f32);
            }
            // The further outside, the larger the step.
            let outside: Vec<f32> = used.iter().map(|u| u.clamp(bounds[0], bounds[1]) - u).collect();
            if outside.iter().all(|o| o.abs() < 1e-3) {
                break;
            }
            let more: Vec<f32> = outside.iter().map(|o| unit * (o / bounds[0]).clamp(-1.0, 1.0)).collect();
            shifts.iter_mut().zip(&more).for_each(|(s, m)| *s += m);
            for (row, one) in scores.chunks_exact_mut(n_expert).zip(&ones) {
                row.iter_mut().zip(&more).for_each(|(v, m)| *v += m * one);
            }
        }
        for (row, shift) in self.router.now.chunks_exact_mut(self.n_embd).zip(&shifts) {
            row.iter_mut().zip(constant).for_each(|(r, c)| *r += shift * c);
        }
    }

    /// Output for `x` `[n_tokens, n_embd]`, and the activations of each expert.
    pub fn forward(&self, x: &[f32], weights: &[f32]) -> (Vec<f32>, Vec<Pass>) {
        let (n_embd, n_expert) = (self.n_embd, self.experts.len());
        let passes = self.experts.par_iter().enumerate().map(|(e, expert)| {
            let chose = |t: &usize| weights[t * n_expert + e] > 0.0;
            let tokens: Vec<usize> = (0..x.len() / n_embd).filter(chose).collect();
            let x = gather(x, n_embd, &tokens);
            let [gate, up, down] = expert.each_ref().map(|w| rows(&w.now, n_embd));
            let [gate, up] = [gate, up].map(|w| product(rows(&x, n_embd), w.transpose(), Par::Seq));
            let h: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| g * sigmoid(*g) * u).collect();
            let y = product(rows(&h, down.nrows()), down, Par::Seq);
            Pass { tokens, x, gate, up, h, y }
        });
        let passes: Vec<Pass> = passes.collect();
        let mut out = vec![0.0; x.len()];
        for (e, pass) in passes.iter().enumerate() {
            for (&t, y) in pass.tokens.iter().zip(pass.y.chunks_exact(n_embd)) {
                let weight = weights[t * n_expert + e];
                out[t * n_embd..][..n_embd].iter_mut().zip(y).for_each(|(o, y)| *o += weight * y);
            }
        }
        (out, passes)
    }

    /// Step number `step`, from 1, of Adam towards the outputs `target` for `x`.
    pub fn step(&mut self, x: &[f32], target: &[f32], scales: &[f32], rates: [f32; 2], step: i32) {
        let (n_embd, n_expert) = (self.n_embd, self.experts.len());
        let weights = self.choose(x, Par::Seq);
        // The gradient of the outputs.
        let (mut d_out, passes) = self.forward(x, &weights);
        for ((d, t), s) in d_out.chunks_exact_mut(n_embd).zip(target.chunks_exact(n_embd)).zip(scales) {
            d.iter_mut().zip(t).for_each(|(d, t)| *d = s * s * (*d - t));
        }
        let experts = self.experts.par_iter_mut().zip(&passes).enumerate();
        let d_weights: Vec<Vec<f32>> = experts
            .map(|(e, (expert, pass))| {
                let mut d_y = gather(&d_out, n_embd, &pass.tokens);
                let pairs = d_y.chunks_exact(n_embd).zip(pass.y.chunks_exact(n_embd));
                let d_weight = pairs.map(|(d, y)| d.iter().zip(y).map(|(d, y)| d * y).sum()).collect();
                for (row, t) in d_y.chunks_exact_mut(n_embd).zip(&pass.tokens) {
                    row.iter_mut().for_each(|v| *v *= weights[t * n_expert + e]);
                }
                let gradients = pass.gradients(&d_y, &expert[2].now, n_embd);
                expert.iter_mut().zip(&gradients).for_each(|(w, g)| w.step(g, rates[0], step));
                d_weight
            })
            .collect();
        let mut d_scores = vec![0.0; weights.len()];
        for (e, (pass, d)) in passes.iter().zip(&d_weights).enumerate() {
            pass.tokens.iter().zip(d).for_each(|(t, d)| d_scores[t * n_expert + e] = *d);
        }
        for (row, weights) in d_scores.chunks_exact_mut(n_expert).zip(weights.chunks_exact(n_expert)) {
            let mean: f32 = row.iter().zip(weights).map(|(d, w)| d * w).sum();
            row.iter_mut().zip(weights).for_each(|(d, w)| *d = w * (*d - mean));
        }
        let d_router = product(rows(&d_scores, n_expert).transpose(), rows(x, n_embd), Par::Seq);
        self.router.step(&d_router, rates[1], step);
    }

    /// Drops what only training needs.
    pub fn finish(&mut self) {
        let all = self.experts.iter_mut().flatten().chain([&mut self.router]);
        all.for_each(|w| w.moments = Default::default());
    }
}

impl Pass {
    /// Gradients of gate, up and transposed down for the gradient `d_y` of the outputs.
    fn gradients(&self, d_y: &[f32], down: &[f32], n_embd: usize) -> [Vec<f32>; 3] {
        let width = down.len() / n_embd;
        let (d_y, x) = (rows(d_y, n_embd), rows(&self.x, n_embd));
        let mut d_up = product(d_y, rows(down, n_embd).transpose(), Par::Seq);
        let mut d_gate = d_up.clone();
        for (((dg, du), g), u) in d_gate.iter_mut().zip(&mut d_up).zip(&self.gate).zip(&self.up) {
            let s = sigmoid(*g);
            *dg *= u * s * (1.0 + g * (1.0 - s));
            *du *= g * s;
        }
        let [d_gate, d_up] = [d_gate, d_up].map(|d| product(rows(&d, width).transpose(), x, Par::Seq));
        [d_gate, d_up, product(rows(&self.h, width).transpose(), d_y, Par::Seq)]
    }
}

/// Matrix in training, with Adam's moments.
pub struct Weights {
    pub now: Vec<f32>,
    moments: [Vec<f32>; 2],
    /// Root mean square before training.
    size: f32,
}

impl Weights {
    pub fn new(now: Vec<f32>) -> Weights {
        let size = norm(&now) / (now.len() as f32).sqrt();
        Weights { moments: [vec![0.0; now.len()], vec![0.0; now.len()]], size, now }
    }

    fn step(&mut self, gradient: &[f32], rate: f32, step: i32) {
        let [first, second] = &mut self.moments;
        let [a, b] = DECAY.map(|d| 1.0 / (1.0 - d.powi(step)));
        for (((w, g), m), v) in self.now.iter_mut().zip(gradient).zip(first).zip(second) {
            *m += (1.0 - DECAY[0]) * (g - *m);
            *v += (1.0 - DECAY[1]) * (g * g - *v);
            *w -= rate * self.size * a * *m / ((b * *v).sqrt() + f32::MIN_POSITIVE);
        }
    }
}
