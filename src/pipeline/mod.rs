//! The passes over the blocks: where forward passes and the mathematics of pruning meet.
//!
//! 1. `heads`: which attention groups go, by their effect on the model's predictions.
//! 2. `curves`: what every block loses as its feed-forward narrows; from that, the widths.
//! 3. `sensitivity`: what errors in the stream behind each block cost the predictions.
//! 4. `sequential`: block after block, refit attn_output, choose neurons, refit ffn_down, requantise;
//!    each block sees the pruned and requantised blocks before it.
//! 5. `tune`: norms and biases, by descent on what the whole model's predictions lose.

mod curves;
mod forecast;
mod heads;
mod journal;
mod judge;
mod plan;
mod sensitivity;
mod sequential;
mod stream;
mod tune;

pub use forecast::{Calibration, Forecast, NoRoom, StageForecast, forecast, within_memory};
pub use journal::{Journal, Settled};
pub use judge::Loss;
pub use plan::{BlockPlan, Plan};
use sensitivity::Sensitivity;
use stream::embedded;

use crate::calibrate::Windows;
use crate::forward::{CHUNK_TOKENS, Forward, ForwardError, InputSquares, embed};
use crate::ggml::{GgmlError, Type};
use crate::gguf::GgufError;
use crate::model::Model;
use crate::prune::{self, Budget, BudgetError, Singular};
use crate::spill::Shelf;

/// How to prune.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Method {
    /// Heads first by lazy greedy search, widths per block from loss curves, one sequential pass that
    /// refits towards a mixture of the block's own output and the dense model's stream, and norms and biases
    /// tuned on the whole.
    #[default]
    Putri,
    /// The paper's method as its authors' code does it: neurons first by its score with equal widths,
    /// refit to the block's own output, then heads in rounds by perplexity on one sequence.
    Paper,
    /// A simpler rival, after 2SSP (arXiv 2501.17771): neurons by the norm of their activations with equal
    /// widths and no refit, then whole blocks' attention by perplexity.
    TwoStage,
}

/// Settings of the passes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Share of the blocks' parameters to remove, 0 < s < 1.
    pub sparsity: f64,
    /// How to prune.
    pub method: Method,
    /// Threads.
    pub n_threads: usize,
    /// Weight of the dense model's stream in the refit's target.
    pub mixture: f64,
    /// How far a token's error counts relative to its residual stream, which the next norm divides by:
    /// 0 counts all errors alike, so that the few tokens with massive activations decide; 1 counts
    /// relative errors.
    pub token_weight: f64,
    /// Ridge of a map's correction towards the dense model's stream, relative to the mean of its Gram
    /// matrix's diagonal.
    pub ridge_stream: f64,
    /// Ridge of what makes up for neurons that went, and for the rounding of ffn_down.
    pub ridge_ffn: f64,
    /// Ridge of what makes up for the rounding of attn_output.
    pub ridge_attn: f64,
    /// Attention groups to remove, instead of the paper's formula.
    pub groups: Option<usize>,
    /// Tokens that heads are judged on.
    pub head_tokens: usize,
    /// Longest window that our search compares candidates on.
    pub head_ctx: usize,
    /// Candidates that the paper's rounds score again after the first round, instead of all.
    pub rescored: Option<usize>,
    /// What heads are judged by.
    pub head_loss: Loss,
    /// Tokens that the widths' loss curves are measured on.
    pub curve_tokens: usize,
    /// Tokens that the model's predictions are judged on with one block narrowed.
    pub probe_tokens: usize,
    /// Columns that are still to be rounded make up for the rounding of those before.
    pub error_feedback: bool,
    /// Tokens on which it is measured how much the predictions mind each output of a block, so that neurons are
    /// chosen by it; 0 counts all outputs alike.
    pub sensitivity_tokens: usize,
    /// Every block gets its own width.
    pub per_block_widths: bool,
    /// Biases take over the mean of what was removed.
    pub biases: bool,
    /// Times that tuning goes over its part of the calibration windows; 0 is no tuning.
    pub tune: usize,
    /// Largest step of tuning, relative to a vector's size.
    pub tune_rate: f64,
    /// Tokens that tuning goes over at a time at most, spread evenly over the calibration windows.
    pub tune_limit: usize,
    /// Tokens per step of tuning, at least one window.
    pub tune_tokens: usize,
    /// Types of the matrices that get new values.
    pub types: TensorTypes,
    /// Tokens that pass through a block in one graph, at least one window.
    pub chunk_tokens: usize,
    /// Where the streams of all tokens live.
    pub shelf: Shelf,
}

/// Types in which matrices with new values are written; those of the source where none is given.
#[derive(Clone, Copy, Debug, Default)]
pub struct TensorTypes {
    /// Of attn_output.
    pub attn_output: Option<Type>,
    /// Of ffn_down, whose block size is also the step of the widths.
    pub ffn_down: Option<Type>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            sparsity: 0.25,
            method: Method::Putri,
            n_threads: 1,
            mixture: 0.35,
            token_weight: 1.0,
            ridge_stream: 0.1,
            ridge_ffn: 1e-3,
            ridge_attn: 1e-2,
            groups: None,
            head_tokens: 1024,
            head_ctx: 256,
            rescored: None,
            head_loss: Loss::Divergence,
            curve_tokens: 4096,
            probe_tokens: 2048,
            sensitivity_tokens: 2048,
            error_feedback: true,
            per_block_widths: true,
            biases: true,
            tune: 1,
            tune_rate: 0.005,
            tune_limit: 16384,
            tune_tokens: 2048,
            types: TensorTypes::default(),
            chunk_tokens: CHUNK_TOKENS,
            shelf: Shelf::default(),
        }
    }
}

/// Who is told how far the work is, and can stop it.
pub trait Observer {
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
    /// A temporary file failed.
    #[error("temporary file: {0}")]
    Spill(#[from] std::io::Error),
    /// The observer asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// What came of the passes.
pub struct Outcome {
    /// What stays of each block, with the tensors that changed.
    pub plan: Plan,
    /// Whether norms and biases were tuned, and held-out windows confirmed it.
    pub tuned: bool,
    /// Perplexity on the held-out windows of the dense model.
    pub dense_ppl: f64,
    /// Perplexity on the held-out windows of the pruned and requantised model, by our own forward.
    pub pruned_ppl: f64,
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
    let budgets = budgets(model, &s.types);
    let s = &within_family(model, s);
    let s = &match s.method {
        Method::Putri => s.clone(),
        // The authors' code counts all errors alike and knows no quantisation.
        Method::Paper | Method::TwoStage => {
            Settings { error_feedback: false, token_weight: 0.0, biases: false, tune: 0, ..s.clone() }
        }
    };
    let settled = journal.settled()?;
    let mut run = Run {
        forward: forward(model, windows.n_ctx, s)?,
        model,
        reference,
        windows,
        settings: s,
        journal,
        observer,
        plan: Plan::whole(model),
        sensitivity: None,
        warnings: Vec::new(),
    };
    let n_groups = groups_to_remove(model, &budgets, s);
    // Where groups differ in size, the paper's order (neurons before heads) has to assume the smallest.
    let group_params = budgets.iter().filter(|b| b.n_groups > 0).map(|b| b.group_params).min().unwrap_or(0);
    let mut tuned = false;
    let (dense_ppl, pruned_ppl) = match s.method {
        Method::Putri => {
            run.search_heads(&budgets, n_groups, settled.heads)?;
            let removed = run.plan.attention_params_removed(&budgets);
            let widths = match settled.widths {
                Some(widths) => widths,
                None => run.choose_widths(&budgets, removed)?,
            };
            run.journal.widths(&widths)?;
            if s.sensitivity_tokens > 0 && settled.blocks.len() < widths.len() {
                run.sensitivity = Some(run.sensitivity(s.sensitivity_tokens)?);
            }
            let mut streams = run.sequential_pass(&widths, settled.blocks)?;
            run.sensitivity = None;
            tuned = run.tune(&mut streams)?;
            let held_out = run.forward.span(&(windows.n_fit..windows.n_windows()));
            run.held_out_ppl([&streams.dense[held_out.clone()], &streams.pruned[held_out]])?
        }
        Method::Paper | Method::TwoStage => {
            let widths = equal_widths(model, &budgets, s, n_groups * group_params)?;
            run.sequential_pass(&widths, settled.blocks)?;
            run.search_heads(&budgets, n_groups, None)?;
            run.evaluate_plan()?
        }
    };
    Ok(Outcome { plan: run.plan, tuned, dense_ppl, pruned_ppl, warnings: run.warnings })
}

/// Checks that the sparsity can be reached in the types that `model` has.
///
/// # Errors
/// [`PruneError::Budget`] with what can be had.
pub fn check_budget(model: &Model, s: &Settings) -> Result<(), PruneError> {
    let budgets = budgets(model, &s.types);
    let s = &within_family(model, s);
    let attention = groups_to_remove(model, &budgets, s)
        * budgets.iter().filter(|b| b.n_groups > 0).map(|b| b.group_params).min().unwrap_or(0);
    prune::ffn_params_to_remove(&budgets, s.sparsity, attention)?;
    Ok(())
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
    let mut stream = embedded(model, windows.tokens_of(0..windows.n_fit), &s.shelf)?;
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
    Ok(Forward::new(model, n_ctx, s.n_threads)?.in_chunks_of(s.chunk_tokens))
}

/// The settings as far as the architecture of `model` can hold what comes of them.
fn within_family(model: &Model, s: &Settings) -> Settings {
    let carriers = [Some(model.hparams.family), model.uneven()];
    let has_biases = carriers.into_iter().flatten().any(|f| f.traits().output_biases);
    Settings {
        per_block_widths: s.per_block_widths && model.uneven().is_some(),
        biases: s.biases && has_biases,
        ..s.clone()
    }
}

/// Groups to remove, capped by the budget and by what may go: the first block keeps one, and where all
/// blocks must stay equal every block keeps as many.
fn groups_to_remove(model: &Model, budgets: &[Budget], s: &Settings) -> usize {
    let total: usize = budgets.iter().map(Budget::params).sum();
    let largest = budgets.iter().map(|b| b.group_params).max().unwrap_or(0).max(1);
    let affordable = (total as f64 * s.sparsity) as usize / largest;
    let wanted = s.groups.unwrap_or_else(|| prune::head_groups_paper(budgets, s.sparsity)).min(affordable);
    let whole_blocks = s.method == Method::TwoStage;
    let Some(carrier) = model.uneven() else {
        if whole_blocks {
            return 0;
        }
        let per_block = (wanted as f64 / budgets.len() as f64).round() as usize;
        let per_block = per_block.min(affordable / budgets.len()).min(budgets[0].n_groups.saturating_sub(1));
        return per_block * budgets.len();
    };
    let limits = heads::removable_groups(carrier, budgets);
    let counts = |(limit, b): &(usize, &Budget)| !whole_blocks || *limit == b.n_groups;
    let available: usize = limits.into_iter().zip(budgets).filter(counts).map(|(limit, _)| limit).sum();
    let wanted = wanted.min(available);
    if whole_blocks { wanted - wanted % budgets[0].n_groups.max(1) } else { wanted }
}

/// Neurons to remove once attention gave up so many parameters.
fn neurons_to_remove(
    budgets: &[Budget],
    s: &Settings,
    attention_removed: usize,
) -> Result<usize, BudgetError> {
    let params = prune::ffn_params_to_remove(budgets, s.sparsity, attention_removed)?;
    Ok(params.div_ceil(budgets[0].neuron_params))
}

/// Widths that are the same for all blocks, or as nearly as steps allow if they may differ.
fn equal_widths(
    model: &Model,
    budgets: &[Budget],
    s: &Settings,
    attention_removed: usize,
) -> Result<Vec<usize>, BudgetError> {
    let n_remove = neurons_to_remove(budgets, s, attention_removed)?;
    let widths: Vec<_> = budgets.iter().map(|b| prune::possible_widths(b.n_ff, b.ff_step)).collect();
    let mut widths = prune::uniform(&widths, n_remove);
    if model.uneven().is_none() {
        let narrowest = widths.iter().copied().min().unwrap_or(0);
        widths.fill(narrowest);
    }
    Ok(widths)
}

/// What every block can give up if changed tensors are written in `types`.
pub fn budgets(model: &Model, types: &TensorTypes) -> Vec<Budget> {
    let h = &model.hparams;
    let mut budgets: Vec<Budget> = h
        .blocks
        .iter()
        .zip(&model.blocks)
        .map(|(b, t)| Budget {
            n_groups: b.n_head_kv,
            group_params: h.group_params(b),
            n_ff: b.n_ff,
            neuron_params: h.neuron_params(),
            ff_step: ff_step(types.ffn_down.unwrap_or(model.tensor(&t.ffn_down).ty)),
        })
        .collect();
    if model.uneven().is_none() {
        // All take the widest step, so that all can take the same widths.
        let widest = budgets.iter().map(|b| b.ff_step).max().unwrap_or(1);
        budgets.iter_mut().for_each(|b| b.ff_step = widest);
    }
    budgets
}

/// Widths change in steps that keep ffn_down in its type, and rows long enough for vector kernels.
fn ff_step(ty: Type) -> usize {
    ty.block_size().max(32)
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
    settings: &'a Settings,
    journal: &'a mut dyn Journal,
    observer: &'a mut dyn Observer,
    forward: Forward,
    plan: Plan,
    /// What the predictions mind, while neurons are chosen.
    sensitivity: Option<Sensitivity>,
    warnings: Vec<String>,
}

impl Run<'_> {
    fn checkpoint(&self) -> Result<(), PruneError> {
        if self.observer.interrupted() { Err(PruneError::Interrupted) } else { Ok(()) }
    }

    /// Perplexity of two final residual streams of the held-out windows.
    fn held_out_ppl(&mut self, streams: [&[f32]; 2]) -> Result<(f64, f64), PruneError> {
        let w = self.windows;
        let heads = [self.forward.head(self.reference)?, self.forward.head(self.model)?];
        let targets = w.targets(w.n_fit..w.n_windows());
        let mut ppl = [0.0; 2];
        for ((p, stream), head) in ppl.iter_mut().zip(streams).zip(&heads) {
            let nll = self.forward.nll(head, stream, &targets)?;
            *p = (nll.iter().sum::<f64>() / nll.len() as f64).exp();
        }
        Ok((ppl[0], ppl[1]))
    }

    /// Perplexity on the held-out windows of the dense model and of the plan.
    fn evaluate_plan(&mut self) -> Result<(f64, f64), PruneError> {
        let w = self.windows;
        let range = w.n_fit..w.n_windows();
        let tokens = w.tokens_of(range);
        let mut streams = [embed(self.reference, tokens)?, embed(self.model, tokens)?];
        let mut out = vec![0.0; streams[0].len()];
        self.observer.stage("evaluate", self.model.hparams.n_layer());
        for il in 0..self.model.hparams.n_layer() {
            self.checkpoint()?;
            let dense = self.forward.upload(&self.reference.block(il)?)?;
            let pruned = self.forward.upload(&self.plan.block(self.model, il)?)?;
            for (stream, block) in streams.iter_mut().zip([&dense, &pruned]) {
                self.forward.stream(block, stream, &mut out)?;
                std::mem::swap(stream, &mut out);
            }
            self.observer.step(il + 1, "");
        }
        self.held_out_ppl([&streams[0], &streams[1]])
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
