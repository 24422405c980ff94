//! Judging: a file by the runtime that will run it, libllama; a pruned model against the dense one by
//! our own forward pass.

mod compare;
mod file;

pub use compare::{Comparison, Judge};
pub use file::{
    Divergence, EvaluateError, Evaluation, Protocol, Speed, Task, accuracy, continuation, evaluate, speed,
    tasks, windows,
};

use crate::ggml::{BatchToken, Context, GgmlError, LlamaModel, Token};
use crate::numeric::nll;
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
    let mut runner = Window::new(model, n_ctx, n_threads)?;
    let (mut sum, mut n) = (0.0, 0usize);
    for window in tokens.chunks_exact(n_ctx) {
        runner.run(window, 0, |at, rows| {
            let rows = rows.par_iter().zip(&window[at + 1..]);
            n += rows.len();
            sum += rows.map(|(row, &next)| nll(row, next as usize)).sum::<f64>();
        })?;
    }
    Ok((sum / n as f64).exp())
}

/// Tokens per call of libllama; logits of all of them are in memory at once.
const BATCH: usize = 256;

/// libllama on one window at a time.
struct Window<'m> {
    context: Context<'m>,
}

impl<'m> Window<'m> {
    /// For windows of up to `n_ctx` tokens.
    fn new(model: &'m LlamaModel, n_ctx: usize, n_threads: usize) -> Result<Window<'m>, GgmlError> {
        Ok(Window { context: Context::new(model, n_ctx, 1, n_ctx.min(BATCH), n_threads)? })
    }

    /// Calls `f` with the logits of consecutive positions of `tokens` and the first of these, from position `first` to
    /// the last but one, part by part.
    fn run(
        &mut self,
        tokens: &[Token],
        first: usize,
        mut f: impl FnMut(usize, &[&[f32]]),
    ) -> Result<(), GgmlError> {
        self.context.clear();
        for (i, part) in tokens.chunks(BATCH).enumerate() {
            let start = i * BATCH;
            let batch: Vec<_> = part
                .iter()
                .enumerate()
                .map(|(j, &token)| BatchToken { token, pos: (start + j) as i32, seq: 0 })
                .collect();
            self.context.decode(&batch)?;
            let wanted = first.saturating_sub(start)..part.len().min(tokens.len() - 1 - start);
            if !wanted.is_empty() {
                let at = start + wanted.start;
                let rows: Vec<&[f32]> = wanted.map(|j| self.context.logits(j)).collect();
                f(at, &rows);
            }
        }
        Ok(())
    }
}
