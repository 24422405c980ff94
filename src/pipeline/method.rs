//! Pruning methods, each a list of stages.

use super::stages::{
    Blocks, ChooseCriterion, EvaluatePlan, GreedyHeads, HeadRounds, JudgeStreams, LossCurveWidths,
    MeasureSensitivity, Recover, ResampleCopies, Stage, Tune, UniformWidths,
};
use super::{BlockSettings, ResampleSettings, Settings, TuneSettings};
use crate::prune::{self, Budget};

/// Pruning method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Method {
    /// putri-gguf's own method.
    /// A lazy greedy search removes heads first. Loss curves give the width of each layer. One sequential
    /// pass refits towards a weighted mean of the block's own output and the dense model's residual stream.
    /// Finally, norms and biases are tuned on the whole model.
    #[default]
    Putri,
    /// The paper's method as its authors' code implements it.
    /// Neurons are removed first by its score, with uniform widths, and the rest is refitted to the block's
    /// own output. Heads are then removed in rounds by perplexity on one sequence.
    Paper,
    /// Simpler baseline after 2SSP (arXiv 2501.17771).
    /// Neurons are removed by the norm of their activations, with uniform widths and no refit. The attention
    /// of whole blocks is then removed by perplexity.
    TwoStage,
    /// No pruning: recovery goes on with a model that was pruned before.
    Recovery,
}

impl Method {
    /// Stages, in the order in which they run.
    pub(super) fn stages(self) -> Vec<Box<dyn Stage>> {
        match self {
            Method::Putri => vec![
                Box::new(GreedyHeads),
                Box::new(MeasureSensitivity),
                Box::new(LossCurveWidths),
                Box::new(ChooseCriterion),
                Box::new(ResampleCopies),
                Box::new(Blocks::TOWARDS_DENSE),
                Box::new(Tune),
                Box::new(Recover),
                Box::new(JudgeStreams),
            ],
            Method::Paper => vec![
                Box::new(UniformWidths),
                Box::new(Blocks::PAPER),
                Box::new(HeadRounds::GROUPS),
                Box::new(EvaluatePlan),
            ],
            Method::TwoStage => vec![
                Box::new(UniformWidths),
                Box::new(Blocks::TWO_STAGE),
                Box::new(HeadRounds::WHOLE_ATTENTION),
                Box::new(EvaluatePlan),
            ],
            Method::Recovery => vec![Box::new(Recover), Box::new(JudgeStreams)],
        }
    }

    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::Putri => "putri",
            Method::Paper => "paper",
            Method::TwoStage => "2ssp",
            Method::Recovery => "recovery",
        }
    }

    /// Returns whether the forecast covers all stages.
    pub fn is_forecast(self) -> bool {
        matches!(self, Method::Putri | Method::Recovery)
    }

    /// Returns whether the method prunes mixtures of experts.
    pub(super) fn takes_experts(self) -> bool {
        self == Method::Putri
    }

    /// Returns whether the method removes only the whole attention of a block.
    pub(super) fn removes_whole_attention(self) -> bool {
        self == Method::TwoStage
    }

    /// Returns whether maps are refitted towards the dense model's residual stream, for which residuals are
    /// summed.
    pub(super) fn refits_towards_dense(self) -> bool {
        self == Method::Putri
    }

    /// Returns whether curvature samples are in memory while neurons are chosen.
    pub(super) fn measures_sensitivity(self) -> bool {
        self == Method::Putri
    }

    /// Number of attention groups to remove by the method's formula, and the smallest number with which the
    /// FFNs can give up the rest.
    pub(super) fn head_groups(self, budgets: &[Budget], sparsity: f64) -> (usize, usize) {
        match self {
            Method::Recovery => (0, 0),
            Method::Putri => {
                (prune::head_groups(budgets, sparsity), prune::fewest_head_groups(budgets, sparsity))
            }
            Method::Paper | Method::TwoStage => (prune::head_groups_paper(budgets, sparsity), 0),
        }
    }

    /// Adapts `s` to the method: the authors' code weights all errors equally and has no quantisation.
    pub(super) fn settings(self, s: Settings) -> Settings {
        match self {
            Method::Putri | Method::Recovery => s,
            Method::Paper | Method::TwoStage => Settings {
                blocks: BlockSettings { error_feedback: false, token_weight: 0.0, biases: false, ..s.blocks },
                tune: TuneSettings { passes: 0, ..s.tune },
                resample: ResampleSettings { copies: 0, ..s.resample },
                ..s
            },
        }
    }
}
