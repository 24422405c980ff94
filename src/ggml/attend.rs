//! Soft max of causal attention, as an operation of a ggml graph.
//!
//! ggml adds a mask to whole rows first, and takes the largest value of a row number by number. Here a query's
//! row ends with the keys that it sees, and all steps work on several numbers at once.

use crate::numeric::soft_max;
use llama_cpp_sys_2 as sys;
use std::ffi::{c_int, c_void};
use std::ops::Range;

/// Queries that attend to keys of the same window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Causal {
    /// Position of the first query.
    pub query: usize,
    /// Position of the first key.
    pub key: usize,
    /// Number of keys that a query sees, up to its own position.
    pub n_seen: usize,
}

impl Causal {
    /// Columns of the keys that the `i`-th query sees, among `n_keys`.
    fn seen(&self, i: usize, n_keys: usize) -> Range<usize> {
        let own = self.query + i;
        let (first, end) = ((own + 1).saturating_sub(self.n_seen), own + 1);
        first.saturating_sub(self.key).min(n_keys)..end.saturating_sub(self.key).min(n_keys)
    }
}

/// Parameters of the operation, which live as long as its graph.
pub(super) struct Params {
    pub(super) causal: Causal,
    pub(super) scale: f32,
}

/// Custom operation: `dst` = softmax(scale · a) over the keys that each query sees, and 0 elsewhere, for its
/// source a `ne` `[n_keys, n_queries, ..]`; both are contiguous and F32.
///
/// # Safety
/// Only ggml's CPU backend may call it, on a tensor that [`super::Graph::causal_soft_max`] made.
pub(super) unsafe extern "C" fn attend(
    dst: *mut sys::ggml_tensor,
    _ith: c_int,
    _nth: c_int,
    user: *mut c_void,
) {
    // SAFETY: both live while the graph runs; the tensor and its source are of the same size and contiguous.
    let (params, n_keys, n_queries, from, to) = unsafe {
        let (dst, params) = (&*dst, &*user.cast::<Params>());
        let n = dst.ne.iter().product::<i64>() as usize;
        let from = std::slice::from_raw_parts((*dst.src[0]).data.cast::<f32>(), n);
        let to = std::slice::from_raw_parts_mut(dst.data.cast::<f32>(), n);
        (params, dst.ne[0] as usize, dst.ne[1] as usize, from, to)
    };
    for (i, (from, to)) in from.chunks_exact(n_keys).zip(to.chunks_exact_mut(n_keys)).enumerate() {
        let seen = params.causal.seen(i % n_queries, n_keys);
        to[..seen.start].fill(0.0);
        to[seen.end..].fill(0.0);
        soft_max(&from[seen.clone()], params.scale, &mut to[seen]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ggml::{Engine, Graph};

    #[test]
    fn rows_are_those_of_a_mask() {
        let engine = Engine::cpu();
        for (n_keys, n_queries, causal) in [
            (1, 1, Causal { query: 0, key: 0, n_seen: 9 }),
            (5, 5, Causal { query: 0, key: 0, n_seen: 5 }),
            (70, 33, Causal { query: 37, key: 0, n_seen: 70 }),
            (40, 8, Causal { query: 50, key: 18, n_seen: 33 }),
            (100, 64, Causal { query: 64, key: 28, n_seen: 20 }),
        ] {
            let scores: Vec<f32> =
                (0..n_keys * n_queries * 3).map(|i| (i * 37 % 101) as f32 / 9.0 - 5.0).collect();
            let mask: Vec<f32> = (0..n_keys * n_queries)
                .map(|at| {
                    let (query, key) = (causal.query + at / n_keys, causal.key + at % n_keys);
                    let seen = key <= query && query - key < causal.n_seen;
                    if seen { 0.0 } else { f32::NEG_INFINITY }
                })
                .collect();
            let mut g = Graph::new(&engine, 16);
            let s = g.input_f32([n_keys, n_queries * 3], &scores);
            let s = g.reshape(s, [n_keys, n_queries, 3, 1]);
            let mask = g.input_f32([n_keys, n_queries], &mask);
            let (ours, ggmls) = (g.causal_soft_max(s, causal, 0.3), g.soft_max(s, Some(mask), 0.3));
            [ours, ggmls].into_iter().for_each(|t| g.output(t));
            let done = g.compute(&engine).unwrap();
            for (i, (a, b)) in done.to_vec(ours).iter().zip(done.to_vec(ggmls)).enumerate() {
                assert!((a - b).abs() < 1e-6, "{causal:?} {i}: {a} {b}");
            }
        }
    }
}
