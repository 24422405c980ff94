//! What can be set, and what it is where nothing is said.

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
    /// What the result shall not be larger than: blocks keep as much as that allows, and the sparsity only says how
    /// many heads go.
    pub target: Option<Target>,
    /// How to prune.
    pub method: Method,
    /// How heads may go.
    pub heads: Heads,
    /// What mixtures of experts lose.
    pub moe_unit: FfnUnit,
    /// Which architecture the result may have.
    pub arch: Arch,
    /// Threads.
    pub n_threads: usize,
    /// Devices that blocks pass through, instead of the CPU.
    pub devices: Vec<Device>,
    /// Weight of the dense model's stream in the refit's target.
    pub dense_target_weight: f64,
    /// How far a token's error counts relative to its residual stream, which the next norm divides by:
    /// 0 counts all errors alike, so that the few tokens with massive activations decide; 1 counts
    /// relative errors.
    pub token_weight: f64,
    /// Ridge of a map's correction towards the dense model's stream, relative to the mean of its Gram
    /// matrix's diagonal.
    pub ridge_stream: f64,
    /// Ridge of what makes up for neurons that went, and for the rounding of ffn_down, where there are tokens enough.
    pub ridge_ffn: f64,
    /// Ridge of what makes up for the rounding of attn_output.
    pub ridge_attn: f64,
    /// Attention groups to remove, instead of the method's formula.
    pub groups: Option<usize>,
    /// Tokens that heads are judged on.
    pub head_tokens: usize,
    /// Longest window that our search compares candidates on, one half of it twice; at most 512 tokens are taken.
    pub head_ctx: usize,
    /// Candidates that the paper's rounds score again after the first round, instead of all.
    pub rescored: Option<usize>,
    /// What heads are judged by, once a first look, which always is by divergence, put them in order.
    pub head_loss: Loss,
    /// Tokens that the widths' loss curves are measured on, and trials of what neurons go by are fitted to.
    pub curve_tokens: usize,
    /// Columns that are still to be rounded make up for the rounding of those before.
    pub error_feedback: bool,
    /// Tokens on which it is measured how much the predictions mind each output of a block: neurons are chosen by it, and
    /// widths per block, which are equal without. 0 counts all outputs alike.
    pub sensitivity_tokens: usize,
    /// What neurons go by; if nothing is said, both ways are tried on the model, where outputs do not all count alike.
    pub criterion: Option<NeuronCriterion>,
    /// Every block gets its own width.
    pub per_block_widths: bool,
    /// The least width of a block where each gets its own, relative to what would stay if all lost the same share.
    pub least_width: f64,
    /// Twins of every fitted window, which blocks are fitted to, too: the same text, with some tokens resampled from the dense
    /// model's predictions.
    pub resample_copies: usize,
    /// Share of a resampled copy's tokens, from 0 to 1, that are resampled.
    pub resample_share: f64,
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
    /// Share of the tokens, from 0 to 1, that tuning draws anew from the dense model's predictions, in half of the windows
    /// of a step.
    pub tune_resample_share: f64,
    /// Types of the matrices that get new values.
    pub types: TensorTypes,
    /// Tokens that pass through a block in one graph, at least one window.
    pub chunk_tokens: usize,
    /// Where the streams of all tokens live.
    pub spill: SpillStore,
}

impl Settings {
    /// What graphs run on.
    pub fn compute(&self) -> Compute {
        Compute { n_threads: self.n_threads, devices: self.devices.clone() }
    }

    /// How often blocks are fitted to each window: as it is, and where windows have resampled copies, to these, too.
    pub fn copies(&self) -> usize {
        1 + self.resample_copies
    }

    /// Ridge of what makes up for neurons that go out of `n_ff`, where fits see `n_tokens` tokens: `ridge_ffn`, and more
    /// where these are few, up to what an input has by itself on average. Sums over few tokens know little of most directions,
    /// and nothing of some where tokens are fewer than neurons; a close fit learns these tokens by heart. Those of resampled copies are not
    /// to be counted: few want the same ridge with them.
    pub fn ridge_of_neurons(&self, n_ff: usize, n_tokens: usize) -> f64 {
        let few = n_ff as f64 / n_tokens as f64 / ENOUGH;
        self.ridge_ffn.max((self.ridge_ffn * few.powi(2)).min(1.0))
    }

    /// Where `model` may go.
    pub fn output_archs(&self, model: &Model) -> OutputArchs {
        model.output_archs(self.heads, self.arch)
    }

    /// What the feed-forwards of `model` lose.
    pub fn ffn_unit(&self, model: &Model) -> FfnUnit {
        if model.hparams.experts.is_some() { self.moe_unit } else { FfnUnit::Neuron }
    }
}

/// Neurons per token up to which the ridge need not grow; then it does so as the square (measured on SmolLM2 at 0.1, 0.4 and
/// 1.7 neurons per token).
const ENOUGH: f64 = 0.125;

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
