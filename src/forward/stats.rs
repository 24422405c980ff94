//! Second moments of activations inside a block: Gram matrices and cross products.

use super::MAX_NODES;
use super::block::Half;
use super::{Block, Forward, ForwardError, Net};
use crate::ggml::{Computed, Graph, Resident, TensorId};
use crate::numeric::Moments;

/// Number of row panels that a symmetric product is cut into.
/// Each starts at its diagonal, which takes (p + 1) / 2p of the work.
const PANELS: usize = 6;

/// Number of rows in a panel of a symmetric matrix of `n` rows.
fn panel_rows(n: usize) -> usize {
    n.div_ceil(PANELS).next_multiple_of(16)
}

/// First row and number of rows of each panel of a symmetric matrix of `n` rows.
fn panels(n: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = panel_rows(n.max(1));
    (0..n).step_by(width).map(move |start| (start, width.min(n - start)))
}

/// Number of products that one token adds to the moments of `n` inputs and `m` residuals.
pub(crate) fn moment_products(n: usize, m: usize) -> usize {
    panels(n).map(|(start, rows)| rows * (n - start)).sum::<usize>() + n * m + n + m
}

/// Number of elements of the largest matrix product in these sums.
pub(crate) fn largest_product(n: usize, m: usize) -> usize {
    panels(n).map(|(start, rows)| rows * (n - start)).fold(n * m, usize::max)
}

/// Number of chunks that are added up on a device at a time.
/// The sums are in 32 bits, in which a sum of many similar numbers drifts.
const CHUNKS_THERE: usize = 8;

/// Accumulator of moments, chunk by chunk.
/// On the CPU, the products of each chunk are added in 64 bits. On a device, the products of several chunks
/// are added up next to the block, because they are the largest data to fetch.
pub struct Gathering {
    moments: Moments,
    there: Option<Totals>,
}

/// Sums on a device: the panels, followed by the cross products.
struct Totals {
    set: Resident,
    cross: Option<usize>,
    n_chunks: usize,
}

impl Gathering {
    /// Moments of all chunks.
    pub fn finish(mut self) -> Moments {
        self.fetch();
        self.moments
    }

    /// Adds the sums on the device to the rest.
    fn fetch(&mut self) {
        let Some(there) = &self.there else { return };
        for (i, (start, _)) in panels(self.moments.gram.n()).enumerate() {
            self.moments.add_panel(start, &there.set.read(i));
        }
        if let Some(cross) = there.cross {
            self.moments.add_cross(&there.set.read(cross));
        }
    }

    /// Fetches the sums on the device if they hold their largest number of chunks.
    fn next_chunk(&mut self) {
        if self.there.as_ref().is_some_and(|t| t.n_chunks == CHUNKS_THERE) {
            self.fetch();
            self.there.iter_mut().for_each(|t| {
                t.set.clear();
                t.n_chunks = 0;
            });
        }
        self.there.iter_mut().for_each(|t| t.n_chunks += 1);
    }
}

/// Outputs of a graph that are still to be added to moments.
pub(super) struct Sums<'a> {
    moments: &'a mut Moments,
    /// Products that no device accumulates.
    panels: Vec<(usize, TensorId)>,
    cross: Option<TensorId>,
    x: TensorId,
    r: Option<TensorId>,
    /// Factor of each token.
    scales: TensorId,
    n_tokens: usize,
}

impl Sums<'_> {
    pub(super) fn add(self, done: &Computed) {
        let moments = self.moments;
        for (start, panel) in self.panels {
            moments.add_panel(start, &done.view(panel));
        }
        if let Some(cross) = self.cross {
            moments.add_cross(&done.view(cross));
        }
        let r = self.r.map(|r| done.to_vec(r)).unwrap_or_default();
        let weight = done.to_vec(self.scales).iter().map(|s| f64::from(*s).powi(2)).sum();
        moments.add_sums(&done.to_vec(self.x), &r, weight);
        moments.n_tokens += self.n_tokens;
    }
}

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
    /// Creates an empty accumulator of moments in `b` with `n` inputs and `m` residuals; `m` is 0 if no
    /// chunk has a target.
    ///
    /// # Errors
    /// [`ForwardError`] if a device has no room for the sums.
    pub fn gathering(&self, b: &Block, n: usize, m: usize) -> Result<Gathering, ForwardError> {
        let there = self.engine.has_devices().then(|| {
            let cross = (m > 0).then_some([n, m]);
            let shapes: Vec<_> = panels(n).map(|(start, rows)| [n - start, rows]).chain(cross).collect();
            let set = Resident::zeros(&self.engine, &b.set, &shapes)?;
            Ok::<_, ForwardError>(Totals { set, cross: cross.map(|_| shapes.len() - 1), n_chunks: 0 })
        });
        Ok(Gathering { moments: Moments::new(n, m), there: there.transpose()? })
    }

    /// Runs a chunk through the whole block: `x` in, the residual stream after the block into `out`, both
    /// `[n_tokens, n_embd]`.
    /// The squared inputs of its matrices are added to `squares`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn block_squares(
        &mut self,
        b: &Block,
        x: &[f32],
        out: &mut [f32],
        squares: &mut InputSquares,
    ) -> Result<(), ForwardError> {
        assert!(!b.has_experts(), "each expert has inputs of its own");
        let mut g = Graph::new(&self.engine, MAX_NODES);
        let x = g.input_f32([self.n_embd(), x.len() / self.n_embd()], x);
        let attention =
            b.has_attention().then(|| (self.net.attn_input(&mut g, b, x), self.net.heads(&mut g, b, x)));
        let mid = self.net.attention_residual(&mut g, b, x, attention.map(|(_, a)| a));
        let ffn = self.net.ffn_input(&mut g, b, x, mid);
        let h = self.net.neurons(&mut g, b, x, mid);
        let y = self.net.ffn_residual(&mut g, b, mid, h);
        let inputs = [attention.map(|a| a.0), attention.map(|a| a.1), Some(ffn), Some(h)];
        let into = [&mut squares.qkv, &mut squares.attn_output, &mut squares.ffn, &mut squares.ffn_down];
        inputs.into_iter().flatten().chain([y]).for_each(|t| g.output(t));
        let widths = inputs.map(|t| t.map_or(0, |t| g.ne(t)[0]));
        let done = g.compute(&mut self.engine)?;
        for ((t, n), sums) in inputs.into_iter().zip(widths).zip(into) {
            sums.resize(n, 0.0);
            for row in t.map(|t| done.to_vec(t)).unwrap_or_default().chunks_exact(n.max(1)) {
                sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v).powi(2));
            }
        }
        done.read(y, out);
        Ok(())
    }

    /// First half of attention: the input of attn_output, `[n_tokens, n_head·head_dim]`, for the chunk `x`
    /// `[n_tokens, n_embd]`.
    /// It is empty in a block without attention. Moments are those at attn_output, with the residual target
    /// − (x + attention).
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn attn_out_input(
        &mut self,
        b: &Block,
        x: &[f32],
        moments: Option<Collect>,
    ) -> Result<Vec<f32>, ForwardError> {
        if !b.has_attention() {
            return Ok(Vec::new());
        }
        let ne = [self.n_embd(), x.len() / self.n_embd()];
        let mut g = Graph::new(&self.engine, MAX_NODES);
        let x = g.input_f32(ne, x);
        let a = self.net.heads(&mut g, b, x);
        g.output(a);
        let collect = moments.map(|c| {
            let y = self.net.map(&mut g, b, Half::Attention, a);
            let own = self.net.join(&mut g, b, Half::Attention, x, y);
            self.net.collect(&mut g, b, Half::Attention, [a, y, own], c)
        });
        let done = g.compute(&mut self.engine)?;
        if let Some(sums) = collect {
            sums.add(&done);
        }
        Ok(done.to_vec(a))
    }

    /// Computes the rest of a block from the output `a` of [`Forward::attn_out_input`] for `x`.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails.
    pub fn from_attn_out_input(
        &mut self,
        b: &Block,
        x: &[f32],
        a: &[f32],
        wanted: BlockOutputs,
    ) -> Result<(), ForwardError> {
        let n = x.len() / self.n_embd();
        let ne = [self.n_embd(), n];
        let mut g = Graph::new(&self.engine, MAX_NODES);
        let x = g.input_f32(ne, x);
        let a = (!a.is_empty()).then(|| g.input_f32([a.len() / n, n], a));
        let mid = self.net.attention_residual(&mut g, b, x, a);
        if b.has_experts() {
            assert!(wanted.moments.is_none(), "moments are those of one feed-forward");
            g.output(mid);
            let stream = g.compute(&mut self.engine)?.to_vec(mid);
            if let Some(out) = wanted.out {
                self.experts(b, &stream, out, None)?;
            }
            if let Some(dst) = wanted.mid {
                dst.copy_from_slice(&stream);
            }
            return Ok(());
        }
        let h = self.net.neurons(&mut g, b, x, mid);
        let y = self.net.map(&mut g, b, Half::FeedForward, h);
        let own = self.net.join(&mut g, b, Half::FeedForward, mid, y);
        if wanted.mid.is_some() {
            g.output(mid);
        }
        if wanted.out.is_some() {
            g.output(own);
        }
        let collect = wanted.moments.map(|c| self.net.collect(&mut g, b, Half::FeedForward, [h, y, own], c));
        let done = g.compute(&mut self.engine)?;
        if let Some(sums) = collect {
            sums.add(&done);
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
    /// Adds nodes for the sums at the map that ends `half`: from its inputs, its outputs, and the residual
    /// stream after it.
    fn collect<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        half: Half,
        [inputs, y, own]: [TensorId; 3],
        c: Collect<'a>,
    ) -> Sums<'a> {
        let mut scales = g.input_f32([1, c.scales.len()], c.scales);
        let mut residual = c.target.map(|target| {
            let [n_embd, n_tokens, ..] = g.ne(own);
            let target = g.input_f32([n_embd, n_tokens], target);
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
        c.into.sums(g, inputs, residual, scales)
    }
}

impl Gathering {
    /// Adds nodes for the products over tokens of `x` `ne` `[n, n_tokens]` with itself and with `residual`
    /// `ne` `[m, n_tokens]`, and for the sums of both.
    /// `x` and `residual` are multiplied by `scales` `ne` `[1, n_tokens]` first; the sums are weighted by
    /// the squares of `scales`.
    pub(super) fn sums<'a>(
        &'a mut self,
        g: &mut Graph<'a>,
        x: TensorId,
        residual: Option<TensorId>,
        scales: TensorId,
    ) -> Sums<'a> {
        self.next_chunk();
        let Gathering { moments, there } = self;
        let there = there.as_ref();
        let [n, n_tokens, ..] = g.ne(x);
        g.output(scales);
        let weights = g.reshape(scales, [n_tokens, 1, 1, 1]);
        let x = g.mul(x, scales);
        let rt = residual.map(|r| {
            let r = g.mul(r, scales);
            g.transpose(r)
        });
        let xt = g.transpose(x);
        // An output for the host, or added to the `i`-th total.
        let product = |g: &mut Graph<'a>, a: TensorId, b: TensorId, total: Option<(&'a Totals, usize)>| {
            let product = g.mul_mat(a, b);
            let kept = total.map(|(there, i)| {
                let total = g.resident(&there.set, i);
                g.add_to(total, product)
            });
            g.output(kept.unwrap_or(product));
            kept.is_none().then_some(product)
        };
        let mut products = Vec::new();
        for (i, (start, rows)) in panels(n).enumerate() {
            let panel = g.slice(x, 0, start, rows);
            let behind = g.slice(x, 0, start, n - start);
            let (panel, behind) = (g.transpose(panel), g.transpose(behind));
            products.extend(product(g, behind, panel, there.map(|t| (t, i))).map(|p| (start, p)));
        }
        let total = there.and_then(|t| Some((t, t.cross?)));
        let mut sum = |x: TensorId| product(g, x, weights, None).expect("it is for the host");
        let (x, r) = (sum(xt), rt.map(&mut sum));
        let cross = rt.and_then(|rt| product(g, xt, rt, total));
        Sums { moments, panels: products, cross, x, r, scales, n_tokens }
    }
}
