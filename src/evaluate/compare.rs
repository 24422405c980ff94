//! Several models against the first on the same text, by our own forward pass.

use crate::forward::{Forward, ForwardError, Head, Precision, embed};
use crate::ggml::Token;
use crate::model::Model;
use crate::numeric::log_sum_exp;
use rayon::prelude::*;

/// How a model does on a text, and how far its predictions are from the first model's.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// Perplexity over all positions but the last of each window.
    pub ppl: f64,
    /// Mean KL divergence of its predictions from the first model's, in nats.
    pub kl: f64,
    /// Share of positions where both think the same token likeliest.
    pub top1: f64,
}

/// Compares `models`, which share a tokenizer, on windows of `n_ctx` tokens. The first is compared
/// with itself.
///
/// # Errors
/// [`ForwardError`] if a model cannot be read or the engine fails.
///
/// # Panics
/// If `tokens` is not made of whole windows or there is no model.
pub fn compare(
    models: &[&Model],
    tokens: &[Token],
    n_ctx: usize,
    n_threads: usize,
) -> Result<Vec<Comparison>, ForwardError> {
    assert!(!models.is_empty() && !tokens.is_empty() && tokens.len().is_multiple_of(n_ctx));
    let mut runs = Vec::new();
    for model in models {
        runs.push(final_stream(model, tokens, n_ctx, n_threads)?);
    }
    let n_embd = models[0].hparams.n_embd;
    let mut totals = vec![[0.0f64; 3]; runs.len()];
    let mut scored = 0;
    // A window's logits of the dense model and one other are in memory at a time.
    for (i, window) in tokens.chunks_exact(n_ctx).enumerate() {
        let span = i * n_ctx * n_embd..((i + 1) * n_ctx - 1) * n_embd;
        let mut base = Vec::new();
        for (run, total) in runs.iter_mut().zip(&mut totals) {
            let (forward, head, stream) = run;
            let n_vocab = head.n_vocab();
            let mut own = Vec::with_capacity(window.len() * n_vocab);
            forward.logits(head, &stream[span.clone()], |_, rows| own.extend_from_slice(rows))?;
            if base.is_empty() {
                base.clone_from(&own);
            }
            let rows = own.par_chunks(n_vocab).zip(base.par_chunks(n_vocab)).zip(&window[1..]);
            let parts: Vec<[f64; 3]> =
                rows.map(|((own, base), &next)| compare_row(own, base, next)).collect();
            for part in parts {
                total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
            }
        }
        scored += window.len() - 1;
    }
    let n = scored as f64;
    Ok(totals
        .into_iter()
        .map(|[nll, kl, top1]| Comparison { ppl: (nll / n).exp(), kl: kl / n, top1: top1 / n })
        .collect())
}

type FinalStream = (Forward, Head, Vec<f32>);

fn final_stream(
    model: &Model,
    tokens: &[Token],
    n_ctx: usize,
    n_threads: usize,
) -> Result<FinalStream, ForwardError> {
    let mut forward = Forward::new(model, n_ctx, n_threads, Precision::Auto)?;
    let mut stream = embed(model, tokens)?;
    let mut out = vec![0.0; stream.len()];
    for il in 0..model.hparams.n_layer() {
        let block = forward.upload(&model.block(il)?)?;
        forward.stream(&block, &stream, &mut out)?;
        std::mem::swap(&mut stream, &mut out);
    }
    let head = forward.head(model)?;
    Ok((forward, head, stream))
}

/// Negative log-likelihood of `next`, KL divergence from `base`, and whether the likeliest token is
/// the same.
fn compare_row(own: &[f32], base: &[f32], next: Token) -> [f64; 3] {
    let (lse, lse_base) = (log_sum_exp(own), log_sum_exp(base));
    let kl: f64 = own
        .iter()
        .zip(base)
        .map(|(&o, &b)| {
            let log_p = f64::from(b) - lse_base;
            log_p.exp() * (log_p - (f64::from(o) - lse))
        })
        .sum();
    let top = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
    [lse - f64::from(own[next as usize]), kl, f64::from(u8::from(top(own) == top(base)))]
}
