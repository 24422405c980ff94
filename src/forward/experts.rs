//! Mixtures of experts: FFNs among which a router chooses for each token (`build_moe_ffn` of llama.cpp).
//!
//! There is one graph for the router and one graph per expert, over the tokens that chose it. These tokens
//! are known only after the first graph has run.

use super::MAX_NODES;
use super::{Block, Forward, ForwardError, Gathering, Net};
use crate::ggml::{Graph, TensorId};
use crate::parallel::each;

/// Index of each weight of a block's experts in the resident set.
pub(super) struct ExpertRoles {
    pub(super) router: usize,
    /// Gate, up and down of each expert.
    pub(super) each: Vec<[usize; 3]>,
    /// Gate, up and down of the shared expert, through which all tokens pass, and the weight of the gate on
    /// its output.
    pub(super) shared: Option<([usize; 3], Option<usize>)>,
}

/// Smallest divisor of the chosen experts' router weights: the smallest normal half-precision number.
const LEAST_SUM: f32 = 6.103_515_6e-5;

/// Tokens that chose one expert, with its router weight for each.
pub type Chosen = Vec<(usize, f32)>;

/// Usage of each expert by the tokens that chose it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertUse {
    /// Sum over its tokens of its output's norm times its router weight, per expert.
    pub energy: Vec<f64>,
    /// Number of tokens that chose it, per expert.
    pub n_tokens: Vec<usize>,
}

impl ExpertUse {
    /// Zero usage of `n_expert` experts.
    pub fn new(n_expert: usize) -> ExpertUse {
        ExpertUse { energy: vec![0.0; n_expert], n_tokens: vec![0; n_expert] }
    }
}

impl Forward {
    /// Runs the experts' half of a block: `mid` in, the residual stream after the block into `out`.
    /// The usage of each expert is added to `used`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If the block has no experts.
    pub fn experts(
        &self,
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
        let experts: Vec<_> = roles.each.iter().zip(&chosen).collect();
        let outputs = each(experts, self.at_once(), |(&weights, tokens)| {
            let rows: Vec<f32> =
                tokens.iter().flat_map(|&(t, _)| &inputs[t * n_embd..][..n_embd]).copied().collect();
            if rows.is_empty() {
                return Ok(rows);
            }
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let h = g.input_f32([n_embd, tokens.len()], &rows);
            let y = self.net.feed_forward(&mut g, b, weights, h);
            g.output(y);
            Ok::<_, ForwardError>(g.compute(&self.engine)?.to_vec(y))
        })?;
        for (expert, (y, tokens)) in outputs.into_iter().zip(&chosen).enumerate() {
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

    /// Tokens of the residual stream `mid` `[n_tokens, n_embd]` that choose each expert.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If the block has no experts.
    pub fn choices(&self, b: &Block, mid: &[f32]) -> Result<Vec<Chosen>, ForwardError> {
        let roles = b.roles.experts.as_ref().expect("a block with experts");
        let n_tokens = mid.len() / self.n_embd();
        let mut g = Graph::new(&self.engine, MAX_NODES);
        let x = g.input_f32([self.n_embd(), n_tokens], mid);
        let h = self.net.ffn_input(&mut g, b, x, x);
        let chances = self.net.chances(&mut g, b, roles, h);
        g.output(chances);
        let chances = g.compute(&self.engine)?.to_vec(chances);
        Ok(self.choose(&chances, n_tokens, roles.each.len()))
    }

    /// Adds moments at ffn_down of expert `expert`, without residuals.
    /// They run over tokens with the residual streams `mid` `[n_tokens, n_embd]`, each with its own factor.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If the block has no such expert.
    pub fn expert_moments(
        &self,
        b: &Block,
        expert: usize,
        mid: &[f32],
        scales: &[f32],
        into: &mut Gathering,
    ) -> Result<(), ForwardError> {
        let roles = b.roles.experts.as_ref().expect("a block with experts");
        let [gate, up, _] = roles.each[expert];
        let (n_embd, n) = (self.n_embd(), scales.len());
        let per_graph = if self.engine.has_devices() { n } else { self.slice_tokens().min(n) };
        let parts = mid.chunks(per_graph * n_embd).zip(scales.chunks(per_graph));
        let parts = parts.zip(into.begin(n, per_graph, false)).collect();
        each(parts, self.at_once(), |((mid, scales), into)| {
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let x = g.input_f32([n_embd, scales.len()], mid);
            let h = self.net.ffn_input(&mut g, b, x, x);
            let h = self.net.gated(&mut g, b, [gate, up], h);
            let scales = g.input_f32([1, scales.len()], scales);
            let asked = into.ask(&mut g, h, None, scales);
            asked.take(&g.compute(&self.engine)?);
            Ok::<_, ForwardError>(())
        })?;
        into.end();
        Ok(())
    }

    /// Experts' inputs `[n_tokens, n_embd]` of the residual stream `mid` `[n_tokens, n_embd]`, and router
    /// probabilities `[n_tokens, n_expert]`.
    /// `out` receives the residual stream plus the shared expert's contribution.
    fn route(
        &self,
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
        let done = g.compute(&self.engine)?;
        match stream {
            Some(stream) => done.read(stream, out),
            None => out.copy_from_slice(mid),
        }
        Ok((done.to_vec(h), done.to_vec(chances)))
    }

    /// Tokens that choose each expert and their router weights, by the router probabilities `chances`
    /// `[n_tokens, n_expert]`.
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
    /// Output of a whole FFN without biases, by its gate, up and down.
    fn feed_forward<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        weights: [usize; 3],
        h: TensorId,
    ) -> TensorId {
        let [gate, up, down] = weights;
        let h = self.gated(g, b, [gate, up], h);
        let down = g.resident(&b.set, down);
        g.mul_mat(down, h)
    }

    /// Input of an FFN's down matrix, by its gate and up.
    fn gated<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, weights: [usize; 2], h: TensorId) -> TensorId {
        let [gate, up] = weights.map(|i| {
            let m = g.resident(&b.set, i);
            g.mul_mat(m, h)
        });
        g.swiglu(gate, up)
    }

    /// Router probabilities of each token, by the experts' input `h`.
    fn chances<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, roles: &ExpertRoles, h: TensorId) -> TensorId {
        let router = g.resident(&b.set, roles.router);
        let logits = g.mul_mat(router, h);
        g.soft_max(logits, None, 1.0)
    }
}
