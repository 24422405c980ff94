//! Gradients: from a loss on the final residual stream back through the blocks.
//!
//! The graphs repeat the forward pass in steps whose derivatives ggml has, and go backwards op by op.
//! Gradients are by the residual stream before the block, the block's vectors and matrices, and the shares
//! of its attention groups.

mod net;

use super::MAX_NODES;
use super::block::{Half, PreNorm, Qkv, linear};
use super::{Block, Forward, ForwardError, Head, Net, whole_windows};
use crate::ggml::{Computed, Graph, TensorId, count};
use crate::model::{Activation, BlockMatrix, BlockVector, Norm, QkNorm};
use crate::numeric::{OuterSum, add_outer};
use crate::parallel::each;
use net::all_but_each_group;

/// Derivatives by a block's vectors, summed over tokens, in the order of [`BlockVector::ALL`].
/// Bias derivatives are present even if the block has no such bias. A vector that the block cannot have
/// gets an empty one.
pub type BlockGradient = [Vec<f32>; BlockVector::ALL.len()];

/// Derivatives by a block's matrices, summed over tokens, row-major as these are, in the order of
/// [`BlockMatrix::ALL`]. Those of matrices that the block does not have are empty.
pub type MatrixGradient = [Vec<f32>; BlockMatrix::ALL.len()];

/// Optional results that [`Forward::block_gradient`] collects on its way back through a block.
#[derive(Default)]
pub struct OnTheWay<'a> {
    /// Receives the derivatives by the block's vectors, which are added.
    pub vectors: Option<&'a mut BlockGradient>,
    /// Receives the derivatives by the block's matrices, which are added.
    pub matrices: Option<&'a mut MatrixGradient>,
    /// Receives the worth of each attention group to each token, `[n_tokens, n_head_kv]`, which is
    /// appended.
    /// The worth is the derivative by the residual stream behind attention times the group's contribution
    /// to it. A block without attention appends nothing.
    pub groups: Option<&'a mut Vec<f32>>,
}

/// Positions whose logits are in memory at a time, several times over.
pub(crate) const LOSS_ROWS: usize = 128;

/// Tokens that gradients go back through in one graph, at least one window.
/// The attention weights of all heads are in memory at once.
pub(crate) const GRADIENT_TOKENS: usize = 512;

/// Largest number of graph nodes for the worth of one attention group.
const NODES_PER_GROUP: usize = 16;

/// Gradients of a block half: by its input in the residual stream, and per token by the bias of its map and
/// by the norm behind that map.
struct HalfBack {
    at_input: TensorId,
    by_bias: TensorId,
    by_post: Option<TensorId>,
    maps: Vec<MapBack>,
}

/// Linear maps that read the same input, with the derivatives by their outputs.
struct MapBack {
    input: TensorId,
    outputs: Vec<(BlockMatrix, TensorId)>,
}

/// The same after the run, for the tokens of one graph.
struct MapRows {
    input: Vec<f32>,
    outputs: Vec<(BlockMatrix, Vec<f32>)>,
}

impl MapBack {
    fn rows(self, done: &Computed) -> MapRows {
        let outputs = self.outputs.into_iter().map(|(m, t)| (m, done.to_vec(t))).collect();
        MapRows { input: done.to_vec(self.input), outputs }
    }
}

/// Optional results of one graph; those that were not asked for are empty.
struct GraphGradient {
    n_tokens: usize,
    vectors: BlockGradient,
    groups: Vec<f32>,
    maps: Vec<MapRows>,
}

impl GraphGradient {
    /// Derivatives by the outputs of the matrix `m`, and its inputs.
    fn map(&self, m: BlockMatrix) -> Option<[&[f32]; 2]> {
        self.maps.iter().find_map(|map| {
            let (_, at) = map.outputs.iter().find(|(name, _)| *name == m)?;
            Some([&at[..], &map.input[..]])
        })
    }
}

/// Intermediate results of attention that its derivatives need.
struct Attention {
    /// Queries and keys before their norm, if there is one.
    before_norm: [Option<TensorId>; 2],
    /// Queries and values, window by window: `ne` `[head_dim, n_ctx, n_head or n_head_kv, n_seq]`.
    q: TensorId,
    v: TensorId,
    /// Keys, transposed: tokens come first.
    k_t: TensorId,
    /// Attention weights, `ne` `[n_ctx (keys), n_ctx (queries), n_head, n_seq]`.
    p: TensorId,
    /// Tanh that caps the scores, if they are capped.
    tanh: Option<TensorId>,
    /// Input of attn_output.
    out: TensorId,
}

impl Forward {
    /// Derivative of Σ KL(dense ‖ own) over all positions by the residual stream `own` `[n_tokens, n_embd]`
    /// behind the last block.
    /// The divergence is among the tokens of the heads. `dense` is the reference's residual stream of the
    /// same tokens; its head is the same unless it is given.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn divergence_gradient(
        &self,
        own_head: &Head,
        dense_head: Option<&Head>,
        own: &[f32],
        dense: &[f32],
    ) -> Result<Vec<f32>, ForwardError> {
        let n_embd = self.n_embd();
        let dense_head = dense_head.unwrap_or(own_head);
        let mut out = vec![0.0; own.len()];
        let rows = LOSS_ROWS * n_embd;
        let parts = own.chunks(rows).zip(dense.chunks(rows)).zip(out.chunks_mut(rows));
        each(parts.collect(), self.at_once(), |((own, dense), out)| {
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let ne = [n_embd, own.len() / n_embd];
            let (x, dense) = (g.input_f32(ne, own), g.input_f32(ne, dense));
            let q = self.net.stream_logits(&mut g, own_head, x);
            let p = self.net.stream_logits(&mut g, dense_head, dense);
            let (soft_q, p) = (g.soft_max(q, None, 1.0), g.soft_max(p, None, 1.0));
            let d = g.sub(soft_q, p);
            let d = self.net.logits_back(&mut g, own_head, [x, q], d);
            g.output(d);
            g.compute(&self.engine)?.read(d, out);
            Ok::<_, ForwardError>(())
        })?;
        Ok(out)
    }

    /// Draws a Fisher (curvature) sample: a random vector per position of the residual stream `x`
    /// `[n_tokens, n_embd]` behind the last block.
    ///
    /// The mean outer product of the vectors is the curvature there of the KL divergence from the model's
    /// own predictions, among the tokens of `head`: the Fisher information of all positions together.
    /// `bits` gives random bits.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn curvature_sample(
        &self,
        head: &Head,
        x: &[f32],
        mut bits: impl FnMut() -> u64,
    ) -> Result<Vec<f32>, ForwardError> {
        let (n_embd, n_vocab) = (self.n_embd(), head.n_vocab());
        let mut out = vec![0.0; x.len()];
        let rows = LOSS_ROWS * n_embd;
        let words = |x: &[f32]| (x.len() / n_embd * n_vocab).div_ceil(64);
        let parts = x.chunks(rows).zip(out.chunks_mut(rows));
        let parts = parts.map(|(x, out)| (x, out, (0..words(x)).map(|_| bits()).collect::<Vec<u64>>()));
        each(parts.collect(), self.at_once(), |(x, out, bits)| {
            let n = x.len() / n_embd;
            let mut signs = vec![1.0; n * n_vocab];
            for (part, bits) in signs.chunks_mut(64).zip(bits) {
                part.iter_mut().enumerate().filter(|(i, _)| bits >> i & 1 == 1).for_each(|(_, s)| *s = -1.0);
            }
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let x = g.input_f32([n_embd, n], x);
            let q = self.net.stream_logits(&mut g, head, x);
            let p = g.soft_max(q, None, 1.0);
            // The sample is (diag √p − p √pᵀ) ξ: its covariance is diag p − p pᵀ, the curvature by the
            // logits.
            let root = g.sqrt(p);
            let signs = g.input_f32([n_vocab, n], &signs);
            let u = g.mul(root, signs);
            let mean = g.mean(u);
            let sum = g.scale(mean, n_vocab as f32, 0.0);
            let drift = g.mul(p, sum);
            let d = g.sub(u, drift);
            let d = self.net.logits_back(&mut g, head, [x, q], d);
            g.output(d);
            g.compute(&self.engine)?.read(d, out);
            Ok::<_, ForwardError>(())
        })?;
        Ok(out)
    }

    /// Carries `grad`, a loss's derivative by the residual stream behind the block, back to the residual
    /// stream `x` before it.
    /// Both are `[n_tokens, n_embd]`; `x` holds whole windows.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If windows are longer than [`super::MAX_GRADIENT_CTX`], or the block has experts.
    pub fn block_gradient(
        &self,
        b: &Block,
        x: &[f32],
        grad: &mut [f32],
        mut found: OnTheWay<'_>,
    ) -> Result<(), ForwardError> {
        assert!(!b.has_experts(), "no gradients go back through a criterion");
        let wanted = [found.vectors.is_some(), found.groups.is_some(), found.matrices.is_some()];
        let n = whole_windows(GRADIENT_TOKENS, self.n_ctx()).min(self.graph_tokens()) * self.n_embd();
        // Inputs of matrices, and derivatives by their outputs, are kept until all graphs of a part are done.
        let part = if wanted[2] { (self.chunk_tokens() * self.n_embd() / n).max(1) * n } else { x.len() };
        for (x, grad) in x.chunks(part).zip(grad.chunks_mut(part)) {
            let graphs = x.chunks(n).zip(grad.chunks_mut(n)).collect();
            let graphs = each(graphs, self.at_once(), |(x, grad): (&[f32], &mut [f32])| {
                self.graph_gradient(b, x, grad, wanted)
            })?;
            if let Some(matrices) = found.matrices.as_deref_mut() {
                add_maps(matrices, &graphs);
            }
            for GraphGradient { vectors, groups, .. } in graphs {
                for (sum, part) in found.vectors.iter_mut().flat_map(|all| all.iter_mut()).zip(vectors) {
                    sum.resize(part.len().max(sum.len()), 0.0);
                    sum.iter_mut().zip(part).for_each(|(s, v)| *s += v);
                }
                if let Some(all) = &mut found.groups {
                    all.extend(groups);
                }
            }
        }
        Ok(())
    }

    /// Does the same for one graph. `vectors`, `groups` and `matrices` say what to collect on the way.
    fn graph_gradient(
        &self,
        b: &Block,
        x: &[f32],
        grad: &mut [f32],
        [vectors, groups, matrices]: [bool; 3],
    ) -> Result<GraphGradient, ForwardError> {
        let ne = [self.n_embd(), x.len() / self.n_embd()];
        let (before, ones) = (grad.to_vec(), vec![1.0; ne[1]]);
        let n_groups = if groups { b.shape.n_head_kv } else { 0 };
        let masks = if n_groups > 0 { all_but_each_group(b, self.net.hparams.head_dim) } else { Vec::new() };
        let mut g = Graph::new(&self.engine, MAX_NODES + NODES_PER_GROUP * n_groups);
        let x = g.input_f32(ne, x);
        let net = &self.net;
        let attention = b.has_attention().then(|| net.attention(&mut g, b, x));
        let mid = net.attention_residual(&mut g, b, x, attention.as_ref().map(|a| a.out));
        let behind = g.input_f32(ne, &before);
        let ffn = net.ffn_back(&mut g, b, x, mid, behind);
        let mut maps = ffn.maps;
        // Derivatives by the part that bypasses both halves, by the input of attention's norm, and by the
        // FFN's own norm.
        let (at_mid, shared, by_ffn_norm) = match (b.parallel, b.roles.ffn_norm) {
            (true, None) => (behind, Some(ffn.at_input), None),
            (true, norm) => {
                let (at_x, by_norm) = net.pre_norm_back(&mut g, b, norm, x, ffn.at_input);
                (g.add(at_x, behind), None, by_norm)
            }
            (false, norm) => {
                let (at_mid, by_norm) = net.pre_norm_back(&mut g, b, norm, mid, ffn.at_input);
                (g.add(at_mid, behind), None, by_norm)
            }
        };
        let (at_x, attn, by_group) = match &attention {
            None => (at_mid, [None; 3], None),
            Some(a) => {
                // If the FFN does not read it, the residual stream behind attention is the one that the
                // block adds to.
                let behind = if b.parallel { behind } else { at_mid };
                let half = net.attention_back(&mut g, b, x, a, behind);
                maps.extend(half.maps);
                let by_group = groups.then(|| net.worth_of_groups(&mut g, b, a, behind, &masks));
                let at_input = shared.map_or(half.at_input, |shared| g.add(half.at_input, shared));
                let (at_x, by_norm) = net.pre_norm_back(&mut g, b, b.roles.attn_norm, x, at_input);
                (g.add(at_x, at_mid), [by_norm, Some(half.by_bias), half.by_post], by_group)
            }
        };
        let ffn = [by_ffn_norm, Some(ffn.by_bias), ffn.by_post];
        // The order is that of `BlockVector::ALL`: each token's contribution, `ne` `[n_embd, n_tokens]`,
        // and its sum.
        let parts: Vec<Option<TensorId>> = if vectors {
            let ones = g.input_f32([ne[1], 1], &ones);
            let mut sum = |part: TensorId| {
                let by_vector = g.transpose(part);
                g.mul_mat(by_vector, ones)
            };
            [attn, ffn].concat().into_iter().map(|part| part.map(&mut sum)).collect()
        } else {
            Vec::new()
        };
        if matrices {
            for t in maps.iter_mut().flat_map(|m| m.outputs.iter_mut().map(|(_, t)| t).chain([&mut m.input]))
            {
                // The memory of a view may be used again.
                *t = g.cont(*t);
                g.output(*t);
            }
        } else {
            maps.clear();
        }
        parts.iter().flatten().chain(&by_group).chain([&at_x]).for_each(|t| g.output(*t));
        let done = g.compute(&self.engine)?;
        done.read(at_x, grad);
        let read = |t: Option<TensorId>| t.map(|t| done.to_vec(t)).unwrap_or_default();
        let mut parts = parts.into_iter();
        let vectors = BlockVector::ALL.map(|_| read(parts.next().flatten()));
        let maps = maps.into_iter().map(|m| m.rows(&done)).collect();
        Ok(GraphGradient { n_tokens: ne[1], vectors, groups: read(by_group), maps })
    }
}

/// Adds the products of what the maps of these graphs read and the derivatives by their outputs.
fn add_maps(into: &mut MatrixGradient, graphs: &[GraphGradient]) {
    let mut sums = Vec::new();
    for (sum, matrix) in into.iter_mut().zip(BlockMatrix::ALL) {
        let parts: Vec<[&[f32]; 2]> = graphs.iter().filter_map(|g| g.map(matrix)).collect();
        let (Some([a, x]), Some(first)) = (parts.first(), graphs.first()) else { continue };
        let (n_out, n_in) = (a.len() / first.n_tokens, x.len() / first.n_tokens);
        sum.resize(n_out * n_in, 0.0);
        count(graphs.iter().map(|g| 2 * (g.n_tokens * n_out * n_in) as u64).sum());
        sums.push(OuterSum { sum, n_in, parts });
    }
    add_outer(sums);
}
