//! Logits by libllama, window by window.

use crate::ggml::{BatchToken, Context, GgmlError, LlamaModel, Token};

/// Number of tokens per call of libllama. The logits of all of them are in memory at once.
const BATCH: usize = 256;

/// Largest number of bytes of logits for windows that are evaluated side by side.
const LOGIT_BYTES: usize = 1 << 30;

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
        run_together([self], tokens, first, |at, [rows]| f(at, &rows))
    }
}

/// Runs `tokens` through several evaluators at a time, and calls `f` as [`Window::run`] does, with the logits
/// of each.
pub(super) fn run_together<'m, const N: usize>(
    windows: [&mut Window<'m>; N],
    tokens: &[Token],
    first: usize,
    mut f: impl FnMut(usize, [Vec<&[f32]>; N]),
) -> Result<(), GgmlError> {
    let mut contexts = windows.map(|w| &mut w.context);
    contexts.iter_mut().for_each(|c| c.clear());
    for (i, part) in tokens.chunks(BATCH).enumerate() {
        let start = i * BATCH;
        let batch: Vec<_> = part
            .iter()
            .enumerate()
            .map(|(j, &token)| BatchToken { token, pos: (start + j) as i32, seq: 0 })
            .collect();
        contexts.iter_mut().try_for_each(|c| c.decode(&batch))?;
        let wanted = first.saturating_sub(start)..part.len().min(tokens.len() - 1 - start);
        if !wanted.is_empty() {
            let rows = contexts.each_ref().map(|c| wanted.clone().map(|j| c.logits(j)).collect());
            f(start + wanted.start, rows);
        }
    }
    Ok(())
}

/// Number of windows that are evaluated at a time by `n_models` models each, and threads for each window.
/// Windows side by side wait for nobody; inside one, libllama's threads meet after every operation.
pub(super) fn side_by_side(
    n_windows: usize,
    n_ctx: usize,
    n_vocab: usize,
    n_models: usize,
    n_threads: usize,
) -> (usize, usize) {
    let bytes = 4 * n_ctx.min(BATCH) * n_vocab * n_models;
    let at_once = n_threads.min(n_windows).min(LOGIT_BYTES / bytes.max(1)).max(1);
    (at_once, n_threads / at_once)
}
