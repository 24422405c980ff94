//! The passes over the blocks: where forward passes and the mathematics of pruning meet.
//!
//! 1. `heads`: which attention groups go, by their effect on the model's predictions.
//! 2. `sensitivity`: what errors in the stream behind each block cost the predictions.
//! 3. `curves`: what every block loses as its feed-forward narrows, by that cost; from that, the widths.
//! 4. `choice`: by what neurons are chosen, tried on many blocks at once.
//! 5. `twins`: the windows once more, with tokens drawn anew, for blocks to be fitted to.
//! 6. `sequential`: block after block, refit attn_output, choose neurons, refit ffn_down, requantise;
//!    each block sees the pruned and requantised blocks before it.
//! 7. `tune`: norms and biases, by descent on what the whole model's predictions lose.

mod amounts;
mod choice;
mod curves;
mod experts;
mod forecast;
mod heads;
mod journal;
mod judge;
mod memory;
mod plan;
mod sensitivity;
mod sequential;
mod settings;
mod size;
mod stream;
mod tune;
mod twins;

pub use amounts::{budgets, check_budget};
use amounts::{
    equal_widths, equally_narrowed, groups_to_remove, neurons_for_target, neurons_to_remove, within_family,
};
pub use forecast::{Calibration, Forecast, StageForecast, forecast};
pub use journal::{Journal, Settled};
pub use judge::Loss;
pub use memory::{NoRoom, within_device_memory, within_memory};
pub use plan::{BlockPlan, Plan};
use sensitivity::Sensitivity;
pub use settings::{Method, Settings, TensorTypes};
pub use size::{FileSize, NewMatrices, Target, TargetError, sparsity_for};
use size::{even_shapes, file_size, new_matrices};
use stream::{embedded, planned_stream};

use crate::calibrate::Windows;
use crate::forward::{Forward, ForwardError, Head, InputSquares, LOGIT_ROWS};
use crate::ggml::GgmlError;
use crate::gguf::GgufError;
use crate::model::{Model, Piece};
use crate::numeric::{RowComparison, compare_rows};
use crate::prune::{BudgetError, Choice, Singular};
use rayon::prelude::*;

/// A stage that is still to come, and how much work it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlannedStage {
    /// The name under which [`Observer::stage`] announces it.
    pub name: &'static str,
    /// Floating-point operations that take as long in graphs, estimated from shapes.
    pub work: f64,
    /// Memory bandwidth limits the stage rather than arithmetic. Its speed says little about that of other stages.
    pub bandwidth_bound: bool,
}

/// Who is told how far the work is, and can stop it.
pub trait Observer {
    /// These stages are still to come, in this order; they replace those of an earlier plan. Some may be skipped, and stages
    /// that are not planned may run besides. `whole` says whether nothing else follows: a search for the largest sparsity
    /// within a limit announces one result after another. A stage without a name stands for work that is announced later.
    fn plan(&mut self, _stages: &[PlannedStage], _whole: bool) {}
    /// A stage begins; it has `steps` steps.
    fn stage(&mut self, name: &str, steps: usize);
    /// `done` steps of the stage are done; `note` says what came of the last.
    fn step(&mut self, done: usize, note: &str);
    /// Whether the work should stop as soon as it can.
    fn interrupted(&self) -> bool {
        false
    }
}

/// Why pruning failed.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    /// A forward pass failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// ggml failed.
    #[error(transparent)]
    Ggml(#[from] GgmlError),
    /// A tensor could not be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The sparsity is out of reach.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// Another method than ours on a mixture of experts.
    #[error("--method paper knows no experts; only our own does")]
    Experts,
    /// Heads shall go block by block where none holds that.
    #[error("--heads per-layer: no architecture holds blocks of {0} with heads of their own in this model")]
    HeadsPerBlock(&'static str),
    /// A layer's activations are degenerate.
    #[error("block {block}, {part}: {source}")]
    Singular {
        /// The block.
        block: usize,
        /// `attn_output` or `ffn_down`.
        part: &'static str,
        /// Why.
        source: Singular,
    },
    /// What was fitted is out of all proportion.
    #[error(
        "block {block}, {part}: new values are {times:.0} times as large as those before; calibrate on more text"
    )]
    Grown {
        /// The block.
        block: usize,
        /// `attn_output` or `ffn_down`.
        part: &'static str,
        /// How much larger.
        times: f32,
    },
    /// A temporary file failed.
    #[error("temporary file: {0}")]
    Spill(#[from] std::io::Error),
    /// The observer asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// How the pruned and requantised model does on the held-out windows, by our own forward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeldOut {
    /// Perplexity of the dense model.
    pub dense_ppl: f64,
    /// Perplexity of the pruned one.
    pub pruned_ppl: f64,
    /// Mean KL divergence of its predictions from the dense model's, in nats.
    pub kl: f64,
    /// Share of positions where both think the same token likeliest.
    pub top1: f64,
}

/// What came of the passes.
pub struct Outcome {
    /// What stays of each block, with the tensors that changed.
    pub plan: Plan,
    /// Whether norms and biases were tuned, and held-out windows confirmed it.
    pub tuned: bool,
    /// What neurons went by, where it was neurons that went.
    pub neurons_by: Option<Choice>,
    /// What the held-out windows say.
    pub held_out: HeldOut,
    /// The pruned model's negative log-likelihoods of the tokens of the first of them but its first, in nats, by the CPU.
    pub losses: Vec<f64>,
    /// The dense model's mean negative log-likelihood on each held-out window, in nats.
    pub dense_window_nll: Vec<f64>,
    /// What the predictions lose by the width of each block alone, about, in nats of KL divergence; not known where all
    /// widths are equal, or were chosen by an earlier run.
    pub block_losses: Option<Vec<f64>>,
    /// What a user should know.
    pub warnings: Vec<String>,
}

/// Plans the pruning of `model` on the calibration `windows`. `reference` is the same model before it was
/// quantised, or `model` itself: what the result is fitted to, and where attn_output and ffn_down, which
/// get new values anyway, come from. What `journal` remembers of an earlier run on the same terms is taken over; the
/// outcome is the same as without.
///
/// # Errors
/// [`PruneError`] if the sparsity cannot be reached, the engine fails, or the observer interrupts.
pub fn run(
    model: &Model,
    reference: &Model,
    windows: &Windows,
    s: &Settings,
    journal: &mut dyn Journal,
    observer: &mut dyn Observer,
) -> Result<Outcome, PruneError> {
    let budgets = budgets(model, s);
    let s = &within_family(model, s);
    let s = &match s.method {
        Method::Putri => s.clone(),
        // The authors' code counts all errors alike and knows no quantisation.
        Method::Paper | Method::TwoStage => {
            Settings { error_feedback: false, token_weight: 0.0, biases: false, tune: 0, ..s.clone() }
        }
    };
    let settled = journal.settled()?;
    let twinned;
    let mut run = Run {
        forward: forward(model, windows.n_ctx, s)?,
        model,
        reference,
        windows,
        fitted: windows,
        settings: s,
        journal,
        observer,
        plan: Plan { carriers: s.carriers(model), ..Plan::whole(model) },
        sensitivity: None,
        choice: Choice::Loss,
        block_losses: None,
        losses: Vec::new(),
        dense_window_nll: Vec::new(),
        warnings: Vec::new(),
    };
    let n_groups = groups_to_remove(model, &budgets, s);
    let mut tuned = false;
    let held_out = match s.method {
        Method::Putri => {
            run.search_heads(&budgets, n_groups, settled.heads)?;
            let removed = run.plan.attention_params_removed(&budgets);
            let wanted =
                settled.widths.is_none() || settled.choice.is_none() || settled.blocks.len() < budgets.len();
            let measured =
                (wanted && s.sensitivity_tokens > 0).then(|| run.sensitivity(s.sensitivity_tokens));
            let sensitivity = measured.transpose()?;
            let widths = match settled.widths {
                Some(widths) => widths,
                None => run.choose_widths(&budgets, removed, sensitivity.as_ref())?,
            };
            run.journal.widths(&widths)?;
            // Blocks of which it is not known what their neurons went by are done anew.
            let done = if settled.choice.is_some() { settled.blocks } else { Vec::new() };
            run.choice = match (settled.choice.or(s.choice), &sensitivity) {
                (Some(choice), _) => choice,
                (None, Some(measured)) => run.choice_of_neurons(&widths, measured)?,
                (None, None) => Choice::Loss,
            };
            run.journal.choice(run.choice)?;
            run.sensitivity = sensitivity;
            twinned = run.twinned()?;
            let fitted = twinned.as_ref().unwrap_or(windows);
            run.fitted = fitted;
            let mut streams = run.sequential_pass(&widths, done)?;
            run.sensitivity = None;
            tuned = run.tune(&mut streams)?;
            let held_out = run.forward.span(&(fitted.n_fit..fitted.n_windows()));
            run.held_out([&streams.dense[held_out.clone()], &streams.pruned[held_out]])?
        }
        Method::Paper | Method::TwoStage => {
            // The paper's order, neurons before heads, does not know yet which groups go.
            let widths = equal_widths(model, &budgets, s, n_groups)?;
            run.sequential_pass(&widths, settled.blocks)?;
            run.search_heads(&budgets, n_groups, None)?;
            run.evaluate_plan()?
        }
    };
    let by_choice = s.method == Method::Putri && s.piece(model) == Piece::Neuron;
    let neurons_by = by_choice.then_some(run.choice);
    let Run { plan, block_losses, losses, dense_window_nll, warnings, .. } = run;
    Ok(Outcome { plan, tuned, neurons_by, held_out, losses, dense_window_nll, block_losses, warnings })
}

/// What the matrices of the pruned model see of the windows that it was fitted on, block by block.
///
/// # Errors
/// [`PruneError`] if the engine fails or the observer interrupts.
pub fn input_squares(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    s: &Settings,
    observer: &mut dyn Observer,
) -> Result<Vec<InputSquares>, PruneError> {
    let mut forward = forward(model, windows.n_ctx, s)?;
    let mut stream = embedded(&forward, model, windows.tokens_of(0..windows.n_fit), &s.shelf)?;
    let n_layer = model.hparams.n_layer();
    observer.stage("importance matrix", n_layer);
    let mut all = vec![InputSquares::default(); n_layer];
    for (il, squares) in all.iter_mut().enumerate() {
        if observer.interrupted() {
            return Err(PruneError::Interrupted);
        }
        let block = forward.upload(&plan.block(model, il)?)?;
        for chunk in forward.chunks(0..windows.n_fit) {
            let x = &mut stream[forward.span(&chunk)];
            let mut out = vec![0.0; x.len()];
            forward.block_squares(&block, x, &mut out, squares)?;
            x.copy_from_slice(&out);
        }
        observer.step(il + 1, "");
    }
    Ok(all)
}

/// A forward pass over windows of `n_ctx` tokens.
fn forward(model: &Model, n_ctx: usize, s: &Settings) -> Result<Forward, ForwardError> {
    Ok(Forward::new(model, n_ctx, s.compute())?.in_chunks_of(s.chunk_tokens))
}

/// Factor of each token of `stream` `[n_tokens, n_embd]` in least-squares sums: its root mean square to
/// the power of −`weight`.
fn token_scales(stream: &[f32], n_embd: usize, weight: f64) -> Vec<f32> {
    let exponent = -0.5 * weight as f32;
    let squares: Vec<f32> = stream.chunks_exact(n_embd).map(mean_square).collect();
    // A token whose embedding is zero must not outweigh all others.
    let floor = (squares.iter().sum::<f32>() / squares.len() as f32 * 1e-6).max(f32::MIN_POSITIVE);
    squares.iter().map(|s| s.max(floor).powf(exponent)).collect()
}

fn mean_square(x: &[f32]) -> f32 {
    x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32
}

/// State of one run.
struct Run<'a> {
    model: &'a Model,
    /// What the result is fitted to.
    reference: &'a Model,
    windows: &'a Windows,
    /// What blocks are fitted to, and the same held out: where the method has twins, these follow the windows.
    fitted: &'a Windows,
    settings: &'a Settings,
    journal: &'a mut dyn Journal,
    observer: &'a mut dyn Observer,
    forward: Forward,
    plan: Plan,
    /// What the predictions mind, while neurons are chosen.
    sensitivity: Option<Sensitivity>,
    /// What neurons go by.
    choice: Choice,
    block_losses: Option<Vec<f64>>,
    /// Of the first held-out window.
    losses: Vec<f64>,
    dense_window_nll: Vec<f64>,
    warnings: Vec<String>,
}

impl Run<'_> {
    fn checkpoint(&self) -> Result<(), PruneError> {
        if self.observer.interrupted() { Err(PruneError::Interrupted) } else { Ok(()) }
    }

    /// `head` of the model and, where it is another, of what the result is fitted to.
    fn output_heads(
        &self,
        head: impl Fn(&Model) -> Result<Head, ForwardError>,
    ) -> Result<(Head, Option<Head>), ForwardError> {
        let same = std::ptr::eq(self.model, self.reference);
        let reference = if same { None } else { Some(head(self.reference)?) };
        Ok((head(self.model)?, reference))
    }

    /// What the final residual streams of the held-out windows, dense and pruned, come to.
    fn held_out(&mut self, [dense, pruned]: [&[f32]; 2]) -> Result<HeldOut, PruneError> {
        let w = self.windows;
        let (own, base) = self.output_heads(|model| self.forward.head(model))?;
        let targets = w.targets(w.n_fit..w.n_windows());
        let mut rows: Vec<RowComparison> = Vec::with_capacity(targets.len());
        let n = LOGIT_ROWS * self.forward.n_embd();
        let (mut p, n_vocab) = (Vec::new(), own.n_vocab());
        for ((pruned, dense), targets) in
            pruned.chunks(n).zip(dense.chunks(n)).zip(targets.chunks(LOGIT_ROWS))
        {
            self.forward.logits(base.as_ref().unwrap_or(&own), dense, |_, logits| {
                p.clear();
                p.extend_from_slice(logits);
            })?;
            self.forward.logits(&own, pruned, |_, q| {
                let compared = q.par_chunks(n_vocab).zip(p.par_chunks(n_vocab)).zip(targets);
                rows.par_extend(compared.filter_map(|((q, p), t)| t.map(|t| compare_rows(q, p, t as usize))));
            })?;
        }
        let mean_nll =
            |window: &[RowComparison]| window.iter().map(|r| r.base_nll).sum::<f64>() / window.len() as f64;
        self.dense_window_nll = rows.chunks(w.n_ctx - 1).map(mean_nll).collect();
        self.losses = if self.settings.devices.is_empty() {
            rows[..w.n_ctx - 1].iter().map(|r| r.nll).collect()
        } else {
            self.losses_on_cpu()?
        };
        let mean = |f: fn(&RowComparison) -> f64| rows.iter().map(f).sum::<f64>() / rows.len() as f64;
        Ok(HeldOut {
            dense_ppl: mean(|r| r.base_nll).exp(),
            pruned_ppl: mean(|r| r.nll).exp(),
            kl: mean(|r| r.kl),
            top1: mean(|r| f64::from(u8::from(r.same_top))),
        })
    }

    /// Losses of the first held-out window's tokens, as every machine finds them again: devices may round to halves.
    fn losses_on_cpu(&self) -> Result<Vec<f64>, PruneError> {
        let (w, model) = (self.windows, self.model);
        let first = w.n_fit..w.n_fit + 1;
        let tokens = w.tokens_of(first.clone());
        let mut forward = Forward::new(model, w.n_ctx, self.settings.n_threads)?;
        let last = planned_stream(&mut forward, model, &self.plan, tokens, &*self.observer, |_| Ok(()))?;
        let head = forward.head(model)?;
        Ok(forward.nll(&head, &last, &w.targets(first))?)
    }

    /// What the plan comes to on the held-out windows.
    fn evaluate_plan(&mut self) -> Result<HeldOut, PruneError> {
        let w = self.windows;
        let range = w.n_fit..w.n_windows();
        let tokens = w.tokens_of(range);
        let embedded = |model| self.forward.embed(model, tokens);
        let mut streams = [embedded(self.reference)?, embedded(self.model)?];
        self.observer.stage("evaluate", self.model.hparams.n_layer());
        for il in 0..self.model.hparams.n_layer() {
            self.checkpoint()?;
            let dense = self.forward.upload(&self.reference.block(il)?)?;
            let pruned = self.forward.upload(&self.plan.block(self.model, il)?)?;
            for (stream, block) in streams.iter_mut().zip([&dense, &pruned]) {
                self.forward.advance(block, stream)?;
            }
            self.observer.step(il + 1, "");
        }
        self.held_out([&streams[0], &streams[1]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_scales_undo_the_size_of_the_stream() {
        let stream: Vec<f32> = (0..600).map(|i| 0.1 + (i * 37 % 101) as f32 / 7.0).collect();
        for (scale, token) in token_scales(&stream, 6, 1.0).iter().zip(stream.chunks_exact(6)) {
            let rms = mean_square(token).sqrt();
            assert!((scale * rms - 1.0).abs() < 1e-5, "{scale} {rms}");
        }
        assert_eq!(token_scales(&stream, 6, 0.0), [1.0; 100]);
    }
}
