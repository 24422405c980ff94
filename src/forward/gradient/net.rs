//! The way back through a block's graph, op by op.

use super::*;

impl Net {
    /// Logits of the residual stream `x` behind the last block.
    pub(super) fn stream_logits<'a>(&'a self, g: &mut Graph<'a>, head: &'a Head, x: TensorId) -> TensorId {
        let normed = self.normed(g, x);
        self.logits(g, head, normed)
    }

    /// Carries the derivative `d` by the logits `q` back through the output head to the residual stream
    /// `x`.
    pub(super) fn logits_back<'a>(
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
    pub(super) fn ffn_back<'a>(
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
            let maps = vec![
                MapBack { input, outputs: vec![(BlockMatrix::FfnUp, at_up)] },
                MapBack { input: h, outputs: vec![(BlockMatrix::FfnDown, by_bias)] },
            ];
            return HalfBack { at_input: self.product_back(g, b, r.ffn_up, at_up), by_bias, by_post, maps };
        };
        let gate = linear(g, b, Some(gate), r.ffn_gate_bias, input);
        let activated = self.activate(g, gate);
        let h = g.mul(activated, up);
        let (at_h, by_bias, by_post) = self.map_back(g, b, Half::FeedForward, h, behind);
        let at_up = g.mul(at_h, activated);
        let at_activated = g.mul(at_h, up);
        let at_gate = self.activate_back(g, at_activated, gate);
        let maps = vec![
            MapBack { input, outputs: vec![(BlockMatrix::FfnGate, at_gate), (BlockMatrix::FfnUp, at_up)] },
            MapBack { input: h, outputs: vec![(BlockMatrix::FfnDown, by_bias)] },
        ];
        let at_up = self.product_back(g, b, r.ffn_up, at_up);
        let at_gate = self.product_back(g, b, r.ffn_gate, at_gate);
        HalfBack { at_input: g.add(at_up, at_gate), by_bias, by_post, maps }
    }

    /// Carries the derivative by the residual stream `behind` back through attention; `x` is the residual
    /// stream before it.
    pub(super) fn attention_back<'a>(
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
        let mut outputs = Vec::new();
        let inputs =
            [(at_q, n_head), (at_k, n_kv), (at_v, n_kv)].into_iter().enumerate().map(|(i, (at, heads))| {
                let matrix = [BlockMatrix::AttnQ, BlockMatrix::AttnK, BlockMatrix::AttnV][i];
                let at = g.permute(at, [0, 2, 1, 3]);
                let at = g.cont(at);
                let at = g.reshape(at, [d, heads, n_tokens, 1]);
                let flat = |g: &mut Graph<'a>, at: TensorId| g.reshape(at, [d * heads, n_tokens, 1, 1]);
                if i == 2 {
                    let at = flat(g, at);
                    outputs.push((matrix, at));
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
                outputs.push((matrix, at));
                self.product_back(g, b, b.roles.qkv[i], at)
            });
        let inputs: Vec<TensorId> = inputs.collect();
        let at_input = g.add(inputs[0], inputs[1]);
        let maps = vec![
            MapBack { input: self.attn_input(g, b, x), outputs },
            MapBack { input: a.out, outputs: vec![(BlockMatrix::AttnOutput, by_bias)] },
        ];
        HalfBack { at_input: g.add(at_input, inputs[2]), by_bias, by_post, maps }
    }

    /// Worth of each group: the derivative by the residual stream `behind` attention times the group's
    /// contribution to it, `ne` `[n_head_kv, n_tokens]`.
    ///
    /// The contribution is the difference that leaving the group out makes. A derivative by the group's
    /// share would miss the part along the input of a norm behind attn_output. `masks` has 0 for the inputs
    /// of one group after another.
    pub(super) fn worth_of_groups<'a>(
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
    pub(super) fn attention_weights_back<'a>(
        &self,
        g: &mut Graph<'a>,
        at_p: TensorId,
        a: &Attention,
    ) -> TensorId {
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
    pub(super) fn pre_norm_back<'a>(
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
    pub(super) fn normed_back<'a>(&'a self, g: &mut Graph<'a>, at: TensorId, x: TensorId) -> TensorId {
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
    pub(super) fn attention<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, x: TensorId) -> Attention {
        let n_tokens = g.ne(x)[1];
        let Qkv { before_norm, ready: [q, k, v] } = self.qkv(g, b, x);
        let q = g.cont(q);
        let s = g.mul_mat(k, q);
        let (p, tanh) = self.attention_weights(g, b, s, 0..self.n_ctx, 0);
        let v_t = g.transpose(v);
        let out = g.mul_mat(v_t, p);
        let out = g.permute(out, [0, 2, 1, 3]);
        let out = g.cont(out);
        let out = g.reshape(out, [self.hparams.head_dim * b.shape.n_head, n_tokens, 1, 1]);
        Attention { before_norm, q, v, k_t: g.transpose(k), p, tanh, out }
    }

    /// Carries the derivative by the residual stream `behind` back through [`Net::map`] and [`Net::join`].
    /// Returns the derivative by the map's `inputs`, and per token by its bias and by the norm behind it.
    pub(super) fn map_back<'a>(
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
        (self.product_back(g, b, half.weight(b), at_y), at_y, by_post)
    }

    /// Carries the derivative back through W x: Wᵀ `at_y`.
    pub(super) fn product_back<'a>(
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
    pub(super) fn norm_back<'a>(
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
    pub(super) fn activate<'a>(&self, g: &mut Graph<'a>, x: TensorId) -> TensorId {
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

    pub(super) fn activate_back<'a>(&self, g: &mut Graph<'a>, at: TensorId, x: TensorId) -> TensorId {
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
pub(super) fn all_but_each_group(b: &Block, head_dim: usize) -> Vec<f32> {
    let (n_kv, width) = (b.shape.n_head_kv, b.shape.heads_per_group() * head_dim);
    let mut masks = vec![1.0; n_kv * n_kv * width];
    masks.chunks_exact_mut(n_kv * width).enumerate().for_each(|(i, m)| m[i * width..][..width].fill(0.0));
    masks
}

/// Constants of ggml's GELU: sqrt(2 / π), and the factor of x³.
const GELU_C: f32 = 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

/// Tanh of ggml's GELU: tanh(c (x + 0.044715 x³)).
pub(super) fn gelu_tanh(g: &mut Graph, x: TensorId) -> TensorId {
    let squares = g.mul(x, x);
    let inner = g.scale(squares, GELU_C * GELU_CUBE, GELU_C);
    let inner = g.mul(inner, x);
    g.tanh(inner)
}
