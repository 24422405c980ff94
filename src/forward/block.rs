//! One block: its weights on the backend, and its graph, as llama.cpp's `src/models/<name>.cpp` build it,
//! in the parts that pruning needs.

mod attention;
mod upload;

pub(crate) use attention::query_slice;

use super::experts::ExpertRoles;
use super::{BlockOutputs, Forward, ForwardError, MAX_NODES, Net};
use crate::ggml::{Causal, Graph, Resident, RopeParams, TensorId, TensorSpec, Values};
use crate::model::{
    Activation, BlockShape, BlockWeights, ExpertWeights, Matrix, Norm, QkNorm, SlidingWindow,
};
use crate::parallel::each;
use std::ops::Range;
use std::sync::Arc;
use upload::Uploads;

/// Number of queries that attend together, and largest number of such slices per window.
/// Keys that none of a slice's queries sees are left out. That saves up to half of the work of causal
/// attention and keeps the memory for attention weights small.
const QUERY_SLICE: usize = 128;
const MAX_SLICES: usize = 32;

/// Damping of outputs with small post-norm weights, as a share of the mean squared weight, when errors are
/// carried back through a post norm.
/// Without it, these outputs would have to change by more than they contribute.
const POST_NORM_RIDGE: f32 = 1e-2;

/// Weights of one block on the backend.
pub struct Block {
    pub(super) set: Resident,
    pub(super) shape: BlockShape,
    pub(super) sliding: bool,
    pub(super) rotated: bool,
    pub(super) parallel: bool,
    pub(super) roles: Roles,
}

impl Block {
    /// Whether the block has attention heads.
    pub fn has_attention(&self) -> bool {
        self.roles.attn_output.is_some()
    }

    /// Whether the block has experts.
    pub fn has_experts(&self) -> bool {
        self.roles.experts.is_some()
    }

    /// Whether the FFN reads the residual stream before attention.
    pub fn is_parallel(&self) -> bool {
        self.parallel
    }

    /// Norm through which the FFN reads the residual stream.
    pub(super) fn ffn_norm(&self) -> Option<PreNorm> {
        self.roles.ffn_norm.or(self.roles.attn_norm.filter(|_| self.parallel))
    }

    pub(super) fn post_norm(&self, half: Half) -> Option<PostNorm> {
        match half {
            Half::Attention => self.roles.attn_post_norm,
            Half::FeedForward => self.roles.ffn_post_norm,
        }
    }
}

/// Index of each weight in the resident set.
#[derive(Default)]
pub(super) struct Roles {
    pub(super) attn_norm: Option<PreNorm>,
    pub(super) qkv: [Option<usize>; 3],
    pub(super) qkv_bias: [Option<usize>; 3],
    pub(super) qk_norm: [Option<usize>; 2],
    pub(super) attn_output: Option<usize>,
    pub(super) attn_output_bias: Option<usize>,
    pub(super) attn_post_norm: Option<PostNorm>,
    pub(super) ffn_norm: Option<PreNorm>,
    pub(super) ffn_gate: Option<usize>,
    pub(super) ffn_gate_bias: Option<usize>,
    pub(super) ffn_up: Option<usize>,
    pub(super) ffn_up_bias: Option<usize>,
    pub(super) ffn_down: Option<usize>,
    pub(super) ffn_down_bias: Option<usize>,
    pub(super) ffn_post_norm: Option<PostNorm>,
    pub(super) experts: Option<ExpertRoles>,
}

/// Norm between the residual stream and the input of a block half.
#[derive(Clone, Copy)]
pub(super) struct PreNorm {
    pub(super) weight: usize,
    pub(super) bias: Option<usize>,
}

/// Norm between the output of a block half and the residual stream: out = x + g ⊙ y / rms(y).
#[derive(Clone, Copy)]
pub(super) struct PostNorm {
    /// Index of g `[n_embd]`.
    pub(super) weight: usize,
    /// Index of g / (g² + δ), which maps a difference in the residual stream back to y / rms(y).
    inverse: usize,
}

/// Inputs of attention.
pub(super) struct Qkv {
    /// Queries and keys before their norm, if there is one.
    pub(super) before_norm: [Option<TensorId>; 2],
    /// Queries, keys and values, normed and rotated: `ne` `[head_dim, n_ctx, heads, n_seq]`.
    pub(super) ready: [TensorId; 3],
}

/// Half of a block: it ends in a map back to the residual stream.
#[derive(Clone, Copy)]
pub(super) enum Half {
    Attention,
    FeedForward,
}

impl Half {
    /// Index of the map that ends it.
    pub(super) fn weight(self, b: &Block) -> Option<usize> {
        match self {
            Half::Attention => b.roles.attn_output,
            Half::FeedForward => b.roles.ffn_down,
        }
    }

    /// Index of that map's bias.
    pub(super) fn bias(self, b: &Block) -> Option<usize> {
        match self {
            Half::Attention => b.roles.attn_output_bias,
            Half::FeedForward => b.roles.ffn_down_bias,
        }
    }
}

impl Forward {
    /// Puts a block's weights on the backend, which may also compute with them in place.
    ///
    /// # Errors
    /// [`ForwardError`] if there is no room.
    pub fn upload(&self, w: &BlockWeights) -> Result<Block, ForwardError> {
        let mut up = Uploads::default();
        let [q, k, v] = &w.qkv;
        let bias = |i: usize| w.qkv_bias.as_ref().map_or(&[][..], |b| &b[i]);
        let norm = |i: usize| w.qk_norm.as_ref().map_or(&[][..], |n| &n[i]);
        let roles = Roles {
            attn_norm: up.pre_norm(&w.attn_norm, &w.attn_norm_bias),
            qkv: [up.matrix(q), up.matrix(k), up.matrix(v)],
            qkv_bias: [up.vector(bias(0)), up.vector(bias(1)), up.vector(bias(2))],
            qk_norm: [up.vector(norm(0)), up.vector(norm(1))],
            attn_output: up.matrix(&w.attn_output),
            attn_output_bias: up.optional(&w.attn_output_bias),
            attn_post_norm: up.post_norm(&w.attn_post_norm),
            ffn_norm: up.pre_norm(&w.ffn_norm, &w.ffn_norm_bias),
            ffn_gate: w.ffn_gate.as_ref().and_then(|gate| up.matrix(gate)),
            ffn_gate_bias: up.optional(&w.ffn_gate_bias),
            ffn_up: up.matrix(&w.ffn_up),
            ffn_up_bias: up.optional(&w.ffn_up_bias),
            ffn_down: up.matrix(&w.ffn_down),
            ffn_down_bias: up.optional(&w.ffn_down_bias),
            ffn_post_norm: up.post_norm(&w.ffn_post_norm),
            experts: w.experts.as_ref().map(|e| up.experts(e)),
        };
        let set = Resident::upload(&self.engine, &up.list)?;
        let (shape, sliding, rotated, parallel) = (w.shape, w.sliding, w.rotated, w.parallel);
        Ok(Block { set, shape, sliding, rotated, parallel, roles })
    }

    /// Runs whole windows `x` `[n_tokens, n_embd]` through the block.
    /// `out` receives the residual stream after the block, and `mid`, if given, the one before its FFN.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn block(
        &self,
        b: &Block,
        x: &[f32],
        mid: Option<&mut [f32]>,
        out: &mut [f32],
    ) -> Result<(), ForwardError> {
        let a = self.attn_out_input(b, x, None)?;
        self.from_attn_out_input(b, x, &a, BlockOutputs { mid, out: Some(out), moments: None })
    }

    /// Runs whole windows `x` through the block into `y`, chunk by chunk; both are `[n_tokens, n_embd]`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn stream(&self, b: &Block, x: &[f32], y: &mut [f32]) -> Result<(), ForwardError> {
        for chunk in self.chunks(0..x.len() / (self.n_ctx() * self.n_embd())) {
            let span = self.span(&chunk);
            self.block(b, &x[span.clone()], None, &mut y[span])?;
        }
        Ok(())
    }

    /// Does the same as [`Forward::stream`], in place.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn advance(&self, b: &Block, x: &mut [f32]) -> Result<(), ForwardError> {
        for chunk in self.chunks(0..x.len() / (self.n_ctx() * self.n_embd())) {
            let x = &mut x[self.span(&chunk)];
            let mut out = vec![0.0; x.len()];
            self.block(b, x, None, &mut out)?;
            x.copy_from_slice(&out);
        }
        Ok(())
    }

    /// Runs the FFN half of a block: `mid` in, the residual stream after the block into `out`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    ///
    /// # Panics
    /// If the FFN reads the residual stream before attention.
    pub fn ffn(&self, b: &Block, mid: &[f32], out: &mut [f32]) -> Result<(), ForwardError> {
        assert!(!b.parallel, "the stream before attention is not known");
        if b.has_experts() {
            return self.experts(b, mid, out, None);
        }
        let n = self.slice_tokens() * self.n_embd();
        let slices = mid.chunks(n).zip(out.chunks_mut(n)).collect();
        each(slices, self.at_once(), |(mid, out): (&[f32], &mut [f32])| {
            let mut g = Graph::new(&self.engine, MAX_NODES);
            let mid = g.input_f32([self.n_embd(), mid.len() / self.n_embd()], mid);
            let h = self.net.neurons(&mut g, b, mid, mid);
            let y = self.net.ffn_residual(&mut g, b, mid, h);
            g.output(y);
            g.compute(&self.engine)?.read(y, out);
            Ok::<_, ForwardError>(())
        })?;
        Ok(())
    }
}

impl Net {
    /// Residual stream after attention. Stock llama.cpp adds no bias in a block without heads.
    pub(super) fn attention_residual<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        x: TensorId,
        a: Option<TensorId>,
    ) -> TensorId {
        let Some(a) = a.filter(|_| b.has_attention()) else {
            return x;
        };
        let y = self.map(g, b, Half::Attention, a);
        self.join(g, b, Half::Attention, x, y)
    }

    /// Residual stream after the FFN.
    pub(super) fn ffn_residual<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        mid: TensorId,
        h: TensorId,
    ) -> TensorId {
        let y = self.map(g, b, Half::FeedForward, h);
        self.join(g, b, Half::FeedForward, mid, y)
    }

    /// Output attn_output · a + bias, or ffn_down · h + bias: `ne` `[n_embd, n_tokens]`.
    pub(super) fn map<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        half: Half,
        inputs: TensorId,
    ) -> TensorId {
        linear(g, b, half.weight(b), half.bias(b), inputs)
    }

    /// Residual stream `x` plus the contribution of [`Net::map`]'s output `y`.
    pub(super) fn join<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        half: Half,
        x: TensorId,
        y: TensorId,
    ) -> TensorId {
        let y = self.added(g, b, half, y);
        g.add(y, x)
    }

    /// Contribution of [`Net::map`]'s output `y` to the residual stream.
    pub(super) fn added<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, half: Half, y: TensorId) -> TensorId {
        let y = match b.post_norm(half) {
            Some(post) => self.rms_norm(g, b, post.weight, y),
            None => y,
        };
        self.scaled(g, y, self.hparams.residual_scale)
    }

    /// Product `factor · x`, without a node if the factor is 1.
    pub(super) fn scaled(&self, g: &mut Graph, x: TensorId, factor: f32) -> TensorId {
        if factor == 1.0 { x } else { g.scale(x, factor, 0.0) }
    }

    /// Factors that carry errors in the residual stream back to [`Net::map`]'s output `y`.
    ///
    /// The first divides an error in `y` on its way to the residual stream, per token: `ne`
    /// `[1, n_tokens]`. The second, `[n_embd]`, maps a difference in the residual stream back. Returns
    /// `None` if `y` is added as it is.
    pub(super) fn back<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        half: Half,
        y: TensorId,
    ) -> Option<(TensorId, TensorId)> {
        let post = b.post_norm(half)?;
        let squares = g.mul(y, y);
        let mean = g.mean(squares);
        let mean = g.scale(mean, 1.0, self.hparams.norm_eps);
        Some((g.sqrt(mean), g.resident(&b.set, post.inverse)))
    }

    /// Input of ffn_down, `ne` `[n_ff, n_tokens]`, for the residual streams `x` before and `mid` after
    /// attention.
    pub(super) fn neurons<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        x: TensorId,
        mid: TensorId,
    ) -> TensorId {
        let h = self.ffn_input(g, b, x, mid);
        let gate = b.roles.ffn_gate.map(|gate| linear(g, b, Some(gate), b.roles.ffn_gate_bias, h));
        let up = linear(g, b, b.roles.ffn_up, b.roles.ffn_up_bias, h);
        match (self.hparams.family.traits().activation, gate) {
            (Activation::SwiGlu, Some(gate)) => g.swiglu(gate, up),
            (Activation::GeGlu, Some(gate)) => g.geglu(gate, up),
            (Activation::Gelu, _) => g.gelu(up),
            (Activation::ReluSquared, _) => {
                let up = g.relu(up);
                g.mul(up, up)
            }
            (Activation::SwiGlu | Activation::GeGlu, None) => unreachable!("a block has its gate"),
        }
    }

    /// Input of attn_q, attn_k and attn_v: `ne` `[n_embd, n_tokens]`.
    pub(super) fn attn_input<'a>(&'a self, g: &mut Graph<'a>, b: &'a Block, x: TensorId) -> TensorId {
        self.pre_norm(g, b, b.roles.attn_norm, x)
    }

    /// Input of ffn_gate and ffn_up: `ne` `[n_embd, n_tokens]`.
    pub(super) fn ffn_input<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        x: TensorId,
        mid: TensorId,
    ) -> TensorId {
        self.pre_norm(g, b, b.ffn_norm(), if b.parallel { x } else { mid })
    }

    /// Residual stream `x` through the norm before a block half.
    fn pre_norm<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        norm: Option<PreNorm>,
        x: TensorId,
    ) -> TensorId {
        let Some(norm) = norm else {
            return x;
        };
        let h = self.normed(g, x);
        let w = g.resident(&b.set, norm.weight);
        let h = g.mul(h, w);
        match norm.bias {
            Some(bias) => {
                let bias = g.resident(&b.set, bias);
                g.add(h, bias)
            }
            None => h,
        }
    }

    /// Residual stream `x`, normalised, before a norm's weight and bias.
    pub(super) fn normed<'a>(&'a self, g: &mut Graph<'a>, x: TensorId) -> TensorId {
        match self.hparams.family.traits().norm {
            Norm::Rms => g.rms_norm(x, self.hparams.norm_eps),
            Norm::Layer | Norm::LayerWithBias => g.layer_norm(x, self.hparams.norm_eps),
        }
    }

    pub(super) fn rms_norm<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        weight: usize,
        x: TensorId,
    ) -> TensorId {
        let h = g.rms_norm(x, self.hparams.norm_eps);
        let w = g.resident(&b.set, weight);
        g.mul(h, w)
    }
}

/// Linear map W x + bias.
pub(in crate::forward) fn linear<'a>(
    g: &mut Graph<'a>,
    b: &'a Block,
    weight: Option<usize>,
    bias: Option<usize>,
    x: TensorId,
) -> TensorId {
    let w = g.resident(&b.set, weight.expect("the role exists in this block"));
    let y = g.mul_mat(w, x);
    match bias {
        Some(i) => {
            let bias = g.resident(&b.set, i);
            g.add(y, bias)
        }
        None => y,
    }
}
