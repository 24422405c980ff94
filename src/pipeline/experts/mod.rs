//! Pruning of whole experts, for mixtures of any architecture: libllama computes, and nothing is fitted but
//! the routers.
//!
//! `observe` takes statistics of the source, `choose` picks the experts to keep by them, and
//! `Trial` tests and refines a choice by the predictions of the source with the others masked.

mod choose;
mod narrow;
mod observe;
mod refine;
mod repair;
mod trial;

pub use choose::{Choice, choose};
pub use narrow::{NarrowLayer, layers_per_pass, narrow};
pub use observe::{OBSERVED, observe};
pub use refine::{REFINED, Refined, STATISTICS, Step};
pub use trial::{TextQuality, Trial};

/// Names of the records that these stages keep in a checkpoint.
pub(super) const RECORDS: [&str; 2] = [OBSERVED, REFINED];

use super::{Observer, PruneError};
use crate::calibrate::Text;
use crate::ggml::LlamaModel;
use crate::model::Mixture;
use crate::prune::{ExpertCriterion, RouterWeights};

/// Settings of the choice of experts.
#[derive(Clone, Debug)]
pub struct ExpertSettings {
    /// Criterion by which experts are kept.
    pub criterion: ExpertCriterion,
    /// Router weights that the criterion uses.
    pub weights: RouterWeights,
    /// Share of the experts that each text protects, those it needs most; 0 to 1.
    pub protect: f64,
    /// Work on refining the choice, in passes over the calibration windows.
    pub refine: usize,
    /// Passes over the calibration windows that refit the routers.
    pub repair: usize,
    /// Whether the blocks that draft tokens (MTP) are left out of the result.
    pub drop_drafts: bool,
}

impl Default for ExpertSettings {
    fn default() -> ExpertSettings {
        ExpertSettings {
            criterion: ExpertCriterion::default(),
            weights: RouterWeights::default(),
            protect: 0.0,
            refine: 4,
            repair: 1,
            drop_drafts: false,
        }
    }
}

/// Input of the stages.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The mixture.
    pub mixture: &'a Mixture,
    /// The same in libllama.
    pub llama: &'a LlamaModel,
    /// Calibration texts.
    pub texts: &'a [Text],
    /// Number of threads.
    pub n_threads: usize,
}

impl Source<'_> {
    /// Tokens of a window.
    pub fn n_ctx(&self) -> usize {
        let windows = self.texts.iter().flat_map(|t| t.fit.iter().chain(&t.held_out));
        windows.map(Vec::len).max().unwrap_or(0)
    }
}

/// Stops if the observer wants to.
fn check(observer: &dyn Observer) -> Result<(), PruneError> {
    if observer.interrupted() { Err(PruneError::Interrupted) } else { Ok(()) }
}
