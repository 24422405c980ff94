//! The whole way from a GGUF to a pruned and verified GGUF.

mod error;
mod eval;
mod inspect;
mod limit;
mod output;
mod state;

pub use error::JobError;
pub use eval::{EvalJob, EvalOutcome, eval};
pub use inspect::{Inspection, inspect};
pub use limit::Limit;
pub use output::remove_temporary;

use crate::assemble::{Provenance, assemble, importance, write_imatrix};
use crate::calibrate::{self, CalibrateError, Recipe, Windows};
use crate::evaluate;
use crate::ggml::{FileType, GgmlError, LlamaModel, quantize_file};
use crate::gguf::{GgufError, OutTensor, write_gguf};
use crate::model::{BlockShape, Family, Model, ModelError};
use crate::pipeline::{
    self, Calibration, Forecast, HeldOut, Journal, Method, Observer, Plan, Settings, Settled, Target,
};
use crate::prune::LazyGreedy;
use output::{check_paths, finish, folder_of, temporary};
use state::State;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How far libllama's perplexity of the written file may lie from our own forward of the pruned
/// model, as a ratio, over many tokens: it rounds activations to eight bits for quantised weights, we
/// do not. Over n tokens chance adds about 1/√n.
const PARITY: f64 = 1.05;

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
    /// Take the largest sparsity that stays within this, instead of one that is given.
    pub limit: Option<Limit>,
    /// Bytes of memory to do with, the mapped files not counted.
    pub max_memory: Option<u64>,
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
    pub carrier: Family,
    /// Share of the blocks' parameters that was removed.
    pub sparsity: f64,
    /// What was measured; absent when nothing was pruned.
    pub quality: Option<Quality>,
    /// The attention groups that stay, per block, by their numbers in the source.
    pub kept_groups: Vec<Vec<usize>>,
    /// What the predictions lose by the width of each block alone, about, in nats of KL divergence, if that is known.
    pub block_losses: Option<Vec<f64>>,
    /// Where the result comes from; absent when nothing was pruned.
    pub provenance: Option<Provenance>,
    /// How source and result go on from the same words, if the job asked for it.
    pub samples: Option<Samples>,
    /// What shapes said beforehand; absent when nothing was pruned.
    pub forecast: Option<Forecast>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Wall time.
    pub time: Duration,
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
    /// The written file, by libllama; absent with `--no-verify`.
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
    if job.settings.sparsity == 0.0 && job.settings.target.is_none() && job.limit.is_none() {
        return copy_as_is(job, &source, start, observer.interrupted());
    }
    let job = &Job { settings: settings(job, &source)?, ..job.clone() };
    let mut p = Prepared::new(job, source, observer)?;
    let mut state = p.state.take();
    let (settings, pruned) = match (job.limit, &mut state) {
        (Some(limit), _) => p.prune_within(job, limit, observer)?,
        (None, Some(state)) => p.prune(job, state, observer)?,
        (None, None) => p.prune(job, &mut (), observer)?,
    };
    let outcome = p.write(&Job { settings, ..job.clone() }, pruned, start, observer)?;
    state.into_iter().for_each(State::remove);
    Ok(outcome)
}

/// Runs `job` at several sparsities on one calibration, each with an output of its own; heads that go at one also go at
/// higher ones, so that they are searched for once. `done` is told of each outcome.
///
/// # Errors
/// [`JobError`]; outputs that were finished stay.
pub fn run_nested(
    job: &Job,
    outputs: &[(f64, PathBuf)],
    observer: &mut dyn Observer,
    mut done: impl FnMut(&Path, &Outcome),
) -> Result<(), JobError> {
    let source = open(job)?;
    let job_of = |(sparsity, output): &(f64, PathBuf)| Job {
        output: output.clone(),
        settings: Settings { sparsity: *sparsity, ..job.settings.clone() },
        ..job.clone()
    };
    let jobs: Vec<Job> = outputs.iter().map(job_of).collect();
    for job in &jobs {
        check_paths(job, &source.file)?;
        settings(job, &source)?;
    }
    let mut start = Instant::now();
    let p = Prepared::new(&jobs[0], source, observer)?;
    let mut memory = Memory::new(&p, &jobs[0]);
    for job in jobs {
        let job = Job { settings: settings(&job, &p.source)?, ..job };
        let (settings, pruned) = p.prune(&job, &mut memory, observer)?;
        let outcome = p.write(&Job { settings, ..job.clone() }, pruned, start, observer)?;
        done(&job.output, &outcome);
        start = Instant::now();
    }
    Ok(())
}

/// The order in which groups go. Where blocks may keep different numbers, it does not depend on how many go.
struct Memory {
    per_block: bool,
    heads: Option<LazyGreedy>,
}

impl Memory {
    fn new(p: &Prepared, job: &Job) -> Memory {
        Memory { per_block: job.settings.carriers(p.model()).per_block.is_some(), heads: None }
    }
}

impl Journal for Memory {
    fn settled(&mut self) -> Result<Settled, GgufError> {
        Ok(Settled { heads: self.heads.clone(), ..Settled::default() })
    }

    fn heads(&mut self, search: &LazyGreedy) -> Result<(), GgufError> {
        if self.per_block {
            self.heads = Some(search.clone());
        }
        Ok(())
    }
}

/// What a job works on, whatever the sparsity.
struct Prepared {
    source: Model,
    source_sha256: String,
    windows: Windows,
    /// The source in the types that the result shall have, if these are others. The map goes before the file.
    quantised: Option<(Model, tempfile::NamedTempFile)>,
    state: Option<State>,
}

impl Prepared {
    fn new(job: &Job, source: Model, observer: &mut dyn Observer) -> Result<Prepared, JobError> {
        let sha256 = || source.file.sha256();
        let (windows, source_sha256, state) = match &job.state {
            None => {
                let (windows, sha) = std::thread::scope(|scope| {
                    let sha = scope.spawn(sha256);
                    (windows(&source, job, observer), sha.join().expect("hashing does not panic"))
                });
                (windows?, sha, None)
            }
            Some(keep) => {
                let sha = sha256();
                let state = State::open(&keep.folder, keep.resume, job, &source, &sha)?;
                let windows = match state.windows()? {
                    Some(windows) => windows,
                    None => {
                        let windows = windows(&source, job, observer)?;
                        state.keep_windows(&windows)?;
                        windows
                    }
                };
                (windows, sha, Some(state))
            }
        };
        let quantised = job.quantise.map(|q| quantise(job, q, &source, &windows, observer)).transpose()?;
        Ok(Prepared { source, source_sha256, windows, quantised, state })
    }

    /// What is pruned: the source, in the types that the result shall have.
    fn model(&self) -> &Model {
        self.quantised.as_ref().map_or(&self.source, |(model, _)| model)
    }

    /// What the passes make of it, and the settings that they had.
    fn prune(
        &self,
        job: &Job,
        journal: &mut dyn Journal,
        observer: &mut dyn Observer,
    ) -> Result<(Settings, pipeline::Outcome), JobError> {
        let settings = match self.quantised {
            Some(_) => on_target(self.model(), job.settings.clone())?,
            None => job.settings.clone(),
        };
        let pruned = pipeline::run(self.model(), &self.source, &self.windows, &settings, journal, observer)?;
        Ok((settings, pruned))
    }

    /// The same at the largest sparsity, in hundredths, that stays within `limit` on the held-out windows.
    fn prune_within(
        &self,
        job: &Job,
        limit: Limit,
        observer: &mut dyn Observer,
    ) -> Result<(Settings, pipeline::Outcome), JobError> {
        let at = |percent: u32| Settings { sparsity: f64::from(percent) / 100.0, ..job.settings.clone() };
        let can = |percent: &u32| pipeline::check_budget(self.model(), &at(*percent)).is_ok();
        let mut memory = Memory::new(self, job);
        let mut best = None;
        let mut search = limit::Search::new(limit, (1..100).rev().find(can).unwrap_or(0));
        while let Some(percent) = search.next() {
            let job = Job { settings: at(percent), ..job.clone() };
            let found = self.prune(&job, &mut memory, observer)?;
            let value = limit.of(&found.1.held_out);
            observer.stage(&format!("{percent} %"), 1);
            observer.step(1, &format!("{limit} is asked for, {value:.4} found"));
            if search.tell(percent, value) {
                best = Some(found);
            }
        }
        best.ok_or_else(|| JobError::Limit { limit, least: search.least() })
    }

    /// Writes and verifies what came of the passes.
    fn write(
        &self,
        job: &Job,
        pruned: pipeline::Outcome,
        start: Instant,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, JobError> {
        let (model, source, windows) = (self.model(), &self.source, &self.windows);
        let forecast = forecast(model, &Calibration::from(windows), &job.settings)?;
        let sparsity = pruned.plan.sparsity(&pipeline::budgets(model, &job.settings));
        let provenance = Provenance {
            source_sha256: self.source_sha256.clone(),
            sparsity: job.settings.sparsity,
            sparsity_reached: sparsity,
            method: method_name(job.settings.method).into(),
            calibration: calibration_text(job, windows),
            seed: job.recipe.seed,
            tune: if pruned.tuned { job.settings.tune } else { 0 },
        };

        // Beside its name until the model is verified, too.
        let imatrix = match &job.imatrix_out {
            None => None,
            Some(path) => {
                let squares = pipeline::input_squares(model, &pruned.plan, windows, &job.settings, observer)?;
                let temp = temporary(path)?;
                let mut out = BufWriter::new(temp.as_file());
                let carrier = pruned.plan.carrier(model);
                write_imatrix(&mut out, path, model, carrier, &squares, windows, &provenance.calibration)?;
                drop(out);
                Some((path, temp))
            }
        };
        observer.stage("write and verify", 2);
        let temp = temporary(&job.output)?;
        let mut out = BufWriter::with_capacity(1 << 20, temp.as_file());
        let carrier = assemble(model, &pruned.plan, &provenance, &mut out, &job.output)?;
        out.flush().map_err(|source| JobError::Io { path: job.output.clone(), source })?;
        drop(out);
        observer.step(1, "");
        let mut quality = Quality {
            held_out: pruned.held_out,
            file_ppl: None,
            fit_tokens: (windows.n_fit * windows.n_ctx, windows.n_self * windows.n_ctx),
            held_out_tokens: windows.n_held_out * windows.n_ctx,
        };
        if job.verify {
            let held_out = windows.tokens_of(windows.n_fit..windows.n_windows());
            let n_threads = job.settings.n_threads;
            let file = llama(job, temp.path())
                .and_then(|model| evaluate::perplexity(&model, held_out, windows.n_ctx, n_threads))
                .map_err(JobError::DoesNotLoad)?;
            let own = quality.held_out.pruned_ppl;
            // A NaN on either side is no agreement.
            let bound = PARITY.ln() + 1.0 / (held_out.len() as f64).sqrt();
            let agrees = (file / own).ln().abs() <= bound;
            if !agrees {
                return Err(JobError::Disagrees { file, own });
            }
            quality.file_ppl = Some(file);
        }
        let samples = if job.samples {
            Some(self.samples(job, temp.path()).map_err(JobError::DoesNotLoad)?)
        } else {
            None
        };
        if observer.interrupted() {
            return Err(JobError::Interrupted);
        }
        if let Some((path, temp)) = imatrix {
            finish(job, temp, path)?;
        }
        let bytes = finish(job, temp, &job.output)?;
        observer.step(2, "");
        let shapes = pruned.plan.shapes(model);
        let before = size_of(source);
        let after = Size {
            bytes,
            params: before.params - removed_params(model, &shapes),
            block_params: shapes.iter().map(|b| sum(model.hparams.block_params(b))).sum(),
            blocks: shapes,
        };
        let mut warnings = pruned.warnings;
        if let Some(Target::Bytes(target)) = job.settings.target
            && bytes > target
        {
            warnings.push(format!("the file has {} bytes more than was asked for", bytes - target));
        }
        let deci_biases = carrier == Family::Deci && source.blocks.iter().any(|b| b.qkv_bias.is_some());
        warnings.extend(advice(sparsity, &quality, carrier, deci_biases));
        Ok(Outcome {
            before,
            after,
            carrier,
            sparsity,
            quality: Some(quality),
            kept_groups: pruned.plan.blocks.into_iter().map(|b| b.groups).collect(),
            block_losses: pruned.block_losses,
            provenance: Some(provenance),
            samples,
            forecast: Some(forecast),
            warnings,
            time: start.elapsed(),
        })
    }

    /// How the source and the file `output` go on from the beginning of the first held-out window.
    fn samples(&self, job: &Job, output: &Path) -> Result<Samples, GgmlError> {
        let window = self.windows.tokens_of(self.windows.n_fit..self.windows.n_fit + 1);
        let prompt = &window[..PROMPT_TOKENS.min(window.len())];
        let written =
            |model: &LlamaModel| evaluate::continuation(model, prompt, SAMPLE_TOKENS, job.settings.n_threads);
        let source = llama(job, &job.input)?;
        let before = written(&source)?;
        let prompt = source.vocab().detokenize(prompt);
        drop(source);
        Ok(Samples { prompt, before, after: written(&llama(job, output)?)? })
    }
}

/// Tokens that samples begin with, and that are written.
const PROMPT_TOKENS: usize = 24;
const SAMPLE_TOKENS: usize = 64;

/// What a job will need, and what comes of it, as far as shapes say.
#[derive(Clone, Debug)]
pub struct DryRun {
    /// The source.
    pub before: Size,
    /// What it comes to.
    pub forecast: Forecast,
    /// What it was made for: those of the job, within its memory.
    pub settings: Settings,
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
    // In other types, the size is known once it is in these.
    if job.quantise.is_none() {
        settings = on_target(source, settings)?;
    }
    pipeline::check_budget(source, &settings)?;
    let n_ctx_train = source.hparams.n_ctx_train;
    if job.recipe.n_ctx > n_ctx_train {
        let problem =
            format!("was trained for {n_ctx_train} tokens; --ctx-size {} is more", job.recipe.n_ctx);
        return Err(JobError::Model { path: job.input.clone(), source: ModelError::Unusable(problem) });
    }
    let Some(limit) = job.max_memory else {
        return Ok(settings);
    };
    let calibration = expected_calibration(job);
    pipeline::within_memory(source, &calibration, &settings, limit, folder_of(&job.output))
        .map_err(JobError::NoRoom)
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
            | GgufError::Magic { .. }
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
        if job.imatrix_out.is_some() {
            return Err(JobError::OfExperts("--imatrix-out"));
        }
        if job.quantise.is_some() {
            return Err(JobError::OfExperts("--type"));
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

/// The whole source in another mix of types, in a temporary file: by libllama's quantiser, with the
/// importance matrix of `windows`. What is cut out of it afterwards needs no second rounding, for types
/// round along rows.
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
        Model::open(temp.path()).map_err(|source| JobError::Model { path: temp.path().into(), source })?;
    pipeline::check_budget(&model, &job.settings)?;
    // The map goes before the file.
    Ok((model, temp))
}

/// The calibration windows of `job`, for jobs that shall share them.
///
/// # Errors
/// [`JobError`] if the model cannot be read or there is too little text.
pub fn calibration(job: &Job, observer: &mut dyn Observer) -> Result<Windows, JobError> {
    collect(&open(job)?, job, observer)
}

fn sum((a, b): (usize, usize)) -> usize {
    a + b
}

fn size_of(model: &Model) -> Size {
    let h = &model.hparams;
    Size {
        bytes: model.file.n_bytes(),
        params: model.file.tensors().iter().map(|t| t.n_elements()).sum(),
        block_params: h.blocks.iter().map(|b| sum(h.block_params(b))).sum(),
        blocks: h.blocks.clone(),
    }
}

fn removed_params(model: &Model, shapes: &[BlockShape]) -> usize {
    let h = &model.hparams;
    h.blocks.iter().zip(shapes).map(|(a, b)| sum(h.block_params(a)) - sum(h.block_params(b))).sum()
}

/// Loads a model into libllama, within the memory of `job`.
fn llama(job: &Job, path: &Path) -> Result<LlamaModel, GgmlError> {
    if job.max_memory.is_some() { LlamaModel::load_mapped(path) } else { LlamaModel::load(path) }
}

/// Bytes of KV cache that generating calibration text may take, and their largest share of `--max-memory`.
const KV_BYTES: usize = 512 << 20;
const KV_SHARE: u64 = 4;

/// Windows that may be generated side by side: each has its F16 keys and values.
fn n_parallel(model: &Model, job: &Job) -> usize {
    let per_token: usize =
        model.hparams.blocks.iter().map(|b| 4 * b.n_head_kv * model.hparams.head_dim).sum();
    let room = job.max_memory.map_or(KV_BYTES, |limit| KV_BYTES.min((limit / KV_SHARE) as usize));
    (room / (per_token * job.recipe.n_ctx).max(1)).clamp(1, job.recipe.n_parallel)
}

/// The windows that `job` was given, or those that it asks for.
fn windows(model: &Model, job: &Job, observer: &mut dyn Observer) -> Result<Windows, JobError> {
    match &job.windows {
        Some(windows) => Ok(windows.clone()),
        None => collect(model, job, observer),
    }
}

fn collect(model: &Model, job: &Job, observer: &mut dyn Observer) -> Result<Windows, JobError> {
    // What only tokenises needs no copies of weights; that libllama takes the file is seen all the same.
    let writes = job.recipe.self_written() > 0;
    let llama = if writes { llama(job, &job.input) } else { LlamaModel::load_mapped(&job.input) };
    let llama = llama.map_err(CalibrateError::Llama)?;
    let mut begun = false;
    let recipe = Recipe { n_parallel: n_parallel(model, job), ..job.recipe.clone() };
    let windows = calibrate::collect(&llama, &recipe, |done, total| {
        if !begun {
            observer.stage("calibration text", total);
            begun = true;
        }
        observer.step(done, "");
        !observer.interrupted()
    });
    match windows {
        Err(CalibrateError::Interrupted) => Err(JobError::Interrupted),
        other => Ok(other?),
    }
}

/// Sparsity 0: the same bytes, or those of all parts as one file.
fn copy_as_is(job: &Job, model: &Model, start: Instant, interrupted: bool) -> Result<Outcome, JobError> {
    let io = |source| JobError::Io { path: job.output.clone(), source };
    let mut temp = temporary(&job.output)?;
    let parts: Vec<&[u8]> = model.file.bytes().collect();
    match parts[..] {
        [bytes] => temp.write_all(bytes).map_err(io)?,
        _ => {
            let tensors = model.file.tensors().iter().map(|t| OutTensor::copy(&model.file, t));
            write_gguf(&mut temp, &job.output, model.file.metadata(), &tensors.collect::<Vec<_>>())?;
        }
    }
    if job.verify {
        LlamaModel::load(temp.path()).map_err(JobError::DoesNotLoad)?;
    }
    if interrupted {
        return Err(JobError::Interrupted);
    }
    let bytes = finish(job, temp, &job.output)?;
    let before = size_of(model);
    Ok(Outcome {
        after: Size { bytes, ..before.clone() },
        before,
        carrier: model.hparams.family,
        sparsity: 0.0,
        quality: None,
        kept_groups: Plan::whole(model).blocks.into_iter().map(|b| b.groups).collect(),
        block_losses: None,
        provenance: None,
        samples: None,
        forecast: None,
        warnings: Vec::new(),
        time: start.elapsed(),
    })
}

fn method_name(method: Method) -> &'static str {
    match method {
        Method::Putri => "putri",
        Method::Paper => "paper",
        Method::TwoStage => "2ssp",
    }
}

fn calibration_text(job: &Job, w: &Windows) -> String {
    let files: Vec<_> = job
        .recipe
        .files
        .iter()
        .map(|f| f.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    let mut own = format!("{} of {} windows of {} tokens self-generated", w.n_self, w.n_fit, w.n_ctx);
    if w.n_self > 0 && job.recipe.chat_share > 0.0 {
        own += &format!(", {:.0} % of them in the chat template", job.recipe.chat_share * 100.0);
    }
    if files.is_empty() { own } else { format!("{own}, the rest from {}", files.join(", ")) }
}

/// What a user needs to hear about a result like this.
fn advice(sparsity: f64, q: &Quality, carrier: Family, deci_biases: bool) -> Vec<String> {
    let mut out = Vec::new();
    if sparsity >= 0.4 {
        out.push(format!(
            "{:.0} % pruned without training afterwards is a start for fine-tuning or a simple task, not a chat model; \
             10 to 25 % is what keeps answers usable",
            sparsity * 100.0
        ));
    }
    if q.held_out.pruned_ppl > 2.0 * q.held_out.dense_ppl {
        out.push("perplexity more than doubled: compare with a smaller quant or a smaller model before you ship this".into());
    }
    let since = match carrier {
        // With biases of Q, K and V: llama.cpp's pull request 21245.
        Family::Deci if deci_biases => Some("llama.cpp since April 2026 and Ollama since 0.30"),
        Family::Deci | Family::OpenElm => Some("llama.cpp since 2025 and Ollama since 0.9.3"),
        _ => None,
    };
    if let Some(since) = since {
        let name = carrier.name();
        out.push(format!(
            "the file is of architecture {name}, in which blocks may differ in size, for {since}"
        ));
    }
    out
}
