//! Plan of a job on a mixture before any work: how many experts stay, and the size of the file.

use super::super::{Job, JobError, RUN_CTX, Size};
use super::{check, mixture as open};
use crate::assemble::{ExpertPlan, experts_size};
use crate::calibrate::expected_texts;
use crate::ggml::run_memory;
use crate::gguf::GgufFile;
use crate::job::ImatrixUse;
use crate::job::verify::RECORDED;
use crate::model::{BlockShape, KvCache, Mixture};
use crate::observe::LayerMask;
use crate::pipeline::{FileSize, Method, PruneError, Target, TargetError};

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
    let n_keep = n_keep_of(job, &mixture)?;
    let (fit, held_out) = expected_texts(&job.recipe);
    let n_ctx = job.recipe.n_ctx;
    Ok(ExpertsDryRun {
        before: size(&mixture),
        after: Size { bytes: bytes_with(job, &mixture, n_keep)?, ..size_with(job, &mixture, n_keep) },
        n_expert: [mixture.n_expert, n_keep],
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
    Ok(())
}

/// Number of tokens of context of the result.
pub(super) fn run_ctx(job: &Job, mixture: &Mixture) -> usize {
    let trained = mixture.file.get_u32(&format!("{}.context_length", mixture.arch)).ok().flatten();
    job.run_ctx.unwrap_or(RUN_CTX.min(trained.unwrap_or(RUN_CTX)))
}

/// Number of experts that stay in each layer by the share or target of `job`.
pub(super) fn n_keep_of(job: &Job, mixture: &Mixture) -> Result<usize, JobError> {
    let bad = |source| JobError::Model { path: job.input.clone(), source };
    let target = job.settings.target;
    if target.is_none() && job.target_ram.is_none() {
        return mixture.n_keep(job.settings.sparsity).map_err(bad);
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
    let of = |n_keep: usize, bytes: u64| {
        let removed = (mixture.n_expert - n_keep) * mixture.expert_params();
        FileSize { bytes, params: (mixture.params() - removed) as u64, kv_cache }
    };
    let mut n_keep = mixture.n_expert;
    let mut least = of(n_keep, mixture.file.n_bytes());
    if least.is_within(target) {
        return Err(JobError::Target(TargetError::Already));
    }
    while n_keep >= mixture.least() + mixture.step() {
        n_keep -= mixture.step();
        least = of(n_keep, bytes_with(job, mixture, n_keep)?);
        if least.is_within(target) {
            return Ok(n_keep);
        }
    }
    let sparsity = 1.0 - n_keep as f64 / mixture.n_expert as f64;
    Err(JobError::Target(TargetError::OutOfReach { target, least, sparsity }))
}

/// Sizes of the source.
pub(super) fn size(mixture: &Mixture) -> Size {
    Size {
        bytes: mixture.file.n_bytes(),
        params: mixture.params(),
        block_params: mixture.block_params(),
        blocks: mixture.shapes(),
    }
}

/// Sizes of the result but its bytes.
pub(super) fn size_with(job: &Job, mixture: &Mixture, n_keep: usize) -> Size {
    let before = size(mixture);
    let removed = (mixture.n_expert - n_keep) * mixture.expert_params();
    let fewer = |b: BlockShape| BlockShape { n_expert: b.n_expert.min(n_keep), ..b };
    let mut blocks: Vec<BlockShape> = before.blocks.into_iter().map(fewer).collect();
    let (mut params, mut block_params) = (before.params - removed, before.block_params - removed);
    if job.settings.experts.drop_drafts {
        let drafts = mixture.draft_params(n_keep);
        (params, block_params) = (params - drafts[0], block_params - drafts[1]);
        blocks.truncate(mixture.n_layer - mixture.n_draft);
    }
    Size { bytes: 0, params, block_params, blocks }
}

/// Bytes of the file with `n_keep` experts in each layer.
fn bytes_with(job: &Job, mixture: &Mixture, n_keep: usize) -> Result<u64, JobError> {
    // Any choice has the same size, and so has any provenance of the same form.
    let mask = |_| {
        let kept = (0..mixture.n_expert).map(|e| e < n_keep).collect();
        LayerMask { kept, router: None, order: (0..mixture.n_expert).collect() }
    };
    let layers = mixture.layers.iter().map(|l| (l.block, mask(l))).collect();
    let plan = ExpertPlan { layers, n_keep, drop_drafts: job.settings.experts.drop_drafts };
    let n = RECORDED.min(job.recipe.n_ctx);
    let p = super::result::provenance(job, "0".repeat(64), 0.0, "reap", n_keep, vec![1; n], vec![0.0; n - 1]);
    Ok(experts_size(mixture, &plan, &p)?)
}
