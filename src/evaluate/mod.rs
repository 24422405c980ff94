//! Judging: a file by the runtime that will run it, libllama; a pruned model against the dense one by
//! our own forward pass.

mod compare;

pub use compare::{Comparison, Judge};

use crate::ggml::{BatchToken, Context, GgmlError, LlamaModel, Token};
use crate::numeric::log_sum_exp;
use rayon::prelude::*;

/// Perplexity of `model` on windows of `n_ctx` tokens: every position but the last of
/// each window is scored, from an empty context.
///
/// # Errors
/// [`GgmlError`] if libllama fails.
///
/// # Panics
/// If `tokens` is not made of whole windows.
pub fn perplexity(
    model: &LlamaModel,
    tokens: &[Token],
    n_ctx: usize,
    n_threads: usize,
) -> Result<f64, GgmlError> {
    assert!(n_ctx > 1 && !tokens.is_empty() && tokens.len().is_multiple_of(n_ctx));
    let mut context = Context::new(model, n_ctx, 1, n_ctx.min(BATCH), n_threads)?;
    let (mut sum, mut n) = (0.0, 0usize);
    for window in tokens.chunks_exact(n_ctx) {
        context.clear();
        for (i, part) in window.chunks(BATCH).enumerate() {
            let start = i * BATCH;
            let batch: Vec<_> = part
                .iter()
                .enumerate()
                .map(|(j, &token)| BatchToken { token, pos: (start + j) as i32, seq: 0 })
                .collect();
            context.decode(&batch)?;
            let scored = part.len().min(n_ctx - 1 - start);
            let logits: Vec<&[f32]> = (0..scored).map(|j| context.logits(j)).collect();
            sum += logits
                .par_iter()
                .enumerate()
                .map(|(j, row)| log_sum_exp(row) - f64::from(row[window[start + j + 1] as usize]))
                .sum::<f64>();
            n += scored;
        }
    }
    Ok((sum / n as f64).exp())
}

/// Tokens per call of libllama; logits of all of them are in memory at once.
const BATCH: usize = 256;
