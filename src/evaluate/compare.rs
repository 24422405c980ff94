//! Comparison of models with the dense one on a text, by the crate's own forward pass.

use crate::forward::{Forward, ForwardError, Head};
use crate::ggml::Token;
use crate::model::Model;
use crate::numeric::{Metrics, RowComparison, compare_rows};
use rayon::prelude::*;
use std::ops::Range;

/// Text on which models are compared, with the dense model's results on it.
pub struct Judge {
    tokens: Vec<Token>,
    n_ctx: usize,
    n_threads: usize,
    forward: Forward,
    head: Head,
    /// Final residual stream of the dense model, `[n_tokens, n_embd]`.
    dense: Vec<f32>,
}

impl Judge {
    /// Prepares the comparison on windows of `n_ctx` tokens.
    ///
    /// # Errors
    /// [`ForwardError`] if the model cannot be read or the engine fails.
    ///
    /// # Panics
    /// If `tokens` does not consist of whole windows.
    pub fn new(
        dense: &Model,
        tokens: Vec<Token>,
        n_ctx: usize,
        n_threads: usize,
    ) -> Result<Judge, ForwardError> {
        assert!(n_ctx > 1 && !tokens.is_empty() && tokens.len().is_multiple_of(n_ctx));
        let (forward, head, stream) = final_stream(dense, &tokens, n_ctx, n_threads)?;
        Ok(Judge { tokens, n_ctx, n_threads, forward, head, dense: stream })
    }

    /// Compares `model`, which has the dense model's tokenizer, with the dense model at all positions except
    /// the last of each window.
    ///
    /// # Errors
    /// [`ForwardError`] if the model cannot be read or the engine fails.
    pub fn compare(&mut self, model: &Model) -> Result<Metrics, ForwardError> {
        let (forward, head, stream) = final_stream(model, &self.tokens, self.n_ctx, self.n_threads)?;
        self.score(|own, span| forward.logits(&head, &stream[span], |_, rows| own.extend_from_slice(rows)))
    }

    /// Metrics of the dense model itself.
    ///
    /// # Errors
    /// [`ForwardError`] if the engine fails.
    pub fn dense(&mut self) -> Result<Metrics, ForwardError> {
        self.score(|_, _| Ok(()))
    }

    /// Scores the logits that `own` writes for a span of positions in the residual stream, or those of the
    /// dense model if it writes none.
    fn score(
        &mut self,
        mut own: impl FnMut(&mut Vec<f32>, Range<usize>) -> Result<(), ForwardError>,
    ) -> Result<Metrics, ForwardError> {
        let n_embd = self.forward.n_embd();
        let mut compared: Vec<RowComparison> = Vec::with_capacity(self.tokens.len());
        // The logits of both models for one window are in memory at a time.
        let (mut base, mut ours) = (Vec::new(), Vec::new());
        for (i, window) in self.tokens.chunks_exact(self.n_ctx).enumerate() {
            let span = i * self.n_ctx * n_embd..((i + 1) * self.n_ctx - 1) * n_embd;
            base.clear();
            ours.clear();
            let dense = &self.dense[span.clone()];
            self.forward.logits(&self.head, dense, |_, rows| base.extend_from_slice(rows))?;
            own(&mut ours, span)?;
            let n_vocab = self.head.n_vocab();
            let rows = if ours.is_empty() { &base } else { &ours }.par_chunks(n_vocab);
            let rows = rows.zip(base.par_chunks(n_vocab)).zip(&window[1..]);
            compared.par_extend(rows.map(|((own, base), &next)| compare_rows(own, base, next as usize)));
        }
        Ok(Metrics::of(&compared))
    }
}

/// Negative log-likelihoods under `model` of each token of a window except the first, in nats, by the crate's
/// own forward pass.
///
/// # Errors
/// [`ForwardError`] if the model cannot be read, the tokens are not in its vocabulary, or the engine fails.
pub fn own_losses(model: &Model, tokens: &[Token], n_threads: usize) -> Result<Vec<f64>, ForwardError> {
    let (forward, head, stream) = final_stream(model, tokens, tokens.len(), n_threads)?;
    let targets: Vec<Option<Token>> = tokens[1..].iter().copied().map(Some).chain([None]).collect();
    forward.nll(&head, &stream, &targets)
}

type FinalStream = (Forward, Head, Vec<f32>);

fn final_stream(
    model: &Model,
    tokens: &[Token],
    n_ctx: usize,
    n_threads: usize,
) -> Result<FinalStream, ForwardError> {
    let forward = Forward::new(model, n_ctx, n_threads)?;
    let mut stream = forward.embed(model, tokens)?;
    for il in 0..model.hparams.n_layer() {
        let block = forward.upload(&model.block(il)?)?;
        forward.advance(&block, &mut stream)?;
    }
    let head = forward.head(model)?;
    Ok((forward, head, stream))
}
