//! Jobs that remove whole experts from a mixture of any architecture.

mod plan;
mod result;
mod verify;

pub use plan::ExpertsDryRun;
pub(super) use plan::{dry_run, size};
pub(super) use verify::{says_experts, verify};

use super::checkpoint::DiskCheckpoint;
use super::output::{check_output, check_paths, folder_of, write_whole};
use super::prepared::{collecting, llama_mapped_if_large};
use super::{Job, JobError, Nested, Outcome, QualityLimit, quality_limit};
use crate::assemble::Narrowed;
use crate::calibrate::{Text, collect_texts};
use crate::ggml::{LlamaModel, RunMemory, run_memory};
use crate::gguf::GgufFile;
use crate::model::{Family, FfnUnit, Mixture};
use crate::numeric::Metrics;
use crate::observe::{LayerMask, Mask, Usage};
use crate::pipeline::experts::{self, Choice, ExpertSettings, Source, TextQuality, Trial};
use crate::pipeline::{Checkpoint, Observer};
use crate::spill::SpillStore;
use plan::{Amount, amount_of, refuse};
use std::path::Path;
use std::time::Instant;

/// Findings of a job about the experts of a mixture.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExpertsOutcome {
    /// Number of experts of a layer in the source.
    pub n_expert: usize,
    /// Number of experts of a layer in the result.
    pub n_keep: usize,
    /// Number of experts that a token passes through.
    pub n_used: usize,
    /// Name of the criterion of the first choice.
    pub criterion: String,
    /// Steps of the choice, with the mean KL divergence on the held-out windows after each, in nats, and
    /// whether its result was kept.
    pub steps: Vec<experts::Step>,
    /// Quality on each text, the worst first.
    pub texts: Vec<TextQuality>,
    /// Statistics of the source.
    pub usage: Usage,
    /// Kept experts by the number of the layer, ascending.
    pub kept: Vec<(usize, Vec<usize>)>,
}

/// Returns whether `job` observes the experts of the model in `file` through libllama.
/// It does unless the crate's own forward pass computes them and narrows them.
pub(super) fn takes(job: &Job, file: &GgufFile) -> bool {
    let own = || {
        let arch = file.get_str("general.architecture").ok().flatten();
        arch.and_then(Family::from_name).is_some_and(|f| f.traits().experts.is_some())
    };
    Mixture::is_in(file) && (job.settings.moe_unit == FfnUnit::Expert || !own())
}

/// Reads the mixture in `file`, the input of `job`.
pub(super) fn mixture(job: &Job, file: GgufFile) -> Result<Mixture, JobError> {
    Mixture::new(file).map_err(|source| JobError::Model { path: job.input.clone(), source })
}

/// Data of a job that does not depend on how many experts go.
struct Prepared {
    mixture: Mixture,
    source_sha256: String,
    llama: LlamaModel,
    texts: Vec<Text>,
    notes: Vec<String>,
    state: Option<DiskCheckpoint>,
    /// Memory that llama.cpp takes to run the source.
    to_run: Option<RunMemory>,
}

/// Result of the choice.
struct Pruned {
    amount: Amount,
    mask: Mask,
    narrowed: Option<Narrowed>,
    steps: Vec<experts::Step>,
    criterion: String,
    texts: Vec<TextQuality>,
    /// Comparison with the source; absent if only the file can tell.
    metrics: Option<Metrics>,
    /// Losses of the first tokens of a held-out window.
    losses: Vec<f64>,
    notes: Vec<String>,
}

/// Runs `job` on a mixture.
pub(super) fn run(job: &Job, file: GgufFile, observer: &mut dyn Observer) -> Result<Outcome, JobError> {
    let start = Instant::now();
    let mixture = mixture(job, file)?;
    check(job, &mixture)?;
    // A limit is found out below.
    let amount =
        if job.limit.is_none() { amount_of(job, &mixture)? } else { Amount::Experts(mixture.n_expert) };
    let mut p = Prepared::new(job, mixture, observer)?;
    let mut state = p.state.take();
    if let Amount::Width(width) = amount {
        let pruned = p.narrow(job, width, observer)?;
        let outcome = p.write(job, pruned, Usage::new(p.mixture.n_expert), start, observer)?;
        state.into_iter().for_each(DiskCheckpoint::remove);
        return Ok(outcome);
    }
    let usage = match &mut state {
        Some(state) => p.usage(job, state, observer)?,
        None => p.usage(job, &mut (), observer)?,
    };
    let mut trial = Trial::new(p.source(job))?;
    let n_keep = match (job.limit, amount) {
        (Some(limit), _) => p.within(job, limit, &usage, &mut trial, observer)?,
        (None, Amount::Experts(n) | Amount::Width(n)) => n,
    };
    let pruned = match &mut state {
        Some(state) => p.prune(job, n_keep, &usage, &mut trial, state, observer)?,
        None => p.prune(job, n_keep, &usage, &mut trial, &mut (), observer)?,
    };
    drop(trial);
    let outcome = p.write(job, pruned, usage, start, observer)?;
    state.into_iter().for_each(DiskCheckpoint::remove);
    Ok(outcome)
}

/// Runs `job` at several shares on one observation.
pub(super) fn run_nested(
    job: &Job,
    file: GgufFile,
    results: &[Nested],
    observer: &mut dyn Observer,
    mut done: impl FnMut(&Job, &Outcome) -> Result<(), JobError>,
) -> Result<(), JobError> {
    let mut start = Instant::now();
    let mixture = mixture(job, file)?;
    let mut jobs = Vec::new();
    for n in results {
        let mut each = Job { output: n.output.clone(), imatrix_out: n.imatrix_out.clone(), ..job.clone() };
        each.settings.sparsity = n.sparsity;
        check(&each, &mixture)?;
        jobs.push((amount_of(&each, &mixture)?, each));
    }
    let p = Prepared::new(job, mixture, observer)?;
    let usage = match job.settings.moe_unit {
        FfnUnit::Expert => p.usage(job, &mut (), observer)?,
        FfnUnit::Neuron => Usage::new(p.mixture.n_expert),
    };
    for (amount, job) in jobs {
        let pruned = match amount {
            Amount::Width(width) => p.narrow(&job, width, observer)?,
            Amount::Experts(n_keep) => {
                let mut trial = Trial::new(p.source(&job))?;
                p.prune(&job, n_keep, &usage, &mut trial, &mut (), observer)?
            }
        };
        let outcome = p.write(&job, pruned, usage.clone(), start, observer)?;
        done(&job, &outcome)?;
        start = Instant::now();
    }
    Ok(())
}

/// Refuses bad paths and what a mixture cannot have, before any work.
fn check(job: &Job, mixture: &Mixture) -> Result<(), JobError> {
    check_paths(job, &mixture.file)?;
    if let Some(path) = &job.stats_out {
        check_output(path, job.force)?;
    }
    refuse(job, mixture)
}

impl Prepared {
    fn new(job: &Job, mixture: Mixture, observer: &mut dyn Observer) -> Result<Prepared, JobError> {
        let n_ctx = plan::run_ctx(job, &mixture);
        let to_run = run_memory(&job.input, n_ctx).ok();
        observer.stage("hash the source", 1);
        mixture.file.check_values()?;
        let source_sha256 = mixture.file.sha256();
        observer.step(1, "");
        let state = match &job.state {
            Some(keep) => {
                let n = mixture.n_layer;
                Some(DiskCheckpoint::open(&keep.folder, keep.resume, job, n, &source_sha256)?)
            }
            None => None,
        };
        let llama =
            llama_mapped_if_large(job, &job.input, mixture.file.n_bytes()).map_err(JobError::Llama)?;
        let mut notes = Vec::new();
        let kept = state.as_ref().map(DiskCheckpoint::texts).transpose()?.flatten();
        let texts = match kept {
            Some(texts) => texts,
            None => {
                let texts = texts(job, &mixture, &llama, &mut notes, observer)?;
                if let Some(state) = &state {
                    state.keep_texts(&texts)?;
                }
                texts
            }
        };
        if mixture.is_multimodal() {
            notes.push(
                "the model may see pictures or hear sounds, and was calibrated on text alone: experts that serve other \
                 inputs only may be gone; its projector is a file of its own and stays as it is"
                    .into(),
            );
        }
        Ok(Prepared { mixture, source_sha256, llama, texts, notes, state, to_run })
    }

    fn source(&self, job: &Job) -> Source<'_> {
        Source {
            mixture: &self.mixture,
            llama: &self.llama,
            texts: &self.texts,
            n_threads: job.settings.n_threads,
        }
    }

    /// Statistics of the source: those of a file, or else observed. They are written where the job wants
    /// them as soon as they are known.
    fn usage(
        &self,
        job: &Job,
        checkpoint: &mut dyn Checkpoint,
        observer: &mut dyn Observer,
    ) -> Result<Usage, JobError> {
        let mut usage = match &job.stats_in {
            Some(path) => read_usage(path, &self.mixture)?,
            None => experts::observe(self.source(job), checkpoint, observer)?,
        };
        if job.stats_in.is_none() {
            usage.architecture = Some(self.mixture.arch.clone());
            usage.source_sha256 = Some(self.source_sha256.clone());
        }
        if let Some(path) = &job.stats_out {
            let s = &job.settings.experts;
            let mut written = usage.clone();
            if !usage.texts.is_empty() {
                written.scores = crate::prune::scores(&usage, s.criterion, s.weights);
                written.criterion = Some(s.criterion.name().into());
            }
            write_whole(path, written.to_json().as_bytes(), job.force)?;
        }
        Ok(usage)
    }

    /// Smallest number of experts whose choice stays within `limit`, before it is refined.
    fn within(
        &self,
        job: &Job,
        limit: QualityLimit,
        usage: &Usage,
        trial: &mut Trial,
        observer: &mut dyn Observer,
    ) -> Result<usize, JobError> {
        let (n, step) = (self.mixture.n_expert, self.mixture.step());
        let share = |steps: u32| (steps as usize * step) as f64 / n as f64;
        let most = ((n - self.mixture.least()) / step) as u32;
        let mut search = quality_limit::Search::new(limit, most);
        let mut best = None;
        while let Some(steps) = search.next() {
            let n_keep = n - steps as usize * step;
            let choice = experts::choose(&self.mixture, usage, &job.settings.experts, n_keep);
            let (_, metrics) = trial.quality(&choice.mask, observer)?;
            let value = limit.of(&metrics);
            observer.stage(&format!("{n_keep} experts"), 1);
            observer.step(1, &format!("{limit} is asked for, {value:.4} found"));
            if search.tell(steps, value) {
                best = Some(n_keep);
            }
        }
        let percent = |(steps, value): (u32, f64)| ((share(steps) * 100.0).round() as u32, value);
        best.ok_or_else(|| JobError::Limit { limit, least: search.least().map(percent) })
    }

    /// Chooses `n_keep` experts of each layer, refines the choice, and judges it.
    fn prune(
        &self,
        job: &Job,
        n_keep: usize,
        usage: &Usage,
        trial: &mut Trial,
        checkpoint: &mut dyn Checkpoint,
        observer: &mut dyn Observer,
    ) -> Result<Pruned, JobError> {
        let settings: &ExpertSettings = &job.settings.experts;
        let choice: Choice = experts::choose(&self.mixture, usage, settings, n_keep);
        let refined = trial.refine(&choice, settings, checkpoint, observer)?;
        let (texts, metrics) = trial.quality(&refined.mask, observer)?;
        let losses = trial.losses(&refined.mask, super::verify::RECORDED)?;
        let criterion = match usage.texts.is_empty() {
            false => settings.criterion.name().into(),
            true => usage.criterion.clone().unwrap_or_else(|| "given".into()),
        };
        let drafts = choice.of_drafts(&self.mixture);
        let mut notes = choice.notes;
        if !drafts.is_empty() {
            notes.push(match settings.drop_drafts {
                true => "the layers that draft tokens (MTP) are left out".into(),
                false => "the routers of layers that draft tokens (MTP) cannot be observed: evenly spread experts stay \
                          there, so fewer drafts may be accepted, at unchanged output"
                    .into(),
            });
        }
        notes.extend(refined.notes);
        let mask = refined.mask.into_iter().chain(drafts).collect();
        Ok(Pruned {
            amount: Amount::Experts(n_keep),
            mask,
            narrowed: None,
            steps: refined.steps,
            criterion,
            texts,
            metrics: Some(metrics),
            losses,
            notes,
        })
    }

    /// Narrows every expert to `width` neurons.
    fn narrow(&self, job: &Job, width: usize, observer: &mut dyn Observer) -> Result<Pruned, JobError> {
        let source = self.source(job);
        let per_pass = experts::layers_per_pass(&source, job.max_memory);
        let mut settings = job.settings.clone();
        // New values of all layers may be larger than the memory.
        settings.spill = SpillStore::in_files(folder_of(&job.output).into());
        let mut notes = Vec::new();
        let layers = experts::narrow(source, width, per_pass, &settings, &mut notes, observer)?;
        let n = self.mixture.n_expert;
        let whole = LayerMask { kept: vec![true; n], router: None, order: (0..n).collect() };
        Ok(Pruned {
            amount: Amount::Width(width),
            mask: self.mixture.layers.iter().map(|l| (l.block, whole.clone())).collect(),
            narrowed: Some(Narrowed { width, layers }),
            steps: Vec::new(),
            criterion: "obs".into(),
            texts: Vec::new(),
            metrics: None,
            losses: Vec::new(),
            notes,
        })
    }
}

/// Collects the calibration texts of `job`.
fn texts(
    job: &Job,
    mixture: &Mixture,
    llama: &LlamaModel,
    notes: &mut Vec<String>,
    observer: &mut dyn Observer,
) -> Result<Vec<Text>, JobError> {
    if let Some(w) = &job.windows {
        let windows = |range| w.tokens_of(range).chunks_exact(w.n_ctx).map(<[_]>::to_vec).collect();
        let name = "given".to_string();
        let (fit, held_out) = (windows(0..w.n_fit), windows(w.n_fit..w.n_windows()));
        return Ok(vec![Text { name, weight: 1.0, fit, held_out }]);
    }
    collecting(job, &mixture.file, observer, |recipe, told| collect_texts(llama, recipe, notes, told))
}

/// Reads the statistics file at `path` for `mixture`.
fn read_usage(path: &Path, mixture: &Mixture) -> Result<Usage, JobError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| JobError::Read { path: path.into(), source })?;
    let blocks: Vec<usize> = mixture.observed().map(|l| l.block).collect();
    Usage::parse(&text, &mixture.arch, mixture.n_expert, &blocks)
        .map_err(|source| JobError::Stats { path: path.into(), source })
}
