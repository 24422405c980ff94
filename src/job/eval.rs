//! Evaluation of a file on texts and tasks by libllama, alone or in comparison with another file.

use super::JobError;
use crate::evaluate::{self, Evaluation, Protocol, Speed};
use crate::ggml::{LlamaModel, Offload, Token};
use crate::pipeline::Observer;
use crate::text::{Encoding, TextError, TextFile};
use std::path::{Path, PathBuf};

/// Description of an evaluation.
#[derive(Clone, Debug)]
pub struct EvalJob {
    /// File to evaluate.
    pub model: PathBuf,
    /// File that it is compared with, usually its source.
    pub base: Option<PathBuf>,
    /// Texts, concatenated.
    pub texts: Vec<PathBuf>,
    /// Encoding of texts and tasks that have no byte-order mark, if it is not UTF-8.
    pub encoding: Option<Encoding>,
    /// Protocol that determines the scored tokens.
    pub protocol: Protocol,
    /// Number of tokens per window.
    pub n_ctx: usize,
    /// Largest number of windows.
    pub n_windows: usize,
    /// Tasks in llama-perplexity's format for HellaSwag, and the largest number of them.
    pub tasks: Option<(PathBuf, usize)>,
    /// Whether to measure tokens per second as well.
    pub speed: bool,
    /// Number of threads.
    pub n_threads: usize,
    /// Layers and buffers on devices.
    pub offload: Offload,
}

/// Results of an evaluation, for the file and for the base if there is one.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct EvalOutcome {
    /// Bytes of the files.
    pub bytes: (u64, Option<u64>),
    /// Results on the texts.
    pub evaluation: Option<Evaluation>,
    /// Share of tasks that were answered correctly, and the number of tasks.
    pub accuracy: Option<(f64, Option<f64>, usize)>,
    /// Speed in tokens per second.
    pub speed: Option<(Speed, Option<Speed>)>,
}

/// Measures what `job` asks for.
///
/// # Errors
/// [`JobError`] if a file cannot be read, or libllama fails.
pub fn eval(job: &EvalJob, observer: &mut dyn Observer) -> Result<EvalOutcome, JobError> {
    let text = |path: &PathBuf| TextFile::open(path, job.encoding);
    // Errors in texts are reported before models are loaded.
    let texts = job.texts.iter().map(text).collect::<Result<Vec<_>, TextError>>()?;
    let tasks = match &job.tasks {
        Some((path, n)) => {
            let failed = |source| JobError::Evaluate { path: path.clone(), source };
            let mut tasks = evaluate::tasks(&text(path)?.read()?).map_err(failed)?;
            tasks.truncate(*n);
            tasks
        }
        None => Vec::new(),
    };
    let (model, bytes) = load(&job.model, &job.offload)?;
    let base = job.base.as_deref().map(|path| load(path, &job.offload)).transpose()?;
    let (base, base_bytes) = base.map_or((None, None), |(model, bytes)| (Some(model), Some(bytes)));
    let failed = |source| JobError::Evaluate { path: job.model.clone(), source };
    let mut outcome =
        EvalOutcome { bytes: (bytes, base_bytes), evaluation: None, accuracy: None, speed: None };

    if !job.texts.is_empty() {
        let windows = windows(&model, &texts, job, observer)?;
        observer.stage("text", windows.len());
        let told = |done, ppl| {
            observer.step(done, &format!("perplexity {ppl:.4}"));
            !observer.interrupted()
        };
        let found = evaluate::evaluate(&model, base.as_ref(), &windows, job.protocol, job.n_threads, told)
            .map_err(failed)?;
        outcome.evaluation = Some(found);
    }
    if !tasks.is_empty() {
        let mut share = |model: &LlamaModel| -> Result<f64, JobError> {
            observer.stage("tasks", tasks.len());
            let told = |done, share: f64| {
                observer.step(done, &format!("{:.2} % right", share * 100.0));
                !observer.interrupted()
            };
            let found = evaluate::accuracy(model, &tasks, job.n_threads, told).map_err(failed)?;
            if observer.interrupted() { Err(JobError::Interrupted) } else { Ok(found) }
        };
        outcome.accuracy = Some((share(&model)?, base.as_ref().map(&mut share).transpose()?, tasks.len()));
    }
    if observer.interrupted() {
        return Err(JobError::Interrupted);
    }
    if job.speed {
        observer.stage("speed", 1);
        let own = evaluate::speed(&model, job.n_threads).map_err(failed)?;
        let other = base.as_ref().map(|b| evaluate::speed(b, job.n_threads)).transpose().map_err(failed)?;
        outcome.speed = Some((own, other));
        observer.step(1, "");
    }
    Ok(outcome)
}

/// Windows of `texts`.
fn windows(
    model: &LlamaModel,
    texts: &[TextFile],
    job: &EvalJob,
    observer: &mut dyn Observer,
) -> Result<Vec<Vec<Token>>, JobError> {
    let mut begun = false;
    let mut told = |done: u64, total: u64| {
        // Progress in KiB: only long texts report any.
        if !begun {
            observer.stage("reading text", (total >> 10) as usize);
            begun = true;
        }
        observer.step((done >> 10) as usize, "");
        !observer.interrupted()
    };
    let found = evaluate::windows(model, texts, job.protocol, job.n_ctx, job.n_windows, &mut told);
    if observer.interrupted() {
        return Err(JobError::Interrupted);
    }
    found.map_err(|source| JobError::evaluating(&job.texts[0], source))
}

fn load(path: &Path, offload: &Offload) -> Result<(LlamaModel, u64), JobError> {
    let bytes = crate::gguf::GgufFile::open(path)?.n_bytes();
    Ok((LlamaModel::load_on(path, offload).map_err(JobError::Llama)?, bytes))
}
