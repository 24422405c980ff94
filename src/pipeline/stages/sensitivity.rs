//! How much the model's predictions mind errors in the stream behind each block, direction by direction.
//!
//! For small errors that is the curvature of the KL divergence (here that among likely tokens), the Fisher
//! information, of which random vectors carried back through the model are samples. Layers have been quantised under
//! such curvatures (YAQA, arXiv 2505.22988); here they say which neurons matter, what narrowing a block costs, and about
//! what a head is worth.

use super::{Stage, neuron_criterion, widths};
use crate::forward::{OnTheWay, whole_windows};
use crate::ggml::Token;
use crate::model::{BlockWeights, Matrix};
use crate::pipeline::forecast::{BASE_BYTES, Sizes, StageForecast, Work};
use crate::pipeline::run::Run;
use crate::pipeline::stream::planned_stream;
use crate::pipeline::{Calibration, PruneError, Settings, forward, mean_square, prediction_loss};
use crate::prune::{Metric, Singular};
use crate::spill::SpillVec;
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::borrow::Cow;
use std::sync::Arc;

/// Length of the windows that are measured on: short, so that they come from many places.
pub(in crate::pipeline) const CTX: usize = 256;

/// Tokens whose streams before all blocks are in memory at a time.
pub(in crate::pipeline) const BATCH_TOKENS: usize = 2048;

/// Samples of what the predictions mind behind each block.
pub(in crate::pipeline) struct Sensitivity {
    behind: Vec<Samples>,
    n_embd: usize,
    /// What was measured on, in windows of `n_ctx`.
    pub(in crate::pipeline) tokens: Vec<Token>,
    pub(in crate::pipeline) n_ctx: usize,
}

/// A random vector per token.
struct Samples {
    /// `[n_tokens, n_embd]`, of length 1.
    directions: SpillVec<bf16>,
    lengths: Vec<f32>,
}

impl Sensitivity {
    /// What the predictions lose, per token in nats of KL divergence, where the stream behind block `il` is `other`
    /// instead of `own`, those of the tokens that were measured on: half the square of each error's product with its token's
    /// sample, whose mean is the form that the curvature makes of the error. What errors of several tokens do together is left out.
    pub(in crate::pipeline) fn divergence(&self, il: usize, own: &[f32], other: &[f32]) -> f64 {
        let Samples { directions, lengths } = &self.behind[il];
        let errors = own.chunks_exact(self.n_embd).zip(other.chunks_exact(self.n_embd));
        let tokens = directions.chunks_exact(self.n_embd).zip(lengths).zip(errors);
        let losses = tokens.map(|((direction, length), (own, other))| {
            let along = direction.iter().zip(own.iter().zip(other)).map(|(d, (a, b))| d.to_f32() * (b - a));
            0.5 * f64::from(length * along.sum::<f32>()).powi(2)
        });
        losses.sum::<f64>() / lengths.len() as f64
    }

    /// What errors of ffn_down, which has the values `ffn_down` in block `il` and otherwise is the one of `w`,
    /// cost: the squares of the outputs of the map that this returns. Rows of the norm behind it count by its
    /// weights.
    ///
    /// # Errors
    /// [`Singular`] if what was measured is not finite.
    pub(in crate::pipeline) fn costs(
        &self,
        il: usize,
        w: &BlockWeights,
        ffn_down: &Matrix,
    ) -> Result<Matrix, Singular> {
        let samples: Vec<f32> = self.behind[il].directions.iter().map(|v| v.to_f32()).collect();
        let mut map = Cow::Borrowed(ffn_down);
        if let Some(post_norm) = &w.ffn_post_norm {
            let rows = Arc::make_mut(&mut map.to_mut().data).chunks_exact_mut(ffn_down.n_in);
            rows.zip(post_norm).for_each(|(row, g)| row.iter_mut().for_each(|v| *v *= g));
        }
        Ok(Metric::new(&samples, self.n_embd)?.apply(&map))
    }
}

/// Measures the sensitivity of the predictions to errors behind each block, on the model without the groups that were
/// removed, where a later stage still needs it.
pub(in crate::pipeline) struct MeasureSensitivity;

impl Stage for MeasureSensitivity {
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        let (n_ctx, n) = w.probes();
        let stage = forecast_carried_back(w, "sensitivity", &w.headless(), 1, n, n_ctx);
        vec![StageForecast {
            operations: if w.s.sensitivity_tokens > 0 { stage.operations } else { 0.0 },
            memory: stage.memory + w.sensitivity_bytes(),
            ..stage
        }]
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        let last_block = super::blocks::record_name(run.model.hparams.n_layer() - 1);
        let later = [widths::RECORD, neuron_criterion::RECORD, &last_block];
        let needed = !later.into_iter().all(|name| run.checkpoint.holds(name));
        if needed && run.settings.sensitivity_tokens > 0 {
            run.sensitivity = Some(run.sensitivity(run.settings.sensitivity_tokens)?);
        }
        Ok(())
    }
}

/// Samples of the curvature, for `n` tokens in windows of `n_ctx`, on their way back through `blocks` from the last to
/// block `first`.
pub(super) fn forecast_carried_back(
    w: &Work,
    name: &'static str,
    blocks: &[Sizes],
    first: usize,
    n: f64,
    n_ctx: usize,
) -> StageForecast {
    let back: f64 = blocks[first..].iter().map(|b| w.gradient_ops(*b, n, n_ctx)).sum();
    let batch = n.min(BATCH_TOKENS as f64);
    let streams = w.stream_bytes(w.n_layer() * w.n_embd() * batch);
    StageForecast {
        name,
        operations: w.model_ops(blocks, n, n_ctx) + back + w.loss_ops(n, batch, 2.0),
        algebra: 0.0,
        memory: BASE_BYTES + streams + w.back_bytes(n_ctx, batch),
        on_devices: w.back_bytes(n_ctx, batch),
    }
}

/// Tokens per window that samples of the curvature are taken on, and tokens of all these windows.
pub(super) fn probes(s: &Settings, c: &Calibration) -> (usize, f64) {
    let n_ctx = CTX.min(c.n_ctx);
    let beside = c.n_fit - widths::n_windows(s, c.n_ctx, c.n_fit);
    let n_windows = s.sensitivity_tokens.div_ceil(n_ctx).clamp(1, if beside > 0 { beside } else { c.n_fit });
    (n_ctx, (n_windows * n_ctx) as f64)
}

/// Sees something of a block: its number, and so much per token.
type PerToken<'a> = &'a mut dyn FnMut(usize, &[f32]);

impl Run<'_> {
    /// Measures on about `n_tokens` calibration tokens of the model as planned so far. Where neurons are chosen, tokens count
    /// alike: the first of each window, whose errors can cost hundreds of times as much, would be most of a plain sum.
    pub(in crate::pipeline) fn sensitivity(&mut self, n_tokens: usize) -> Result<Sensitivity, PruneError> {
        let s = self.settings;
        let n_ctx = self.windows.n_ctx.min(CTX);
        // What a narrowed block makes of text that it was fitted to would cost next to nothing.
        let fitted = widths::n_windows(s, self.windows.n_ctx, self.windows.n_fit);
        let tokens = self.windows.sample_beside(n_tokens, n_ctx, fitted);
        let n_embd = self.model.hparams.n_embd;
        let none = |_| {
            let directions = s.spill.zeros(tokens.len() * n_embd)?;
            Ok::<_, PruneError>(Samples { directions, lengths: Vec::with_capacity(tokens.len()) })
        };
        let mut behind: Vec<Samples> = (0..self.plan.blocks.len()).map(none).collect::<Result<_, _>>()?;
        let keep = |il: usize, grad: &[f32]| {
            let Samples { directions, lengths } = &mut behind[il];
            let directions = directions[lengths.len() * n_embd..].chunks_exact_mut(n_embd);
            for (direction, g) in directions.zip(grad.chunks_exact(n_embd)) {
                let length = (mean_square(g) * n_embd as f32).sqrt().max(f32::MIN_POSITIVE);
                direction.iter_mut().zip(g).for_each(|(d, g)| *d = bf16::from_f32(g / length));
                lengths.push(length);
            }
        };
        self.carry_back("sensitivity", &tokens, n_ctx, keep, None)?;
        Ok(Sensitivity { behind, n_embd, tokens, n_ctx })
    }

    /// About what the predictions lose, per token of `tokens` in nats of KL divergence, without each attention group of each
    /// block of the model as planned so far: half the mean square of what the group is worth to the curvature's
    /// samples. Large losses bend, and what errors of several tokens do together is left out, so that it is good for an order.
    pub(in crate::pipeline) fn worth_of_groups(
        &mut self,
        stage: &str,
        tokens: &[Token],
        n_ctx: usize,
    ) -> Result<Vec<Vec<f64>>, PruneError> {
        let mut worth: Vec<Vec<f64>> = self.plan.blocks.iter().map(|b| vec![0.0; b.groups.len()]).collect();
        let n_tokens = tokens.len() as f64;
        let mut add = |il: usize, by_group: &[f32]| {
            let sums = &mut worth[il];
            for token in by_group.chunks_exact(sums.len().max(1)) {
                sums.iter_mut()
                    .zip(token)
                    .for_each(|(sum, v)| *sum += 0.5 * f64::from(*v).powi(2) / n_tokens);
            }
        };
        self.carry_back(stage, tokens, n_ctx, |_, _| (), Some(&mut add))?;
        Ok(worth)
    }

    /// Carries samples of the curvature, for `tokens` in windows of `n_ctx`, back through the model as planned so far. On the
    /// way `behind` sees those behind each block, `[n_tokens, n_embd]`, and `groups` what each attention group is worth
    /// to them, `[n_tokens, n_head_kv]`; in batches, from the last block to the first.
    fn carry_back(
        &mut self,
        stage: &str,
        tokens: &[Token],
        n_ctx: usize,
        mut behind: impl FnMut(usize, &[f32]),
        mut groups: Option<PerToken<'_>>,
    ) -> Result<(), PruneError> {
        let s = self.settings;
        let mut forward = forward(self.model, n_ctx, s)?;
        let head = forward.head(self.model)?;
        let n_layer = self.plan.blocks.len();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let batch = whole_windows(BATCH_TOKENS, n_ctx);
        self.observer.stage(stage, n_layer * tokens.len().div_ceil(batch));
        let mut done = 0;
        for tokens in tokens.chunks(batch) {
            let mut inputs = Vec::with_capacity(n_layer);
            let keep = |x| {
                inputs.push(s.spill.put(x)?);
                Ok(())
            };
            let last = planned_stream(&mut forward, self.model, &self.plan, tokens, &*self.observer, keep)?;
            let (_, likely) = prediction_loss::likely(&mut forward, &head, &last)?;
            let part = forward.head_of(self.model, &likely)?;
            let mut grad = forward.curvature_sample(&part, &last, || rng.random())?;
            drop(part);
            for (il, x) in inputs.into_iter().enumerate().rev() {
                self.check_interrupted()?;
                behind(il, &grad);
                // Nobody asks for what is before the first block, unless its groups are asked for.
                if il > 0 || groups.is_some() {
                    let block = forward.upload(&self.plan.block(self.model, il)?)?;
                    let mut by_group = Vec::new();
                    let found =
                        OnTheWay { groups: groups.is_some().then_some(&mut by_group), ..OnTheWay::default() };
                    forward.block_gradient(&block, &x, &mut grad, found)?;
                    if let Some(groups) = &mut groups {
                        groups(il, &by_group);
                    }
                }
                done += 1;
                self.observer.step(done, "");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spill::SpillStore;

    #[test]
    fn an_error_costs_by_the_sample_of_its_token() {
        const N: usize = 8;
        // Token i minds an error in direction i, the more the later it is.
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
