//! Settings of a run and their defaults.

use super::experts::ExpertSettings;
use super::stages::{
    BlockSettings, HeadSettings, RecoverSettings, ResampleSettings, SensitivitySettings, TuneSettings,
    WidthSettings,
};
use super::{Method, Target};
use crate::forward::{CHUNK_TOKENS, SUM_TOKENS, whole_windows};
use crate::ggml::{Compute, Device, Type};
use crate::model::{Arch, FfnUnit, Heads, Model, OutputArchs};
use crate::prune::NeuronCriterion;
use crate::spill::SpillStore;

/// Settings of a run: those of each stage, and those that several stages read.
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
    /// Number of threads of rayon's pool, on which passes and algebra run, and of libllama.
    pub n_threads: usize,
    /// Devices that run the blocks instead of the CPU.
    pub devices: Vec<Device>,
    /// Settings of the search for head groups to remove.
    pub head_search: HeadSettings,
    /// Settings of the sensitivity.
    pub sensitivity: SensitivitySettings,
    /// Settings of the blocks' widths.
    pub widths: WidthSettings,
    /// Settings of the resampled copies.
    pub resample: ResampleSettings,
    /// Settings of the sequential pass over the blocks.
    pub blocks: BlockSettings,
    /// Settings of the tuning of norms and biases.
    pub tune: TuneSettings,
    /// Settings of recovery.
    pub recover: RecoverSettings,
    /// Settings of the choice of whole experts.
    pub experts: ExpertSettings,
    /// Criterion by which neurons are removed. If it is none, and outputs do not all count equally, both
    /// criteria are tried on the model.
    pub criterion: Option<NeuronCriterion>,
    /// Types of the matrices that get new values.
    pub types: TensorTypes,
    /// Largest number of tokens that pass through a block together; at least one window does.
    pub chunk_tokens: usize,
    /// Storage of the residual streams of all tokens.
    pub spill: SpillStore,
}

impl Settings {
    /// Hardware that graphs run on.
    pub fn compute(&self) -> Compute {
        Compute { n_threads: self.n_threads, devices: self.devices.clone() }
    }

    /// Number of tokens that pass through a block together, in whole windows of `n_ctx`. A device takes them in
    /// one graph.
    pub fn chunk(&self, n_ctx: usize) -> usize {
        let most = if self.devices.is_empty() { usize::MAX } else { SUM_TOKENS };
        whole_windows(self.chunk_tokens.min(most), n_ctx)
    }

    /// Number of versions of each window that blocks are fitted to: the window itself and its resampled
    /// copies.
    pub fn copies(&self) -> usize {
        1 + self.resample.copies
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
        self.blocks.ridge_ffn.max((self.blocks.ridge_ffn * few.powi(2)).min(1.0))
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
            head_search: HeadSettings::default(),
            sensitivity: SensitivitySettings::default(),
            widths: WidthSettings::default(),
            resample: ResampleSettings::default(),
            blocks: BlockSettings::default(),
            tune: TuneSettings::default(),
            recover: RecoverSettings::default(),
            experts: ExpertSettings::default(),
            criterion: None,
            types: TensorTypes::default(),
            chunk_tokens: CHUNK_TOKENS,
            spill: SpillStore::default(),
        }
    }
}
