//! Logits by libllama, window by window.

use crate::ggml::{BatchToken, Context, GgmlError, LlamaModel, Token};

/// Number of tokens per call of libllama. The logits of all of them are in memory at once.
const BATCH: usize = 256;

/// Evaluator of one window at a time by libllama.
pub(super) struct Window<'m> {
    context: Context<'m>,
}

impl<'m> Window<'m> {
    /// Creates an evaluator of windows of up to `n_ctx` tokens.
    pub(super) fn new(
        model: &'m LlamaModel,
        n_ctx: usize,
        n_threads: usize,
    ) -> Result<Window<'m>, GgmlError> {
        Ok(Window { context: Context::new(model, n_ctx, 1, n_ctx.min(BATCH), n_threads)? })
    }

    /// Calls `f` with the logits of consecutive positions of `tokens` and the first of these positions, part
    /// by part, from position `first` to the last but one.
    pub(super) fn run(
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
