//! Quantisation baselines: the source, only quantised, in about as many bytes.

use super::output::temporary;
use super::prepared::{Prepared, llama};
use super::{Job, JobError};
use crate::assemble::importance;
use crate::evaluate::{self, Metrics, Protocol};
use crate::ggml::{FileType, Token, quantize_file};
use crate::pipeline::{self, Observer, Plan};
use std::path::Path;

/// Mixes of types of llama-quantize, from small to large.
const MIXES: [&str; 10] =
    ["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"];

/// File and its quality on the held-out windows, by libllama.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QuantBaseline {
    /// `pruned`, or the mix of types.
    pub name: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Comparison with the source.
    pub metrics: Metrics,
}

impl Prepared {
    /// Measures the result of `job`, of `goal` bytes at `output`, and the source in the two mixes whose files
    /// are closest to it in size.
    /// These are the largest that is not larger, and the next.
    ///
    /// # Errors
    /// [`JobError`] if libllama fails.
    pub(super) fn quant_baselines(
        &self,
        job: &Job,
        output: &Path,
        goal: u64,
        observer: &mut dyn Observer,
    ) -> Result<Vec<QuantBaseline>, JobError> {
        let whole = Plan::whole(&self.source);
        let squares = pipeline::input_squares(&self.source, &whole, &self.windows, &job.settings, observer)?;
        let importance = importance(&self.source, &squares, &self.windows);
        let source = (job.input.as_path(), self.source.file.n_bytes());
        quant_baselines(job, source, &importance, &self.windows.held_out(), (output, goal), observer)
    }
}

/// Measures the file `result` and the source of `job`, a path and its bytes each, the latter in the two mixes
/// whose files are closest in size to the result.
/// `importance` is that of the source's matrices; `windows` are held out.
///
/// # Errors
/// [`JobError`] if libllama fails.
pub(super) fn quant_baselines(
    job: &Job,
    source: (&Path, u64),
    importance: &[(String, Vec<f32>)],
    windows: &[&[Token]],
    result: (&Path, u64),
    observer: &mut dyn Observer,
) -> Result<Vec<QuantBaseline>, JobError> {
    let (output, goal) = result;
    observer.stage("compare with quants", 4);
    let quantise = |name: &str| {
        let temp = temporary(&job.output)?;
        let to = FileType::from_name(name).expect("llama-quantize knows it");
        quantize_file(source.0, temp.path(), to, importance, true, job.settings.n_threads)
            .map_err(JobError::Quantise)?;
        let bytes = temp.as_file().metadata().map_or(0, |m| m.len());
        Ok::<_, JobError>((temp, bytes))
    };
    let (mut below, mut above) = (None, None);
    let (mut from, mut to) = (0, MIXES.len());
    while from < to {
        let middle = (from + to) / 2;
        let (temp, bytes) = quantise(MIXES[middle])?;
        let found = Some((MIXES[middle], temp, bytes));
        if bytes <= goal {
            (from, below) = (middle + 1, found);
        } else {
            (to, above) = (middle, found);
        }
        if observer.interrupted() {
            return Err(JobError::Interrupted);
        }
    }
    // A file larger than the source is no useful baseline.
    let above = above.filter(|(.., bytes)| *bytes < source.1);

    let failed = |source| JobError::Evaluate { path: job.output.clone(), source };
    let source = llama(job, source.0).map_err(JobError::Llama)?;
    let mut judge = |name: &str, path: &Path, bytes: u64, done: usize| {
        let file = llama(job, path).map_err(JobError::does_not_load)?;
        let n_threads = job.settings.n_threads;
        let found = evaluate::evaluate(&file, Some(&source), windows, Protocol::Hf, n_threads, |_, _| true)
            .map_err(failed)?;
        observer.step(done, "");
        let metrics = found.compared.expect("it was compared with the source");
        Ok::<_, JobError>(QuantBaseline { name: name.into(), bytes, metrics })
    };
    let mut all = vec![judge("pruned", output, goal, 2)?];
    for (i, (name, temp, bytes)) in [below, above].into_iter().flatten().enumerate() {
        all.push(judge(name, temp.path(), bytes, 3 + i)?);
    }
    Ok(all)
}
