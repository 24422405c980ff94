//! The methods: each is a list of stages.

use super::Settings;
use super::stages::{
    Blocks, ChooseCriterion, EvaluatePlan, GreedyHeads, HeadRounds, JudgeStreams, LossCurveWidths,
    MeasureSensitivity, ResampleCopies, Stage, Tune, UniformWidths,
};
use crate::prune::{self, Budget};

/// How to prune.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Method {
    /// Heads first by lazy greedy search, widths per layer from loss curves, one sequential pass that refits towards a
    /// weighted mean of the block's own output and the dense model's residual stream, and norms and biases tuned on the
    /// whole.
    #[default]
    Putri,
    /// The paper's method as its authors' code does it: neurons first by its score with uniform widths, refit to the block's
    /// own output, then heads in rounds by perplexity on one sequence.
    Paper,
    /// A simpler baseline, after 2SSP (arXiv 2501.17771): neurons by the norm of their activations with uniform widths and no
    /// refit, then whole blocks' attention by perplexity.
    TwoStage,
}

impl Method {
    /// The stages, in the order in which they run.
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
        }
    }

    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::Putri => "putri",
            Method::Paper => "paper",
            Method::TwoStage => "2ssp",
        }
    }

    /// Whether the forecast knows all stages.
    pub fn is_forecast(self) -> bool {
        self == Method::Putri
    }

    /// Whether mixtures of experts can be pruned so.
    pub(super) fn takes_experts(self) -> bool {
        self == Method::Putri
    }

    /// Whether blocks' attention goes as a whole, or not at all.
    pub(super) fn removes_whole_attention(self) -> bool {
        self == Method::TwoStage
    }

    /// Whether maps are refitted towards the dense model's residual stream, for which residuals are summed.
    pub(super) fn refits_towards_dense(self) -> bool {
        self == Method::Putri
    }

    /// Whether samples of the curvature are in memory while neurons are chosen.
    pub(super) fn measures_sensitivity(self) -> bool {
        self == Method::Putri
    }

    /// Attention groups to remove by the method's formula, and the fewest of them that leave the rest to the feed-forwards.
    pub(super) fn head_groups(self, budgets: &[Budget], sparsity: f64) -> (usize, usize) {
        match self {
            Method::Putri => {
                (prune::head_groups(budgets, sparsity), prune::fewest_head_groups(budgets, sparsity))
            }
            Method::Paper | Method::TwoStage => (prune::head_groups_paper(budgets, sparsity), 0),
        }
    }

    /// `s` as the method wants them: the authors' code counts all errors alike and knows no quantisation.
    pub(super) fn settings(self, s: Settings) -> Settings {
        match self {
            Method::Putri => s,
            Method::Paper | Method::TwoStage => Settings {
                error_feedback: false,
                token_weight: 0.0,
                biases: false,
                tune: 0,
                resample_copies: 0,
                ..s
            },
        }
    }
}
