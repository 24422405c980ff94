//! Operations and bytes of the parts that stages are made of, from shapes.

use super::*;
use crate::pipeline::sensitivity::probes;

/// Sizes of one block on which the work depends. They are whole numbers, except for means over blocks.
#[derive(Clone, Copy)]
pub(in crate::pipeline) struct Sizes {
    /// Total width of the query heads, and of the key heads.
    pub(in crate::pipeline) q: f64,
    pub(in crate::pipeline) kv: f64,
    /// Number of neurons that a token passes through.
    pub(in crate::pipeline) ff: f64,
    /// Number of all neurons.
    pub(in crate::pipeline) held: f64,
    /// Number of neurons of an FFN that is refitted.
    pub(in crate::pipeline) refitted: f64,
    /// Number of experts of the router.
    pub(in crate::pipeline) router: f64,
}

pub(in crate::pipeline) struct Work<'a> {
    pub(in crate::pipeline) model: &'a Model,
    pub(in crate::pipeline) c: Calibration,
    pub(in crate::pipeline) s: &'a Settings,
    /// Share of the attention that is kept, the same in all blocks.
    pub(in crate::pipeline) kept: f64,
    /// Number of attention groups that are removed.
    pub(in crate::pipeline) n_groups_removed: usize,
    pub(in crate::pipeline) widths: &'a [usize],
}

impl Work<'_> {
    pub(in crate::pipeline) fn n_embd(&self) -> f64 {
        self.model.hparams.n_embd as f64
    }

    pub(in crate::pipeline) fn n_vocab(&self) -> f64 {
        self.model.hparams.n_vocab as f64
    }

    pub(in crate::pipeline) fn ffn_matrices(&self) -> f64 {
        self.model.hparams.ffn_matrices() as f64
    }

    pub(in crate::pipeline) fn n_layer(&self) -> f64 {
        self.model.hparams.n_layer() as f64
    }

    pub(in crate::pipeline) fn n_all(&self) -> f64 {
        self.n_fitted() + self.n_held_out()
    }

    /// Number of tokens that blocks are fitted to, including those of resampled copies.
    pub(in crate::pipeline) fn n_fitted(&self) -> f64 {
        self.n_fit() * self.s.copies() as f64
    }

    pub(in crate::pipeline) fn n_fit(&self) -> f64 {
        (self.c.n_fit * self.c.n_ctx) as f64
    }

    pub(in crate::pipeline) fn n_held_out(&self) -> f64 {
        (self.c.n_held_out * self.c.n_ctx) as f64
    }

    pub(in crate::pipeline) fn sizes(&self, b: &BlockShape, kept: f64) -> Sizes {
        let d = self.model.hparams.head_dim as f64 * kept;
        let (ff, held) = match self.model.hparams.experts {
            None => (b.n_ff, b.n_ff),
            Some(e) => (e.n_used * b.n_ff + e.n_ff_shared, b.n_expert * b.n_ff + e.n_ff_shared),
        };
        Sizes {
            q: d * b.n_head as f64,
            kv: d * b.n_head_kv as f64,
            ff: ff as f64,
            held: held as f64,
            // Experts are refitted one at a time.
            refitted: if self.s.ffn_unit(self.model) == FfnUnit::Neuron { b.n_ff as f64 } else { 0.0 },
            router: b.n_expert as f64,
        }
    }

    /// Number of experts that a token uses, and of all experts.
    pub(in crate::pipeline) fn experts(&self) -> Option<[f64; 2]> {
        let h = &self.model.hparams;
        h.experts.map(|e| [e.n_used as f64, h.blocks[0].n_expert as f64])
    }

    /// Sizes of all blocks of the whole model. `headless` returns those with fewer heads; `pruned` also
    /// narrows the FFNs.
    pub(in crate::pipeline) fn whole(&self) -> Vec<Sizes> {
        self.model.hparams.blocks.iter().map(|b| self.sizes(b, 1.0)).collect()
    }

    /// Sizes of all blocks of the model that the result is fitted to.
    pub(in crate::pipeline) fn source(&self) -> Vec<Sizes> {
        match &self.s.recover.source {
            Some(blocks) => blocks.iter().map(|b| self.sizes(b, 1.0)).collect(),
            None => self.whole(),
        }
    }

    pub(in crate::pipeline) fn headless(&self) -> Vec<Sizes> {
        self.model.hparams.blocks.iter().map(|b| self.sizes(b, self.kept)).collect()
    }

    pub(in crate::pipeline) fn pruned(&self) -> Vec<Sizes> {
        let blocks = self.model.hparams.blocks.iter().zip(self.widths);
        let ffn_unit = self.s.ffn_unit(self.model);
        blocks.map(|(b, &w)| self.sizes(&b.with_units(ffn_unit, w), self.kept)).collect()
    }

    /// Number of tokens that `Windows::sample` returns.
    pub(in crate::pipeline) fn sampled(&self, n_tokens: usize, n_ctx: usize) -> f64 {
        (n_tokens.div_ceil(n_ctx).clamp(1, self.c.n_fit) * n_ctx) as f64
    }

    /// Approximate number of tokens that are likely at one or more of `n` positions.
    pub(in crate::pipeline) fn known(&self, n: f64) -> f64 {
        (200.0 * n.sqrt()).min(self.n_vocab())
    }

    /// Operations up to the input of `attn_output`.
    pub(in crate::pipeline) fn heads_ops(&self, il: usize, b: Sizes, n_tokens: f64, n_ctx: usize) -> f64 {
        let slides = self.model.hparams.slides(il);
        let n_swa = self.model.hparams.sliding.as_ref().filter(|_| slides).map_or(n_ctx, |s| s.n_swa);
        let slice = query_slice(n_ctx);
        let pairs: usize = (0..n_ctx)
            .step_by(slice)
            .map(|start| {
                let n = slice.min(n_ctx - start);
                n * (start + n - (start + 1).saturating_sub(n_swa))
            })
            .sum();
        n_tokens * (2.0 * self.n_embd() * (b.q + 2.0 * b.kv) + 4.0 * b.q * pairs as f64 / n_ctx as f64)
    }

    /// Operations of `attn_output` and the FFN.
    pub(in crate::pipeline) fn rest_ops(&self, b: Sizes, n_tokens: f64) -> f64 {
        2.0 * n_tokens * self.n_embd() * (b.q + self.ffn_matrices() * b.ff + b.router)
    }

    pub(in crate::pipeline) fn block_ops(&self, il: usize, b: Sizes, n_tokens: f64, n_ctx: usize) -> f64 {
        self.heads_ops(il, b, n_tokens, n_ctx) + self.rest_ops(b, n_tokens)
    }

    pub(in crate::pipeline) fn model_ops(&self, blocks: &[Sizes], n_tokens: f64, n_ctx: usize) -> f64 {
        blocks.iter().enumerate().map(|(il, b)| self.block_ops(il, *b, n_tokens, n_ctx)).sum()
    }

    /// Operations of the gradient through a block, including the forward pass.
    pub(in crate::pipeline) fn gradient_ops(&self, b: Sizes, n_tokens: f64, n_ctx: usize) -> f64 {
        // The forward pass needs `ffn_down` only if a norm follows it, and then `attn_output` once more.
        let maps = if self.model.hparams.family.traits().post_norms { b.q + b.ff } else { 0.0 };
        let ffn = 2.0 * self.ffn_matrices() - 1.0;
        let matrices = 4.0 * b.q + 4.0 * b.kv + ffn * b.ff + maps;
        n_tokens * (2.0 * self.n_embd() * matrices + 12.0 * b.q * n_ctx as f64)
    }

    /// Parameters of a block's matrices that a token passes through.
    pub(in crate::pipeline) fn matrix_params(&self, b: Sizes) -> f64 {
        self.n_embd() * (2.0 * b.q + 2.0 * b.kv + self.ffn_matrices() * b.ff)
    }

    /// Parameters of adapters of all matrices of a block.
    pub(in crate::pipeline) fn adapter_params(&self, b: Sizes, rank: f64) -> f64 {
        let e = self.n_embd();
        rank * (4.0 * e + 2.0 * b.q + 2.0 * b.kv + self.ffn_matrices() * (e + b.ff))
    }

    /// Operations of the gradient by all matrices of a block, besides those of the gradient through it.
    pub(in crate::pipeline) fn matrix_ops(&self, b: Sizes, n_tokens: f64) -> f64 {
        2.0 * n_tokens * self.matrix_params(b)
    }

    pub(in crate::pipeline) fn logit_ops(&self, n_vocab: f64, n_tokens: f64) -> f64 {
        2.0 * self.n_embd() * n_vocab * n_tokens
    }

    /// Operations of the moments of `n` inputs and `m` residuals.
    pub(in crate::pipeline) fn moment_ops(&self, n: f64, m: f64, n_tokens: f64) -> f64 {
        2.0 * n_tokens * products_per_token(n.round() as usize, m as usize) as f64
    }

    /// Operations to prepare a prediction loss on `n_tokens` positions and to compute it `n_losses` times.
    pub(in crate::pipeline) fn judge_ops(&self, n_tokens: f64, n_losses: f64) -> f64 {
        self.loss_ops(n_tokens, n_tokens, 1.0 + n_losses)
    }

    /// Operations of the logits of `n_tokens` positions and of `n_products` similar products per token over
    /// the tokens that are likely in batches of `batch`.
    pub(in crate::pipeline) fn loss_ops(&self, n_tokens: f64, batch: f64, n_products: f64) -> f64 {
        self.logit_ops(self.n_vocab() + n_products * self.known(batch), n_tokens)
    }

    /// Bytes of the largest block in 32-bit floats.
    pub(in crate::pipeline) fn block_bytes(&self) -> f64 {
        let bytes = |b: &Sizes| {
            4.0 * self.n_embd() * (2.0 * b.q + 2.0 * b.kv + self.ffn_matrices() * b.held + b.router)
        };
        self.whole().iter().map(bytes).fold(0.0, f64::max)
    }

    /// Number of neurons of the widest FFN that is refitted.
    pub(in crate::pipeline) fn max_ff(&self) -> f64 {
        self.whole().iter().map(|b| b.refitted).fold(0.0, f64::max)
    }

    pub(in crate::pipeline) fn max_q(&self) -> f64 {
        self.whole().iter().map(|b| b.q).fold(0.0, f64::max)
    }

    /// Bytes in memory of residual streams of `n` numbers.
    pub(in crate::pipeline) fn stream_bytes(&self, n: f64) -> f64 {
        if self.s.spill.is_memory() { 4.0 * n } else { 0.0 }
    }

    /// Number of tokens that pass through a block together.
    pub(in crate::pipeline) fn chunk(&self, n_ctx: usize, n_tokens: f64) -> f64 {
        n_tokens.min(self.s.chunk(n_ctx) as f64)
    }

    /// Number of tokens in one graph, and of the graphs that run at a time.
    fn graphs(&self, n_ctx: usize, n_tokens: f64) -> (f64, f64) {
        let chunk = self.chunk(n_ctx, n_tokens);
        if !self.s.devices.is_empty() {
            return (chunk, 1.0);
        }
        let tokens = chunk.min(whole_windows(GRAPH_TOKENS[0], n_ctx) as f64);
        (tokens, (chunk / tokens).ceil().min(self.s.n_threads as f64))
    }

    /// Bytes of the graphs of a block that run at a time: the largest set of tensors that are alive at once.
    /// In between, the inputs of `attn_output` are kept.
    pub(in crate::pipeline) fn graph_bytes(&self, n_ctx: usize, n_tokens: f64) -> f64 {
        let (tokens, n_graphs) = self.graphs(n_ctx, n_tokens);
        let slice = query_slice(n_ctx) as f64;
        let head_dim = self.model.hparams.head_dim as f64;
        let scores = 2.0 * self.max_q() / head_dim * slice * tokens;
        let attention = tokens * (3.0 * self.max_q() + self.n_embd()) + scores;
        let ffn = tokens * 3.0 * self.max_ff();
        let mask = if self.s.devices.is_empty() { 0.0 } else { 8.0 * slice * n_ctx as f64 };
        let graph = 4.0 * (attention.max(ffn) + tokens * 3.0 * self.n_embd()) + mask;
        n_graphs * graph + 4.0 * self.chunk(n_ctx, n_tokens) * self.max_q()
    }

    /// Number of residuals per token in the moments at `ffn_down`, where blocks are refitted.
    pub(in crate::pipeline) fn n_residuals(&self) -> f64 {
        if self.s.method.refits_towards_dense() { self.n_embd() } else { 0.0 }
    }

    /// Whether moments need the map's output for each token: to carry residuals back through a norm, or on a
    /// device.
    pub(in crate::pipeline) fn maps_every_token(&self) -> bool {
        self.model.hparams.family.traits().post_norms || !self.s.devices.is_empty()
    }

    /// Bytes of the sums of products for the moments of `n` inputs and `n_out` residuals. The CPU adds up
    /// those of a part, and devices all.
    pub(in crate::pipeline) fn sums_bytes(&self, n: f64, n_out: f64) -> f64 {
        if self.s.devices.is_empty() {
            let parts = (n / PANEL_ROWS as f64).ceil().min(self.s.n_threads as f64);
            return 4.0 * parts * PANEL_ROWS as f64 * n;
        }
        4.0 * products_per_token(n as usize, n_out as usize) as f64
    }

    /// Bytes of the graphs that compute moments, and of what they leave for the sums.
    pub(in crate::pipeline) fn moment_graph_bytes(&self, n_ctx: usize, n_tokens: f64) -> f64 {
        let (tokens, n_graphs) = self.graphs(n_ctx, n_tokens);
        let left = if self.s.devices.is_empty() { self.chunk(n_ctx, n_tokens) } else { 0.0 };
        let width = self.max_ff().max(self.max_q()) + 2.0 * self.n_embd();
        self.graph_bytes(n_ctx, n_tokens) + 4.0 * width * (tokens * n_graphs + left)
    }

    /// Bytes that the forward pass over the calibration windows keeps for its graphs after it has summed
    /// moments.
    pub(in crate::pipeline) fn scratch_bytes(&self) -> f64 {
        let sums = self.sums_bytes(self.max_ff(), self.n_residuals());
        self.moment_graph_bytes(self.c.n_ctx, self.n_fitted()) + sums
    }

    /// Bytes of these graphs on devices. Products are added to a total one at a time.
    pub(in crate::pipeline) fn kept_graph_bytes(&self) -> f64 {
        let largest = |n: f64| largest_product(n as usize, self.n_residuals() as usize) as f64;
        let product = largest(self.max_ff()).max(largest(self.max_q()));
        self.moment_graph_bytes(self.c.n_ctx, self.n_fitted()) + 4.0 * product
    }

    /// Bytes of a whole output head in 32-bit floats.
    pub(in crate::pipeline) fn head_bytes(&self) -> f64 {
        4.0 * self.n_embd() * self.n_vocab()
    }

    /// Bytes of the logits that are in memory at a time.
    pub(in crate::pipeline) fn logits_bytes(&self) -> f64 {
        4.0 * LOGIT_ROWS as f64 * self.n_vocab()
    }

    /// Bytes of a whole output head and of the graph of its logits.
    pub(in crate::pipeline) fn predicting_bytes(&self) -> f64 {
        self.head_bytes() + 2.0 * self.logits_bytes()
    }

    /// Bytes of the moments and of the choice of neurons on them, with the sums that a graph keeps.
    /// `squares` is the number of bytes of factors and inverses per pair of inputs.
    pub(in crate::pipeline) fn choosing_bytes(&self, n_out: f64, carried: bool, squares: f64) -> f64 {
        let n = self.max_ff();
        let gram = 4.0 * n * n + 8.0 * n * n_out;
        let maps = if carried { 2.0 } else { 1.0 };
        let obs = squares * n * n + maps * 4.0 * n * self.n_embd() + 3.0 * 4.0 * prune::PENDING as f64 * n;
        gram + obs + self.sums_bytes(n, n_out)
    }

    pub(in crate::pipeline) fn n_groups(&self) -> f64 {
        self.model.hparams.blocks.iter().map(|b| b.n_head_kv as f64).sum()
    }

    /// Operations to build the quadratic form of the curvature samples and to apply it to a map of `n_ff`
    /// inputs.
    pub(in crate::pipeline) fn metric_ops(&self, n_ff: f64) -> f64 {
        let e = self.n_embd();
        2.0 * e * e * n_ff + e.powi(3) * 4.0 / 3.0
    }

    /// Number of tokens per window of the curvature samples, and of the tokens of all these windows.
    pub(in crate::pipeline) fn probes(&self) -> (usize, f64) {
        probes(self.s, &self.c)
    }

    /// Bytes of the curvature samples.
    pub(in crate::pipeline) fn sensitivity_bytes(&self) -> f64 {
        let runs = self.s.sensitivity.tokens > 0 && self.s.method.measures_sensitivity();
        if runs { self.stream_bytes(self.n_layer() * self.n_embd() * 0.5 * self.probes().1) } else { 0.0 }
    }

    /// Bytes while residual streams of `n_tokens` go through all blocks and gradients go back, including the
    /// head at which these begin.
    /// Graphs keep the memory of their largest need.
    pub(in crate::pipeline) fn back_bytes(&self, n_ctx: usize, n_tokens: f64) -> f64 {
        let (n, n_graphs) = self.graphs(n_ctx, n_tokens);
        let n = n.min(whole_windows(GRADIENT_TOKENS, n_ctx) as f64);
        let head_dim = self.model.hparams.head_dim as f64;
        let scores = 4.0 * self.max_q() / head_dim * n_ctx as f64 * n;
        let block = n * (7.0 * self.max_ff() + 8.0 * self.n_embd() + 8.0 * self.max_q()) + scores;
        let known = self.known(n_tokens);
        let loss = n_graphs * 6.0 * 4.0 * LOSS_ROWS as f64 * known;
        let block = 4.0 * n_graphs * block;
        let graphs = block.max(loss).max(self.logits_bytes()).max(self.graph_bytes(n_ctx, n_tokens));
        // Logits, and the part of the head for losses, are in memory while no block is.
        let part = 4.0 * self.n_embd() * known;
        self.head_bytes() + self.block_bytes().max(part).max(self.logits_bytes()) + graphs
    }

    /// Number of tokens per window that gradients go through, and of all tokens of a pass with at most
    /// `limit`.
    pub(in crate::pipeline) fn lessons(&self, limit: usize) -> (usize, f64) {
        let parts = self.c.n_ctx.div_ceil(MAX_GRADIENT_CTX);
        let n_ctx = self.c.n_ctx / parts;
        let n = (limit / n_ctx).clamp(1, self.c.n_fit * parts);
        (n_ctx, (n * n_ctx) as f64)
    }

    /// Encoded bytes of a block's `attn_output` and `ffn_down` as they are written.
    pub(in crate::pipeline) fn new_block_bytes(&self, b: Sizes, shape: &BlockShape, t: &BlockTensors) -> f64 {
        let encoded = |wanted: Option<Type>, old: &Segment, n_in: f64, step: usize| {
            let ty = output_type(wanted.unwrap_or(self.model.tensor(old).ty), step);
            n_in * self.n_embd() * ty.row_bytes(ty.block_size()) as f64 / ty.block_size() as f64
        };
        // Rows of `attn_output` consist of whole groups.
        let group = shape.heads_per_group() * self.model.hparams.head_dim;
        let attn_output =
            t.attn_output.as_ref().map_or(0.0, |o| encoded(self.s.types.attn_output, o, b.q, group));
        let feed_forwards = shape.n_feed_forwards() as f64;
        let ffn_down =
            feed_forwards * encoded(self.s.types.ffn_down, &t.down(), b.refitted, b.refitted as usize);
        attn_output + ffn_down
    }

    /// Bytes of these matrices of all blocks, if they are in memory.
    pub(in crate::pipeline) fn new_bytes(&self) -> f64 {
        if !self.s.spill.is_memory() {
            return 0.0;
        }
        let blocks = self.model.hparams.blocks.iter().zip(&self.model.blocks);
        self.pruned().into_iter().zip(blocks).map(|(b, (shape, t))| self.new_block_bytes(b, shape, t)).sum()
    }
}

/// Operations of a Cholesky factor of `n` rows and its inverse, in 32 bits, two of which count as one.
pub(in crate::pipeline) fn inverse_ops(n: f64) -> f64 {
    0.5 * n.powi(3)
}

/// Operations, counted in the same way, of removing inputs from `n` down to `end`.
/// `n_out` is the total number of outputs of all maps that are updated. The map that ranks the inputs counts
/// twice: for lengths and for values.
pub(in crate::pipeline) fn removal_ops(n: f64, end: f64, n_out: f64) -> f64 {
    0.5 * ((n.powi(3) - end.powi(3)) / 3.0 + n_out * (n.powi(2) - end.powi(2)))
}
