//! Sensitivity of the model's predictions to errors in the residual stream after each block, direction by
//! direction.
//!
//! For small errors it is the curvature of the KL divergence (here that among likely tokens): the Fisher
//! information. Random vectors carried back through the model are samples of it. YAQA (arXiv 2505.22988)
//! quantises layers under such curvatures. Here they rank neurons, give the loss of narrowing a block, and
//! estimate the worth of a head.

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

/// Length of the windows for the curvature samples, in tokens. They are short, so that they come from many
/// places.
pub(in crate::pipeline) const CTX: usize = 256;

/// Number of tokens whose residual streams before all blocks are in memory at a time.
pub(in crate::pipeline) const BATCH_TOKENS: usize = 2048;

/// Curvature samples after each block.
pub(in crate::pipeline) struct Sensitivity {
    behind: Vec<Samples>,
    n_embd: usize,
    /// Tokens of the samples, in windows of `n_ctx`.
    pub(in crate::pipeline) tokens: Vec<Token>,
    pub(in crate::pipeline) n_ctx: usize,
}

/// One random vector per token.
struct Samples {
    /// Unit vectors, `[n_tokens, n_embd]`.
    directions: SpillVec<bf16>,
    lengths: Vec<f32>,
}

impl Sensitivity {
    /// Loss of the predictions if the residual stream after block `il` is `other` instead of `own`, per token
    /// in nats of KL divergence.
    /// `own` and `other` `[n_tokens, n_embd]` belong to the tokens of the samples. The loss is half the
    /// square of each error's product with its token's sample; the mean of this is the quadratic form of the
    /// curvature. It leaves out what errors of several tokens do together.
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

    /// Map whose squared outputs are the cost of errors of `ffn_down`, with the values `ffn_down` in block
    /// `il`. The rest of the block is `w`.
    /// Rows are multiplied by the weights of the norm after them.
    ///
    /// # Errors
    /// [`Singular`] if the samples are not finite.
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

/// Stage that measures the sensitivity of the predictions to errors after each block, on the model without
/// the removed groups, if a later stage needs it.
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

/// Forecast of curvature samples for `n` tokens in windows of `n_ctx`, carried back through `blocks` from the
/// last to block `first`.
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

/// Number of tokens per window of the curvature samples, and of the tokens of all these windows.
pub(super) fn probes(s: &Settings, c: &Calibration) -> (usize, f64) {
    let n_ctx = CTX.min(c.n_ctx);
    let beside = c.n_fit - widths::n_windows(s, c.n_ctx, c.n_fit);
    let n_windows = s.sensitivity_tokens.div_ceil(n_ctx).clamp(1, if beside > 0 { beside } else { c.n_fit });
    (n_ctx, (n_windows * n_ctx) as f64)
}

/// Receiver of a block's number and of some values per token.
type PerToken<'a> = &'a mut dyn FnMut(usize, &[f32]);

impl Run<'_> {
    /// Measures the sensitivity of the model as planned so far on about `n_tokens` calibration tokens.
    /// Tokens count equally in the choice of neurons: errors of the first token of each window can cost
    /// hundreds of times as much, and would dominate a plain sum.
    pub(in crate::pipeline) fn sensitivity(&mut self, n_tokens: usize) -> Result<Sensitivity, PruneError> {
        let s = self.settings;
        let n_ctx = self.windows.n_ctx.min(CTX);
        // The loss of a narrowed block on text that it is fitted to would be close to 0.
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

    /// Estimated loss of the predictions without each attention group of each block of the model as planned
    /// so far, per token of `tokens` in nats of KL divergence.
    /// It is half the mean square of the product of the group's output with the curvature samples. Large
    /// losses are not quadratic, and the estimate leaves out what errors of several tokens do together. It is
    /// therefore only good for an order.
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

    /// Carries curvature samples for `tokens` in windows of `n_ctx` back through the model as planned so far.
    /// On the way, `behind` receives the samples after each block, `[n_tokens, n_embd]`, and `groups` the
    /// worth of each attention group to them, `[n_tokens, n_head_kv]`. Both are called in batches, from the
    /// last block to the first.
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
                // The gradient before the first block is needed only for its groups.
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
