//! Stages of the methods, one file each.
//!
//! A stage owns all that belongs to it: its settings, its run, its checkpoint records and how it reads them
//! back, its forecast from shapes alone, and its part of the output's provenance. A method is a list of stages
//! ([`Method`](super::Method)).

mod blocks;
mod experts;
mod head_rounds;
mod heads;
mod judge;
mod neuron_criterion;
mod recover;
mod resample;
mod sensitivity;
mod trials;
mod tune;
mod widths;

pub use blocks::BlockSettings;
pub(super) use blocks::Blocks;
pub(super) use head_rounds::HeadRounds;
pub(super) use heads::GreedyHeads;
pub use heads::HeadSettings;
pub(super) use judge::{EvaluatePlan, JudgeStreams};
pub(super) use neuron_criterion::ChooseCriterion;
pub(super) use recover::Recover;
pub use recover::{RecoverBudget, RecoverSettings};
pub(super) use resample::ResampleCopies;
pub use resample::ResampleSettings;
pub(super) use sensitivity::MeasureSensitivity;
pub use sensitivity::SensitivitySettings;
pub(super) use tune::Tune;
pub use tune::TuneSettings;
pub use widths::WidthSettings;
pub(super) use widths::{LossCurveWidths, UniformWidths};

use super::PruneError;
use super::forecast::{StageForecast, Work};
use super::run::Run;

/// Names of the records that stages keep in a checkpoint: the order of heads, the widths, the criterion.
pub(crate) const HEADS: &str = "heads";
const WIDTHS: &str = "widths";
const CRITERION: &str = "criterion";

/// Name of the record of block `il`.
fn block_record(il: usize) -> String {
    format!("block-{il:03}")
}

/// One stage of a method.
pub(super) trait Stage {
    /// Operations and memory of each step that the stage announces to the observer, in order, from shapes
    /// alone.
    /// Steps without operations do not run.
    fn forecast(&self, work: &Work) -> Vec<StageForecast>;

    /// Names of the records that the stage keeps in the checkpoint of a model of `n_layer` blocks.
    fn records(&self, _n_layer: usize) -> Vec<String> {
        Vec::new()
    }

    /// Runs the stage on the results of the earlier stages in `run`, and reuses the records of the
    /// checkpoint.
    ///
    /// # Errors
    /// [`PruneError`] if the engine fails, the checkpoint is damaged, or the observer interrupts.
    fn run(&self, run: &mut Run) -> Result<(), PruneError>;
}
