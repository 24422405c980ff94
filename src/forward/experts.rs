//! Experts: feed-forwards among which a router chooses for each token (`build_moe_ffn` of llama.cpp).
//!
//! The router's graph and one graph per expert, over the tokens that chose it: which those are is known only once
//! the first has run.

use super::block::MAX_NODES;
use super::{Block, Forward, ForwardError, Gathering, Net};
use crate::ggml::{Graph, T};

/// Index of each weight of a block's experts in the resident set.
pub(super) struct ExpertRoles {
    pub(super) router: usize,
    /// Gate, up and down.
    pub(super) each: Vec<[usize; 3]>,
    /// The same of the one that all tokens pass through, and what its output is gated by.
    pub(super) shared: Option<([usize; 3], Option<usize>)>,
}

/// The least that what chosen experts count is divided by: the smallest normal half.
const LEAST_SUM: f32 = 6.103_515_6e-5;

/// The tokens that chose one expert, and what it counts for each.
pub type Chosen = Vec<(usize, f32)>;

/// What experts have done for the tokens that chose them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertUse {
    /// Sum over its tokens, per expert, of the length of its output times what it counts.
    pub energy: Vec<f64>,
    /// Tokens that chose it.
    pub n_tokens: Vec<usize>,
}

impl ExpertUse {
    /// Nothing yet, of so many.
    pub fn new(n_expert: usize) -> ExpertUse {
        ExpertUse { energy: vec![0.0; n_expert], n_tokens: vec![0; n_expert] }
    }
}

impl Forward {
    /// The experts' half of a block: `mid` in, the residual stream after the block into `out`; what each did is added
    /// to `used`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If the block has none.
    pub fn experts(
        &mut self,
        b: &Block,
        mid: &[f32],
        out: &mut [f32],
        mut used: Option<&mut ExpertUse>,
    ) -> Result<(), ForwardError> {
        let roles = b.roles.experts.as_ref().expect("a block with experts");
        let (n_embd, n_expert) = (self.n_embd(), roles.each.len());
        let n_tokens = mid.len() / n_embd;
        let (inputs, chances) = self.route(b, roles, mid, out)?;
        let chosen = self.choose(&chances, n_tokens, n_expert);
        let scale = self.net.hparams.residual_scale;
        for (expert, &weights) in roles.each.iter().enumerate() {
            let tokens = &chosen[expert];
            if tokens.is_empty() {
                continue;
            }
            let rows: Vec<f32> =
                tokens.iter().flat_map(|&(t, _)| &inputs[t * n_embd..][..n_embd]).copied().collect();
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let h = g.input_f32([n_embd, tokens.len()], &rows);
            let y = self.net.feed_forward(&mut g, b, weights, h);
            g.output(y);
            let y = g.compute(&mut self.engine)?.to_vec(y);
            for (y, &(t, weight)) in y.chunks_exact(n_embd).zip(tokens) {
                let out = &mut out[t * n_embd..][..n_embd];
                out.iter_mut().zip(y).for_each(|(o, y)| *o += scale * weight * y);
                if let Some(used) = &mut used {
                    let length = y.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                    used.energy[expert] += f64::from(weight) * length;
                    used.n_tokens[expert] += 1;
                }
            }
        }
        Ok(())
    }

    /// The tokens of the stream `mid` `[n_tokens, n_embd]` that choose each expert.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If the block has none.
    pub fn choices(&mut self, b: &Block, mid: &[f32]) -> Result<Vec<Chosen>, ForwardError> {
        let roles = b.roles.experts.as_ref().expect("a block with experts");
        let n_tokens = mid.len() / self.n_embd();
        let mut g = Graph::new(&self.engine, MAX_NODES);
        let x = g.input_f32([self.n_embd(), n_tokens], mid);
        let h = self.net.ffn_input(&mut g, b, x, x);
        let chances = self.net.chances(&mut g, b, roles, h);
        g.output(chances);
        let chances = g.compute(&mut self.engine)?.to_vec(chances);
        Ok(self.choose(&chances, n_tokens, roles.each.len()))
    }

    /// Moments at ffn_down of expert `expert`, without residuals, over tokens whose streams are `mid` `[n_tokens, n_embd]`,
    /// each with a factor of its own.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If the block has no such expert.
    pub fn expert_moments(
        &mut self,
        b: &Block,
        expert: usize,
        mid: &[f32],
        scales: &[f32],
        into: &mut Gathering,
    ) -> Result<(), ForwardError> {
        let roles = b.roles.experts.as_ref().expect("a block with experts");
        let [gate, up, _] = roles.each[expert];
        let mut g = Graph::new(&self.engine, MAX_NODES);
        let x = g.input_f32([self.n_embd(), scales.len()], mid);
        let h = self.net.ffn_input(&mut g, b, x, x);
        let h = self.net.gated(&mut g, b, [gate, up], h);
        let scales = g.input_f32([1, scales.len()], scales);
        let sums = into.sums(&mut g, h, None, scales);
        sums.add(&g.compute(&mut self.engine)?);
        Ok(())
    }

    /// What experts see of the stream `mid` `[n_tokens, n_embd]`, and each token's probability of each `[n_tokens,
    /// n_expert]`; `out` becomes the stream with what the shared expert adds.
    fn route(
        &mut self,
        b: &Block,
        roles: &ExpertRoles,
        mid: &[f32],
        out: &mut [f32],
    ) -> Result<(Vec<f32>, Vec<f32>), ForwardError> {
        let mut g = Graph::new(&self.engine, MAX_NODES);
        let x = g.input_f32([self.n_embd(), mid.len() / self.n_embd()], mid);
        let h = self.net.ffn_input(&mut g, b, x, x);
        let chances = self.net.chances(&mut g, b, roles, h);
        let stream = roles.shared.map(|(weights, scale)| {
            let mut y = self.net.feed_forward(&mut g, b, weights, h);
            if let Some(scale) = scale {
                let scale = g.resident(&b.set, scale);
                let z = g.mul_mat(scale, h);
                let gate = g.sigmoid(z);
                y = g.mul(y, gate);
            }
            let y = self.net.scaled(&mut g, y, self.net.hparams.residual_scale);
            g.add(y, x)
        });
        [h, chances].into_iter().chain(stream).for_each(|t| g.output(t));
        let done = g.compute(&mut self.engine)?;
        match stream {
            Some(stream) => done.read(stream, out),
            None => out.copy_from_slice(mid),
        }
        Ok((done.to_vec(h), done.to_vec(chances)))
    }

    /// The tokens that choose each expert, and what it counts for them, by `chances` `[n_tokens, n_expert]`.
    fn choose(&self, chances: &[f32], n_tokens: usize, n_expert: usize) -> Vec<Chosen> {
        let h = &self.net.hparams;
        let n_used = h.experts.map_or(n_expert, |e| e.n_used).min(n_expert);
        let normed = h.family.traits().experts.is_some_and(|e| e.normed);
        let mut chosen = vec![Vec::new(); n_expert];
        let mut order: Vec<usize> = Vec::with_capacity(n_expert);
        for (t, row) in chances.chunks_exact(n_expert).enumerate().take(n_tokens) {
            order.clear();
            order.extend(0..n_expert);
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            let sum: f32 = order[..n_used].iter().map(|&e| row[e]).sum();
            let divisor = if normed { sum.max(LEAST_SUM) } else { 1.0 };
            order[..n_used].iter().for_each(|&e| chosen[e].push((t, row[e] / divisor)));
        }
        chosen
    }
}

impl Net {
    /// A whole feed-forward without biases, by its gate, up and down.
    fn feed_forward<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, weights: [usize; 3], h: T) -> T {
        let [gate, up, down] = weights;
        let h = self.gated(g, b, [gate, up], h);
        let down = g.resident(&b.set, down);
        g.mul_mat(down, h)
    }

    /// Its neurons, by gate and up.
    fn gated<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, weights: [usize; 2], h: T) -> T {
        let [gate, up] = weights.map(|i| {
            let m = g.resident(&b.set, i);
            g.mul_mat(m, h)
        });
        g.swiglu(gate, up)
    }

    /// Each token's probability of each expert, by what experts see.
    fn chances<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, roles: &ExpertRoles, h: T) -> T {
        let router = g.resident(&b.set, roles.router);
        let logits = g.mul_mat(router, h);
        g.soft_max(logits, None, 1.0)
    }
}
