//! The stages of the methods, a file each.
//!
//! A stage owns all that is known of it: how it runs, what it keeps in a checkpoint and how it reads that back, what it needs by
//! shapes alone, and what it adds to the output's provenance. A method is a list of stages
//! ([`Method`](super::Method)).

mod blocks;
mod experts;
mod head_rounds;
mod heads;
mod judge;
mod neuron_criterion;
mod resample;
mod sensitivity;
mod tune;
mod widths;

pub(super) use blocks::{Blocks, Streams};
pub(super) use head_rounds::HeadRounds;
pub(crate) use heads::RECORD as HEADS;
pub(super) use heads::{GreedyHeads, removable_groups};
pub(super) use judge::{EvaluatePlan, JudgeStreams};
pub(super) use neuron_criterion::ChooseCriterion;
pub(super) use resample::ResampleCopies;
pub(super) use sensitivity::{MeasureSensitivity, Sensitivity};
pub(super) use tune::Tune;
pub(super) use widths::{LossCurveWidths, UniformWidths};

use super::forecast::{StageForecast, Work};
use super::run::Run;
use super::{Calibration, PruneError, Settings};

/// One stage of a method.
pub(super) trait Stage {
    /// Operations and memory of each step that it announces to the observer, in order, from shapes alone. Steps without
    /// operations do not run.
    fn forecast(&self, work: &Work) -> Vec<StageForecast>;

    /// Names of the records that it keeps in the checkpoint of a model of `n_layer` blocks.
    fn records(&self, _n_layer: usize) -> Vec<String> {
        Vec::new()
    }

    /// Runs on what the stages before it left in `run`, and takes over what the checkpoint holds.
    ///
    /// # Errors
    /// [`PruneError`] if the engine fails, the checkpoint is damaged, or the observer interrupts.
    fn run(&self, run: &mut Run) -> Result<(), PruneError>;
}

/// Windows, and tokens of them, that samples of the curvature are taken on: (tokens per window, tokens).
pub(super) fn probes(s: &Settings, c: &Calibration) -> (usize, f64) {
    sensitivity::probes(s, c)
}
