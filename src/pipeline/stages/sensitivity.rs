//! Measurement of the sensitivity: curvature samples are carried back through the model.

use super::{CRITERION, Stage, WIDTHS, block_record};
use crate::forward::{OnTheWay, whole_windows};
use crate::ggml::Token;
use crate::pipeline::forecast::{BASE_BYTES, Sizes, StageForecast, Work};
use crate::pipeline::run::Run;
use crate::pipeline::sensitivity::{CTX, Samples, Sensitivity, curve_windows};
use crate::pipeline::stream::planned_stream;
use crate::pipeline::{PruneError, forward, mean_square, prediction_loss};
use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Number of tokens whose residual streams before all blocks are in memory at a time.
pub(in crate::pipeline) const BATCH_TOKENS: usize = 2048;

/// Settings of the measurement of the sensitivity.
#[derive(Clone, Debug, PartialEq)]
pub struct SensitivitySettings {
    /// Number of tokens on which the sensitivity of the predictions to each output of a block is measured.
    /// The sensitivity determines the choice of neurons and the widths per layer; widths are equal without
    /// it. At 0 all outputs count equally.
    pub tokens: usize,
}

impl Default for SensitivitySettings {
    fn default() -> SensitivitySettings {
        SensitivitySettings { tokens: 2048 }
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
            operations: if w.s.sensitivity.tokens > 0 { stage.operations } else { 0.0 },
            memory: stage.memory + w.sensitivity_bytes(),
            ..stage
        }]
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        let last_block = block_record(run.model.hparams.n_layer() - 1);
        let later = [WIDTHS, CRITERION, &last_block];
        let needed = !later.into_iter().all(|name| run.checkpoint.holds(name));
        if needed && run.settings.sensitivity.tokens > 0 {
            run.sensitivity = Some(run.sensitivity(run.settings.sensitivity.tokens)?);
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
        let fitted = curve_windows(s, self.windows.n_ctx, self.windows.n_fit);
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
        let forward = forward(self.model, n_ctx, s)?;
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
            let last = planned_stream(&forward, self.model, &self.plan, tokens, &*self.observer, keep)?;
            let (_, likely) = prediction_loss::likely(&forward, &head, &last)?;
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
