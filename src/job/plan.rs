//! Plan of a job before any work: its settings within memory limit and target, and a forecast.

use super::output::folder_of;
use super::*;
use crate::gguf::GgufFile;

/// Forecast of a job from shapes.
#[derive(Clone, Debug)]
pub enum DryRun {
    /// Of passes over the blocks.
    Blocks(Box<BlocksDryRun>),
    /// Of the removal of whole experts.
    Experts(ExpertsDryRun),
}

/// Forecast of the passes over the blocks.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BlocksDryRun {
    /// The source.
    pub before: Size,
    /// Forecast of the passes and the result.
    pub forecast: Forecast,
    /// Settings of the forecast: those of the job, within its memory limit.
    pub settings: Settings,
    /// Number of tokens that pass through a block at a time.
    pub chunk_tokens: usize,
    /// Unit that is removed from FFNs.
    pub ffn_unit: FfnUnit,
    /// Number of tokens of context of the result.
    pub run_ctx: usize,
    /// KV cache of the source.
    pub kv_cache: KvCache,
    /// Number of tokens that the model generates itself, including the held-out ones.
    pub self_written: usize,
    /// Whether the result gets other types than the source. The forecast is for those of the source.
    pub quantises: bool,
}

/// Checks `job` as [`run`](super::run) does and forecasts it, without running it.
///
/// # Errors
/// [`JobError`].
pub fn dry_run(job: &Job) -> Result<DryRun, JobError> {
    let file = open_file(&job.input)?;
    if mixture::takes(job, &file) {
        return mixture::dry_run(job, file).map(DryRun::Experts);
    }
    let source = open_in(&job.input, file)?;
    check_paths(job, &source.file)?;
    let settings = settings(job, &source)?;
    let forecast = forecast(&source, &expected_calibration(job), &settings)?;
    Ok(DryRun::Blocks(Box::new(BlocksDryRun {
        before: size_of(&source),
        ffn_unit: settings.ffn_unit(&source),
        run_ctx: run_ctx(job, &source),
        kv_cache: KvCache::new(&source.hparams, &source.hparams.blocks),
        chunk_tokens: settings.chunk(job.recipe.n_ctx),
        forecast,
        settings,
        self_written: job.recipe.self_written(),
        quantises: job.quantise.is_some(),
    })))
}

/// Checks the settings of `job` and returns them within its memory limits.
pub(super) fn settings(job: &Job, source: &Model) -> Result<Settings, JobError> {
    check_types(job, source)?;
    let mut settings = job.settings.clone();
    if let Some(path) = &job.recover_from {
        settings.recover.source = Some(recover::origin(path, source)?.hparams.blocks);
    }
    if let Some(bytes) = job.target_ram {
        let n_ctx = run_ctx(job, source);
        // Compute buffers of the source; those of the result are no larger.
        let compute = ask_memory(job, &job.input, n_ctx)?.compute;
        settings.target = Some(Target::WithCache { bytes, n_ctx, compute });
    }
    // With other types, the size is known only after quantisation.
    if job.quantise.is_none() {
        settings = on_target(source, settings)?;
    }
    pipeline::check_budget(source, &settings)?;
    let n_ctx_train = source.hparams.n_ctx_train;
    if job.recipe.n_ctx > n_ctx_train {
        let (path, n_ctx) = (job.input.clone(), job.recipe.n_ctx);
        return Err(JobError::WindowsTooLong { path, n_ctx, n_ctx_train });
    }
    let calibration = expected_calibration(job);
    if let Some(limit) = device_memory(job) {
        settings = pipeline::within_device_memory(source, &calibration, &settings, limit)
            .map_err(JobError::NoRoomOnDevice)?;
    }
    let Some(limit) = job.max_memory else {
        return Ok(settings);
    };
    pipeline::within_memory(source, &calibration, &settings, limit, folder_of(&job.output))
        .map_err(JobError::NoRoom)
}

/// Percentage of a device's free memory that is used by default. Slightly more may be needed than is
/// foreseen.
const DEVICE_SHARE: u64 = 80;

/// Bytes that graphs and their weights may take on each device, if there are devices and the limit is known.
pub(super) fn device_memory(job: &Job) -> Option<u64> {
    let devices = &job.settings.devices;
    let known = || devices.iter().map(|d| d.memory()).filter(|(_, total)| *total > 0);
    let free = || known().map(|(free, _)| free / 100 * DEVICE_SHARE).min();
    if devices.is_empty() { None } else { job.max_device_memory.or_else(free) }
}

/// Number of tokens of context of the result.
pub(super) fn run_ctx(job: &Job, source: &Model) -> usize {
    job.run_ctx.unwrap_or(RUN_CTX.min(source.hparams.n_ctx_train))
}

/// Memory that llama.cpp takes to run the file at `path`.
pub(super) fn ask_memory(job: &Job, path: &Path, n_ctx: usize) -> Result<RunMemory, JobError> {
    run_memory(path, n_ctx).map_err(|e| JobError::evaluating(&job.input, EvaluateError::Llama(e)))
}

/// Settings with the sparsity that their target needs, if they have one.
pub(super) fn on_target(model: &Model, s: Settings) -> Result<Settings, JobError> {
    match s.target {
        Some(target) => {
            let sparsity = pipeline::sparsity_for(model, &s, target).map_err(JobError::Target)?;
            Ok(Settings { sparsity, ..s })
        }
        None => Ok(s),
    }
}

pub(super) fn forecast(model: &Model, c: &Calibration, settings: &Settings) -> Result<Forecast, JobError> {
    pipeline::forecast(model, c, settings).map_err(|e| JobError::Prune(e.into()))
}

pub(super) fn expected_calibration(job: &Job) -> Calibration {
    if let Some(windows) = &job.windows {
        return windows.into();
    }
    let (n_fit, n_held_out) = job.recipe.expected();
    Calibration { n_ctx: job.recipe.n_ctx, n_fit, n_held_out }
}

pub(super) fn open(job: &Job) -> Result<Model, JobError> {
    open_model(&job.input)
}

pub(super) fn open_model(path: &Path) -> Result<Model, JobError> {
    open_in(path, open_file(path)?)
}

/// Opens the container at `path`.
pub(super) fn open_file(path: &Path) -> Result<GgufFile, JobError> {
    GgufFile::open(path).map_err(|e| named(path, e.into()))
}

/// Reads the model in the container that was opened at `path`.
pub(super) fn open_in(path: &Path, file: GgufFile) -> Result<Model, JobError> {
    Model::new(file).map_err(|e| named(path, e))
}

/// Error about the file at `path`, which the error may name itself.
fn named(path: &Path, e: ModelError) -> JobError {
    match e {
        // Errors of these variants name the file already.
        ModelError::Gguf(
            e @ (GgufError::Io { .. }
            | GgufError::NoFile { .. }
            | GgufError::Magic { .. }
            | GgufError::LfsPointer(_)
            | GgufError::Header { .. }
            | GgufError::Truncated { .. }
            | GgufError::UnknownType { .. }),
        ) => JobError::Gguf(e),
        source => JobError::Model { path: path.into(), source },
    }
}

/// Rejects importance matrices of experts, and quantisation of a quantised model unless the job asks for it.
pub(super) fn check_types(job: &Job, source: &Model) -> Result<(), JobError> {
    if source.hparams.experts.is_some() {
        if job.settings.recover.budget.is_some() {
            return Err(JobError::NoWayBack(job.input.clone()));
        }
        let of_experts = |wanted| Err(JobError::OfExperts { path: job.input.clone(), wanted });
        if job.imatrix_out.is_some() {
            return of_experts(ImatrixUse::Output);
        }
        if job.quantise.is_some() {
            return of_experts(ImatrixUse::Quantise);
        }
        if job.compare_quant {
            return of_experts(ImatrixUse::Baselines);
        }
    }
    let quantised = source.file.tensors().iter().find(|t| t.ty.is_quantized());
    match (job.quantise, quantised) {
        (Some(q), Some(t)) if !q.again => {
            Err(JobError::Quantised { path: job.input.clone(), tensor: t.name.clone(), ty: t.ty })
        }
        _ => Ok(()),
    }
}
