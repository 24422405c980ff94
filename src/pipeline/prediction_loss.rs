//! Loss of the model's predictions by a change.

use super::PruneError;
use crate::forward::{Forward, Head};
use crate::ggml::Token;
use crate::model::Model;
use crate::numeric::log_sum_exp;

/// Loss by which candidates are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Mean KL divergence of the pruned model's predictions from the dense model's.
    Divergence,
    /// Mean negative log-likelihood of the tokens.
    Likelihood,
}

/// Number of likeliest tokens of a prediction that count as likely. The divergence takes all others together,
/// which bounds it from below.
const TOP: usize = 64;

/// Map from a final residual stream to a loss.
pub(super) struct PredictionLoss {
    head: Head,
    wanted: Objective,
}

/// Data by which each position is evaluated.
enum Objective {
    /// Next token, if there is one.
    Likelihood(Vec<Option<Token>>),
    /// The dense model's likeliest tokens, as indices of the head's rows, with their probabilities.
    /// The divergence covers the tokens that are among the likeliest at some position. These are a few
    /// thousand; the logits of the whole vocabulary would take as long as many blocks.
    Divergence(Vec<Vec<(u32, f32)>>),
}

impl PredictionLoss {
    /// Prepares the loss of final residual streams of `model` on `tokens`.
    /// They are compared with the stream `dense` of `reference`, which is the same model, or has the same
    /// vocabulary.
    pub(super) fn new(
        forward: &Forward,
        model: &Model,
        reference: &Model,
        tokens: &[Token],
        dense: &[f32],
        loss: Loss,
    ) -> Result<PredictionLoss, PruneError> {
        let n_ctx = forward.n_ctx();
        if loss == Loss::Likelihood {
            let next = |i: usize| {
                if (i + 1).is_multiple_of(n_ctx) { None } else { Some(tokens[i + 1]) }
            };
            let wanted = Objective::Likelihood((0..tokens.len()).map(next).collect());
            return Ok(PredictionLoss { head: forward.head(model)?, wanted });
        }
        let whole = forward.head(reference)?;
        let (top, known) = likely(forward, &whole, dense)?;
        drop(whole);
        let head = forward.head_of(reference, &known)?;
        let wanted = forward.of_logits(&head, dense, |i, row| probabilities(row, &known, &top[i]))?;
        let head = if std::ptr::eq(model, reference) { head } else { forward.head_of(model, &known)? };
        Ok(PredictionLoss { head, wanted: Objective::Divergence(wanted) })
    }

    /// Mean loss over the positions of the final residual stream `stream`.
    pub(super) fn loss(&self, forward: &Forward, stream: &[f32]) -> Result<f64, PruneError> {
        let losses = self.losses(forward, stream)?;
        Ok(losses.iter().sum::<f64>() / losses.len() as f64)
    }

    /// Loss at each position of the final residual stream `stream` that has one.
    pub(super) fn losses(&self, forward: &Forward, stream: &[f32]) -> Result<Vec<f64>, PruneError> {
        Ok(match &self.wanted {
            Objective::Likelihood(targets) => forward.nll(&self.head, stream, targets)?,
            Objective::Divergence(wanted) => {
                forward.of_logits(&self.head, stream, |i, row| divergence(row, &wanted[i]))?
            }
        })
    }
}

/// The [`TOP`] likeliest tokens of each position of the final stream `stream` by `head`, and the union of
/// them, ascending.
pub(super) fn likely(
    forward: &Forward,
    head: &Head,
    stream: &[f32],
) -> Result<(Vec<Vec<u32>>, Vec<u32>), PruneError> {
    let top = forward.likeliest(head, stream, TOP)?;
    let mut known = top.concat();
    known.sort_unstable();
    known.dedup();
    Ok((top, known))
}

/// Indices of the tokens `ids` in `row`, with their probabilities. `row` holds the logits of the tokens
/// `known`, which are ascending.
fn probabilities(row: &[f32], known: &[u32], ids: &[u32]) -> Vec<(u32, f32)> {
    let lse = log_sum_exp(row);
    let place = |id: &u32| known.binary_search(id).expect("every likeliest token is known");
    ids.iter().map(place).map(|at| (at as u32, (f64::from(row[at]) - lse).exp() as f32)).collect()
}

/// KL divergence of softmax(row) from `dense`, with the tokens that `dense` leaves out counted as one.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Softmax in f64.
    fn softmax(row: &[f32]) -> Vec<f64> {
        let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
        row.iter().map(|v| f64::from(*v).exp() / sum).collect()
    }

    #[test]
    fn divergences_are_those_among_the_known_tokens() {
        for n in [40usize, 300] {
            let dense: Vec<f32> = (0..n).map(|i| (i * 7919 % 613) as f32 / 40.0).collect();
            let own: Vec<f32> =
                dense.iter().enumerate().map(|(i, v)| v + (i * 31 % 17) as f32 / 9.0).collect();
            let mut ids: Vec<u32> = (0..n as u32).collect();
            ids.sort_by(|a, b| dense[*b as usize].total_cmp(&dense[*a as usize]));
            ids.truncate(TOP);
            // Tokens that are likely at other positions are known as well.
            let mut known: Vec<u32> = ids.iter().copied().chain((0..n as u32).step_by(3)).collect();
            known.sort_unstable();
            known.dedup();
            let on_known = |row: &[f32]| -> Vec<f32> { known.iter().map(|&t| row[t as usize]).collect() };
            let found = divergence(&on_known(&own), &probabilities(&on_known(&dense), &known, &ids));
            let (p, q) = (softmax(&on_known(&dense)), softmax(&on_known(&own)));
            let top = |t: &u32| ids.contains(t);
            let rest = |p: &[f64]| p.iter().zip(&known).filter(|(_, t)| !top(t)).map(|(p, _)| p).sum::<f64>();
            let mut expected: f64 =
                (0..known.len()).filter(|&i| top(&known[i])).map(|i| p[i] * (p[i] / q[i]).ln()).sum();
            if rest(&p) > 0.0 {
                expected += rest(&p) * (rest(&p) / rest(&q)).ln();
            }
            assert!((found - expected).abs() < 1e-5, "n {n}: {found} {expected}");
        }
    }
}
