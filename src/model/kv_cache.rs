//! Size of the KV cache that a runtime allocates.

use super::{BlockShape, Hparams};

/// Number of cells that the KV cache grows by.
const CELLS: usize = 256;

/// Tokens that llama.cpp decodes at once by default; a sliding-window cache holds them beside the window.
const N_UBATCH: usize = 512;

/// Bytes per element: llama.cpp uses F16 by default.
const BYTES: usize = 2;

/// KV cache of one sequence, as llama.cpp allocates it by default (`llama_kv_cache`,
/// `llama_kv_cache_iswa`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCache {
    /// Bytes per token of the blocks that see all tokens.
    full: usize,
    /// Bytes per token of the blocks with a sliding window.
    sliding: usize,
    /// Length of the sliding window in tokens.
    n_swa: usize,
}

impl KvCache {
    /// KV cache of blocks with the sizes `shapes` in a model that is otherwise as `h`.
    pub fn new(h: &Hparams, shapes: &[BlockShape]) -> KvCache {
        let mut cache = KvCache { full: 0, sliding: 0, n_swa: h.sliding.as_ref().map_or(0, |s| s.n_swa) };
        for (il, shape) in shapes.iter().enumerate() {
            let bytes = 2 * shape.n_head_kv * h.head_dim * BYTES;
            *if h.slides(il) { &mut cache.sliding } else { &mut cache.full } += bytes;
        }
        cache
    }

    /// KV cache that takes `bytes` with a context of `n_ctx` tokens, and grows with it.
    pub fn of_bytes(bytes: u64, n_ctx: usize) -> KvCache {
        KvCache { full: bytes as usize / n_ctx.next_multiple_of(CELLS), sliding: 0, n_swa: 0 }
    }

    /// Size in bytes with a context of `n_ctx` tokens.
    pub fn bytes(&self, n_ctx: usize) -> u64 {
        let cells = n_ctx.next_multiple_of(CELLS);
        let window = (self.n_swa + N_UBATCH).min(cells).next_multiple_of(CELLS);
        (self.full * cells + self.sliding * window) as u64
    }
}
