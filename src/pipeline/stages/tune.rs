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
use crate::forward::whole_windows;
use crate::gguf::Value;
use crate::pipeline::PruneError;
use crate::pipeline::forecast::{BASE_BYTES, StageForecast, Work};
use crate::pipeline::prediction_loss::{Loss, PredictionLoss};
use crate::pipeline::run::Run;
use crate::pipeline::stream::{Streams, planned_stream};
use crate::pipeline::training::{Batch, BlockParams, Lessons, Rates};
use crate::train::Schedule;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// The rate falls to nothing, since nothing comes after.
const SCHEDULE: Schedule = Schedule { warm_up: 0.1, floor: 0.0 };

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
    let (n_ctx, n) = w.lessons(w.s.tune.limit);
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
        let lessons = Lessons::new(self, self.windows, &streams.dense, self.settings.tune.limit)?;
        let n_windows = lessons.n_windows();
        let per_step = (self.settings.tune.tokens / lessons.forward.n_ctx()).clamp(1, n_windows);
        let n_steps = self.settings.tune.passes * n_windows.div_ceil(per_step);
        let before = judge.loss(&self.forward, &streams.pruned[span.clone()])?;
        let untuned: Vec<_> = self.plan.blocks.iter().map(|b| b.vectors.clone()).collect();
        let biases = self.settings.blocks.biases;
        let params = (0..self.plan.blocks.len())
            .map(|il| Ok(BlockParams::vectors(&self.plan.block(self.model, il)?, biases)));
        let mut params = params.collect::<Result<Vec<_>, PruneError>>()?;
        self.observer.stage("tune", n_steps);
        let (mut rng, mut text_rng) = (ChaCha8Rng::seed_from_u64(0), ChaCha8Rng::seed_from_u64(1));
        let mut n = 0;
        for _ in 0..self.settings.tune.passes {
            let mut order: Vec<usize> = (0..n_windows).collect();
            order.shuffle(&mut rng);
            for windows in order.chunks(per_step) {
                n += 1;
                let (n_given, drawn) = (windows.len().div_ceil(2), self.settings.tune.resample_share);
                let lesson = lessons.lesson(self, &Batch { windows, n_given, drawn }, &mut text_rng)?;
                let rate = SCHEDULE.factor(n, n_steps) * self.settings.tune.rate as f32;
                let rates = Rates { vectors: rate, matrices: 0.0 };
                self.train_step(&lessons, lesson, &mut params, None, rates, n)?;
                self.observer.step(n, "");
            }
        }
        params.iter().zip(&mut self.plan.blocks).for_each(|(params, plan)| params.write_vectors(plan));
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
}
