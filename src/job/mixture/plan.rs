//! Plan of a job on a mixture before any work: how many experts stay, and the size of the file.

use super::super::{Job, JobError, RUN_CTX, Size};
use super::{check, mixture as open};
use crate::assemble::{ExpertPlan, Narrowed, experts_size};
use crate::calibrate::expected_texts;
use crate::ggml::run_memory;
use crate::gguf::GgufFile;
use crate::job::ImatrixUse;
use crate::job::verify::RECORDED;
use crate::model::{BlockShape, ExpertLayer, FfnUnit, KvCache, Mixture};
use crate::observe::LayerMask;
use crate::pipeline::experts::NarrowLayer;
use crate::pipeline::{FileSize, Method, PruneError, Target, TargetError};
use crate::requant::{Quantised, output_type};

/// Forecast of a job on a mixture.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExpertsDryRun {
    /// The source.
    pub before: Size,
    /// The result; its size is exact to the byte.
    pub after: Size,
    /// Number of experts of a layer before and after.
    pub n_expert: [usize; 2],
    /// Number of neurons of an expert before and after.
    pub width: [usize; 2],
    /// Number of experts that a token passes through.
    pub n_used: usize,
    /// Number of layers with experts.
    pub n_layers: usize,
    /// Architecture, which stays.
    pub arch: String,
    /// Tokens that are decoded to observe the routers, and those that only judge.
    pub tokens: (usize, usize),
    /// Number of tokens that the model generates itself.
    pub self_written: usize,
}

/// Checks a job on a mixture and forecasts it.
pub(in crate::job) fn dry_run(job: &Job, file: GgufFile) -> Result<ExpertsDryRun, JobError> {
    let mixture = open(job, file)?;
    check(job, &mixture)?;
    let amount = amount_of(job, &mixture)?;
    let (fit, held_out) = expected_texts(&job.recipe);
    let n_ctx = job.recipe.n_ctx;
    Ok(ExpertsDryRun {
        before: size(&mixture),
        after: Size { bytes: bytes_with(job, &mixture, amount)?, ..size_with(job, &mixture, amount) },
        n_expert: [mixture.n_expert, amount.n_expert(&mixture)],
        width: [mixture.layers[0].width, amount.width(&mixture)],
        n_used: mixture.n_used,
        n_layers: mixture.layers.len(),
        tokens: (if job.stats_in.is_some() { 0 } else { fit * n_ctx }, held_out * n_ctx),
        self_written: job.recipe.self_written(),
        arch: mixture.arch,
    })
}

/// Refuses what a mixture cannot have.
pub(super) fn refuse(job: &Job, mixture: &Mixture) -> Result<(), JobError> {
    if job.settings.method != Method::Putri {
        return Err(PruneError::Experts.into());
    }
    if job.settings.recover.budget.is_some() {
        return Err(JobError::NoWayBack(job.input.clone()));
    }
    let of_experts = |wanted| Err(JobError::OfExperts { path: job.input.clone(), wanted });
    if job.imatrix_out.is_some() && job.imatrix_in.is_none() {
        return of_experts(ImatrixUse::Output);
    }
    if job.quantise.is_some() {
        return of_experts(ImatrixUse::Quantise);
    }
    let n_ctx_train = mixture.file.get_u32(&format!("{}.context_length", mixture.arch))?;
    if let Some(n_ctx_train) = n_ctx_train.filter(|n| job.recipe.n_ctx > *n) {
        let (path, n_ctx) = (job.input.clone(), job.recipe.n_ctx);
        return Err(JobError::WindowsTooLong { path, n_ctx, n_ctx_train });
    }
    if job.settings.moe_unit == FfnUnit::Neuron
        && (job.limit.is_some() || job.stats_in.is_some() || job.imatrix_in.is_some())
    {
        let problem = "experts that are narrowed take no quality limit, statistics or importance matrix; remove whole experts";
        return Err(JobError::BadOutput { path: job.input.clone(), problem });
    }
    Ok(())
}

/// Number of tokens of context of the result.
pub(super) fn run_ctx(job: &Job, mixture: &Mixture) -> usize {
    let trained = mixture.file.get_u32(&format!("{}.context_length", mixture.arch)).ok().flatten();
    job.run_ctx.unwrap_or(RUN_CTX.min(trained.unwrap_or(RUN_CTX)))
}

/// Amount of each layer's experts that is left.
#[derive(Clone, Copy, Debug)]
pub(super) enum Amount {
    /// So many whole experts.
    Experts(usize),
    /// All experts, with so many neurons each.
    Width(usize),
}

impl Amount {
    pub(super) fn n_expert(self, mixture: &Mixture) -> usize {
        if let Amount::Experts(n) = self { n } else { mixture.n_expert }
    }

    fn width(self, mixture: &Mixture) -> usize {
        if let Amount::Width(n) = self { n } else { mixture.layers[0].width }
    }
}

/// Amount of each layer's experts that is left by the share or target of `job`.
pub(super) fn amount_of(job: &Job, mixture: &Mixture) -> Result<Amount, JobError> {
    let bad = |source| JobError::Model { path: job.input.clone(), source };
    let target = job.settings.target;
    if target.is_none() && job.target_ram.is_none() {
        let share = job.settings.sparsity;
        return match job.settings.moe_unit {
            FfnUnit::Expert => mixture.n_keep(share).map(Amount::Experts).map_err(bad),
            FfnUnit::Neuron => mixture.narrowed(share).map(Amount::Width).map_err(bad),
        };
    }
    // Beside the file, running takes what it takes for the source: experts are no part of it.
    let (target, kv_cache) = match job.target_ram {
        Some(ram) => {
            let n_ctx = run_ctx(job, mixture);
            let takes = run_memory(&job.input, n_ctx).map_err(JobError::Llama)?;
            let cache = KvCache::of_bytes(takes.kv_cache, n_ctx);
            (Target::WithCache { bytes: ram, n_ctx, compute: takes.compute }, cache)
        }
        None => (target.expect("one of the two"), KvCache::of_bytes(0, RUN_CTX)),
    };
    let amounts: Vec<Amount> = match job.settings.moe_unit {
        FfnUnit::Expert => {
            let kept = (mixture.least()..mixture.n_expert).step_by(mixture.step());
            kept.rev().map(Amount::Experts).collect()
        }
        FfnUnit::Neuron => mixture.possible_widths().into_iter().rev().map(Amount::Width).collect(),
    };
    let own = size(mixture);
    let own = FileSize { bytes: own.bytes, params: own.params as u64, kv_cache };
    if own.is_within(target) {
        return Err(JobError::Target(TargetError::Already));
    }
    let mut least = (own, 0.0);
    for amount in amounts {
        let after = size_with(job, mixture, amount);
        let bytes = bytes_with(job, mixture, amount)?;
        let found = FileSize { bytes, params: after.params as u64, kv_cache };
        if found.is_within(target) {
            return Ok(amount);
        }
        let left = amount.n_expert(mixture) * amount.width(mixture);
        least = (found, 1.0 - left as f64 / (mixture.n_expert * mixture.layers[0].width) as f64);
    }
    let (least, sparsity) = least;
    Err(JobError::Target(TargetError::OutOfReach { target, least, sparsity }))
}

/// Sizes of the source.
pub(in crate::job) fn size(mixture: &Mixture) -> Size {
    Size {
        bytes: mixture.file.n_bytes(),
        params: mixture.params(),
        block_params: mixture.block_params(),
        blocks: mixture.shapes(),
    }
}

/// Sizes of the result but its bytes.
pub(super) fn size_with(job: &Job, mixture: &Mixture, amount: Amount) -> Size {
    let before = size(mixture);
    let (n_keep, width) = (amount.n_expert(mixture), amount.width(mixture));
    let [all, matrices] = mixture.removed_params(n_keep, width, job.settings.experts.drop_drafts);
    let (params, block_params) = (before.params - all, before.block_params - matrices);
    let fewer = |b: BlockShape| match b.n_expert {
        0 => b,
        _ => BlockShape { n_expert: n_keep, n_ff: if width < b.n_ff { width } else { b.n_ff }, ..b },
    };
    let mut blocks: Vec<BlockShape> = before.blocks.into_iter().map(fewer).collect();
    if job.settings.experts.drop_drafts {
        blocks.truncate(mixture.n_layer - mixture.n_draft);
    }
    Size { bytes: 0, params, block_params, blocks }
}

/// Bytes of the file with what `amount` leaves of each layer.
fn bytes_with(job: &Job, mixture: &Mixture, amount: Amount) -> Result<u64, JobError> {
    // Any choice has the same size, and so has any provenance of the same form.
    let (n_keep, width) = (amount.n_expert(mixture), amount.width(mixture));
    let mask = || {
        let kept = (0..mixture.n_expert).map(|e| e < n_keep).collect();
        LayerMask { kept, router: None, order: (0..mixture.n_expert).collect() }
    };
    let layers = mixture.layers.iter().map(|l| (l.block, mask())).collect();
    let narrowed = match amount {
        Amount::Experts(_) => None,
        Amount::Width(_) => Some(Narrowed {
            width,
            layers: mixture.layers.iter().map(|l| blank(mixture, l, width)).collect(),
        }),
    };
    let (criterion, n) = match amount {
        Amount::Experts(_) => (job.settings.experts.criterion.name(), RECORDED.min(job.recipe.n_ctx)),
        Amount::Width(_) => ("obs", 1),
    };
    let drop_drafts = job.settings.experts.drop_drafts;
    let plan = ExpertPlan { layers, n_keep, drop_drafts, narrowed };
    let p =
        super::result::provenance(job, "0".repeat(64), 0.0, criterion, n_keep, vec![1; n], vec![0.0; n - 1]);
    Ok(experts_size(mixture, &plan, &p)?)
}

/// A layer with narrower experts, without values.
fn blank(mixture: &Mixture, layer: &ExpertLayer, width: usize) -> (usize, NarrowLayer) {
    let name = format!("blk.{}.ffn_down_exps.weight", layer.block);
    let t = mixture.file.find(&name).expect("a layer with experts");
    let ty = output_type(t.ty, width);
    let n_rows = t.ne[1] * mixture.n_expert;
    let down = Quantised::new(ty, width, n_rows, Vec::new());
    (layer.block, NarrowLayer { neurons: vec![(0..width).collect(); mixture.n_expert], down })
}
