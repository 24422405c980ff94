//! Data of a job that does not depend on the sparsity, and the passes over it, once or more often.

use super::announce::announce;
use super::checkpoint::DiskCheckpoint;
use super::output::temporary;
use super::{
    Job, JobError, QualityLimit, Quantise, ask_memory, on_target, open, quality_limit, recover, run_ctx,
};
use crate::assemble::importance;
use crate::calibrate::{self, CalibrateError, Origin, Recipe, Windows};
use crate::ggml::{GgmlError, LlamaModel, Offload, RunMemory, Token, quantize_file, total_memory};
use crate::gguf::{GgufError, GgufFile, Value};
use crate::model::Model;
use crate::pipeline::{self, Checkpoint, HEADS, Observer, Plan, Record, Settings};
use std::path::Path;

/// Cache of the order in which groups are removed. If blocks may keep different numbers, the order does not
/// depend on how many are removed.
pub(super) struct HeadOrderCache {
    per_block: bool,
    heads: Option<Record>,
}

impl HeadOrderCache {
    pub(super) fn new(p: &Prepared, job: &Job) -> HeadOrderCache {
        HeadOrderCache { per_block: job.settings.output_archs(p.model()).of_heads().is_some(), heads: None }
    }
}

impl Checkpoint for HeadOrderCache {
    fn load(&mut self, name: &str) -> Result<Option<Record>, GgufError> {
        Ok(self.heads.clone().filter(|_| name == HEADS))
    }

    fn save(&mut self, name: &str, record: Record) -> Result<(), GgufError> {
        if self.per_block && name == HEADS {
            self.heads = Some(record);
        }
        Ok(())
    }
}

/// Data of a job that does not depend on the sparsity.
pub(super) struct Prepared {
    /// The job's input.
    pub(super) source: Model,
    /// Model that the input was pruned from, if the job only recovers.
    origin: Option<Model>,
    /// Checksum of the model that everything was or is pruned from.
    pub(super) source_sha256: String,
    pub(super) windows: Windows,
    /// Warnings about the calibration text.
    pub(super) notes: Vec<String>,
    /// Source in the requested types, if they differ from its own. The memory map is dropped before the file.
    quantised: Option<(Model, tempfile::NamedTempFile)>,
    pub(super) state: Option<DiskCheckpoint>,
    /// Memory that llama.cpp takes to run the source.
    pub(super) to_run: RunMemory,
}

impl Prepared {
    pub(super) fn new(job: &Job, source: Model, observer: &mut dyn Observer) -> Result<Prepared, JobError> {
        // The memory is measured now: at the end, another file may have this name.
        let n_ctx = run_ctx(job, &source);
        let origin = job.recover_from.as_deref().map(|path| recover::origin(path, &source)).transpose()?;
        let to_run = ask_memory(job, &job.input, n_ctx)?;
        // Both calls read the whole file. Damage must not be reported only at the end of a long run.
        let first = origin.as_ref().unwrap_or(&source);
        let sha256 = || {
            source.file.check_values()?;
            origin.iter().try_for_each(|model| model.file.check_values())?;
            Ok::<_, GgufError>(first.file.sha256())
        };
        let mut notes = Vec::new();
        let (windows, source_sha256, state) = match &job.state {
            None => {
                let (windows, sha) = std::thread::scope(|scope| {
                    let sha = scope.spawn(sha256);
                    (windows(first, job, &mut notes, observer), sha.join().expect("hashing does not panic"))
                });
                // Damage of the file is the cause of other errors.
                let sha = sha?;
                (windows?, sha, None)
            }
            Some(keep) => {
                let sha = sha256()?;
                // Of two files that were pruned from the same source, each has a training of its own.
                let both = origin.as_ref().map(|_| format!("{sha}, pruned to {}", source.file.sha256()));
                let terms = both.as_deref().unwrap_or(&sha);
                let n_layer = source.hparams.n_layer();
                let state = DiskCheckpoint::open(&keep.folder, keep.resume, job, n_layer, terms)?;
                let windows = match state.windows()? {
                    Some(windows) => windows,
                    None => {
                        let windows = windows(first, job, &mut notes, observer)?;
                        state.keep_windows(&windows)?;
                        windows
                    }
                };
                (windows, sha, Some(state))
            }
        };
        let quantised = job.quantise.map(|q| quantise(job, q, &source, &windows, observer)).transpose()?;
        Ok(Prepared { source, origin, source_sha256, windows, notes, quantised, state, to_run })
    }

    /// Model that is pruned: the source, in the requested types.
    pub(super) fn model(&self) -> &Model {
        self.quantised.as_ref().map_or(&self.source, |(model, _)| model)
    }

    /// Model that the result is fitted to: before pruning, and before other types.
    pub(super) fn reference(&self) -> &Model {
        self.origin.as_ref().unwrap_or(&self.source)
    }

    /// Runs the passes and returns their result and settings. `later` is the work of later results, `None` if
    /// their number is not known.
    pub(super) fn prune(
        &self,
        job: &Job,
        checkpoint: &mut dyn Checkpoint,
        later: Option<f64>,
        observer: &mut dyn Observer,
    ) -> Result<(Settings, pipeline::Pruned), JobError> {
        let settings = match self.quantised {
            Some(_) => on_target(self.model(), job.settings.clone())?,
            None => job.settings.clone(),
        };
        let c = pipeline::Calibration::from(&self.windows);
        announce(job, self.model(), &c, &settings, later, observer);
        let pruned =
            pipeline::run(self.model(), self.reference(), &self.windows, &settings, checkpoint, observer)?;
        Ok((settings, pruned))
    }

    /// Runs the passes at the largest sparsity, in hundredths, that stays within `limit` on the held-out
    /// windows.
    pub(super) fn prune_within(
        &self,
        job: &Job,
        limit: QualityLimit,
        observer: &mut dyn Observer,
    ) -> Result<(Settings, pipeline::Pruned), JobError> {
        let at = |percent: u32| Settings { sparsity: f64::from(percent) / 100.0, ..job.settings.clone() };
        let can = |percent: &u32| pipeline::check_budget(self.model(), &at(*percent)).is_ok();
        let mut memory = HeadOrderCache::new(self, job);
        let mut best = None;
        let mut search = quality_limit::Search::new(limit, (1..100).rev().find(can).unwrap_or(0));
        while let Some(percent) = search.next() {
            let job = Job { settings: at(percent), ..job.clone() };
            let found = self.prune(&job, &mut memory, None, observer)?;
            let value = limit.of(&found.1.held_out);
            observer.stage(&format!("{percent} %"), 1);
            observer.step(1, &format!("{limit} is asked for, {value:.4} found"));
            if search.tell(percent, value) {
                best = Some(found);
            }
        }
        best.ok_or_else(|| JobError::Limit { limit, least: search.least() })
    }
}

/// Quantises the whole source to another mix of types, in a temporary file.
/// It uses libllama's quantiser and the importance matrix of `windows`. Later removal of rows and columns
/// needs no second rounding, because types round along rows.
fn quantise(
    job: &Job,
    q: Quantise,
    source: &Model,
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<(Model, tempfile::NamedTempFile), JobError> {
    let whole = Plan::whole(source);
    let squares = pipeline::input_squares(source, &whole, windows, &job.settings, observer)?;
    let importance = importance(source, &squares, windows);
    observer.stage("quantise", 1);
    let temp = temporary(&job.output)?;
    let n_threads = job.settings.n_threads;
    quantize_file(&job.input, temp.path(), q.to, &importance, q.again, n_threads)
        .map_err(JobError::Quantise)?;
    observer.step(1, "");
    let model =
        Model::open(temp.path()).map_err(|source| JobError::Model { path: job.input.clone(), source })?;
    pipeline::check_budget(&model, &job.settings)?;
    // The memory map is dropped before the file.
    Ok((model, temp))
}

/// Calibration windows of `job`, to be shared by several jobs.
///
/// # Errors
/// [`JobError`] if the model cannot be read or there is too little text.
pub fn calibration(job: &Job, observer: &mut dyn Observer) -> Result<Windows, JobError> {
    collect(&open(job)?, job, &mut Vec::new(), observer)
}

/// Loads a model into libllama, within the memory limit of `job`.
pub(super) fn llama(job: &Job, path: &Path) -> Result<LlamaModel, GgmlError> {
    if !job.settings.devices.is_empty() {
        let devices = job.settings.devices.clone();
        return LlamaModel::load_on(path, &Offload { devices, n_layers: job.n_gpu_layers });
    }
    if job.max_memory.is_some() { LlamaModel::load_mapped(path) } else { LlamaModel::load(path) }
}

/// Largest number of bytes of the KV cache for the generation of calibration text, and its largest share of
/// the memory limit.
const KV_BYTES: usize = 512 << 20;
const KV_SHARE: u64 = 4;

/// Number of windows that may be generated in parallel. Each has its own keys and values in F16.
fn n_parallel(model: &Model, job: &Job) -> usize {
    let per_token: usize =
        model.hparams.blocks.iter().map(|b| 4 * b.n_head_kv * model.hparams.head_dim).sum();
    let room = job.max_memory.map_or(KV_BYTES, |limit| KV_BYTES.min((limit / KV_SHARE) as usize));
    (room / (per_token * job.recipe.n_ctx).max(1)).clamp(1, job.recipe.n_parallel)
}

/// Windows that `job` holds, or those collected by its recipe.
fn windows(
    model: &Model,
    job: &Job,
    notes: &mut Vec<String>,
    observer: &mut dyn Observer,
) -> Result<Windows, JobError> {
    match &job.windows {
        Some(windows) => Ok(windows.clone()),
        None => collect(model, job, notes, observer),
    }
}

/// First token of generated text: the BOS that the file names, or else the EOS.
/// If the file names none, libllama returns token 1, 2 or 11, which may be any word.
fn start_token(file: &GgufFile, n_vocab: usize) -> Option<Token> {
    ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"].iter().find_map(|key| {
        let id = file.get_u32(key).ok().flatten().filter(|id| *id < n_vocab)?;
        Token::try_from(id).ok()
    })
}

fn collect(
    model: &Model,
    job: &Job,
    notes: &mut Vec<String>,
    observer: &mut dyn Observer,
) -> Result<Windows, JobError> {
    // A model that only tokenises needs no copies of weights. It still shows that libllama loads the file.
    let writes = job.recipe.self_written() > 0;
    let path = job.recover_from.as_ref().unwrap_or(&job.input);
    let llama = if writes { llama(job, path) } else { LlamaModel::load_mapped(path) };
    let llama = llama.map_err(JobError::Llama)?;
    let start = job.recipe.start.or_else(|| start_token(&model.file, model.hparams.n_vocab));
    if writes && start.is_none() {
        return Err(CalibrateError::NoStart.into());
    }
    let recipe = Recipe { n_parallel: n_parallel(model, job), start, ..job.recipe.clone() };
    gathering(observer, |told| calibrate::collect(&llama, &recipe, notes, told))
}

/// Collects the texts of a mixture in `file`, the input of `job`, by `collect`.
pub(super) fn collecting<T>(
    job: &Job,
    file: &GgufFile,
    observer: &mut dyn Observer,
    collect: impl FnOnce(&Recipe, Told) -> Result<T, CalibrateError>,
) -> Result<T, JobError> {
    let n_vocab = match file.get("tokenizer.ggml.tokens") {
        Some(Value::StrArray(tokens)) => tokens.len(),
        _ => usize::MAX,
    };
    let start = job.recipe.start.or_else(|| start_token(file, n_vocab));
    if job.recipe.self_written() > 0 && start.is_none() {
        return Err(CalibrateError::NoStart.into());
    }
    let recipe = Recipe { start, n_parallel: job.recipe.n_parallel.min(PARALLEL), ..job.recipe.clone() };
    gathering(observer, |told| collect(&recipe, told))
}

/// Largest number of windows that a mixture generates side by side.
const PARALLEL: usize = 8;

/// Progress of the collection of texts: origin, tokens done, tokens in all; returns whether to go on.
pub(super) type Told<'a> = &'a mut dyn FnMut(Origin, usize, usize) -> bool;

/// Collects calibration text by `collect`, with its progress shown to `observer`.
fn gathering<T>(
    observer: &mut dyn Observer,
    collect: impl FnOnce(Told) -> Result<T, CalibrateError>,
) -> Result<T, JobError> {
    let mut begun = None;
    let found = collect(&mut |origin, done, total| {
        // A short text is read at once and needs no progress.
        if begun == Some(origin) || origin == Origin::Model || done < total {
            if begun != Some(origin) {
                let stage = if origin == Origin::Files { "reading text" } else { "calibration text" };
                observer.stage(stage, total);
                begun = Some(origin);
            }
            observer.step(done, "");
        }
        !observer.interrupted()
    });
    match found {
        Err(CalibrateError::Interrupted) => Err(JobError::Interrupted),
        other => Ok(other?),
    }
}

/// Share of the machine's memory up to which a model may be copied for faster kernels.
const COPIED_SHARE: u64 = 4;

/// Loads the model of `n_bytes` at `path` as [`llama`] does, but so that its weights stay in the mapped file if
/// it is large beside the machine's memory.
pub(super) fn llama_mapped_if_large(job: &Job, path: &Path, n_bytes: u64) -> Result<LlamaModel, GgmlError> {
    let large = total_memory().is_none_or(|total| n_bytes > total / COPIED_SHARE);
    if job.settings.devices.is_empty() && large { LlamaModel::load_mapped(path) } else { llama(job, path) }
}
