//! Announcement of a job's stages to the observer, with the work of each.
//!
//! Only what shapes determine is announced: the calibration text that the model generates, the passes, and
//! the verification. Only putri-gguf's own method is covered: the forecast knows just one stage of the
//! others.

use super::{Job, expected_calibration, forecast, size_of};
use crate::model::Model;
use crate::pipeline::{Calibration, Observer, PlannedStage, Settings};

/// Ratio of the time that libllama takes for the operations of a generated token to the time of as many
/// operations in graphs. A single token at a time reads all weights. On two cores, generation reaches 14 % of
/// a plain product's rate, and graphs 65 %.
const WRITING: f64 = 4.6;

/// Announces the calibration text and passes of `jobs`, which share one calibration, before any work.
/// Announces nothing if a sparsity is still to be found.
pub(super) fn announce_all(jobs: &[Job], source: &Model, observer: &mut dyn Observer) {
    let known = |job: &Job| job.limit.is_none() && (job.quantise.is_none() || job.settings.target.is_none());
    let Some(first) = jobs.first().filter(|_| jobs.iter().all(known)) else {
        return;
    };
    let c = expected_calibration(first);
    let result = stages_of(first, source, &c, &first.settings);
    if result.is_empty() {
        return;
    }
    let later = work_after(jobs, source, &c).first().copied().unwrap_or(0.0);
    let stages: Vec<PlannedStage> =
        text(first, source).into_iter().chain(result).chain(rest(later)).collect();
    observer.plan(&stages, true);
}

/// Announces the passes of one result. `later` is the work of the results after it, `None` if their number is
/// not known.
pub(super) fn announce(
    job: &Job,
    model: &Model,
    c: &Calibration,
    settings: &Settings,
    later: Option<f64>,
    observer: &mut dyn Observer,
) {
    let result = stages_of(job, model, c, settings);
    let stages: Vec<PlannedStage> = result.into_iter().chain(rest(later.unwrap_or(0.0))).collect();
    observer.plan(&stages, later.is_some());
}

/// Work of the later jobs for each of `jobs`, which share one calibration.
/// Heads that an earlier job removed are not searched for again, if the order of removal does not depend on
/// their number.
pub(super) fn work_after(jobs: &[Job], model: &Model, c: &Calibration) -> Vec<f64> {
    let mut searched = 0.0_f64;
    let work_of = |job: &Job| {
        let stages = stages_of(job, model, c, &job.settings);
        let of_heads = |s: &&PlannedStage| s.name.starts_with("heads");
        let all: f64 = stages.iter().map(|s| s.work).sum();
        let heads: f64 = stages.iter().filter(of_heads).map(|s| s.work).sum();
        let kept = job.settings.output_archs(model).of_heads().is_some();
        let again = if kept { searched.min(heads) } else { 0.0 };
        searched = searched.max(heads);
        all - again
    };
    let works: Vec<f64> = jobs.iter().map(work_of).collect();
    (0..works.len()).map(|i| works[i + 1..].iter().sum()).collect()
}

/// Passes of one result and its verification; empty if the forecast does not cover them.
fn stages_of(job: &Job, model: &Model, c: &Calibration, settings: &Settings) -> Vec<PlannedStage> {
    if !settings.method.is_forecast() {
        return Vec::new();
    }
    let Ok(forecast) = forecast(model, c, settings) else {
        return Vec::new();
    };
    let compute = |name, work| PlannedStage { name, work, bandwidth_bound: false };
    // A register holds half as many numbers of 64 bits.
    let passes = forecast.stages.iter().map(|s| compute(s.name, s.operations + 2.0 * s.algebra));
    let judged = (c.n_held_out * c.n_ctx) as f64;
    let verify = job.verify.then(|| compute("verify", 2.0 * forecast.params as f64 * judged));
    passes.chain(verify).collect()
}

/// Calibration text that the model generates itself. Devices generate at another rate than `WRITING` assumes.
fn text(job: &Job, source: &Model) -> Option<PlannedStage> {
    let n_tokens = if job.windows.is_some() { 0 } else { job.recipe.self_written() };
    let work = WRITING * 2.0 * size_of(source).params as f64 * n_tokens as f64;
    let known = n_tokens > 0 && job.settings.devices.is_empty();
    known.then_some(PlannedStage { name: "calibration text", work, bandwidth_bound: true })
}

/// Work that is announced later.
fn rest(work: f64) -> Option<PlannedStage> {
    (work > 0.0).then_some(PlannedStage { name: "", work, bandwidth_bound: false })
}
