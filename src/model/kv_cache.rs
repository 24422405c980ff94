//! How large the keys and values are that a runtime keeps.

use super::{BlockShape, Hparams};

/// Cells come in so many.
const CELLS: usize = 256;

/// Tokens that llama.cpp decodes at once by default, which a sliding window holds besides those it looks at.
const N_UBATCH: usize = 512;

/// Bytes of an element: llama.cpp keeps F16 by default.
const BYTES: usize = 2;

/// Keys and values of one sequence, as llama.cpp keeps them by default (`llama_kv_cache`, `llama_kv_cache_iswa`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCache {
    /// Bytes per token of blocks that see all tokens.
    full: usize,
    /// Of those that see a sliding window.
    sliding: usize,
    /// Tokens of that.
    n_swa: usize,
}

impl KvCache {
    /// That of blocks of the sizes `shapes` in a model that is else as `h` says.
    pub fn new(h: &Hparams, shapes: &[BlockShape]) -> KvCache {
        let mut cache = KvCache { full: 0, sliding: 0, n_swa: h.sliding.as_ref().map_or(0, |s| s.n_swa) };
        for (il, shape) in shapes.iter().enumerate() {
            let bytes = 2 * shape.n_head_kv * h.head_dim * BYTES;
            *if h.slides(il) { &mut cache.sliding } else { &mut cache.full } += bytes;
        }
        cache
    }

    /// Bytes with a context of `n_ctx` tokens.
    pub fn bytes(&self, n_ctx: usize) -> u64 {
        let cells = n_ctx.next_multiple_of(CELLS);
        let window = (self.n_swa + N_UBATCH).min(cells).next_multiple_of(CELLS);
        (self.full * cells + self.sliding * window) as u64
    }
}
