//! Recovery: distillation of the source into every kept weight.
//!
//! The sequential pass fits each map to the target of its own block, and tuning moves norms and biases. Here
//! all matrices move as well, by Adam along the gradient of KL(source ‖ own), the divergence of the whole
//! model's predictions. Each block moves as soon as its gradient is known, so that no more than one block's
//! gradients exist.
//!
//! Fresh text counts for more than second passes over the same. After the first pass, windows come back with
//! some of their tokens resampled from the source's predictions, differently each time.
//!
//! Held-out windows judge what moved, before and after it is rounded to the file's types. What does not help
//! them is taken back.

mod course;
mod keep;
mod round;

use super::Stage;
use crate::forward::whole_windows;
use crate::ggml::Token;
use crate::gguf::Value;
use crate::model::BlockShape;
use crate::pipeline::forecast::{BASE_BYTES, Sizes, StageForecast, Work};
use crate::pipeline::prediction_loss::{Loss, PredictionLoss};
use crate::pipeline::run::Run;
use crate::pipeline::stream::{Streams, embedded, planned_stream};
use crate::pipeline::training::{Among, BlockParams, Heads, Lessons, Moves};
use crate::pipeline::{Method, PruneError, forward};
use crate::train::AdamState;
use course::Course;
use std::sync::Arc;
use std::time::Duration;

/// Smallest number of steps for which steps may read more than [`LEAST_TOKENS`] tokens, and these limits.
const MANY_STEPS: usize = 128;
const LEAST_TOKENS: usize = 2048;
const MOST_TOKENS: usize = 16384;

/// Amount of recovery.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RecoverBudget {
    /// Number of tokens to train on.
    Tokens(usize),
    /// Time to train for.
    Time(Duration),
}

impl std::fmt::Display for RecoverBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RecoverBudget::Tokens(n) => write!(f, "{n} tokens"),
            RecoverBudget::Time(limit) => write!(f, "{} s", limit.as_secs()),
        }
    }
}

/// Settings of recovery.
#[derive(Clone, Debug, PartialEq)]
pub struct RecoverSettings {
    /// Amount; none turns recovery off.
    pub budget: Option<RecoverBudget>,
    /// Largest step of matrices, relative to the root mean square of their values.
    pub rate: f64,
    /// Largest step of norms and biases, relative to their sizes.
    pub vector_rate: f64,
    /// Number of tokens per step, at least one window; without it, it follows from the budget.
    pub tokens: Option<usize>,
    /// Share of the windows of the first pass that are resampled, too.
    pub first_resampled: f64,
    /// Smallest and largest share of a resampled window's tokens that is resampled.
    pub resample_share: [f64; 2],
    /// Tokens over which predictions are compared.
    pub among: Among,
    /// How matrices move.
    pub moves: Moves,
    /// Blocks of the reference, if they are not the model's.
    pub source: Option<Vec<BlockShape>>,
}

impl Default for RecoverSettings {
    fn default() -> RecoverSettings {
        RecoverSettings {
            budget: None,
            rate: 0.0005,
            vector_rate: 0.002,
            tokens: None,
            first_resampled: 0.5,
            resample_share: [0.5, 0.5],
            among: Among::All,
            moves: Moves::Full(AdamState::F32),
            source: None,
        }
    }
}

impl RecoverSettings {
    /// Whether a smaller state of the optimiser would save memory and is not ruled out.
    pub(in crate::pipeline) fn may_be_leaner(&self) -> bool {
        self.budget.is_some() && self.moves == Moves::Full(AdamState::F32)
    }

    /// Number of tokens per step, in whole windows of `n_ctx`.
    fn step_tokens(&self, n_ctx: usize) -> usize {
        let wanted = self.tokens.unwrap_or(match self.budget {
            Some(RecoverBudget::Tokens(n)) => (n / MANY_STEPS).clamp(LEAST_TOKENS, MOST_TOKENS),
            _ => LEAST_TOKENS,
        });
        whole_windows(wanted, n_ctx)
    }
}

/// Stage that trains all kept weights.
pub(in crate::pipeline) struct Recover;

impl Stage for Recover {
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        let Some(budget) = w.s.recover.budget else { return Vec::new() };
        let pruned_before = w.s.method == Method::Recovery;
        let preparing = pruned_before.then(|| forecast_preparing(w));
        preparing.into_iter().chain([forecast_training(w, budget), round::forecast(w)]).collect()
    }

    fn records(&self, n_layer: usize) -> Vec<String> {
        keep::names(n_layer)
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        if run.settings.recover.budget.is_none() {
            return Ok(());
        }
        let mut streams = match run.streams.take() {
            Some(streams) => streams,
            None => run.final_streams()?,
        };
        let done = run.recover(&mut streams)?;
        run.streams = Some(streams);
        // An earlier recovery of the same file counts as well.
        let before = match run.model.file.get("putri.recover_tokens") {
            Some(Value::U64(n)) if run.settings.method == Method::Recovery => *n,
            _ => 0,
        };
        run.provenance.push(("recover_tokens", Value::U64(before + done as u64)));
        run.provenance.push(("recover_rate", Value::F32(run.settings.recover.rate as f32)));
        Ok(())
    }
}

/// Operations per second of a machine for which a limit of time becomes work; the forecast knows no machine.
const USUAL_RATE: f64 = 1e11;

/// Bytes in memory of what moves, with the optimiser's state and the best values so far.
fn kept_bytes(w: &Work) -> f64 {
    let of = |b: Sizes| match w.s.recover.moves {
        Moves::Full(state) => w.matrix_params(b) * (8.0 + state.bytes()),
        Moves::LowRank(rank) => w.adapter_params(b, rank as f64) * 16.0,
    };
    if w.s.spill.is_memory() { w.pruned().into_iter().map(of).sum() } else { 0.0 }
}

fn forecast_preparing(w: &Work) -> StageForecast {
    let n_ctx = w.c.n_ctx;
    let streams = w.stream_bytes(2.0 * w.n_all() * w.n_embd());
    let passing = w.graph_bytes(n_ctx, w.n_all()) + w.block_bytes();
    StageForecast {
        name: "recover, preparing",
        operations: w.model_ops(&w.source(), w.n_all(), n_ctx)
            + w.model_ops(&w.pruned(), w.n_held_out(), n_ctx),
        algebra: 0.0,
        memory: BASE_BYTES + streams + passing,
        on_devices: passing,
    }
}

fn forecast_training(w: &Work, budget: RecoverBudget) -> StageForecast {
    let s = &w.s.recover;
    let (n_ctx, n_lessons) = w.lessons(usize::MAX);
    let step = n_lessons.min(s.step_tokens(n_ctx) as f64);
    let pruned = w.pruned();
    // Operations of `n` tokens, of which `again` are resampled, and read by the source.
    let training = |n: f64, again: f64| {
        let read = if n_ctx == w.c.n_ctx { again } else { n };
        let share = 0.5 * (s.resample_share[0] + s.resample_share[1]);
        let loss = match s.among {
            Among::All => 3.0 * w.logit_ops(w.n_vocab(), n),
            Among::Likely => w.loss_ops(n, step, 3.0),
        };
        w.model_ops(&w.source(), read, n_ctx)
            + w.logit_ops(w.n_vocab(), share * again)
            + w.model_ops(&pruned, n, n_ctx)
            + pruned.iter().map(|b| w.gradient_ops(*b, n, n_ctx) + w.matrix_ops(*b, n)).sum::<f64>()
            + loss
    };
    let windows = step / n_ctx as f64;
    let in_first = (windows * s.first_resampled).floor() / windows;
    let first = |n: f64| n.min(n_lessons) * in_first + (n - n_lessons).max(0.0);
    let operations = match budget {
        RecoverBudget::Tokens(n) => {
            let steps = (n as f64 / step).ceil();
            let (n, judgements) = (steps * step, steps.min(course::JUDGEMENTS as f64));
            let judged = w.n_held_out();
            let judging = w.model_ops(&pruned, judged, w.c.n_ctx) + w.logit_ops(w.known(judged), judged);
            training(n, first(n)) + w.judge_ops(judged, 1.0) + judgements * judging
        }
        RecoverBudget::Time(limit) => USUAL_RATE * limit.as_secs_f64(),
    };
    let kept = kept_bytes(w);
    let largest = pruned.iter().map(|b| w.matrix_params(*b)).fold(0.0, f64::max);
    let streams = w.stream_bytes(w.n_embd() * (w.n_layer() * step + 2.0 * w.n_all()));
    let heads = if w.s.method == Method::Recovery { 2.0 } else { 1.0 };
    let chunk = w.chunk(n_ctx, step);
    let rows = 4.0 * chunk * (3.0 * w.max_ff() + 4.0 * w.max_q() + 6.0 * w.n_embd());
    let back = w.back_bytes(n_ctx, step) - w.head_bytes() + 4.0 * largest + rows;
    let loss = 6.0 * w.logits_bytes() * w.s.n_threads as f64;
    StageForecast {
        name: "recover",
        operations,
        algebra: 0.0,
        memory: BASE_BYTES + kept + streams + w.new_bytes() + heads * w.head_bytes() + back.max(loss),
        on_devices: heads * w.head_bytes() + back.max(loss) + w.kept_graph_bytes(),
    }
}

/// Held-out windows as judges.
struct HeldOut<'w> {
    tokens: &'w [Token],
    loss: PredictionLoss,
    /// Number of positions of the windows from files, and of those that the source wrote.
    sets: Vec<usize>,
    /// Divergence on each set before anything moved.
    before: Vec<f64>,
}

impl HeldOut<'_> {
    /// Mean divergence of each set of windows at the final residual stream `stream`.
    fn divergences(&self, run: &Run, stream: &[f32]) -> Result<Vec<f64>, PruneError> {
        let losses = self.loss.losses(&run.forward, stream)?;
        let mut at = 0;
        Ok(self
            .sets
            .iter()
            .map(|n| {
                let set = &losses[at..at + n];
                at += n;
                set.iter().sum::<f64>() / *n as f64
            })
            .collect())
    }

    /// Mean ratio to before, if no set is worse; else infinity.
    fn score(&self, found: &[f64]) -> f64 {
        let ratios = found.iter().zip(&self.before).map(|(now, before)| now / before);
        let all: Vec<f64> = ratios.collect();
        // Not a number is no gain.
        if all.iter().all(|r| *r <= 1.0) { all.iter().sum::<f64>() / all.len() as f64 } else { f64::INFINITY }
    }
}

fn listed(found: &[f64]) -> String {
    let all: Vec<String> = found.iter().map(|d| format!("{d:.4}")).collect();
    all.join(", ")
}

impl Run<'_> {
    /// Final residual streams of all windows in the reference, and of the held-out ones under the plan.
    fn final_streams(&mut self) -> Result<Streams, PruneError> {
        let fitted = Arc::clone(&self.fitted);
        let source = forward(self.reference, fitted.n_ctx, self.settings)?;
        self.observer.stage("recover, preparing", self.reference.hparams.n_layer());
        let mut dense = embedded(&source, self.reference, &fitted.tokens, &self.settings.spill)?;
        for il in 0..self.reference.hparams.n_layer() {
            self.check_interrupted()?;
            let block = source.upload(&self.reference.block(il)?)?;
            source.advance(&block, &mut dense)?;
            self.observer.step(il + 1, "");
        }
        let held_out = fitted.n_fit..fitted.n_windows();
        let own = planned_stream(
            &self.forward,
            self.model,
            &self.plan,
            fitted.tokens_of(held_out.clone()),
            &*self.observer,
            |_| Ok(()),
        )?;
        let mut pruned = self.settings.spill.zeros(dense.len())?;
        pruned[self.forward.span(&held_out)].copy_from_slice(&own);
        Ok(Streams { dense, pruned })
    }

    /// Trains all kept weights so that the predictions on the windows are closer to the reference's, and
    /// rounds them to the file's types. The pruned stream of the held-out windows is updated. Returns the
    /// number of tokens that the kept weights were trained on; 0 if nothing helped.
    fn recover(&mut self, streams: &mut Streams) -> Result<usize, PruneError> {
        let s = &self.settings.recover;
        let fitted = Arc::clone(&self.fitted);
        let held_out = fitted.n_fit..fitted.n_windows();
        let span = self.forward.span(&held_out);
        let tokens = fitted.tokens_of(held_out);
        let dense = &streams.dense[span.clone()];
        let (model, reference) = (self.model, self.reference);
        let loss = PredictionLoss::new(&self.forward, model, reference, tokens, dense, Loss::Divergence)?;
        let mut judge = HeldOut { tokens, loss, sets: self.windows.held_out_sets(), before: Vec::new() };
        judge.before = judge.divergences(self, &streams.pruned[span.clone()])?;
        let lessons = Lessons::new(self, self.windows, &streams.dense, usize::MAX)?;
        let whole = (s.among == Among::All).then(|| Heads::new(self, &lessons)).transpose()?;
        let biases = self.settings.blocks.biases;
        let params = (0..self.plan.blocks.len()).map(|il| {
            let w = self.plan.block(model, il)?;
            Ok(BlockParams::all(w, il, biases, s.moves, &self.settings.spill)?)
        });
        let params = params.collect::<Result<Vec<_>, PruneError>>()?;
        let (params, trained) = Course::new(self, &judge, &lessons, whole.as_ref(), params)?.run(self)?;
        drop((whole, lessons));
        if trained.tokens == 0 {
            return Ok(0);
        }
        let before = self.plan.clone();
        self.round(&params)?;
        let own = planned_stream(&self.forward, model, &self.plan, tokens, &*self.observer, |_| Ok(()))?;
        let after = judge.divergences(self, &own)?;
        let better = judge.score(&after).is_finite();
        let verdict = if better { "" } else { ", undone" };
        self.observer.step(
            self.plan.blocks.len(),
            &format!(
                "held-out divergence {} to {}, in the file {}{verdict}",
                listed(&judge.before),
                listed(&trained.divergences),
                listed(&after)
            ),
        );
        if !better {
            self.plan = before;
            return Ok(0);
        }
        streams.pruned[span].copy_from_slice(&own);
        Ok(trained.tokens)
    }
}
