//! Second moments of activations inside a block: Gram matrices and cross products.

use super::block::MAX_NODES;
use super::{Block, Forward, ForwardError, Net};
use crate::ggml::{Computed, Graph, T, Type};
use crate::numeric::Moments;

/// Row panels that a symmetric product is cut into; only panels on and below the diagonal are
/// computed, (p + 1) / 2p of the work.
const PANELS: usize = 6;

/// Outputs of a graph that [`Moments::add`] reads.
struct Sums {
    panels: Vec<(usize, T)>,
    cross: Option<T>,
    n_tokens: usize,
}

impl Sums {
    fn add_to(&self, moments: &mut Moments, done: &Computed) {
        for (start, panel) in &self.panels {
            moments.add_panel(*start, &done.to_vec(*panel));
        }
        if let Some(cross) = self.cross {
            moments.add_cross(&done.to_vec(cross));
        }
        moments.n_tokens += self.n_tokens;
    }
}

/// Moments to be collected over a chunk.
pub struct Collect<'a> {
    /// What the residual stream should be at that point; without it only the Gram matrix is collected.
    pub target: Option<&'a [f32]>,
    /// Factor of each token's inputs and residual.
    pub scales: &'a [f32],
    /// Receives the sums.
    pub into: &'a mut Moments,
}

/// What [`Forward::from_heads`] writes.
#[derive(Default)]
pub struct Wanted<'a> {
    /// The stream before the feed-forward.
    pub mid: Option<&'a mut [f32]>,
    /// The stream after the block.
    pub out: Option<&'a mut [f32]>,
    /// Moments at the input of ffn_down; the target is for the stream after the block.
    pub moments: Option<Collect<'a>>,
}

impl Forward {
    /// The first half of attention: the input of attn_output, `[n_tokens, n_head·head_dim]`, for the
    /// chunk `x`; empty in a block without attention. Moments are those at attn_output, with the
    /// residual target − (x + attention).
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn heads(
        &mut self,
        b: &Block,
        x: &[f32],
        moments: Option<Collect>,
    ) -> Result<Vec<f32>, ForwardError> {
        if !b.has_attention() {
            return Ok(Vec::new());
        }
        let ne = [self.n_embd(), x.len() / self.n_embd()];
        let mut g = Graph::new(MAX_NODES);
        let x = g.input_f32(ne, x);
        let a = self.net.heads(&mut g, b, x);
        g.output(a);
        let collect = moments.map(|c| {
            let residual = c.target.map(|target| {
                let own = self.net.attention_residual(&mut g, b, x, Some(a));
                let target = g.input_f32(ne, target);
                g.sub(target, own)
            });
            (self.net.sums(&mut g, a, residual, c.scales), c.into)
        });
        let done = g.compute(&mut self.engine)?;
        if let Some((sums, into)) = collect {
            sums.add_to(into, &done);
        }
        Ok(done.to_vec(a))
    }

    /// The rest of a block after [`Forward::heads`] gave `a` for `x`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn from_heads(
        &mut self,
        b: &Block,
        x: &[f32],
        a: &[f32],
        wanted: Wanted,
    ) -> Result<(), ForwardError> {
        let n = x.len() / self.n_embd();
        let ne = [self.n_embd(), n];
        let mut g = Graph::new(MAX_NODES);
        let x = g.input_f32(ne, x);
        let a = (!a.is_empty()).then(|| g.input_f32([a.len() / n, n], a));
        let mid = self.net.attention_residual(&mut g, b, x, a);
        let h = self.net.neurons(&mut g, b, mid);
        let own = self.net.ffn_residual(&mut g, b, mid, h);
        if wanted.mid.is_some() {
            g.output(mid);
        }
        if wanted.out.is_some() {
            g.output(own);
        }
        let collect = wanted.moments.map(|c| {
            let residual = c.target.map(|target| {
                let target = g.input_f32(ne, target);
                g.sub(target, own)
            });
            (self.net.sums(&mut g, h, residual, c.scales), c.into)
        });
        let done = g.compute(&mut self.engine)?;
        if let Some((sums, into)) = collect {
            sums.add_to(into, &done);
        }
        if let Some(dst) = wanted.mid {
            done.read(mid, dst);
        }
        if let Some(dst) = wanted.out {
            done.read(own, dst);
        }
        Ok(())
    }
}

impl Net {
    /// Products over tokens of `x` `[n, n_tokens]` with itself and with `residual` `[m, n_tokens]`, both
    /// multiplied by `scales` `[n_tokens]`.
    fn sums<'a>(&self, g: &mut Graph<'a>, x: T, residual: Option<T>, scales: &'a [f32]) -> Sums {
        let [n, n_tokens, ..] = g.ne(x);
        let scales = g.input_f32([1, n_tokens], scales);
        let x = g.mul(x, scales);
        let residual = residual.map(|r| g.mul(r, scales));
        let xt = self.transposed(g, x);
        let width = n.div_ceil(PANELS).next_multiple_of(16);
        let panels = (0..n)
            .step_by(width)
            .map(|start| {
                let panel = g.slice(xt, 1, start, width.min(n - start));
                let below = g.slice(xt, 1, start, n - start);
                let product = g.mul_mat(panel, below);
                g.output(product);
                (start, product)
            })
            .collect();
        let cross = residual.map(|r| {
            let rt = self.transposed(g, r);
            let product = g.mul_mat(xt, rt);
            g.output(product);
            product
        });
        Sums { panels, cross, n_tokens }
    }

    /// The transpose in the type of matrix products: tokens become ne\[0\].
    fn transposed<'a>(&self, g: &mut Graph<'a>, x: T) -> T {
        let t = g.permute(x, [1, 0, 2, 3]);
        if self.ty == Type::F32 { g.cont(t) } else { g.cast(t, self.ty) }
    }
}
