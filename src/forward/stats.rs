//! The two halves of a block, with the second moments inside them.

use super::MAX_NODES;
use super::block::Half;
use super::gathering::{Collecting, Gathering, Part, Pending};
use super::{Block, Forward, ForwardError, Net};
use crate::ggml::{Graph, TensorId};
use crate::model::BlockMatrix;
use crate::parallel::each;
use std::sync::Arc;

/// Request to collect moments over a chunk.
///
/// If a norm lies between the map and the residual stream, the moments are still those of the map.
/// Residuals are taken back through the norm. The norm's divisor of a token's outputs also divides the
/// token's factor, so that errors count by their effect on the residual stream.
pub struct Collect<'a> {
    /// Target residual stream at that point, `[n_tokens, n_embd]`; without it only the Gram matrix is
    /// collected.
    pub target: Option<&'a [f32]>,
    /// Factor of each token's inputs and residual.
    pub scales: &'a [f32],
    /// Accumulator that receives the sums.
    pub into: &'a mut Gathering,
}

/// Outputs of [`Forward::from_attn_out_input`].
#[derive(Default)]
pub struct BlockOutputs<'a> {
    /// Residual stream before the FFN.
    pub mid: Option<&'a mut [f32]>,
    /// Residual stream after the block.
    pub out: Option<&'a mut [f32]>,
    /// Moments at the input of ffn_down; their target is the residual stream after the block.
    pub moments: Option<Collect<'a>>,
}

/// Sums over tokens of the squared inputs of a block's matrices, as in llama.cpp's importance matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputSquares {
    /// Inputs of attn_q, attn_k and attn_v: `[n_embd]`; empty in a block without attention.
    pub qkv: Vec<f64>,
    /// Inputs of attn_output: `[n_head·head_dim]`.
    pub attn_output: Vec<f64>,
    /// Inputs of ffn_gate and ffn_up: `[n_embd]`.
    pub ffn: Vec<f64>,
    /// Inputs of ffn_down: `[n_ff]`.
    pub ffn_down: Vec<f64>,
}

impl Forward {
    /// Runs whole windows through the whole block: `x` in, the residual stream after the block into `out`,
    /// both `[n_tokens, n_embd]`.
    /// The squared inputs of its matrices are added to `squares`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn block_squares(
        &self,
        b: &Block,
        x: &[f32],
        out: &mut [f32],
        squares: &mut InputSquares,
    ) -> Result<(), ForwardError> {
        assert!(!b.has_experts(), "each expert has inputs of its own");
        let n = self.graph_tokens() * self.n_embd();
        let parts = x.chunks(n).zip(out.chunks_mut(n)).collect();
        let found = each(parts, self.at_once(), |(x, out): (&[f32], &mut [f32])| self.squares_of(b, x, out))?;
        for part in found {
            let into = [&mut squares.qkv, &mut squares.attn_output, &mut squares.ffn, &mut squares.ffn_down];
            for (sums, part) in into.into_iter().zip(part) {
                sums.resize(part.len(), 0.0);
                sums.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
            }
        }
        Ok(())
    }

    /// Squared inputs of attn_q, attn_output, ffn_gate and ffn_down for one graph; `out` receives the
    /// residual stream after the block.
    fn squares_of(&self, b: &Block, x: &[f32], out: &mut [f32]) -> Result<[Vec<f64>; 4], ForwardError> {
        let mut g = Graph::new(&self.engine, MAX_NODES);
        let x = g.input_f32([self.n_embd(), x.len() / self.n_embd()], x);
        let attention =
            b.has_attention().then(|| (self.net.attn_input(&mut g, b, x), self.net.heads(&mut g, b, x)));
        let mid = self.net.attention_residual(&mut g, b, x, attention.map(|(_, a)| a));
        let ffn = self.net.ffn_input(&mut g, b, x, mid);
        let h = self.net.neurons(&mut g, b, x, mid);
        let y = self.net.ffn_residual(&mut g, b, mid, h);
        let inputs = [attention.map(|a| a.0), attention.map(|a| a.1), Some(ffn), Some(h)];
        inputs.into_iter().flatten().chain([y]).for_each(|t| g.output(t));
        let widths = inputs.map(|t| t.map_or(0, |t| g.ne(t)[0]));
        let done = g.compute(&self.engine)?;
        let mut found = widths.map(|n| vec![0.0; n]);
        for (sums, t) in found.iter_mut().zip(inputs) {
            for row in t.map(|t| done.to_vec(t)).unwrap_or_default().chunks_exact(sums.len().max(1)) {
                sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v).powi(2));
            }
        }
        done.read(y, out);
        Ok(found)
    }

    /// Inputs of the matrix `m` for whole windows `x` `[n_tokens, n_embd]`: a row per token.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If the block has no such matrix, or experts.
    pub fn inputs(&self, b: &Block, x: &[f32], m: BlockMatrix) -> Result<Vec<f32>, ForwardError> {
        assert!(!b.has_experts(), "each expert has inputs of its own");
        let n = self.graph_tokens() * self.n_embd();
        let parts = each(x.chunks(n).collect(), self.at_once(), |x| {
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let x = g.input_f32([self.n_embd(), x.len() / self.n_embd()], x);
            let inputs = match m {
                BlockMatrix::AttnQ | BlockMatrix::AttnK | BlockMatrix::AttnV => {
                    self.net.attn_input(&mut g, b, x)
                }
                BlockMatrix::AttnOutput => self.net.heads(&mut g, b, x),
                BlockMatrix::FfnGate | BlockMatrix::FfnUp | BlockMatrix::FfnDown => {
                    let a = b.has_attention().then(|| self.net.heads(&mut g, b, x));
                    let mid = self.net.attention_residual(&mut g, b, x, a);
                    match m {
                        BlockMatrix::FfnDown => self.net.neurons(&mut g, b, x, mid),
                        _ => self.net.ffn_input(&mut g, b, x, mid),
                    }
                }
            };
            g.output(inputs);
            Ok::<_, ForwardError>(g.compute(&self.engine)?.to_vec(inputs))
        })?;
        Ok(parts.concat())
    }

    /// Map that ends `half`, if its outputs are subtracted from the sums of all tokens.
    fn later(&self, b: &Block, half: Half) -> Option<Arc<Vec<f32>>> {
        let wanted = self.net.subtracts_later(self.engine.has_devices(), b, half);
        let map = half.weight(b).filter(|_| wanted && !b.has_experts())?;
        b.set.shared(map)
    }

    /// First half of attention: the input of attn_output, `[n_tokens, n_head·head_dim]`, for whole windows
    /// `x` `[n_tokens, n_embd]`.
    /// It is empty in a block without attention. Moments are those at attn_output, with the residual target
    /// − (x + attention).
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn attn_out_input(
        &self,
        b: &Block,
        x: &[f32],
        moments: Option<Collect>,
    ) -> Result<Vec<f32>, ForwardError> {
        if !b.has_attention() {
            return Ok(Vec::new());
        }
        let (n_embd, n) = (self.n_embd(), x.len() / self.n_embd());
        let (row, per_graph) = (self.net.hparams.head_dim * b.shape.n_head, self.graph_tokens().min(n));
        let mut heads = vec![0.0; n * row];
        let mut collect = Collecting::new(moments, n, per_graph, n_embd, self.later(b, Half::Attention));
        let parts = x.chunks(per_graph * n_embd).zip(heads.chunks_mut(per_graph * row)).zip(collect.parts());
        each(parts.collect(), self.at_once(), |((x, heads), collect)| {
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let x = g.input_f32([n_embd, x.len() / n_embd], x);
            let a = self.net.heads(&mut g, b, x);
            g.output(a);
            let asked = collect.map(|c| self.net.collect(&mut g, b, Half::Attention, [a, x], None, c));
            let done = g.compute(&self.engine)?;
            if let Some(asked) = asked {
                asked.take(&done);
            }
            done.read(a, heads);
            Ok::<_, ForwardError>(())
        })?;
        collect.end();
        Ok(heads)
    }

    /// Computes the rest of a block from the output `a` of [`Forward::attn_out_input`] for `x`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn from_attn_out_input(
        &self,
        b: &Block,
        x: &[f32],
        a: &[f32],
        wanted: BlockOutputs,
    ) -> Result<(), ForwardError> {
        let (n_embd, n) = (self.n_embd(), x.len() / self.n_embd());
        let (row, per_graph) = (a.len() / n, self.slice_tokens().min(n));
        let BlockOutputs { mut mid, mut out, moments } = wanted;
        let mut experts_input = Vec::new();
        let experts_out = if b.has_experts() { out.take() } else { None };
        if experts_out.is_some() && mid.is_none() {
            experts_input.resize(x.len(), 0.0);
        }
        assert!(moments.is_none() || !b.has_experts(), "moments are those of one feed-forward");
        {
            let mid = mid.as_deref_mut().or((!experts_input.is_empty()).then_some(&mut experts_input[..]));
            let mut collect =
                Collecting::new(moments, n, per_graph, n_embd, self.later(b, Half::FeedForward));
            let mut mid = mid.unwrap_or_default().chunks_mut(per_graph * n_embd);
            let mut out = out.unwrap_or_default().chunks_mut(per_graph * n_embd);
            let mut heads = a.chunks(per_graph * row.max(1));
            let parts = x.chunks(per_graph * n_embd).zip(collect.parts());
            let parts = parts.map(|(x, collect)| (x, heads.next(), collect, mid.next(), out.next()));
            each(parts.collect(), self.at_once(), |(x, a, collect, to_mid, to_out)| {
                let n = x.len() / n_embd;
                let mut g = Graph::new(&self.engine, MAX_NODES);
                let x = g.input_f32([n_embd, n], x);
                let a = a.map(|a| g.input_f32([row, n], a));
                let mid = self.net.attention_residual(&mut g, b, x, a);
                if to_mid.is_some() {
                    g.output(mid);
                }
                let (mut own, mut asked) = (mid, None);
                if !b.has_experts() {
                    let h = self.net.neurons(&mut g, b, x, mid);
                    let half = Half::FeedForward;
                    let y = to_out.is_some().then(|| self.net.map(&mut g, b, half, h));
                    if let Some(y) = y {
                        own = self.net.join(&mut g, b, half, mid, y);
                        g.output(own);
                    }
                    asked = collect.map(|c| self.net.collect(&mut g, b, half, [h, mid], y, c));
                }
                let done = g.compute(&self.engine)?;
                if let Some(asked) = asked {
                    asked.take(&done);
                }
                if let Some(dst) = to_mid {
                    done.read(mid, dst);
                }
                if let Some(dst) = to_out {
                    done.read(own, dst);
                }
                Ok::<_, ForwardError>(())
            })?;
            collect.end();
        }
        if let Some(out) = experts_out {
            self.experts(b, mid.as_deref().unwrap_or(&experts_input), out, None)?;
        }
        Ok(())
    }
}

impl Net {
    /// Adds nodes for the sums at the map that ends `half`: from its inputs, the residual stream before it, and
    /// its outputs `y`, which are computed if they are needed and not given.
    /// Without a norm behind the map, its outputs are left out of the residuals on the CPU;
    /// [`Gathering::finish`] subtracts them.
    fn collect<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        half: Half,
        [inputs, before]: [TensorId; 2],
        y: Option<TensorId>,
        c: Part<'a>,
    ) -> Pending<'a> {
        let mut scales = g.input_f32([1, c.scales.len()], c.scales);
        let target = c.target.map(|target| {
            let [n_embd, n_tokens, ..] = g.ne(before);
            g.input_f32([n_embd, n_tokens], target)
        });
        if self.subtracts_later(g.on_devices(), b, half) {
            let residual = target.map(|target| {
                let r = g.sub(target, before);
                let r = self.scaled(g, r, 1.0 / self.hparams.residual_scale);
                match half.bias(b) {
                    Some(bias) => {
                        let bias = g.resident(&b.set, bias);
                        g.sub(r, bias)
                    }
                    None => r,
                }
            });
            return c.into.ask(g, inputs, residual, scales);
        }
        let y = y.unwrap_or_else(|| self.map(g, b, half, inputs));
        let own = self.join(g, b, half, before, y);
        let mut residual = target.map(|target| {
            let r = g.sub(target, own);
            self.scaled(g, r, 1.0 / self.hparams.residual_scale)
        });
        if let Some((rms, inverse)) = self.back(g, b, half, y) {
            residual = residual.map(|r| {
                let r = g.mul(r, inverse);
                g.mul(r, rms)
            });
            scales = g.div(scales, rms);
        }
        c.into.ask(g, inputs, residual, scales)
    }

    /// Whether the outputs of the map that ends `half` are subtracted from the sums of all tokens, not from
    /// each token's residual. A norm behind the map has to see them.
    fn subtracts_later(&self, on_devices: bool, b: &Block, half: Half) -> bool {
        !on_devices && b.post_norm(half).is_none()
    }
}
