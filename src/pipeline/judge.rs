//! What a change does to the model's predictions.

use super::PruneError;
use crate::forward::{Forward, Head};
use crate::ggml::Token;
use crate::numeric::log_sum_exp;
use rayon::prelude::*;

/// What a candidate is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Mean KL divergence of the pruned model's predictions from the dense model's.
    Divergence,
    /// Mean negative log-likelihood of the tokens.
    Likelihood,
}

/// Most likely tokens of a dense prediction that are kept apart; the others are taken together,
/// which bounds the KL divergence from below.
const TOP: usize = 64;

/// Turns a final residual stream into a loss.
pub(super) enum Judge {
    Likelihood(Vec<Option<Token>>),
    /// Per position: the likeliest tokens of the dense model with their probabilities.
    Divergence(Vec<Vec<(u32, f32)>>),
}

impl Judge {
    /// Judges final streams of `tokens`, whose stream in the reference model is `dense`.
    pub(super) fn new(
        forward: &mut Forward,
        head: &Head,
        tokens: &[Token],
        dense: &[f32],
        loss: Loss,
    ) -> Result<Judge, PruneError> {
        let n_ctx = forward.n_ctx();
        if loss == Loss::Likelihood {
            let next = |i: usize| {
                if (i + 1).is_multiple_of(n_ctx) { None } else { Some(tokens[i + 1]) }
            };
            return Ok(Judge::Likelihood((0..tokens.len()).map(next).collect()));
        }
        let mut top = Vec::with_capacity(tokens.len());
        forward.logits(head, dense, |_, rows| {
            top.par_extend(rows.par_chunks(head.n_vocab()).map(likeliest));
        })?;
        Ok(Judge::Divergence(top))
    }

    /// Mean loss over the positions of the final residual stream `stream`.
    pub(super) fn loss(&self, forward: &mut Forward, head: &Head, stream: &[f32]) -> Result<f64, PruneError> {
        match self {
            Judge::Likelihood(targets) => {
                let nll = forward.nll(head, stream, targets)?;
                Ok(nll.iter().sum::<f64>() / nll.len() as f64)
            }
            Judge::Divergence(top) => {
                let mut sum = 0.0;
                forward.logits(head, stream, |start, rows| {
                    let chunk: Vec<f64> = rows
                        .par_chunks(head.n_vocab())
                        .zip(&top[start..])
                        .map(|(row, dense)| divergence(row, dense))
                        .collect();
                    sum += chunk.iter().sum::<f64>();
                })?;
                Ok(sum / top.len() as f64)
            }
        }
    }
}

/// The likeliest tokens of a row of logits with their probabilities.
fn likeliest(row: &[f32]) -> Vec<(u32, f32)> {
    let lse = log_sum_exp(row);
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let n = TOP.min(row.len());
    let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    ids.select_nth_unstable_by(n - 1, by_logit);
    ids.truncate(n);
    ids.into_iter().map(|id| (id, (f64::from(row[id as usize]) - lse).exp() as f32)).collect()
}

/// KL divergence of softmax(row) from `dense`, with the tokens that `dense` leaves out as one.
fn divergence(row: &[f32], dense: &[(u32, f32)]) -> f64 {
    let lse = log_sum_exp(row);
    let (mut kl, mut p_rest, mut q_rest) = (0.0, 1.0f64, 1.0f64);
    for &(id, p) in dense {
        let (p, log_q) = (f64::from(p), f64::from(row[id as usize]) - lse);
        if p > 0.0 {
            kl += p * (p.ln() - log_q);
        }
        p_rest -= p;
        q_rest -= log_q.exp();
    }
    if p_rest > 1e-9 { kl + p_rest * (p_rest / q_rest.max(1e-9)).ln() } else { kl }
}
