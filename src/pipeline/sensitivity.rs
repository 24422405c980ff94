//! Sensitivity of the model's predictions to errors in the residual stream after each block, direction by
//! direction.
//!
//! For small errors it is the curvature of the KL divergence (here that among likely tokens): the Fisher
//! information. Random vectors carried back through the model are samples of it. YAQA (arXiv 2505.22988)
//! quantises layers under such curvatures. Here they rank neurons, give the loss of narrowing a block, and
//! estimate the worth of a head.

use super::{Calibration, Settings};
use crate::ggml::Token;
use crate::model::{BlockWeights, Matrix};
use crate::prune::{Metric, Singular};
use crate::spill::SpillVec;
use half::bf16;
use std::borrow::Cow;
use std::sync::Arc;

/// Length of the windows for the curvature samples, in tokens. They are short, so that they come from many
/// places.
pub(super) const CTX: usize = 256;

/// Curvature samples after each block.
pub(super) struct Sensitivity {
    pub(super) behind: Vec<Samples>,
    pub(super) n_embd: usize,
    /// Tokens of the samples, in windows of `n_ctx`.
    pub(super) tokens: Vec<Token>,
    pub(super) n_ctx: usize,
}

/// One random vector per token.
pub(super) struct Samples {
    /// Unit vectors, `[n_tokens, n_embd]`.
    pub(super) directions: SpillVec<bf16>,
    pub(super) lengths: Vec<f32>,
}

impl Sensitivity {
    /// Loss of the predictions if the residual stream after block `il` is `other` instead of `own`, per token
    /// in nats of KL divergence.
    /// `own` and `other` `[n_tokens, n_embd]` belong to the tokens of the samples. The loss is half the
    /// square of each error's product with its token's sample; the mean of this is the quadratic form of the
    /// curvature. It leaves out what errors of several tokens do together.
    pub(super) fn divergence(&self, il: usize, own: &[f32], other: &[f32]) -> f64 {
        let Samples { directions, lengths } = &self.behind[il];
        let errors = own.chunks_exact(self.n_embd).zip(other.chunks_exact(self.n_embd));
        let tokens = directions.chunks_exact(self.n_embd).zip(lengths).zip(errors);
        let losses = tokens.map(|((direction, length), (own, other))| {
            let along = direction.iter().zip(own.iter().zip(other)).map(|(d, (a, b))| d.to_f32() * (b - a));
            0.5 * f64::from(length * along.sum::<f32>()).powi(2)
        });
        losses.sum::<f64>() / lengths.len() as f64
    }

    /// Map whose squared outputs are the cost of errors of `ffn_down`, with the values `ffn_down` in block
    /// `il`. The rest of the block is `w`.
    /// Rows are multiplied by the weights of the norm after them.
    ///
    /// # Errors
    /// [`Singular`] if the samples are not finite.
    pub(super) fn costs(&self, il: usize, w: &BlockWeights, ffn_down: &Matrix) -> Result<Matrix, Singular> {
        let samples: Vec<f32> = self.behind[il].directions.iter().map(|v| v.to_f32()).collect();
        let mut map = Cow::Borrowed(ffn_down);
        if let Some(post_norm) = &w.ffn_post_norm {
            let rows = Arc::make_mut(&mut map.to_mut().data).chunks_exact_mut(ffn_down.n_in);
            rows.zip(post_norm).for_each(|(row, g)| row.iter_mut().for_each(|v| *v *= g));
        }
        Ok(Metric::new(&samples, self.n_embd)?.apply(&map))
    }
}

/// Number of tokens per window of the curvature samples, and of the tokens of all these windows.
pub(super) fn probes(s: &Settings, c: &Calibration) -> (usize, f64) {
    let n_ctx = CTX.min(c.n_ctx);
    let beside = c.n_fit - curve_windows(s, c.n_ctx, c.n_fit);
    let n_windows = s.sensitivity.tokens.div_ceil(n_ctx).clamp(1, if beside > 0 { beside } else { c.n_fit });
    (n_ctx, (n_windows * n_ctx) as f64)
}

/// Number of windows on which the curves are measured, of `n_fit` to fit to. It is at most half of them,
/// because the cost of narrowing is measured on others.
pub(super) fn curve_windows(s: &Settings, n_ctx: usize, n_fit: usize) -> usize {
    s.widths.curve_tokens.div_ceil(n_ctx).clamp(1, n_fit.div_ceil(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spill::SpillStore;

    #[test]
    fn an_error_costs_by_the_sample_of_its_token() {
        const N: usize = 8;
        // Token i is sensitive only to errors in direction i, and later tokens are more so.
        let mut directions = SpillStore::default().zeros(N * N).unwrap();
        (0..N).for_each(|i| directions[i * N + i] = bf16::ONE);
        let lengths = (0..N).map(|i| 1.0 + i as f32).collect();
        let s = Sensitivity {
            behind: vec![Samples { directions, lengths }],
            n_embd: N,
            tokens: vec![0; N],
            n_ctx: N,
        };
        let own: Vec<f32> = (0..N * N).map(|i| (i * 7 % 5) as f32).collect();
        assert_eq!(s.divergence(0, &own, &own), 0.0);
        for token in 0..N {
            for direction in 0..N {
                let mut other = own.clone();
                other[token * N + direction] -= 0.5;
                let expected =
                    if token == direction { 0.5 * (0.5 * (1 + token) as f64).powi(2) } else { 0.0 };
                let found = s.divergence(0, &own, &other);
                assert!((found - expected / N as f64).abs() < 1e-9, "{token} {direction}: {found}");
            }
        }
    }
}
