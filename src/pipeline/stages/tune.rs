//! A last adjustment of norms and biases, by descent on what the whole model loses.
//!
//! The sequential pass fits every map to what its own block should give. Here the loss is that of the
//! predictions, the KL divergence from the dense model among likely tokens, and all blocks move together. Only vectors
//! move: there are few of them, they are written as F32, so that nothing is rounded anew, and what is kept per number is
//! small. That norms and biases alone win back much of what pruning costs was found in PERP, arXiv 2312.15230.
//!
//! All that came before is fitted to the same text. So only half of the windows are gone over as they are: in the others
//! some tokens are resampled, each time others, from what the dense model predicts for their places, and the dense model
//! reads the same.

use super::resample::{places, resample};
use super::{Stage, Streams};
use crate::calibrate::Windows;
use crate::forward::{BlockGradient, Forward, ForwardError, Head, MAX_GRADIENT_CTX, OnTheWay, whole_windows};
use crate::ggml::Token;
use crate::gguf::Value;
use crate::model::BlockVector;
use crate::pipeline::forecast::{BASE_BYTES, StageForecast, Work};
use crate::pipeline::prediction_loss::{self, Loss, PredictionLoss};
use crate::pipeline::run::Run;
use crate::pipeline::stream::planned_stream;
use crate::pipeline::{Plan, PruneError, forward};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::f32::consts::PI;
use std::sync::Arc;

/// Decay of the running means of gradients and of their squares (Adam, arXiv 1412.6980); the second shorter than
/// usual, for there are few steps.
const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.98;

/// Keeps a direction finite where there are no gradients.
const EPSILON: f32 = 1e-15;

/// Share of the steps over which the rate grows to its full size.
const WARM_UP: f32 = 0.1;

/// A vector that moves.
struct Moving {
    values: Vec<f32>,
    /// Running means of the gradient and of its square.
    mean: Vec<f32>,
    square: Vec<f32>,
    /// Size of what it adds to or multiplies, which steps are relative to.
    size: f32,
}

impl Moving {
    fn new(values: &[f32], size: f32) -> Moving {
        let zero = vec![0.0; values.len()];
        Moving { values: values.to_vec(), mean: zero.clone(), square: zero, size }
    }

    /// The `n`-th step of Adam, counted from 1.
    fn step(&mut self, gradient: &[f32], rate: f32, n: i32) {
        let (mean_part, square_part) = (1.0 - MEAN_DECAY.powi(n), 1.0 - SQUARE_DECAY.powi(n));
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((value, (mean, square)), g) in self.values.iter_mut().zip(moments).zip(gradient) {
            *mean += (1.0 - MEAN_DECAY) * (g - *mean);
            *square += (1.0 - SQUARE_DECAY) * (g * g - *square);
            let direction = *mean / mean_part / ((*square / square_part).sqrt() + EPSILON);
            *value -= rate * self.size * direction;
        }
    }
}

/// The vectors of one block that move, in the order of [`BlockVector::ALL`].
type BlockState = [Option<Moving>; BlockVector::ALL.len()];

/// What is learnt from.
struct Lessons<'a> {
    forward: Forward,
    /// The dense model's head.
    dense: Head,
    windows: &'a Windows,
    /// The dense model's last stream of all of them.
    stream: &'a [f32],
    /// Where in their tokens those begin that are learnt from, whole or cut to a length that gradients can go through.
    starts: Vec<usize>,
    rng: ChaCha8Rng,
}

impl Lessons<'_> {
    /// The windows numbered `batch`, in the second half of them the share `drawn` of the tokens resampled; and what is known of
    /// the dense model's last stream of them, from the first token on.
    fn text(&mut self, batch: &[usize], drawn: f64) -> Result<(Vec<Token>, Vec<f32>), ForwardError> {
        let (n_ctx, n_embd) = (self.forward.n_ctx(), self.forward.n_embd());
        let starts: Vec<usize> = batch.iter().map(|&i| self.starts[i]).collect();
        let mut text: Vec<Token> =
            starts.iter().flat_map(|&at| &self.windows.tokens[at..][..n_ctx]).copied().collect();
        let n_given = batch.len().div_ceil(2);
        let places = places(&starts, n_given, n_ctx, drawn, &mut self.rng);
        resample(&mut self.forward, &self.dense, &mut text, &places, self.stream, &mut self.rng)?;
        // In a cut window the dense model sees less than it saw.
        let known = starts[..if n_ctx < self.windows.n_ctx { 0 } else { n_given }].iter();
        let known = known.flat_map(|at| &self.stream[at * n_embd..][..n_ctx * n_embd]).copied().collect();
        Ok((text, known))
    }
}

/// Adjusts norms and biases on the whole model.
pub(in crate::pipeline) struct Tune;

impl Stage for Tune {
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        vec![forecast_preparing(w), forecast_tuning(w)]
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        let Some(mut streams) = run.streams.take() else { return Ok(()) };
        let tuned = run.tune(&mut streams)?;
        run.streams = Some(streams);
        let passes = if tuned { run.settings.tune } else { 0 };
        run.provenance.push(("tune", Value::U32(passes as u32)));
        Ok(())
    }
}

fn forecast_preparing(w: &Work) -> StageForecast {
    let operations = w.judge_ops(w.n_held_out(), 1.0);
    let streams = w.stream_bytes(w.n_embd() * 2.0 * w.n_all());
    StageForecast {
        name: "tune, preparing",
        operations: if w.s.tune > 0 { operations } else { 0.0 },
        algebra: 0.0,
        memory: BASE_BYTES + streams + w.new_bytes() + w.scratch_bytes() + w.predicting_bytes(),
        on_devices: w.kept_graph_bytes() + w.predicting_bytes(),
    }
}

fn forecast_tuning(w: &Work) -> StageForecast {
    let (n_ctx, n) = w.lessons();
    let (pruned, n_held_out) = (w.pruned(), w.n_held_out());
    // Half of the windows are read again, with tokens resampled; all, where they are cut.
    let read = if n_ctx == w.c.n_ctx { n / 2.0 } else { n };
    let step = n.min(whole_windows(w.s.tune_tokens, n_ctx) as f64);
    let pass = w.model_ops(&w.whole(), read, n_ctx)
        + w.logit_ops(w.n_vocab(), w.s.tune_resample_share * n / 2.0)
        + w.model_ops(&pruned, n, n_ctx)
        + pruned.iter().map(|b| w.gradient_ops(*b, n, n_ctx)).sum::<f64>()
        + w.loss_ops(n, step, 3.0);
    let held_out = w.model_ops(&pruned, n_held_out, w.c.n_ctx)
        + w.logit_ops(2.0 * w.n_vocab() + w.known(n_held_out), n_held_out);
    let streams = w.stream_bytes(w.n_embd() * (w.n_layer() * step + 2.0 * w.n_all()));
    StageForecast {
        name: "tune",
        operations: if w.s.tune > 0 { w.s.tune as f64 * pass + held_out } else { 0.0 },
        algebra: 0.0,
        memory: BASE_BYTES
            + streams
            + w.new_bytes()
            // At the end predictions before and after are compared.
            + w.back_bytes(n_ctx, step).max(w.predicting_bytes() + w.logits_bytes())
            + w.scratch_bytes().max(w.logits_bytes()),
        on_devices: w.back_bytes(n_ctx, step) + w.kept_graph_bytes(),
    }
}

impl Run<'_> {
    /// Moves norms and biases to where predictions on the fitted windows, some of whose tokens are resampled, are closer
    /// to the dense model's. `streams` are those behind the last block; the pruned one of the held-out windows is brought
    /// up to date. If they are no better off, everything stays as it was. Returns whether anything moved.
    fn tune(&mut self, streams: &mut Streams) -> Result<bool, PruneError> {
        if self.settings.tune == 0 {
            return Ok(false);
        }
        self.observer.stage("tune, preparing", 1);
        let fitted = Arc::clone(&self.fitted);
        let held_out = fitted.n_fit..fitted.n_windows();
        let span = self.forward.span(&held_out);
        let tokens = fitted.tokens_of(held_out);
        let dense = &streams.dense[span.clone()];
        let (model, reference) = (self.model, self.reference);
        // It reads a whole head, and is done with it before the lessons need theirs.
        let judge =
            PredictionLoss::new(&mut self.forward, model, reference, tokens, dense, Loss::Divergence)?;
        let mut lessons = self.lessons(self.windows, &streams.dense)?;
        let n_windows = lessons.starts.len();
        let per_step = (self.settings.tune_tokens / lessons.forward.n_ctx()).clamp(1, n_windows);
        let n_steps = self.settings.tune * n_windows.div_ceil(per_step);
        let before = judge.loss(&mut self.forward, &streams.pruned[span.clone()])?;
        let untuned: Vec<_> = self.plan.blocks.iter().map(|b| b.vectors.clone()).collect();
        let mut state: Vec<BlockState> =
            (0..self.plan.blocks.len()).map(|il| self.vectors(il)).collect::<Result<_, _>>()?;
        self.observer.stage("tune", n_steps);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut n = 0;
        for _ in 0..self.settings.tune {
            let mut order: Vec<usize> = (0..n_windows).collect();
            order.shuffle(&mut rng);
            for batch in order.chunks(per_step) {
                n += 1;
                // In the middle of each step: even a single one moves something.
                let progress = (n as f32 - 0.5) / n_steps as f32;
                let rate = (progress / WARM_UP).min(1.0) * 0.5 * (1.0 + (PI * progress).cos());
                self.tune_step(&mut lessons, batch, &mut state, rate * self.settings.tune_rate as f32, n)?;
                self.observer.step(n, "");
            }
        }
        let tuned =
            planned_stream(&mut self.forward, self.model, &self.plan, tokens, &*self.observer, |_| Ok(()))?;
        let after = judge.loss(&mut self.forward, &tuned)?;
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

    /// The fitted ones of `windows`, or some of them, spread evenly; `stream` is the dense model's last one, that of
    /// these windows first, as resampled copies are behind them.
    fn lessons<'w>(&self, windows: &'w Windows, stream: &'w [f32]) -> Result<Lessons<'w>, PruneError> {
        let (w, s) = (windows, self.settings);
        let parts = w.n_ctx.div_ceil(MAX_GRADIENT_CTX);
        let n_ctx = w.n_ctx / parts;
        let forward = forward(self.model, n_ctx, s)?;
        let n_all = w.n_fit * parts;
        let n = (s.tune_limit / n_ctx).clamp(1, n_all);
        let chosen = (0..n).map(|i| (2 * i + 1) * n_all / (2 * n));
        let starts = chosen.map(|i| i / parts * w.n_ctx + i % parts * n_ctx).collect();
        let dense = forward.head(self.reference)?;
        let rng = ChaCha8Rng::seed_from_u64(1);
        Ok(Lessons { forward, dense, windows, stream, starts, rng })
    }

    /// The `n`-th step, on the windows `batch`. Every block moves as soon as its gradient is known.
    fn tune_step(
        &mut self,
        lessons: &mut Lessons,
        batch: &[usize],
        state: &mut [BlockState],
        rate: f32,
        n: usize,
    ) -> Result<(), PruneError> {
        let (tokens, mut target) = lessons.text(batch, self.settings.tune_resample_share)?;
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

    /// The vectors of block `il` that move.
    fn vectors(&self, il: usize) -> Result<BlockState, PruneError> {
        let w = self.plan.block(self.model, il)?;
        Ok(BlockVector::ALL.map(|v| {
            let there = !v.of_attention() || w.shape.n_head_kv > 0;
            let may = !v.is_bias() || self.settings.biases;
            let values = w.vector(v).filter(|_| there && may)?;
            // A bias is a weight whose input is always 1.
            let size = match v {
                BlockVector::AttnOutputBias => rms(&w.attn_output.data),
                BlockVector::FfnDownBias => rms(&w.ffn_down.data),
                _ => median(values),
            };
            Some(Moving::new(values, size))
        }))
    }
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len().max(1) as f64).sqrt() as f32
}

/// Median of the absolute values: norms can have a few weights a hundred times as large as all others (Gemma 3), which
/// would make the steps of these far too long.
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
