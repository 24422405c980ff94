//! Options that take one of a few names.

use clap::ValueEnum;

/// Names of [`putri_gguf::pipeline::Method`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// Greedy search for heads, widths per layer, refit towards the source, norms and biases tuned.
    Putri,
    /// The method of the Putri paper (arXiv 2605.18331) as its authors' code does it: slow, for comparison.
    Paper,
}

/// Names of [`putri_gguf::model::Heads`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HeadsArg {
    /// A different number per layer, where the output architecture supports it; otherwise the same number.
    Auto,
    /// A different number per layer; models without an output architecture for that are refused.
    PerLayer,
    /// The same number in every layer, and one feed-forward width, for programs that read one number only.
    Uniform,
    /// No heads: only feed-forward neurons are removed.
    None,
}

/// Units that are removed from the FFNs of mixtures of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MoeArg {
    /// Whole experts: those that contribute least to the tokens routed to them (REAP, arXiv 2510.13999).
    #[value(alias = "whole")]
    Experts,
    /// Neurons of every expert, the same number in each; every expert is refitted.
    #[value(alias = "narrow")]
    Width,
}

/// Names of [`putri_gguf::prune::ExpertCriterion`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExpertCriterionArg {
    /// Mean length of an expert's weighted output over the tokens that chose it (REAP, arXiv 2510.13999).
    Reap,
    /// Number of tokens that chose it.
    Frequency,
    /// Sum of its router weights.
    RouterWeight,
}

/// Names of [`putri_gguf::prune::RouterWeights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RouterWeightsArg {
    /// Weights as the layer applies them.
    Applied,
    /// Weights of each token divided by their sum, for routers that do not do so themselves.
    Normalised,
}

/// Names of [`putri_gguf::model::Arch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ArchArg {
    /// The architecture that allows most heads and neurons to be removed.
    Auto,
    /// The source's own architecture.
    Keep,
}

/// Names of [`putri_gguf::evaluate::Protocol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PplStyle {
    /// As llama-perplexity: BOS at the start of each window where there is one; the second half is scored.
    Llama,
    /// As papers do: no BOS; all tokens of a window but the first are scored.
    Hf,
}

/// Names of [`putri_gguf::pipeline::Moves`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RecoverMethodArg {
    /// Every value by itself, with the optimiser's state in as many bits as --max-memory allows.
    Full,
    /// Low-rank adapters of rank 32.
    Lora,
}
