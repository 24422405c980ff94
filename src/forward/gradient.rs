//! Gradients: from a loss on the final residual stream back through the blocks.
//!
//! The graphs repeat the forward pass in steps whose derivatives ggml has, and go backwards op by op.
//! Gradients are by the residual stream before the block, the block's vectors, and the shares of its
//! attention groups.

use super::block::{Half, MAX_NODES, PreNorm, Qkv, linear};
use super::{Block, Forward, ForwardError, Head, Net};
use crate::ggml::{Graph, TensorId};
use crate::model::{Activation, BlockVector, Norm, QkNorm};

/// Derivatives by a block's vectors, summed over tokens, in the order of [`BlockVector::ALL`].
/// Bias derivatives are present even if the block has no such bias. A vector that the block cannot have
/// gets an empty one.
pub type BlockGradient = [Vec<f32>; BlockVector::ALL.len()];

/// Optional results that [`Forward::block_gradient`] collects on its way back through a block.
#[derive(Default)]
pub struct OnTheWay<'a> {
    /// Receives the derivatives by the block's vectors, which are added.
    pub vectors: Option<&'a mut BlockGradient>,
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
        &mut self,
        own_head: &Head,
        dense_head: Option<&Head>,
        own: &[f32],
        dense: &[f32],
    ) -> Result<Vec<f32>, ForwardError> {
        let n_embd = self.n_embd();
        let dense_head = dense_head.unwrap_or(own_head);
        let mut out = vec![0.0; own.len()];
        let rows = LOSS_ROWS * n_embd;
        for ((own, dense), out) in own.chunks(rows).zip(dense.chunks(rows)).zip(out.chunks_mut(rows)) {
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let ne = [n_embd, own.len() / n_embd];
            let (x, dense) = (g.input_f32(ne, own), g.input_f32(ne, dense));
            let q = self.net.stream_logits(&mut g, own_head, x);
            let p = self.net.stream_logits(&mut g, dense_head, dense);
            let (soft_q, p) = (g.soft_max(q, None, 1.0), g.soft_max(p, None, 1.0));
            let d = g.sub(soft_q, p);
            let d = self.net.logits_back(&mut g, own_head, [x, q], d);
            g.output(d);
            g.compute(&mut self.engine)?.read(d, out);
        }
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
        &mut self,
        head: &Head,
        x: &[f32],
        mut bits: impl FnMut() -> u64,
    ) -> Result<Vec<f32>, ForwardError> {
        let (n_embd, n_vocab) = (self.n_embd(), head.n_vocab());
        let mut out = vec![0.0; x.len()];
        let rows = LOSS_ROWS * n_embd;
        for (x, out) in x.chunks(rows).zip(out.chunks_mut(rows)) {
            let n = x.len() / n_embd;
            let mut signs = vec![1.0; n * n_vocab];
            for part in signs.chunks_mut(64) {
                let bits = bits();
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
            g.compute(&mut self.engine)?.read(d, out);
        }
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
        &mut self,
        b: &Block,
        x: &[f32],
        grad: &mut [f32],
        mut found: OnTheWay<'_>,
    ) -> Result<(), ForwardError> {
        assert!(!b.has_experts(), "no gradients go back through a criterion");
        let n_windows = x.len() / (self.n_ctx() * self.n_embd());
        let at_a_time = (GRADIENT_TOKENS / self.n_ctx()).clamp(1, self.net.chunk);
        for start in (0..n_windows).step_by(at_a_time) {
            let span = self.span(&(start..(start + at_a_time).min(n_windows)));
            self.chunk_gradient(b, &x[span.clone()], &mut grad[span], &mut found)?;
        }
        Ok(())
    }

    fn chunk_gradient(
        &mut self,
        b: &Block,
        x: &[f32],
        grad: &mut [f32],
        found: &mut OnTheWay<'_>,
    ) -> Result<(), ForwardError> {
        let ne = [self.n_embd(), x.len() / self.n_embd()];
        let (before, ones) = (grad.to_vec(), vec![1.0; ne[1]]);
        let n_groups = if found.groups.is_some() { b.shape.n_head_kv } else { 0 };
        let masks = if n_groups > 0 { all_but_each_group(b, self.net.hparams.head_dim) } else { Vec::new() };
        let mut g = Graph::new(&self.engine, MAX_NODES + NODES_PER_GROUP * n_groups);
        let x = g.input_f32(ne, x);
        let net = &self.net;
        let attention = b.has_attention().then(|| net.attention(&mut g, b, x));
        let mid = net.attention_residual(&mut g, b, x, attention.as_ref().map(|a| a.out));
        let behind = g.input_f32(ne, &before);
        let ffn = net.ffn_back(&mut g, b, x, mid, behind);
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
                let by_group =
                    found.groups.is_some().then(|| net.worth_of_groups(&mut g, b, a, behind, &masks));
                let at_input = shared.map_or(half.at_input, |shared| g.add(half.at_input, shared));
                let (at_x, by_norm) = net.pre_norm_back(&mut g, b, b.roles.attn_norm, x, at_input);
                (g.add(at_x, at_mid), [by_norm, Some(half.by_bias), half.by_post], by_group)
            }
        };
        let ffn = [by_ffn_norm, Some(ffn.by_bias), ffn.by_post];
        // The order is that of `BlockVector::ALL`: each token's contribution, `ne` `[n_embd, n_tokens]`,
        // and its sum.
        let parts: Vec<Option<TensorId>> = if found.vectors.is_some() {
            let ones = g.input_f32([ne[1], 1], &ones);
            let mut sum = |part: TensorId| {
                let by_vector = g.transpose(part);
                g.mul_mat(by_vector, ones)
            };
            [attn, ffn].concat().into_iter().map(|part| part.map(&mut sum)).collect()
        } else {
            Vec::new()
        };
        parts.iter().flatten().chain(&by_group).chain([&at_x]).for_each(|t| g.output(*t));
        let done = g.compute(&mut self.engine)?;
        for (sum, part) in found.vectors.iter_mut().flat_map(|all| all.iter_mut()).zip(parts) {
            let Some(part) = part else { continue };
            sum.resize(ne[0], 0.0);
            sum.iter_mut().zip(done.to_vec(part)).for_each(|(s, v)| *s += v);
        }
        if let (Some(all), Some(part)) = (&mut found.groups, by_group) {
            all.extend(done.to_vec(part));
        }
        done.read(at_x, grad);
        Ok(())
    }
}

impl Net {
    /// Logits of the residual stream `x` behind the last block.
    fn stream_logits<'a>(&'a self, g: &mut Graph<'a>, head: &'a Head, x: TensorId) -> TensorId {
        let normed = self.normed(g, x);
        self.logits(g, head, normed)
    }

    /// Carries the derivative `d` by the logits `q` back through the output head to the residual stream
    /// `x`.
    fn logits_back<'a>(
        &'a self,
        g: &mut Graph<'a>,
        head: &'a Head,
        [x, q]: [TensorId; 2],
        mut d: TensorId,
    ) -> TensorId {
        if let Some(cap) = self.hparams.softcap {
            // The derivative of c tanh(z / c) by z is 1 − tanh².
            let t = g.scale(q, 1.0 / cap, 0.0);
            let squares = g.mul(t, t);
            let slope = g.scale(squares, -1.0, 1.0);
            d = g.mul(d, slope);
        }
        let d = self.scaled(g, d, self.hparams.logit_scale);
        let w = g.resident(&head.set, 1);
        let w = g.transpose(w);
        let d = g.mul_mat(w, d);
        let w = g.resident(&head.set, 0);
        let d = g.mul(d, w);
        self.normed_back(g, d, x)
    }

    /// Carries the derivative by the residual stream `behind` back through the FFN.
    /// `x` and `mid` are the residual streams before and after attention.
    fn ffn_back<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        x: TensorId,
        mid: TensorId,
        behind: TensorId,
    ) -> HalfBack {
        let r = &b.roles;
        let input = self.ffn_input(g, b, x, mid);
        let up = linear(g, b, r.ffn_up, r.ffn_up_bias, input);
        let Some(gate) = r.ffn_gate else {
            let h = self.activate(g, up);
            let (at_h, by_bias, by_post) = self.map_back(g, b, Half::FeedForward, h, behind);
            let at_up = self.activate_back(g, at_h, up);
            return HalfBack { at_input: self.product_back(g, b, r.ffn_up, at_up), by_bias, by_post };
        };
        let gate = linear(g, b, Some(gate), r.ffn_gate_bias, input);
        let activated = self.activate(g, gate);
        let h = g.mul(activated, up);
        let (at_h, by_bias, by_post) = self.map_back(g, b, Half::FeedForward, h, behind);
        let at_up = g.mul(at_h, activated);
        let at_activated = g.mul(at_h, up);
        let at_gate = self.activate_back(g, at_activated, gate);
        let at_up = self.product_back(g, b, r.ffn_up, at_up);
        let at_gate = self.product_back(g, b, r.ffn_gate, at_gate);
        HalfBack { at_input: g.add(at_up, at_gate), by_bias, by_post }
    }

    /// Carries the derivative by the residual stream `behind` back through attention; `x` is the residual
    /// stream before it.
    fn attention_back<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        x: TensorId,
        a: &Attention,
        behind: TensorId,
    ) -> HalfBack {
        let (at_out, by_bias, by_post) = self.map_back(g, b, Half::Attention, a.out, behind);
        let (d, t, n_tokens) = (self.hparams.head_dim, self.n_ctx, g.ne(x)[1]);
        let n_seq = n_tokens / t;
        let (n_head, n_kv) = (b.shape.n_head, b.shape.n_head_kv);
        let at_out = g.reshape(at_out, [d, n_head, t, n_seq]);
        let at_out = g.permute(at_out, [0, 2, 1, 3]);
        let at_out = g.cont(at_out);
        let at_p = g.mul_mat(a.v, at_out);
        let at_s = self.attention_weights_back(g, at_p, a);
        let at_q = g.mul_mat(a.k_t, at_s);
        // The query heads of a group side by side act as one head with more queries. Products over queries
        // then sum over the group.
        let queries = t * b.shape.heads_per_group();
        let queries_first = |g: &mut Graph<'a>, x: TensorId| {
            let x = g.reshape(x, [g.ne(x)[0], queries, n_kv, n_seq]);
            g.transpose(x)
        };
        let (s_t, q_t) = (queries_first(g, at_s), queries_first(g, a.q));
        let at_k = g.mul_mat(q_t, s_t);
        let (p_t, out_t) = (queries_first(g, a.p), queries_first(g, at_out));
        let at_v = g.mul_mat(out_t, p_t);
        let positions = g.input_i32(&self.positions[..n_tokens]);
        let factors = self.factors.map(|i| g.resident(&self.fixed, i));
        let kind = self.hparams.family.traits().qk_norm;
        let inputs =
            [(at_q, n_head), (at_k, n_kv), (at_v, n_kv)].into_iter().enumerate().map(|(i, (at, heads))| {
                let at = g.permute(at, [0, 2, 1, 3]);
                let at = g.cont(at);
                let at = g.reshape(at, [d, heads, n_tokens, 1]);
                let flat = |g: &mut Graph<'a>, at: TensorId| g.reshape(at, [d * heads, n_tokens, 1, 1]);
                if i == 2 {
                    let at = flat(g, at);
                    return self.product_back(g, b, b.roles.qkv[i], at);
                }
                let at = if i == 0 { self.tempered(g, at) } else { at };
                let through_norm = |g: &mut Graph<'a>, at: TensorId| {
                    let w = g.resident(&b.set, b.roles.qk_norm[i].expect("a block has its norms"));
                    let scaled = g.mul(at, w);
                    let before = a.before_norm[i].expect("what a norm saw is kept");
                    g.rms_norm_back(scaled, before, self.hparams.norm_eps)
                };
                let at = if kind == Some(QkNorm::RotatedHeads) { through_norm(g, at) } else { at };
                let at = if b.rotated { g.rope_back(at, positions, factors, self.rope_of(b)) } else { at };
                let at = if kind == Some(QkNorm::Heads) { through_norm(g, at) } else { at };
                let at = flat(g, at);
                let at = if kind == Some(QkNorm::Whole) { through_norm(g, at) } else { at };
                self.product_back(g, b, b.roles.qkv[i], at)
            });
        let inputs: Vec<TensorId> = inputs.collect();
        let at_input = g.add(inputs[0], inputs[1]);
        HalfBack { at_input: g.add(at_input, inputs[2]), by_bias, by_post }
    }

    /// Worth of each group: the derivative by the residual stream `behind` attention times the group's
    /// contribution to it, `ne` `[n_head_kv, n_tokens]`.
    ///
    /// The contribution is the difference that leaving the group out makes. A derivative by the group's
    /// share would miss the part along the input of a norm behind attn_output. `masks` has 0 for the inputs
    /// of one group after another.
    fn worth_of_groups<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        a: &Attention,
        behind: TensorId,
        masks: &'a [f32],
    ) -> TensorId {
        let n_embd = self.hparams.n_embd;
        let added = |g: &mut Graph<'a>, inputs: TensorId| {
            let y = self.map(g, b, Half::Attention, inputs);
            self.added(g, b, Half::Attention, y)
        };
        // The residual streams behind attention differ by the same amount, but rounding would blur it.
        let whole = added(g, a.out);
        let n_in = g.ne(a.out)[0];
        let each = masks.chunks_exact(n_in).map(|mask| {
            let mask = g.input_f32([n_in, 1], mask);
            let others = g.mul(a.out, mask);
            let without = added(g, others);
            let lost = g.sub(whole, without);
            let worth = g.mul(behind, lost);
            let mean = g.mean(worth);
            g.scale(mean, n_embd as f32, 0.0)
        });
        let each: Vec<TensorId> = each.collect();
        each.into_iter().reduce(|all, one| g.concat(all, one, 0)).expect("a block with attention has groups")
    }

    /// Carries the derivative back through [`Net::attention_weights`] to the products of keys and queries.
    fn attention_weights_back<'a>(&self, g: &mut Graph<'a>, at_p: TensorId, a: &Attention) -> TensorId {
        let (Some(tanh), Some(cap)) = (a.tanh, self.hparams.attn_softcap) else {
            return g.soft_max_back(at_p, a.p, self.attention_scale);
        };
        let at_tanh = g.soft_max_back(at_p, a.p, cap);
        // (tanh(s / cap))' = (1 − tanh²) / cap
        let squares = g.mul(tanh, tanh);
        let by = self.attention_scale / cap;
        let slope = g.scale(squares, -by, by);
        g.mul(at_tanh, slope)
    }

    /// Carries the derivative back through the norm before a block half, if there is one: by the residual
    /// stream `x`, and per token by the norm's weight.
    fn pre_norm_back<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        norm: Option<PreNorm>,
        x: TensorId,
        at: TensorId,
    ) -> (TensorId, Option<TensorId>) {
        let Some(norm) = norm else {
            return (at, None);
        };
        let normed = self.normed(g, x);
        let by_weight = g.mul(at, normed);
        let weight = g.resident(&b.set, norm.weight);
        let scaled = g.mul(at, weight);
        (self.normed_back(g, scaled, x), Some(by_weight))
    }

    /// Carries the derivative back through [`Net::normed`] of `x`.
    fn normed_back<'a>(&'a self, g: &mut Graph<'a>, at: TensorId, x: TensorId) -> TensorId {
        let eps = self.hparams.norm_eps;
        if self.hparams.family.traits().norm == Norm::Rms {
            return g.rms_norm_back(at, x, eps);
        }
        // (at − mean(at) − y · mean(at · y)) / σ, for y = (x − mean(x)) / σ
        let mean = g.mean(x);
        let centred = g.sub(x, mean);
        let squares = g.mul(centred, centred);
        let variance = g.mean(squares);
        let variance = g.scale(variance, 1.0, eps);
        let sigma = g.sqrt(variance);
        let y = g.div(centred, sigma);
        let along = g.mul(at, y);
        let along = g.mean(along);
        let along = g.mul(y, along);
        let mean = g.mean(at);
        let at = g.sub(at, mean);
        let at = g.sub(at, along);
        g.div(at, sigma)
    }

    /// Attention as [`Net::heads`] computes it, in single steps.
    fn attention<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, x: TensorId) -> Attention {
        let n_tokens = g.ne(x)[1];
        let Qkv { before_norm, ready: [q, k, v] } = self.qkv(g, b, x);
        let q = g.cont(q);
        let mask = self.mask(g, b, 0..self.n_ctx, 0);
        let s = g.mul_mat(k, q);
        let (p, tanh) = self.attention_weights(g, s, mask);
        let v_t = g.transpose(v);
        let out = g.mul_mat(v_t, p);
        let out = g.permute(out, [0, 2, 1, 3]);
        let out = g.cont(out);
        let out = g.reshape(out, [self.hparams.head_dim * b.shape.n_head, n_tokens, 1, 1]);
        Attention { before_norm, q, v, k_t: g.transpose(k), p, tanh, out }
    }

    /// Carries the derivative by the residual stream `behind` back through [`Net::map`] and [`Net::join`].
    /// Returns the derivative by the map's `inputs`, and per token by its bias and by the norm behind it.
    fn map_back<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        half: Half,
        inputs: TensorId,
        behind: TensorId,
    ) -> (TensorId, TensorId, Option<TensorId>) {
        let behind = self.scaled(g, behind, self.hparams.residual_scale);
        let (mut at_y, mut by_post) = (behind, None);
        if let Some(post) = b.post_norm(half) {
            let y = self.map(g, b, half, inputs);
            let normed = g.rms_norm(y, self.hparams.norm_eps);
            let weight = g.resident(&b.set, post.weight);
            let (at, by) = self.norm_back(g, behind, [y, normed, weight]);
            (at_y, by_post) = (at, Some(by));
        }
        let weight = match half {
            Half::Attention => b.roles.attn_output,
            Half::FeedForward => b.roles.ffn_down,
        };
        (self.product_back(g, b, weight, at_y), at_y, by_post)
    }

    /// Carries the derivative back through W x: Wᵀ `at_y`.
    fn product_back<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        weight: Option<usize>,
        at_y: TensorId,
    ) -> TensorId {
        let w = g.resident(&b.set, weight.expect("the role exists in this block"));
        let w = g.transpose(w);
        g.mul_mat(w, at_y)
    }

    /// Carries the derivative back through a norm of `x` and its weight: by `x`, and per token by the
    /// weight.
    fn norm_back<'a>(
        &'a self,
        g: &mut Graph<'a>,
        at: TensorId,
        [x, normed, weight]: [TensorId; 3],
    ) -> (TensorId, TensorId) {
        let by_weight = g.mul(at, normed);
        let scaled = g.mul(at, weight);
        (g.rms_norm_back(scaled, x, self.hparams.norm_eps), by_weight)
    }

    /// Activation function: of the gate, or of up if there is no gate.
    fn activate<'a>(&self, g: &mut Graph<'a>, x: TensorId) -> TensorId {
        match self.hparams.family.traits().activation {
            Activation::SwiGlu => g.silu(x),
            Activation::GeGlu | Activation::Gelu => {
                let t = gelu_tanh(g, x);
                let half = g.scale(t, 0.5, 0.5);
                g.mul(half, x)
            }
            Activation::ReluSquared => {
                let x = g.relu(x);
                g.mul(x, x)
            }
        }
    }

    fn activate_back<'a>(&self, g: &mut Graph<'a>, at: TensorId, x: TensorId) -> TensorId {
        match self.hparams.family.traits().activation {
            Activation::SwiGlu => g.silu_back(at, x),
            Activation::GeGlu | Activation::Gelu => {
                // Derivative ½ (1 + t) + ½ x (1 − t²) u', with t = tanh(u) and u' = c (1 + 3 · 0.044715
                // x²).
                let t = gelu_tanh(g, x);
                let squares = g.mul(x, x);
                let inner = g.scale(squares, 3.0 * GELU_C * GELU_CUBE, GELU_C);
                let t2 = g.mul(t, t);
                let slope = g.scale(t2, -0.5, 0.5);
                let slope = g.mul(slope, inner);
                let slope = g.mul(slope, x);
                let half = g.scale(t, 0.5, 0.5);
                let slope = g.add(slope, half);
                g.mul(at, slope)
            }
            Activation::ReluSquared => {
                let x = g.relu(x);
                let slope = g.scale(x, 2.0, 0.0);
                g.mul(at, slope)
            }
        }
    }
}

/// Factors of attn_output's inputs that leave out one group after another, `ne`
/// `[n_head·head_dim, n_head_kv]`.
fn all_but_each_group(b: &Block, head_dim: usize) -> Vec<f32> {
    let (n_kv, width) = (b.shape.n_head_kv, b.shape.heads_per_group() * head_dim);
    let mut masks = vec![1.0; n_kv * n_kv * width];
    masks.chunks_exact_mut(n_kv * width).enumerate().for_each(|(i, m)| m[i * width..][..width].fill(0.0));
    masks
}

/// Constants of ggml's GELU: sqrt(2 / π), and the factor of x³.
const GELU_C: f32 = 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

/// Tanh of ggml's GELU: tanh(c (x + 0.044715 x³)).
fn gelu_tanh(g: &mut Graph, x: TensorId) -> TensorId {
    let squares = g.mul(x, x);
    let inner = g.scale(squares, GELU_C * GELU_CUBE, GELU_C);
    let inner = g.mul(inner, x);
    g.tanh(inner)
}
