//! Attention in a block's graph.

use super::*;

impl Net {
    fn sliding_of(&self, b: &Block) -> Option<&SlidingWindow> {
        self.hparams.sliding.as_ref().filter(|_| b.sliding)
    }

    /// Rotation of the block's queries and keys.
    pub(in crate::forward) fn rope_of(&self, b: &Block) -> &RopeParams {
        self.sliding_of(b).map_or(&self.hparams.rope, |s| &s.rope)
    }

    /// Queries, keys and values of the residual stream `x`.
    pub(in crate::forward) fn qkv<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, x: TensorId) -> Qkv {
        let (d, t) = (self.hparams.head_dim, self.n_ctx);
        let n_tokens = g.ne(x)[1];
        let h = self.attn_input(g, b, x);
        let positions = g.input_i32(&self.positions[..n_tokens]);
        let factors = self.factors.map(|i| g.resident(&self.fixed, i));
        let heads = [b.shape.n_head, b.shape.n_head_kv, b.shape.n_head_kv];
        let kind = self.hparams.family.traits().qk_norm;
        let mut before_norm = [None; 2];
        let ready = std::array::from_fn(|i| {
            let y = linear(g, b, b.roles.qkv[i], b.roles.qkv_bias[i], h);
            let by_head = |g: &mut Graph<'a>, y: TensorId| g.reshape(y, [d, heads[i], n_tokens, 1]);
            // Values are neither normed nor rotated.
            let y = if i == 2 {
                by_head(g, y)
            } else {
                let mut normed = |g: &mut Graph<'a>, y: TensorId| {
                    before_norm[i] = Some(y);
                    self.rms_norm(
                        g,
                        b,
                        b.roles.qk_norm[i].expect("a block has its norms of queries and keys"),
                        y,
                    )
                };
                let y = if kind == Some(QkNorm::Whole) { normed(g, y) } else { y };
                let y = by_head(g, y);
                let y = if kind == Some(QkNorm::Heads) { normed(g, y) } else { y };
                let y = if b.rotated { g.rope(y, positions, factors, self.rope_of(b)) } else { y };
                let y = if kind == Some(QkNorm::RotatedHeads) { normed(g, y) } else { y };
                if i == 0 { self.tempered(g, y) } else { y }
            };
            let y = g.reshape(y, [d, heads[i], t, n_tokens / t]);
            g.permute(y, [0, 2, 1, 3])
        });
        Qkv { before_norm, ready }
    }

    /// Queries, `ne` `[head_dim, n_head, n_tokens]`, or a derivative by them, times the temperature of
    /// their positions.
    pub(in crate::forward) fn tempered<'a>(&'a self, g: &mut Graph<'a>, q: TensorId) -> TensorId {
        if self.temperatures.is_empty() {
            return q;
        }
        let n_tokens = g.ne(q)[2];
        let by = g.input_f32([1, n_tokens], &self.temperatures[..n_tokens]);
        let by = g.reshape(by, [1, 1, n_tokens, 1]);
        g.mul(q, by)
    }

    /// Attention weights from the products `s` of the queries `queries` of each window with the keys from
    /// `first` to the last of these queries, and the tanh of the cap, if there is one.
    pub(in crate::forward) fn attention_weights<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &Block,
        s: TensorId,
        queries: Range<usize>,
        first: usize,
    ) -> (TensorId, Option<TensorId>) {
        let (s, scale, tanh) = match self.hparams.attn_softcap {
            None => (s, self.attention_scale, None),
            Some(cap) => {
                let s = g.scale(s, self.attention_scale / cap, 0.0);
                let tanh = g.tanh(s);
                (tanh, cap, Some(tanh))
            }
        };
        let weights = if g.on_devices() {
            let mask = self.mask(g, b, queries, first);
            g.soft_max(s, Some(mask), scale)
        } else {
            let n_seen = self.sliding_of(b).map_or(self.n_ctx, |s| s.n_swa);
            g.causal_soft_max(s, Causal { query: queries.start, key: first, n_seen }, scale)
        };
        (weights, tanh)
    }

    /// Mask that is added to the scores of the queries `queries` of each window and the keys from `first`
    /// to the last of these queries.
    fn mask<'a>(&'a self, g: &mut Graph<'a>, b: &Block, queries: Range<usize>, first: usize) -> TensorId {
        assert!(queries.len() <= self.mask_rows);
        let mask = g.resident(&self.fixed, if b.sliding { self.sliding_mask } else { 0 });
        let rows = g.slice(mask, 1, 0, queries.len());
        let columns = g.slice(rows, 0, self.n_ctx - (queries.start - first), queries.end - first);
        g.cont(columns)
    }

    /// Input of attn_output: `ne` `[n_head·head_dim, n_tokens]`.
    pub(in crate::forward) fn heads<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, x: TensorId) -> TensorId {
        let (d, t, n_tokens) = (self.hparams.head_dim, self.n_ctx, g.ne(x)[1]);
        let [q, k, v] = self.qkv(g, b, x).ready;
        let n_seen = self.sliding_of(b).map_or(t, |s| s.n_swa);
        let slice = query_slice(t);
        let slices: Vec<TensorId> = (0..t)
            .step_by(slice)
            .map(|start| {
                let n = slice.min(t - start);
                let first = (start + 1).saturating_sub(n_seen);
                let n_keys = start + n - first;
                let q = g.slice(q, 1, start, n);
                let (k, v) = (g.slice(k, 1, first, n_keys), g.slice(v, 1, first, n_keys));
                let scores = g.mul_mat(k, q);
                let (p, _) = self.attention_weights(g, b, scores, start..start + n, first);
                let v = g.transpose(v);
                g.mul_mat(v, p)
            })
            .collect();
        let out = join_queries(g, &slices);
        let out = g.permute(out, [0, 2, 1, 3]);
        let out = g.cont(out);
        g.reshape(out, [d * b.shape.n_head, n_tokens, 1, 1])
    }
}

/// Number of queries that attend together in a window of `n_ctx` tokens.
pub(crate) fn query_slice(n_ctx: usize) -> usize {
    QUERY_SLICE.max(n_ctx.div_ceil(MAX_SLICES))
}

/// Concatenation of the slices. They are joined in pairs, so that each is copied only a few times.
fn join_queries(g: &mut Graph, slices: &[TensorId]) -> TensorId {
    match slices {
        [one] => *one,
        _ => {
            let (a, b) = slices.split_at(slices.len() / 2);
            let (a, b) = (join_queries(g, a), join_queries(g, b));
            g.concat(a, b, 1)
        }
    }
}
