//! Passes over the blocks: they connect the forward passes with the pruning algorithms of [`crate::prune`].
//!
//! A [`Method`] is a list of stages (`method.rs`), each in a file of `stages/`. The stages share a `Run`.

mod allocation;
mod checkpoint;
pub mod experts;
mod forecast;
mod memory;
mod method;
mod plan;
mod prediction_loss;
mod resampled;
mod run;
mod sensitivity;
mod settings;
mod size;
mod stages;
mod stream;
mod training;

pub use allocation::{budgets, check_budget};
use allocation::{
    equal_widths, equally_narrowed, groups_to_remove, neurons_for_target, neurons_to_remove, within_family,
};
pub use checkpoint::{Checkpoint, KeptTensor, Record};
pub use forecast::{Calibration, Forecast, StageForecast, forecast};
pub use memory::{NoRoom, within_device_memory, within_memory};
pub use method::Method;
pub use plan::{BlockPlan, Plan};
pub use prediction_loss::Loss;
use run::Run;
pub use settings::{Settings, TensorTypes};
pub use size::{FileSize, NewMatrices, Target, TargetError, sparsity_for};
use size::{even_shapes, file_size, new_matrices};
pub(crate) use stages::HEADS;
pub use stages::{
    BlockSettings, HeadSettings, RecoverBudget, RecoverSettings, ResampleSettings, SensitivitySettings,
    TuneSettings, WidthSettings,
};
use stream::embedded;
pub use training::{Among, Moves};

use crate::calibrate::Windows;
use crate::forward::{Forward, ForwardError, InputSquares};
use crate::ggml::GgmlError;
use crate::gguf::{GgufError, Value};
use crate::model::Model;
use crate::observe::ObserveError;
use crate::prune::{BudgetError, Singular};

/// Stage that has not run yet, with its amount of work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlannedStage {
    /// Name under which [`Observer::stage`] announces it.
    pub name: &'static str,
    /// Floating-point operations that take as long in graphs, estimated from shapes.
    pub work: f64,
    /// Whether memory bandwidth limits the stage rather than arithmetic. The speed of such a stage says
    /// little about that of other stages.
    pub bandwidth_bound: bool,
}

/// Receiver of progress reports, which can also stop the work.
pub trait Observer {
    /// Announces the stages that have not run yet, in their order; they replace those of an earlier plan.
    /// Some of them may be skipped, and stages that are not planned may run as well.
    /// `whole` says whether nothing else follows: a search for the largest sparsity within a quality limit
    /// announces one result after another.
    /// A stage without a name stands for work that is announced later.
    fn plan(&mut self, _stages: &[PlannedStage], _whole: bool) {}
    /// Announces the start of a stage with `steps` steps.
    fn stage(&mut self, name: &str, steps: usize);
    /// Reports that `done` steps of the stage are done; `note` describes the result of the last one.
    fn step(&mut self, done: usize, note: &str);
    /// Returns whether the work should stop as soon as possible.
    fn interrupted(&self) -> bool {
        false
    }
    /// Takes an interruption back, where a stage can end early with what it has. Returns whether the rest is to
    /// go on.
    fn end_stage(&mut self) -> bool {
        false
    }
}

/// Error of a pruning run.
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
    /// The method does not prune mixtures of experts; only putri-gguf's own does.
    #[error("this method prunes no mixtures of experts; only putri-gguf's own does")]
    Experts,
    /// Different numbers of heads per layer are requested, but no output architecture supports them.
    #[error(
        "no architecture holds layers of {0} with head counts of their own in this model; remove heads uniformly"
    )]
    HeadsPerBlock(&'static str),
    /// The activations of a layer are degenerate.
    #[error("block {block}, {part}: cannot be fitted")]
    Singular {
        /// Number of the block.
        block: usize,
        /// Matrix: `attn_output` or `ffn_down`.
        part: &'static str,
        /// Cause.
        source: Singular,
    },
    /// The fitted values are far larger than those before.
    #[error(
        "block {block}, {part}: new values are {times:.0} times as large as those before; calibrate on more text"
    )]
    Grown {
        /// Number of the block.
        block: usize,
        /// Matrix: `attn_output` or `ffn_down`.
        part: &'static str,
        /// Ratio of the new values' size to the old.
        times: f32,
    },
    /// An observation in libllama failed.
    #[error(transparent)]
    Observe(ObserveError),
    /// A temporary file failed.
    #[error("cannot use a temporary file")]
    Spill(#[from] std::io::Error),
    /// The observer asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Comparison of the pruned and requantised model with the dense one on the held-out windows, by the crate's
/// own forward pass.
pub type HeldOut = crate::numeric::Metrics;

/// Result of the passes.
pub struct Pruned {
    /// Kept parts of each block, with the tensors that changed.
    pub plan: Plan,
    /// Comparison with the dense model on the held-out windows.
    pub held_out: HeldOut,
    /// Negative log-likelihoods under the pruned model of the tokens of the first held-out window except its
    /// first token, in nats, computed on the CPU.
    pub losses: Vec<f64>,
    /// Mean negative log-likelihood of the dense model on each held-out window, in nats.
    pub dense_window_nll: Vec<f64>,
    /// Estimated loss of the predictions by the width of each block alone, in nats of KL divergence.
    /// None if all widths are equal or an earlier run chose them.
    pub block_losses: Option<Vec<f64>>,
    /// Keys and values that the stages add to the `putri.*` metadata of the output.
    pub provenance: Vec<(&'static str, Value)>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// Plans the pruning of `model` on the calibration `windows`.
///
/// `reference` is the same model before it was quantised, or `model` itself. The result is fitted to it, and
/// `attn_output` and `ffn_down` are taken from it, because they get new values anyway. Records of an earlier
/// run on the same terms in `checkpoint` are reused; the result is the same as without them.
///
/// # Errors
/// [`PruneError`] if the sparsity cannot be reached, the engine fails, or the observer interrupts.
pub fn run(
    model: &Model,
    reference: &Model,
    windows: &Windows,
    s: &Settings,
    checkpoint: &mut dyn Checkpoint,
    observer: &mut dyn Observer,
) -> Result<Pruned, PruneError> {
    let budgets = budgets(model, s);
    let s = &within_family(model, s);
    let mut run = Run::new(model, reference, windows, s, budgets, checkpoint, observer)?;
    for stage in s.method.stages() {
        stage.run(&mut run)?;
    }
    Ok(run.finish())
}

/// Names of all records that a run of any method on a model of `n_layer` blocks may keep in a checkpoint.
pub fn record_names(n_layer: usize) -> Vec<String> {
    let methods = [Method::Putri, Method::Paper, Method::TwoStage];
    let stages = methods.into_iter().flat_map(Method::stages);
    let of_experts = experts::RECORDS.map(String::from);
    stages.flat_map(|stage| stage.records(n_layer)).chain(of_experts).collect()
}

/// Squared inputs of the pruned model's matrices on the windows that it was fitted to, block by block.
pub fn input_squares(
    model: &Model,
    plan: &Plan,
    windows: &Windows,
    s: &Settings,
    observer: &mut dyn Observer,
) -> Result<Vec<InputSquares>, PruneError> {
    let forward = forward(model, windows.n_ctx, s)?;
    let mut stream = embedded(&forward, model, windows.tokens_of(0..windows.n_fit), &s.spill)?;
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

/// Creates a forward pass over windows of `n_ctx` tokens.
fn forward(model: &Model, n_ctx: usize, s: &Settings) -> Result<Forward, ForwardError> {
    Ok(Forward::new(model, n_ctx, s.compute())?.in_chunks_of(s.chunk_tokens))
}

/// Factor of each token of `stream` `[n_tokens, n_embd]` in least-squares sums: its root mean square to the
/// power of −`weight`.
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
