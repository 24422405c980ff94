//! Second moments of activations inside a block: Gram matrices and cross products.

use super::block::{Half, MAX_NODES};
use super::{Block, Forward, ForwardError, Net};
use crate::ggml::{Computed, Graph, Resident, T};
use crate::numeric::Moments;

/// Panels of rows that a symmetric product is cut into, each from its diagonal on: (p + 1) / 2p of the work.
const PANELS: usize = 6;

/// Rows of a panel of a symmetric matrix of `n` rows.
fn panel_rows(n: usize) -> usize {
    n.div_ceil(PANELS).next_multiple_of(16)
}

/// Where the panels of a symmetric matrix of `n` rows begin, and how many rows each has.
fn panels(n: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = panel_rows(n.max(1));
    (0..n).step_by(width).map(move |start| (start, width.min(n - start)))
}

/// Products of two numbers that a token adds to the moments of `n` inputs and `m` residuals.
pub(crate) fn moment_products(n: usize, m: usize) -> usize {
    panels(n).map(|(start, rows)| rows * (n - start)).sum::<usize>() + n * m + n + m
}

/// Elements of the largest product that they are summed by.
pub(crate) fn largest_product(n: usize, m: usize) -> usize {
    panels(n).map(|(start, rows)| rows * (n - start)).fold(n * m, usize::max)
}

/// Chunks that are added up on a device at a time: in 32 bits, in which the sum of many like numbers drifts.
const CHUNKS_THERE: usize = 8;

/// Moments that grow chunk by chunk. On the CPU the products of each chunk are added in 64 bits. On a device those of several
/// chunks are added up where the block is, for they are the largest thing that would have to be fetched.
pub struct Gathering {
    moments: Moments,
    there: Option<Totals>,
}

/// Sums on a device: panels, and the cross products behind them.
struct Totals {
    set: Resident,
    cross: Option<usize>,
    n_chunks: usize,
}

impl Gathering {
    /// What all chunks come to.
    pub fn finish(mut self) -> Moments {
        self.fetch();
        self.moments
    }

    /// Adds what is on the device to the rest.
    fn fetch(&mut self) {
        let Some(there) = &self.there else { return };
        for (i, (start, _)) in panels(self.moments.gram.n()).enumerate() {
            self.moments.add_panel(start, &there.set.read(i));
        }
        if let Some(cross) = there.cross {
            self.moments.add_cross(&there.set.read(cross));
        }
    }

    /// Makes room for another chunk.
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

/// Outputs of a graph that are yet to be added to moments.
pub(super) struct Sums<'a> {
    moments: &'a mut Moments,
    /// Products, as far as no device keeps them.
    panels: Vec<(usize, T)>,
    cross: Option<T>,
    x: T,
    r: Option<T>,
    /// Factor of each token.
    scales: T,
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

/// Moments to be collected over a chunk. Where a norm lies between the map and the stream, they are those of
/// the map all the same: residuals are taken back through the norm, and what it divides a token's outputs by
/// divides the token's factor, so that errors count by what they do to the stream.
pub struct Collect<'a> {
    /// What the residual stream should be at that point; without it only the Gram matrix is collected.
    pub target: Option<&'a [f32]>,
    /// Factor of each token's inputs and residual.
    pub scales: &'a [f32],
    /// Receives the sums.
    pub into: &'a mut Gathering,
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

/// Sums over tokens of the squared inputs of a block's matrices: what llama.cpp's importance matrices
/// hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputSquares {
    /// Of attn_q, attn_k and attn_v: `[n_embd]`; empty in a block without attention.
    pub qkv: Vec<f64>,
    /// Of attn_output: `[n_head·head_dim]`.
    pub attn_output: Vec<f64>,
    /// Of ffn_gate and ffn_up: `[n_embd]`.
    pub ffn: Vec<f64>,
    /// Of ffn_down: `[n_ff]`.
    pub ffn_down: Vec<f64>,
}

impl Forward {
    /// Nothing yet, of moments in `b` of `n` inputs and `m` residuals, which are 0 where no chunk has a target.
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

    /// A chunk through the whole block: `x` in, the stream after the block into `out`, and the squares of
    /// what its matrices see added to `squares`.
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
    /// Sums at the map that ends `half`: its inputs, its outputs, and the stream after it.
    fn collect<'a>(
        &'a self,
        g: &mut Graph<'a>,
        b: &'a Block,
        half: Half,
        [inputs, y, own]: [T; 3],
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
    /// Products over tokens of `x` `[n, n_tokens]` with itself and with `residual` `[m, n_tokens]`, both
    /// multiplied by `scales` `[1, n_tokens]`, and their sums with the square of that weight.
    pub(super) fn sums<'a>(
        &'a mut self,
        g: &mut Graph<'a>,
        x: T,
        residual: Option<T>,
        scales: T,
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
        // For the host, or added to the `i`-th total.
        let product = |g: &mut Graph<'a>, a: T, b: T, total: Option<(&'a Totals, usize)>| {
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
        let mut sum = |x: T| product(g, x, weights, None).expect("it is for the host");
        let (x, r) = (sum(xt), rt.map(&mut sum));
        let cross = rt.and_then(|rt| product(g, xt, rt, total));
        Sums { moments, panels: products, cross, x, r, scales, n_tokens }
    }
}
