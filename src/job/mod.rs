//! Jobs: the whole way from a GGUF file to a pruned and verified GGUF file.

mod announce;
mod checkpoint;
mod error;
mod eval;
mod inspect;
mod mixture;
mod output;
mod plan;
mod prepared;
mod quality_limit;
mod quant_baselines;
mod recover;
mod result;
mod verify;

pub use error::{ImatrixUse, JobError, with_causes};
pub use eval::{EvalJob, EvalOutcome, eval};
pub use inspect::{Inspection, Removable, inspect};
pub use mixture::{ExpertsDryRun, ExpertsOutcome};
#[cfg(unix)]
pub(crate) use output::usual_mode;
pub use output::{check_distinct, check_output, remove_temporary, write_whole};
pub(crate) use output::{resolved, temporary_folder};
pub use plan::{BlocksDryRun, DryRun, dry_run};
pub use prepared::calibration;
pub use quality_limit::QualityLimit;
pub use quant_baselines::QuantBaseline;
pub use verify::{Check, VerifyJob, verify};

use crate::assemble::Provenance;
use crate::calibrate::{Recipe, Windows};
use crate::evaluate::EvaluateError;
use crate::ggml::{FileType, RunMemory, run_memory};
use crate::gguf::GgufError;
use crate::model::{BlockShape, FfnUnit, KvCache, Model, ModelError};
use crate::pipeline::{self, Calibration, Forecast, HeldOut, Observer, Settings, Target};
use announce::{announce_all, work_after};
use checkpoint::DiskCheckpoint;
use output::check_paths;
use plan::{
    ask_memory, expected_calibration, forecast, on_target, open, open_file, open_in, open_model, run_ctx,
    settings,
};
use prepared::{HeadOrderCache, Prepared};
use result::{copy_as_is, size_of};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Description of a pruning job.
#[derive(Clone, Debug)]
pub struct Job {
    /// Path of the source, which is never written to.
    pub input: PathBuf,
    /// Path of the model that `input` was pruned from. With it nothing is removed: recovery goes on.
    pub recover_from: Option<PathBuf>,
    /// Path of the pruned model.
    pub output: PathBuf,
    /// Path of the pruned model's importance matrix, if it is written.
    pub imatrix_out: Option<PathBuf>,
    /// Importance matrix of a mixture, from which that of the pruned model is cut.
    pub imatrix_in: Option<PathBuf>,
    /// Path of the statistics of a mixture's experts, if they are written.
    pub stats_out: Option<PathBuf>,
    /// Statistics of the experts, which are taken instead of observing them.
    pub stats_in: Option<PathBuf>,
    /// Mix of types of the result, instead of the source's types.
    pub quantise: Option<Quantise>,
    /// Whether to write as many files as a split source has.
    pub keep_split: bool,
    /// Whether to replace existing outputs.
    pub force: bool,
    /// Whether libllama loads and evaluates the result before it gets its name.
    pub verify: bool,
    /// Recipe of the calibration text.
    pub recipe: Recipe,
    /// Windows that [`calibration`] collected by `recipe`; without them, the job collects its own.
    pub windows: Option<Windows>,
    /// Settings of the passes.
    pub settings: Settings,
    /// Folder of the run's checkpoint, if there is one.
    pub state: Option<KeepState>,
    /// Whether source and result continue a text.
    pub samples: bool,
    /// Whether to measure quantisation baselines of about the same size.
    pub compare_quant: bool,
    /// Quality limit: the job uses the largest sparsity within it, instead of a given one.
    pub limit: Option<QualityLimit>,
    /// Memory limit in bytes, not counting memory-mapped files.
    pub max_memory: Option<u64>,
    /// Memory limit per device in bytes; without it, the job uses most of the free memory.
    pub max_device_memory: Option<u64>,
    /// Memory in bytes that llama.cpp may take to run the result, instead of a sparsity or target.
    pub target_ram: Option<u64>,
    /// Number of layers that llama.cpp keeps on the devices of the settings, if there are any, for generation
    /// and evaluation.
    pub n_gpu_layers: usize,
    /// Number of tokens of context of the result; without it, [`RUN_CTX`], or the source's training context
    /// if that is less.
    pub run_ctx: Option<usize>,
}

impl Job {
    /// Job that prunes `input` to `output` like the command without options: with the default settings, on
    /// text that the model generates itself, verified.
    pub fn new(input: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Job {
        let recipe = Recipe::default();
        Job {
            input: input.into(),
            recover_from: None,
            output: output.into(),
            imatrix_out: None,
            imatrix_in: None,
            stats_out: None,
            stats_in: None,
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

/// Checkpoint of an interrupted run: text, heads, widths and finished blocks.
#[derive(Clone, Debug)]
pub struct KeepState {
    /// Folder for this checkpoint only. It is emptied when the job is done.
    pub folder: PathBuf,
    /// Whether to resume from an existing checkpoint, instead of refusing it.
    pub resume: bool,
}

/// Quantisation of the whole model.
#[derive(Clone, Copy, Debug)]
pub struct Quantise {
    /// Mix of types.
    pub to: FileType,
    /// Whether to quantise an already quantised model.
    pub again: bool,
}

/// Number of tokens of context, about the default for users of llama-cli and Ollama.
pub const RUN_CTX: usize = 4096;

/// Sizes of a model.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Size {
    /// Bytes of the file.
    pub bytes: u64,
    /// Number of all parameters.
    pub params: usize,
    /// Number of parameters of the blocks' attention and FFN matrices.
    pub block_params: usize,
    /// Shape of each block.
    pub blocks: Vec<BlockShape>,
}

/// Result of a job.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// Sizes of the source.
    pub before: Size,
    /// Sizes of the result.
    pub after: Size,
    /// Output architecture.
    pub output_arch: String,
    /// Share of the blocks' parameters that was removed.
    pub sparsity: f64,
    /// Unit that was removed from FFNs.
    pub ffn_unit: FfnUnit,
    /// Memory that llama.cpp takes to run source and result; absent if it was not measured.
    pub running: Option<Running>,
    /// Quality measurements; absent if nothing was pruned.
    pub quality: Option<Quality>,
    /// Path of the result; the first part if it consists of several files.
    pub output: PathBuf,
    /// Kept attention groups per block, by their numbers in the source.
    pub kept_groups: Vec<Vec<usize>>,
    /// Estimated loss of the predictions by the width of each block alone, in nats of KL divergence, if it is
    /// known.
    pub block_losses: Option<Vec<f64>>,
    /// Provenance of the result; absent if nothing was pruned.
    pub provenance: Option<Provenance>,
    /// The result, and the source in types that make files of about its size, if the job asked for them.
    pub quant_baselines: Vec<QuantBaseline>,
    /// Continuations of the same text by source and result, if the job asked for them.
    pub samples: Option<Samples>,
    /// Forecast from shapes, for results of the passes over the blocks.
    pub forecast: Option<Forecast>,
    /// Findings about the experts, if whole experts were removed.
    pub experts: Option<ExpertsOutcome>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    /// Wall time.
    pub time: Duration,
}

/// Memory that llama.cpp takes to run source and result.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Running {
    /// Number of tokens of context.
    pub n_ctx: usize,
    /// Number of tokens of context that the models were trained for.
    pub n_ctx_train: usize,
    /// Memory of the source.
    pub before: RunMemory,
    /// Memory of the result.
    pub after: RunMemory,
    /// KV caches of source and result, for other context lengths, if they are known from the shapes.
    pub kv_caches: Option<[KvCache; 2]>,
}

/// Text and its continuations.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Samples {
    /// Beginning of the first held-out window.
    pub prompt: String,
    /// Continuation by the source, always with the likeliest token.
    pub before: String,
    /// Continuation by the result.
    pub after: String,
}

/// Quality on held-out calibration windows.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Quality {
    /// Comparison of source and result by the crate's own forward pass.
    pub held_out: HeldOut,
    /// Perplexity of the written file by libllama; absent if the job does not verify.
    pub file_ppl: Option<f64>,
    /// Number of tokens that blocks are fitted to, and of those among them that the model generated itself.
    pub fit_tokens: (usize, usize),
    /// Number of held-out tokens.
    pub held_out_tokens: usize,
}

/// Whether the sparsity of `job` follows from something else that it asks for.
fn wanted(job: &Job) -> bool {
    job.settings.target.is_some() || job.target_ram.is_some() || job.limit.is_some()
}

/// Runs `job`.
///
/// # Errors
/// [`JobError`]; then there is no output, and no temporary file.
pub fn run(job: &Job, observer: &mut dyn Observer) -> Result<Outcome, JobError> {
    let start = Instant::now();
    let file = open_file(&job.input)?;
    if job.recover_from.is_none()
        && mixture::takes(job, &file)
        && (job.settings.sparsity > 0.0 || wanted(job))
    {
        return mixture::run(job, file, observer);
    }
    let source = open_in(&job.input, file)?;
    check_paths(job, &source.file)?;
    if job.settings.sparsity == 0.0 && !wanted(job) && job.recover_from.is_none() {
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
    /// Sparsity of the result.
    pub sparsity: f64,
    /// Path of the result.
    pub output: PathBuf,
    /// Path of its importance matrix, if it is written.
    pub imatrix_out: Option<PathBuf>,
}

/// Runs `job` at several sparsities on one calibration, each with its own outputs.
/// Heads that are removed at one sparsity are also removed at higher ones, so that they are searched for
/// once. `done` receives each request and its outcome.
///
/// # Errors
/// [`JobError`], also of `done`; finished outputs remain.
pub fn run_nested(
    job: &Job,
    results: &[Nested],
    observer: &mut dyn Observer,
    mut done: impl FnMut(&Job, &Outcome) -> Result<(), JobError>,
) -> Result<(), JobError> {
    let file = open_file(&job.input)?;
    if mixture::takes(job, &file) {
        return mixture::run_nested(job, file, results, observer, done);
    }
    let source = open_in(&job.input, file)?;
    let job_of = |n: &Nested| Job {
        output: n.output.clone(),
        imatrix_out: n.imatrix_out.clone(),
        settings: Settings { sparsity: n.sparsity, ..job.settings.clone() },
        ..job.clone()
    };
    // Limits are determined before any work, because the free memory may change meanwhile.
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
