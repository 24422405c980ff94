//! The whole way from a GGUF to a pruned and verified GGUF.

mod announce;
mod checkpoint;
mod error;
mod eval;
mod inspect;
mod output;
mod prepared;
mod quality_limit;
mod quant_baselines;
mod result;
mod verify;

pub use error::{ImatrixUse, JobError, with_causes};
pub use eval::{EvalJob, EvalOutcome, eval};
pub use inspect::{Inspection, inspect};
#[cfg(unix)]
pub(crate) use output::usual_mode;
pub use output::{check_distinct, check_output, remove_temporary, write_whole};
pub(crate) use output::{resolved, temporary_folder};
pub use prepared::calibration;
pub use quality_limit::QualityLimit;
pub use quant_baselines::QuantBaseline;
pub use verify::{Check, VerifyJob, verify};

use crate::assemble::Provenance;
use crate::calibrate::{Recipe, Windows};
use crate::evaluate::EvaluateError;
use crate::forward::whole_windows;
use crate::ggml::{FileType, RunMemory, run_memory};
use crate::gguf::GgufError;
use crate::model::{BlockShape, Family, FfnUnit, KvCache, Model, ModelError};
use crate::pipeline::{self, Calibration, Forecast, HeldOut, Observer, Settings, Target};
use announce::{announce_all, work_after};
use checkpoint::DiskCheckpoint;
use output::{check_paths, folder_of};
use prepared::{HeadOrderCache, Prepared};
use result::{copy_as_is, size_of};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What to do.
#[derive(Clone, Debug)]
pub struct Job {
    /// The source; never written to.
    pub input: PathBuf,
    /// Where the pruned model goes.
    pub output: PathBuf,
    /// Where the pruned model's importance matrix goes, if anywhere.
    pub imatrix_out: Option<PathBuf>,
    /// The mix of types that the result is written in, instead of the source's types.
    pub quantise: Option<Quantise>,
    /// Write as many files as a split source has.
    pub keep_split: bool,
    /// Replace existing outputs.
    pub force: bool,
    /// Let libllama load and judge the result before it gets its name.
    pub verify: bool,
    /// What to calibrate on.
    pub recipe: Recipe,
    /// Windows that [`calibration`] collected by `recipe`; without them the job collects its own.
    pub windows: Option<Windows>,
    /// How to prune.
    pub settings: Settings,
    /// Where the state of the run is kept, if anywhere.
    pub state: Option<KeepState>,
    /// Let source and result continue a text.
    pub samples: bool,
    /// Also measure what quantisation alone makes of as many bytes.
    pub compare_quant: bool,
    /// Take the largest sparsity that stays within this, instead of one that is given.
    pub limit: Option<QualityLimit>,
    /// Bytes of memory to do with, the mapped files not counted.
    pub max_memory: Option<u64>,
    /// Bytes of each device's memory to do with; without it, most of what is free there.
    pub max_device_memory: Option<u64>,
    /// Bytes of memory that llama.cpp may take to run the result; instead of a sparsity or target.
    pub target_ram: Option<u64>,
    /// Layers that llama.cpp keeps on the devices of the settings, if there are some, when it writes text and judges.
    pub n_gpu_layers: usize,
    /// Tokens of context that the result is to run with; without it [`RUN_CTX`], or what the source was trained for if
    /// that is less.
    pub run_ctx: Option<usize>,
}

impl Job {
    /// Prunes `input` to `output` as the command does without options: by the default settings, on text that the model
    /// writes itself, verified.
    pub fn new(input: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Job {
        let recipe = Recipe::default();
        Job {
            input: input.into(),
            output: output.into(),
            imatrix_out: None,
            quantise: None,
            keep_split: false,
            force: false,
            verify: true,
            windows: None,
            settings: Settings { n_threads: recipe.n_threads, ..Settings::default() },
            recipe,
            state: None,
            samples: false,
            compare_quant: false,
            limit: None,
            max_memory: None,
            max_device_memory: None,
            target_ram: None,
            run_ctx: None,
            n_gpu_layers: usize::MAX,
        }
    }
}

/// Where an interrupted run leaves what it has settled: text, heads, widths and finished blocks.
#[derive(Clone, Debug)]
pub struct KeepState {
    /// A folder of its own; it is emptied when the job is done.
    pub folder: PathBuf,
    /// Go on from what is there already, instead of refusing it.
    pub resume: bool,
}

/// How to quantise a whole model.
#[derive(Clone, Copy, Debug)]
pub struct Quantise {
    /// The mix of types.
    pub to: FileType,
    /// Also quantise what is quantised already.
    pub again: bool,
}

/// Tokens of context that llama-cli's users and Ollama's have by default, about.
pub const RUN_CTX: usize = 4096;

/// Sizes of a model.
#[derive(Clone, Debug)]
pub struct Size {
    /// Bytes of the file.
    pub bytes: u64,
    /// All parameters.
    pub params: usize,
    /// Parameters of the blocks' attention and feed-forward matrices.
    pub block_params: usize,
    /// Per block.
    pub blocks: Vec<BlockShape>,
}

/// What came of a job.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The source.
    pub before: Size,
    /// The result.
    pub after: Size,
    /// The architecture of the result.
    pub output_arch: Family,
    /// Share of the blocks' parameters that was removed.
    pub sparsity: f64,
    /// What feed-forwards lost.
    pub ffn_unit: FfnUnit,
    /// What llama.cpp takes to run them; absent where it was not asked.
    pub running: Option<Running>,
    /// What was measured; absent when nothing was pruned.
    pub quality: Option<Quality>,
    /// Where the result is; the first part if it lies in several files.
    pub output: PathBuf,
    /// The attention groups that stay, per block, by their numbers in the source.
    pub kept_groups: Vec<Vec<usize>>,
    /// What the predictions lose by the width of each block alone, about, in nats of KL divergence, if that is known.
    pub block_losses: Option<Vec<f64>>,
    /// Where the result comes from; absent when nothing was pruned.
    pub provenance: Option<Provenance>,
    /// The result, and the source in types that make files of about its size, if the job asked for it.
    pub quant_baselines: Vec<QuantBaseline>,
    /// How source and result go on from the same words, if the job asked for it.
    pub samples: Option<Samples>,
    /// What shapes said beforehand; absent when nothing was pruned.
    pub forecast: Option<Forecast>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Wall time.
    pub time: Duration,
}

/// Memory that llama.cpp takes to run source and result.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// With so many tokens of context.
    pub n_ctx: usize,
    /// Tokens of context that they were trained for.
    pub n_ctx_train: usize,
    /// The source.
    pub before: RunMemory,
    /// The result.
    pub after: RunMemory,
    /// Their keys and values, for other lengths.
    pub kv_caches: [KvCache; 2],
}

/// A text that is continued.
#[derive(Clone, Debug)]
pub struct Samples {
    /// The beginning of the first held-out window.
    pub prompt: String,
    /// What the source writes, always the likeliest token.
    pub before: String,
    /// What the result writes.
    pub after: String,
}

/// What was measured on calibration windows that were held out.
#[derive(Clone, Copy, Debug)]
pub struct Quality {
    /// Source and result, by our forward.
    pub held_out: HeldOut,
    /// The written file, by libllama; absent where the job does not verify.
    pub file_ppl: Option<f64>,
    /// Tokens fitted on, and how many of them the model wrote itself.
    pub fit_tokens: (usize, usize),
    /// Tokens judged on.
    pub held_out_tokens: usize,
}

/// Runs `job`.
///
/// # Errors
/// [`JobError`]; then there is no output, and no temporary file.
pub fn run(job: &Job, observer: &mut dyn Observer) -> Result<Outcome, JobError> {
    let start = Instant::now();
    let source = open(job)?;
    check_paths(job, &source.file)?;
    let wanted = job.settings.target.is_some() || job.target_ram.is_some() || job.limit.is_some();
    if job.settings.sparsity == 0.0 && !wanted {
        return copy_as_is(job, &source, start, observer.interrupted());
    }
    let job = &Job { settings: settings(job, &source)?, ..job.clone() };
    announce_all(std::slice::from_ref(job), &source, observer);
    let mut p = Prepared::new(job, source, observer)?;
    let mut state = p.state.take();
    // No result comes after this one.
    let later = Some(0.0);
    let (settings, pruned) = match (job.limit, &mut state) {
        (Some(limit), _) => p.prune_within(job, limit, observer)?,
        (None, Some(state)) => p.prune(job, state, later, observer)?,
        (None, None) => p.prune(job, &mut (), later, observer)?,
    };
    let outcome = p.write(&Job { settings, ..job.clone() }, pruned, start, observer)?;
    state.into_iter().for_each(DiskCheckpoint::remove);
    Ok(outcome)
}

/// One of several results of one calibration.
#[derive(Clone, Debug)]
pub struct Nested {
    /// Its sparsity.
    pub sparsity: f64,
    /// Where it goes.
    pub output: PathBuf,
    /// Where its importance matrix goes, if anywhere.
    pub imatrix_out: Option<PathBuf>,
}

/// Runs `job` at several sparsities on one calibration, each with outputs of its own; heads that go at one also go at
/// higher ones, so that they are searched for once. `done` is told of each outcome, and of what it was asked for.
///
/// # Errors
/// [`JobError`], of `done` too; outputs that were finished stay.
pub fn run_nested(
    job: &Job,
    results: &[Nested],
    observer: &mut dyn Observer,
    mut done: impl FnMut(&Job, &Outcome) -> Result<(), JobError>,
) -> Result<(), JobError> {
    let source = open(job)?;
    let job_of = |n: &Nested| Job {
        output: n.output.clone(),
        imatrix_out: n.imatrix_out.clone(),
        settings: Settings { sparsity: n.sparsity, ..job.settings.clone() },
        ..job.clone()
    };
    // Settled before any work, since what is free may change meanwhile.
    let jobs: Vec<Job> = results
        .iter()
        .map(|n| {
            let job = job_of(n);
            check_paths(&job, &source.file)?;
            Ok(Job { settings: settings(&job, &source)?, ..job })
        })
        .collect::<Result<_, JobError>>()?;
    let mut start = Instant::now();
    announce_all(&jobs, &source, observer);
    let p = Prepared::new(&jobs[0], source, observer)?;
    let mut memory = HeadOrderCache::new(&p, &jobs[0]);
    let later = work_after(&jobs, p.model(), &Calibration::from(&p.windows));
    for (job, later) in jobs.into_iter().zip(later) {
        let (settings, pruned) = p.prune(&job, &mut memory, Some(later), observer)?;
        let job = Job { settings, ..job };
        let outcome = p.write(&job, pruned, start, observer)?;
        done(&job, &outcome)?;
        start = Instant::now();
    }
    Ok(())
}

/// What a job will need, and what comes of it, as far as shapes say.
#[derive(Clone, Debug)]
pub struct DryRun {
    /// The source.
    pub before: Size,
    /// What it comes to.
    pub forecast: Forecast,
    /// What it was made for: those of the job, within its memory.
    pub settings: Settings,
    /// Tokens that would pass through a block at a time.
    pub chunk_tokens: usize,
    /// What feed-forwards would lose.
    pub ffn_unit: FfnUnit,
    /// Tokens of context that the result is to run with.
    pub run_ctx: usize,
    /// Keys and values of the source.
    pub kv_cache: KvCache,
    /// Tokens that the model writes itself, the held-out ones with them.
    pub self_written: usize,
    /// The result is to have other types than the source, in which the forecast is.
    pub quantises: bool,
}

/// Refuses what [`run`] would refuse, and says what it would need, without doing anything.
///
/// # Errors
/// [`JobError`].
pub fn dry_run(job: &Job) -> Result<DryRun, JobError> {
    let source = open(job)?;
    check_paths(job, &source.file)?;
    let settings = settings(job, &source)?;
    let forecast = forecast(&source, &expected_calibration(job), &settings)?;
    Ok(DryRun {
        before: size_of(&source),
        ffn_unit: settings.ffn_unit(&source),
        run_ctx: run_ctx(job, &source),
        kv_cache: KvCache::new(&source.hparams, &source.hparams.blocks),
        chunk_tokens: whole_windows(settings.chunk_tokens, job.recipe.n_ctx),
        forecast,
        settings,
        self_written: job.recipe.self_written(),
        quantises: job.quantise.is_some(),
    })
}

/// Refuses what cannot come out well. The settings of `job`, within its memory.
fn settings(job: &Job, source: &Model) -> Result<Settings, JobError> {
    check_types(job, source)?;
    let mut settings = job.settings.clone();
    if let Some(bytes) = job.target_ram {
        let n_ctx = run_ctx(job, source);
        // Of the source: that of the result is no more.
        let compute = ask_memory(job, &job.input, n_ctx)?.compute;
        settings.target = Some(Target::WithCache { bytes, n_ctx, compute });
    }
    // In other types, the size is known once it is in these.
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

/// Percent of a device's free memory that is taken where nothing else is said: a little more may be taken than is foreseen.
const DEVICE_SHARE: u64 = 80;

/// Bytes that graphs and their weights may take on each device, if there are devices and that is known.
fn device_memory(job: &Job) -> Option<u64> {
    let devices = &job.settings.devices;
    let known = || devices.iter().map(|d| d.memory()).filter(|(_, total)| *total > 0);
    let free = || known().map(|(free, _)| free / 100 * DEVICE_SHARE).min();
    if devices.is_empty() { None } else { job.max_device_memory.or_else(free) }
}

/// Tokens of context that the result is to run with.
fn run_ctx(job: &Job, source: &Model) -> usize {
    job.run_ctx.unwrap_or(RUN_CTX.min(source.hparams.n_ctx_train))
}

/// What llama.cpp takes to run the file at `path`.
fn ask_memory(job: &Job, path: &Path, n_ctx: usize) -> Result<RunMemory, JobError> {
    run_memory(path, n_ctx).map_err(|e| JobError::evaluating(&job.input, EvaluateError::Llama(e)))
}

/// The settings with the sparsity that their target takes, if they have one.
fn on_target(model: &Model, s: Settings) -> Result<Settings, JobError> {
    match s.target {
        Some(target) => {
            let sparsity = pipeline::sparsity_for(model, &s, target).map_err(JobError::Target)?;
            Ok(Settings { sparsity, ..s })
        }
        None => Ok(s),
    }
}

fn forecast(model: &Model, c: &Calibration, settings: &Settings) -> Result<Forecast, JobError> {
    pipeline::forecast(model, c, settings).map_err(|e| JobError::Prune(e.into()))
}

fn expected_calibration(job: &Job) -> Calibration {
    if let Some(windows) = &job.windows {
        return windows.into();
    }
    let (n_fit, n_held_out) = job.recipe.expected();
    Calibration { n_ctx: job.recipe.n_ctx, n_fit, n_held_out }
}

fn open(job: &Job) -> Result<Model, JobError> {
    open_model(&job.input)
}

fn open_model(path: &Path) -> Result<Model, JobError> {
    Model::open(path).map_err(|e| match e {
        // These name the file already.
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
    })
}

/// Refuses importance matrices of experts, and to quantise what is quantised already, unless it was asked for.
fn check_types(job: &Job, source: &Model) -> Result<(), JobError> {
    if source.hparams.experts.is_some() {
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
