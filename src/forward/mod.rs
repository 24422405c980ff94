//! Block-by-block forward passes in ggml graphs.
//!
//! [`Forward`] computes a block, collects second moments inside it and carries gradients back through it.
//! It does not know the use of any of these. Activations live on the host as `[n_tokens, n_embd]` rows of
//! windows that all have the same length. They pass through a block in graphs of a few hundred tokens, of
//! which every thread computes one at a time. Which tokens share a graph does not depend on the number of
//! threads, so neither do the results.

mod block;
mod experts;
mod gathering;
mod gradient;
mod head;
mod stats;

pub use block::Block;
pub(crate) use block::query_slice;
pub use experts::{Chosen, ExpertUse};
pub use gathering::Gathering;
pub(crate) use gathering::largest_product;
pub use gradient::{BlockGradient, MatrixGradient, OnTheWay};
pub(crate) use gradient::{GRADIENT_TOKENS, LOSS_ROWS};
pub use head::Head;
pub(crate) use head::LOGIT_ROWS;
pub use stats::{BlockOutputs, Collect, InputSquares};

use crate::ggml::{Compute, Engine, GgmlError, Resident, TensorSpec, Token, Values};
use crate::gguf::GgufError;
use crate::model::{Hparams, Model, Segment};
use std::ops::Range;
use std::sync::Arc;

/// Largest number of nodes in a graph of a block.
/// A block takes about forty, a dozen more per slice of queries, and as many again with gradients.
const MAX_NODES: usize = 1024;

/// Longest window, in tokens, that gradients go through.
/// It is attended in one piece, and the attention weights of all its heads are in memory at once.
pub const MAX_GRADIENT_CTX: usize = 512;

/// Smallest and largest number of tokens that pass through a block in one graph on the CPU, if they need not be
/// whole windows. In between, it is that of a window, so that there are as many graphs as windows: passes over
/// few short windows should still give every thread something to do.
pub(crate) const GRAPH_TOKENS: [usize; 2] = [256, 512];

/// Largest number of tokens whose products are summed in 32 bits, at least one window.
pub(crate) const SUM_TOKENS: usize = 2048;

/// Default number of tokens that pass through a block together, at least one window.
pub const CHUNK_TOKENS: usize = 4096;

/// Number of tokens that pass through a block together on `n_threads` threads, so that each has a graph.
pub fn chunk_tokens(n_threads: usize) -> usize {
    CHUNK_TOKENS.max(n_threads * GRAPH_TOKENS[1])
}

/// Largest number of tokens up to `n_tokens` that makes whole windows of `n_ctx`; at least one window.
pub fn whole_windows(n_tokens: usize, n_ctx: usize) -> usize {
    (n_tokens / n_ctx).max(1) * n_ctx
}

/// Error of a forward pass.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// ggml failed.
    #[error(transparent)]
    Ggml(#[from] GgmlError),
    /// A tensor could not be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

/// Forward pass of one model's blocks over windows of one length.
pub struct Forward {
    engine: Engine,
    net: Net,
}

/// Properties that all graphs of a model share.
struct Net {
    hparams: Hparams,
    n_ctx: usize,
    /// Number of windows that pass through a block together, and in one graph.
    chunk: usize,
    per_graph: usize,
    /// Causal mask (`mask`) on devices, and the tensors that the two indices below refer to.
    fixed: Resident,
    /// Index of the mask of sliding-window blocks; the causal one if windows are no longer than the sliding
    /// window.
    sliding_mask: usize,
    /// Number of queries that a mask has rows for.
    mask_rows: usize,
    /// Index of the frequency factors.
    factors: Option<usize>,
    /// Factor of the products of queries and keys.
    attention_scale: f32,
    positions: Vec<i32>,
    /// Factor of the queries at each position; empty if it is 1 everywhere.
    temperatures: Vec<f32>,
}

impl Forward {
    /// Creates a forward pass of `model` over windows of `n_ctx` tokens, on the CPU or on devices.
    ///
    /// # Errors
    /// [`ForwardError`] if the backend fails or the frequency factors cannot be read.
    pub fn new(model: &Model, n_ctx: usize, compute: impl Into<Compute>) -> Result<Forward, ForwardError> {
        assert!(n_ctx > 0);
        let engine = Engine::new(&compute.into())?;
        let factors = model.rope_factors(n_ctx)?;
        let hparams = model.hparams.clone();
        let mask_rows = if n_ctx <= MAX_GRADIENT_CTX { n_ctx } else { query_slice(n_ctx) };
        // The CPU needs no masks.
        let n_seen = hparams.sliding.as_ref().map(|s| s.n_swa).filter(|n| *n < n_ctx);
        let masked = [Some(n_ctx), n_seen].into_iter().flatten().filter(|_| engine.has_devices());
        let masks: Vec<_> = masked.map(|n_seen| mask(n_ctx, mask_rows, n_seen)).collect();
        let ne = [n_ctx + mask_rows, mask_rows];
        let mut specs: Vec<_> = masks.iter().map(|m| TensorSpec { ne, data: Values::Copied(m) }).collect();
        let sliding_mask = specs.len().saturating_sub(1);
        let factors_at = factors.as_ref().map(|f| {
            specs.push(TensorSpec { ne: [f.len(), 1], data: Values::Copied(f) });
            specs.len() - 1
        });
        let fixed = Resident::upload(&engine, &specs)?;
        let net = Net {
            n_ctx,
            chunk: 0,
            per_graph: 0,
            fixed,
            sliding_mask,
            mask_rows,
            factors: factors_at,
            attention_scale: hparams.attention_scale(hparams.blocks[0].n_head),
            positions: Vec::new(),
            temperatures: Vec::new(),
            hparams,
        };
        Ok(Forward { engine, net }.in_chunks_of(CHUNK_TOKENS))
    }

    /// Sets the number of tokens that pass through a block together: up to `n_tokens`, but at least one
    /// window. They are divided among the threads; a device takes all of them in one graph.
    pub fn in_chunks_of(mut self, n_tokens: usize) -> Forward {
        let n_ctx = self.net.n_ctx;
        let summed = whole_windows(SUM_TOKENS, n_ctx);
        let n_tokens = if self.engine.has_devices() { n_tokens.min(summed) } else { n_tokens };
        // Chunks that are cut into sums elsewhere would give other sums.
        let n_tokens =
            if n_tokens > summed { n_tokens / summed * summed } else { whole_windows(n_tokens, n_ctx) };
        self.net.chunk = n_tokens / n_ctx;
        let per_graph = if self.engine.has_devices() {
            n_tokens
        } else {
            n_tokens.min(whole_windows(GRAPH_TOKENS[0], n_ctx))
        };
        self.net.per_graph = per_graph / n_ctx;
        self.net.positions = (0..per_graph).map(|i| (i % n_ctx) as i32).collect();
        if let Some(t) = self.net.hparams.temperature.filter(|t| t.floor < n_ctx) {
            let factor = |position: &i32| {
                let steps = (*position as f32 / t.floor as f32).floor();
                1.0 + t.scale * (steps + 1.0).ln()
            };
            self.net.temperatures = self.net.positions.iter().map(factor).collect();
        }
        self
    }

    /// Embeddings `[n_tokens, n_embd]` of `tokens` as they enter the first block; `tokens` are whole
    /// windows.
    ///
    /// # Errors
    /// [`GgufError`] if a row cannot be decoded, or a token or position has none.
    pub fn embed(&self, model: &Model, tokens: &[Token]) -> Result<Vec<f32>, GgufError> {
        let mut out = rows(model, &model.token_embd, tokens)?;
        let scale = model.hparams.embd_scale;
        if scale != 1.0 {
            out.iter_mut().for_each(|v| *v *= scale);
        }
        if let Some(positions) = &model.position_embd {
            let window: Vec<i32> = (0..self.n_ctx() as i32).collect();
            let positions = rows(model, positions, &window)?;
            out.iter_mut().zip(positions.iter().cycle()).for_each(|(v, p)| *v += p);
        }
        Ok(out)
    }

    /// Length of a window in tokens.
    pub fn n_ctx(&self) -> usize {
        self.net.n_ctx
    }

    /// Number of tokens that pass through a block together.
    pub fn chunk_tokens(&self) -> usize {
        self.net.chunk * self.net.n_ctx
    }

    /// Number of tokens of whole windows in one graph.
    fn graph_tokens(&self) -> usize {
        self.net.per_graph * self.net.n_ctx
    }

    /// Number of tokens in one graph that does not depend on windows.
    fn slice_tokens(&self) -> usize {
        if self.engine.has_devices() {
            return self.chunk_tokens();
        }
        let [least, most] = GRAPH_TOKENS;
        self.chunk_tokens().min(self.n_ctx().clamp(least, most))
    }

    /// Number of graphs that run at a time.
    fn at_once(&self) -> usize {
        if self.engine.has_devices() {
            1
        } else {
            self.chunk_tokens().div_ceil(self.graph_tokens().min(self.slice_tokens()))
        }
    }

    /// Width of the residual stream.
    pub fn n_embd(&self) -> usize {
        self.net.hparams.n_embd
    }

    /// Splits the windows `windows` into chunks that pass through a block together.
    pub fn chunks(&self, windows: Range<usize>) -> Vec<Range<usize>> {
        let n = self.net.chunk;
        windows.clone().step_by(n).map(|start| start..(start + n).min(windows.end)).collect()
    }

    /// Range of the activations of `windows` in a residual stream.
    pub fn span(&self, windows: &Range<usize>) -> Range<usize> {
        let row = self.net.n_ctx * self.net.hparams.n_embd;
        windows.start * row..windows.end * row
    }
}

/// Mask that is added to scores, for any queries of a window: `ne` `[n_ctx + n_rows, n_rows]`.
///
/// It is 0 if the key is the query's own or one of the `n_seen` − 1 before it, else -∞. It depends only on
/// their distance. Query j of a slice sees key i of those that begin `n_ctx` columns before the slice, so
/// each slice gets the columns for its keys.
fn mask(n_ctx: usize, n_rows: usize, n_seen: usize) -> Vec<f32> {
    let seen = |query: usize, key: usize| key <= query && query - key < n_seen;
    let value = |query, key| if seen(query, key) { 0.0 } else { f32::NEG_INFINITY };
    (0..n_rows).flat_map(|j| (0..n_ctx + n_rows).map(move |i| value(n_ctx + j, i))).collect()
}

/// Rows of an embedding by index.
fn rows(model: &Model, embedding: &Segment, numbers: &[i32]) -> Result<Vec<f32>, GgufError> {
    let row = |&number: &i32| {
        usize::try_from(number).ok().filter(|i| *i < embedding.n).ok_or_else(|| GgufError::BadKey {
            key: model.tensor(embedding).name.clone(),
            problem: format!(
                "has no row {number}; the tokenizer does not fit the model, or windows are too long"
            ),
        })
    };
    let numbers = numbers.iter().map(row).collect::<Result<Vec<_>, _>>()?;
    Ok(Arc::unwrap_or_clone(model.rows(embedding, &numbers)?.data))
}
