//! Conversion of the arguments about experts to settings.

use super::args::{Args, ExpertCriterionArg, RouterWeightsArg};
use anyhow::{Result, ensure};
use putri_gguf::pipeline::experts::ExpertSettings;
use putri_gguf::prune::{ExpertCriterion, RouterWeights};

/// Checks the arguments about mixtures of experts and their texts.
pub(super) fn experts(args: &Args) -> Result<ExpertSettings> {
    ensure!((0.0..=1.0).contains(&args.protect), "--protect {} is not a share from 0 to 1", args.protect);
    ensure!(
        args.text_weights.is_empty() || args.text_weights.len() == args.file.len(),
        "--text-weights has {} weights for {} texts",
        args.text_weights.len(),
        args.file.len()
    );
    ensure!(
        args.text_weights.iter().all(|w| w.is_finite() && *w > 0.0),
        "--text-weights has a weight that is not above 0"
    );
    let defaults = ExpertSettings::default();
    let passes = |flag, wanted: Option<usize>, default| {
        ensure!(wanted.is_none_or(|n| n <= 1000), "{flag} is not from 0 to 1000");
        Ok(wanted.unwrap_or(default))
    };
    Ok(ExpertSettings {
        criterion: match args.expert_criterion {
            ExpertCriterionArg::Reap => ExpertCriterion::Reap,
            ExpertCriterionArg::Frequency => ExpertCriterion::Frequency,
            ExpertCriterionArg::RouterWeight => ExpertCriterion::RouterWeight,
        },
        weights: match args.router_weights {
            RouterWeightsArg::Applied => RouterWeights::Applied,
            RouterWeightsArg::Normalised => RouterWeights::Normalised,
        },
        protect: args.protect,
        refine: passes("--refine", args.refine, defaults.refine)?,
        repair: passes("--refit-routers", args.refit_routers, defaults.repair)?,
        drop_drafts: args.drop_mtp,
    })
}
