//! Final adjustment of norms and biases by gradient descent on the loss of the whole model.
//!
//! The sequential pass fits every map to the target of its own block. Here the loss is that of the
//! predictions, the KL divergence from the dense model among likely tokens, and all blocks change together.
//! Only vectors change: there are few of them, they are written as F32, so that nothing is rounded again, and
//! the optimiser's state is small. PERP (arXiv 2312.15230) found that norms and biases alone recover much of
//! the loss of pruning.
//!
//! All earlier stages are fitted to the same text. Therefore only half of the windows are used unchanged. In
//! the others, some tokens are resampled from the dense model's predictions for their positions, differently
//! each time, and the dense model reads the same tokens.

use super::Stage;
use super::resample::{places, resample};
use crate::calibrate::Windows;
use crate::forward::{BlockGradient, Forward, ForwardError, Head, MAX_GRADIENT_CTX, OnTheWay, whole_windows};
use crate::ggml::Token;
use crate::gguf::Value;
use crate::model::BlockVector;
use crate::pipeline::forecast::{BASE_BYTES, StageForecast, Work};
use crate::pipeline::prediction_loss::{self, Loss, PredictionLoss};
use crate::pipeline::run::Run;
use crate::pipeline::stream::{Streams, planned_stream};
use crate::pipeline::{Plan, PruneError, forward};
use crate::train::Adam;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::f32::consts::PI;
use std::sync::Arc;

/// Share of the steps over which the rate grows to its full size.
const WARM_UP: f32 = 0.1;

/// Trainable vectors of one block, in the order of [`BlockVector::ALL`].
type BlockState = [Option<Adam>; BlockVector::ALL.len()];

/// Training text.
struct Lessons<'a> {
    forward: Forward,
    /// Output head of the dense model.
    dense: Head,
    windows: &'a Windows,
    /// Final residual stream of the dense model for all windows, `[n_tokens, n_embd]`.
    stream: &'a [f32],
    /// Indices in the windows' tokens at which the training windows begin. These are whole windows, or parts
    /// of a length that gradients can go through.
    starts: Vec<usize>,
    rng: ChaCha8Rng,
}

impl Lessons<'_> {
    /// Training windows with the numbers `batch`, with the share `drawn` of the tokens resampled in the
    /// second half of them.
    /// Also returns the known part of the dense model's final residual stream for them, from the first token
    /// on.
    fn text(&mut self, batch: &[usize], drawn: f64) -> Result<(Vec<Token>, Vec<f32>), ForwardError> {
        let (n_ctx, n_embd) = (self.forward.n_ctx(), self.forward.n_embd());
        let starts: Vec<usize> = batch.iter().map(|&i| self.starts[i]).collect();
        let mut text: Vec<Token> =
            starts.iter().flat_map(|&at| &self.windows.tokens[at..][..n_ctx]).copied().collect();
        let n_given = batch.len().div_ceil(2);
        let places = places(&starts, n_given, n_ctx, drawn, &mut self.rng);
        resample(&self.forward, &self.dense, &mut text, &places, self.stream, &mut self.rng)?;
        // In a part of a window, the dense model sees less context than in the whole one.
        let known = starts[..if n_ctx < self.windows.n_ctx { 0 } else { n_given }].iter();
        let known = known.flat_map(|at| &self.stream[at * n_embd..][..n_ctx * n_embd]).copied().collect();
        Ok((text, known))
    }
}

/// Settings of tuning.
#[derive(Clone, Debug, PartialEq)]
pub struct TuneSettings {
    /// Number of passes of tuning over its part of the calibration windows; 0 turns tuning off.
    pub passes: usize,
    /// Largest step of tuning, relative to a vector's size.
    pub rate: f64,
    /// Largest number of tokens per pass of tuning, spread evenly over the calibration windows.
    pub limit: usize,
    /// Number of tokens per step of tuning, at least one window.
    pub tokens: usize,
    /// Share of the tokens, from 0 to 1, that tuning resamples from the dense model's predictions in half of
    /// the windows of a step.
    pub resample_share: f64,
}

impl Default for TuneSettings {
    fn default() -> TuneSettings {
        TuneSettings { passes: 1, rate: 0.005, limit: 16384, tokens: 2048, resample_share: 0.5 }
    }
}

/// Stage that adjusts norms and biases on the whole model.
pub(in crate::pipeline) struct Tune;

impl Stage for Tune {
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        vec![forecast_preparing(w), forecast_tuning(w)]
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        let Some(mut streams) = run.streams.take() else { return Ok(()) };
        let tuned = run.tune(&mut streams)?;
        run.streams = Some(streams);
        let passes = if tuned { run.settings.tune.passes } else { 0 };
        run.provenance.push(("tune", Value::U32(passes as u32)));
        Ok(())
    }
}

fn forecast_preparing(w: &Work) -> StageForecast {
    let operations = w.judge_ops(w.n_held_out(), 1.0);
    let streams = w.stream_bytes(w.n_embd() * 2.0 * w.n_all());
    StageForecast {
        name: "tune, preparing",
        operations: if w.s.tune.passes > 0 { operations } else { 0.0 },
        algebra: 0.0,
        memory: BASE_BYTES + streams + w.new_bytes() + w.scratch_bytes() + w.predicting_bytes(),
        on_devices: w.kept_graph_bytes() + w.predicting_bytes(),
    }
}

fn forecast_tuning(w: &Work) -> StageForecast {
    let (n_ctx, n) = w.lessons();
    let (pruned, n_held_out) = (w.pruned(), w.n_held_out());
    // Half of the windows are processed again, with tokens resampled; all of them, if they are cut.
    let read = if n_ctx == w.c.n_ctx { n / 2.0 } else { n };
    let step = n.min(whole_windows(w.s.tune.tokens, n_ctx) as f64);
    let pass = w.model_ops(&w.whole(), read, n_ctx)
        + w.logit_ops(w.n_vocab(), w.s.tune.resample_share * n / 2.0)
        + w.model_ops(&pruned, n, n_ctx)
        + pruned.iter().map(|b| w.gradient_ops(*b, n, n_ctx)).sum::<f64>()
        + w.loss_ops(n, step, 3.0);
    let held_out = w.model_ops(&pruned, n_held_out, w.c.n_ctx)
        + w.logit_ops(2.0 * w.n_vocab() + w.known(n_held_out), n_held_out);
    let streams = w.stream_bytes(w.n_embd() * (w.n_layer() * step + 2.0 * w.n_all()));
    StageForecast {
        name: "tune",
        operations: if w.s.tune.passes > 0 { w.s.tune.passes as f64 * pass + held_out } else { 0.0 },
        algebra: 0.0,
        memory: BASE_BYTES
            + streams
            + w.new_bytes()
            // At the end, the predictions before and after are compared.
            + w.back_bytes(n_ctx, step).max(w.predicting_bytes() + w.logits_bytes())
            + w.scratch_bytes().max(w.logits_bytes()),
        on_devices: w.back_bytes(n_ctx, step) + w.kept_graph_bytes(),
    }
}

impl Run<'_> {
    /// Adjusts norms and biases so that the predictions on the fitted windows, some of whose tokens are
    /// resampled, are closer to the dense model's.
    /// `streams` are those after the last block; the pruned one of the held-out windows is updated. If the
    /// predictions on the held-out windows do not improve, all vectors are restored. Returns whether the
    /// vectors changed.
    fn tune(&mut self, streams: &mut Streams) -> Result<bool, PruneError> {
        if self.settings.tune.passes == 0 {
            return Ok(false);
        }
        self.observer.stage("tune, preparing", 1);
        let fitted = Arc::clone(&self.fitted);
        let held_out = fitted.n_fit..fitted.n_windows();
        let span = self.forward.span(&held_out);
        let tokens = fitted.tokens_of(held_out);
        let dense = &streams.dense[span.clone()];
        let (model, reference) = (self.model, self.reference);
        // It reads a whole head, and frees it before the lessons need theirs.
        let judge = PredictionLoss::new(&self.forward, model, reference, tokens, dense, Loss::Divergence)?;
        let mut lessons = self.lessons(self.windows, &streams.dense)?;
        let n_windows = lessons.starts.len();
        let per_step = (self.settings.tune.tokens / lessons.forward.n_ctx()).clamp(1, n_windows);
        let n_steps = self.settings.tune.passes * n_windows.div_ceil(per_step);
        let before = judge.loss(&self.forward, &streams.pruned[span.clone()])?;
        let untuned: Vec<_> = self.plan.blocks.iter().map(|b| b.vectors.clone()).collect();
        let mut state: Vec<BlockState> =
            (0..self.plan.blocks.len()).map(|il| self.vectors(il)).collect::<Result<_, _>>()?;
        self.observer.stage("tune", n_steps);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut n = 0;
        for _ in 0..self.settings.tune.passes {
            let mut order: Vec<usize> = (0..n_windows).collect();
            order.shuffle(&mut rng);
            for batch in order.chunks(per_step) {
                n += 1;
                // The rate is that of the middle of each step, so that even a single step has an effect.
                let progress = (n as f32 - 0.5) / n_steps as f32;
                let rate = (progress / WARM_UP).min(1.0) * 0.5 * (1.0 + (PI * progress).cos());
                self.tune_step(&mut lessons, batch, &mut state, rate * self.settings.tune.rate as f32, n)?;
                self.observer.step(n, "");
            }
        }
        let tuned =
            planned_stream(&self.forward, self.model, &self.plan, tokens, &*self.observer, |_| Ok(()))?;
        let after = judge.loss(&self.forward, &tuned)?;
        let better = after < before;
        if better {
            streams.pruned[span].copy_from_slice(&tuned);
        } else {
            self.plan.blocks.iter_mut().zip(untuned).for_each(|(b, vectors)| b.vectors = vectors);
        }
        let verdict = if better { "" } else { ", undone" };
        self.observer.step(n, &format!("held-out divergence {before:.4} to {after:.4}{verdict}"));
        Ok(better)
    }

    /// Training text from the fitted ones of `windows`, or some of them, spread evenly.
    /// `stream` is the final residual stream of the dense model. It begins with these windows; the resampled
    /// copies follow.
    fn lessons<'w>(&self, windows: &'w Windows, stream: &'w [f32]) -> Result<Lessons<'w>, PruneError> {
        let (w, s) = (windows, self.settings);
        let parts = w.n_ctx.div_ceil(MAX_GRADIENT_CTX);
        let n_ctx = w.n_ctx / parts;
        let forward = forward(self.model, n_ctx, s)?;
        let n_all = w.n_fit * parts;
        let n = (s.tune.limit / n_ctx).clamp(1, n_all);
        let chosen = (0..n).map(|i| (2 * i + 1) * n_all / (2 * n));
        let starts = chosen.map(|i| i / parts * w.n_ctx + i % parts * n_ctx).collect();
        let dense = forward.head(self.reference)?;
        let rng = ChaCha8Rng::seed_from_u64(1);
        Ok(Lessons { forward, dense, windows, stream, starts, rng })
    }

    /// Takes the `n`-th step, on the windows `batch`. Every block changes as soon as its gradient is known.
    fn tune_step(
        &mut self,
        lessons: &mut Lessons,
        batch: &[usize],
        state: &mut [BlockState],
        rate: f32,
        n: usize,
    ) -> Result<(), PruneError> {
        let (tokens, mut target) = lessons.text(batch, self.settings.tune.resample_share)?;
        let Lessons { forward, dense, .. } = lessons;
        let unknown = &tokens[target.len() / forward.n_embd()..];
        if !unknown.is_empty() {
            let (reference, whole) = (self.reference, Plan::whole(self.reference));
            target.extend(planned_stream(forward, reference, &whole, unknown, &*self.observer, |_| Ok(()))?);
        }
        let mut inputs = Vec::with_capacity(state.len());
        let keep = |x| {
            inputs.push(self.settings.spill.put(x)?);
            Ok(())
        };
        let last = planned_stream(forward, self.model, &self.plan, &tokens, &*self.observer, keep)?;
        let (_, likely) = prediction_loss::likely(forward, dense, &target)?;
        let (own, base) = self.output_heads(|model| forward.head_of(model, &likely))?;
        let mut grad = forward.divergence_gradient(&own, base.as_ref(), &last, &target)?;
        drop((own, base, last, target));
        for ((il, vectors), x) in state.iter_mut().enumerate().zip(inputs).rev() {
            self.check_interrupted()?;
            let block = forward.upload(&self.plan.block(self.model, il)?)?;
            let mut gradient = BlockGradient::default();
            let found = OnTheWay { vectors: Some(&mut gradient), ..OnTheWay::default() };
            forward.block_gradient(&block, &x, &mut grad, found)?;
            for ((v, moving), gradient) in BlockVector::ALL.into_iter().zip(vectors).zip(&gradient) {
                if let Some(moving) = moving {
                    moving.step(gradient, rate, n as i32);
                    self.plan.blocks[il].set_vector(v, Some(moving.values.clone()));
                }
            }
        }
        Ok(())
    }

    /// Trainable vectors of block `il`.
    fn vectors(&self, il: usize) -> Result<BlockState, PruneError> {
        let w = self.plan.block(self.model, il)?;
        Ok(BlockVector::ALL.map(|v| {
            let there = !v.of_attention() || w.shape.n_head_kv > 0;
            let may = !v.is_bias() || self.settings.blocks.biases;
            let values = w.vector(v).filter(|_| there && may)?;
            // A bias is a weight with a constant input of 1.
            let size = match v {
                BlockVector::AttnOutputBias => rms(&w.attn_output.data),
                BlockVector::FfnDownBias => rms(&w.ffn_down.data),
                _ => median(values),
            };
            Some(Adam::new(values, size))
        }))
    }
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len().max(1) as f64).sqrt() as f32
}

/// Median of the absolute values.
/// A few weights of a norm can be a hundred times as large as all others (Gemma 3). A mean would make the
/// steps of the others far too long.
fn median(x: &[f32]) -> f32 {
    let mut sizes: Vec<f32> = x.iter().map(|v| v.abs()).collect();
    let middle = sizes.len() / 2;
    if sizes.is_empty() { 0.0 } else { *sizes.select_nth_unstable_by(middle, f32::total_cmp).1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_large_weights_do_not_make_the_others_large() {
        for n in [1usize, 8, 641] {
            let mut norm: Vec<f32> = (0..n).map(|i| if i % 2 == 0 { -2.0 } else { 2.0 }).collect();
            (0..n / 8).for_each(|i| norm[i * 7] = 300.0);
            assert_eq!(median(&norm), 2.0);
        }
        assert_eq!(median(&[]), 0.0);
    }
}
