//! Settings of a run and their defaults.

use super::{Loss, Method, Target};
use crate::forward::CHUNK_TOKENS;
use crate::ggml::{Compute, Device, Type};
use crate::model::{Arch, FfnUnit, Heads, Model, OutputArchs};
use crate::prune::NeuronCriterion;
use crate::spill::SpillStore;

/// Settings of the passes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Share of the blocks' parameters to remove, 0 < s < 1.
    pub sparsity: f64,
    /// Upper limit of the result's size. Blocks keep as much as it allows, and the sparsity only determines
    /// how many heads are removed.
    pub target: Option<Target>,
    /// Pruning method.
    pub method: Method,
    /// Distribution of the removed heads over the layers.
    pub heads: Heads,
    /// FFN unit that is removed from mixtures of experts.
    pub moe_unit: FfnUnit,
    /// Allowed output architectures.
    pub arch: Arch,
    /// Number of threads.
    pub n_threads: usize,
    /// Devices that run the blocks instead of the CPU.
    pub devices: Vec<Device>,
    /// Weight of the dense model's residual stream in the refit's target.
    pub dense_target_weight: f64,
    /// Exponent of the residual stream's size by which a token's error is divided, as the next norm does. At
    /// 0 all errors count equally, so that the few tokens with massive activations dominate. At 1 relative
    /// errors count.
    pub token_weight: f64,
    /// Ridge of a map's correction towards the dense model's residual stream, relative to the mean of its
    /// Gram matrix's diagonal.
    pub ridge_stream: f64,
    /// Ridge of the refit that compensates for removed neurons and for the rounding of `ffn_down`, if there
    /// are enough tokens.
    pub ridge_ffn: f64,
    /// Ridge of the refit that compensates for the rounding of `attn_output`.
    pub ridge_attn: f64,
    /// Number of attention groups to remove, instead of the method's formula.
    pub groups: Option<usize>,
    /// Number of tokens that the search for heads evaluates.
    pub head_tokens: usize,
    /// Length of the longest window on which putri-gguf's own search compares candidates, of which one half
    /// is repeated; at most 512 tokens are used.
    pub head_ctx: usize,
    /// Number of candidates that the paper's rounds score again after the first round, instead of all.
    pub rescored: Option<usize>,
    /// Loss by which the search for heads ranks candidates after the first look, which always uses
    /// divergence.
    pub head_loss: Loss,
    /// Number of tokens on which the loss curves of the widths are measured and the trials of the neuron
    /// criteria are fitted.
    pub curve_tokens: usize,
    /// Whether columns that are not yet rounded compensate for the rounding of those before.
    pub error_feedback: bool,
    /// Number of tokens on which the sensitivity of the predictions to each output of a block is measured.
    /// The sensitivity determines the choice of neurons and the widths per layer; widths are equal without
    /// it. At 0 all outputs count equally.
    pub sensitivity_tokens: usize,
    /// Criterion by which neurons are removed. If it is none, and outputs do not all count equally, both
    /// criteria are tried on the model.
    pub criterion: Option<NeuronCriterion>,
    /// Whether every block gets its own width.
    pub per_block_widths: bool,
    /// Smallest width of a block if each gets its own, relative to the width with the same share removed
    /// everywhere.
    pub least_width: f64,
    /// Number of resampled copies of every fitted window, to which blocks are fitted as well. A copy is the
    /// same text, with some tokens resampled from the dense model's predictions.
    pub resample_copies: usize,
    /// Share of a copy's tokens that are resampled, from 0 to 1.
    pub resample_share: f64,
    /// Whether biases take over the mean of the removed units.
    pub biases: bool,
    /// Number of passes of tuning over its part of the calibration windows; 0 turns tuning off.
    pub tune: usize,
    /// Largest step of tuning, relative to a vector's size.
    pub tune_rate: f64,
    /// Largest number of tokens per pass of tuning, spread evenly over the calibration windows.
    pub tune_limit: usize,
    /// Number of tokens per step of tuning, at least one window.
    pub tune_tokens: usize,
    /// Share of the tokens, from 0 to 1, that tuning resamples from the dense model's predictions in half of
    /// the windows of a step.
    pub tune_resample_share: f64,
    /// Types of the matrices that get new values.
    pub types: TensorTypes,
    /// Number of tokens that pass through a block in one graph, at least one window.
    pub chunk_tokens: usize,
    /// Storage of the residual streams of all tokens.
    pub spill: SpillStore,
}

impl Settings {
    /// Hardware that graphs run on.
    pub fn compute(&self) -> Compute {
        Compute { n_threads: self.n_threads, devices: self.devices.clone() }
    }

    /// Number of versions of each window that blocks are fitted to: the window itself and its resampled
    /// copies.
    pub fn copies(&self) -> usize {
        1 + self.resample_copies
    }

    /// Ridge of the refit that compensates for neurons removed out of `n_ff`, where fits see `n_tokens`
    /// tokens.
    ///
    /// It is `ridge_ffn`, and larger if the tokens are few, up to the mean of the Gram matrix's diagonal.
    /// Sums over few tokens say little about most directions, and nothing about some if there are fewer
    /// tokens than neurons; a close fit overfits these tokens. `n_tokens` does not count the tokens of
    /// resampled copies: a small number of tokens needs the same ridge with them.
    pub fn ridge_of_neurons(&self, n_ff: usize, n_tokens: usize) -> f64 {
        let few = n_ff as f64 / n_tokens as f64 / ENOUGH;
        self.ridge_ffn.max((self.ridge_ffn * few.powi(2)).min(1.0))
    }

    /// Output architectures that `model` may be written in.
    pub fn output_archs(&self, model: &Model) -> OutputArchs {
        model.output_archs(self.heads, self.arch)
    }

    /// Unit that is removed from the FFNs of `model`.
    pub fn ffn_unit(&self, model: &Model) -> FfnUnit {
        if model.hparams.experts.is_some() { self.moe_unit } else { FfnUnit::Neuron }
    }
}

/// Number of neurons per token up to which the ridge need not grow. Beyond it, the ridge grows as the square.
/// The value fits SmolLM2 at 0.1, 0.4 and 1.7 neurons per token.
const ENOUGH: f64 = 0.125;

/// Types of the matrices that get new values; without one, the type of the source is used.
#[derive(Clone, Copy, Debug, Default)]
pub struct TensorTypes {
    /// Type of `attn_output`.
    pub attn_output: Option<Type>,
    /// Type of `ffn_down`; its block size is also the step of the widths.
    pub ffn_down: Option<Type>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            sparsity: 0.25,
            target: None,
            method: Method::Putri,
            heads: Heads::Auto,
            moe_unit: FfnUnit::Expert,
            arch: Arch::Auto,
            n_threads: 1,
            devices: Vec::new(),
            dense_target_weight: 0.35,
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
            sensitivity_tokens: 2048,
            error_feedback: true,
            criterion: None,
            per_block_widths: true,
            least_width: 0.0,
            resample_copies: 1,
            resample_share: 0.5,
            biases: true,
            tune: 1,
            tune_rate: 0.005,
            tune_limit: 16384,
            tune_tokens: 2048,
            tune_resample_share: 0.5,
            types: TensorTypes::default(),
            chunk_tokens: CHUNK_TOKENS,
            spill: SpillStore::default(),
        }
    }
}
