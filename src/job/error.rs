//! Errors of jobs, in the words that a user sees.
//!
//! One rule holds for all error types of the library: an error with another error as its cause returns it as
//! its `source` and leaves it out of its own message. The caller that shows an error joins the messages of
//! the chain, each once, as [`with_causes`] does. Transparent variants are the error that they hold. Messages
//! are lower case, one line without a full stop, and name no options of the command line: `cli/hints.rs` adds
//! those.

use super::QualityLimit;
use crate::calibrate::CalibrateError;
use crate::evaluate::EvaluateError;
use crate::ggml::{GgmlError, Type};
use crate::gguf::GgufError;
use crate::model::ModelError;
use crate::observe::UsageError;
use crate::pipeline::{NoRoom, PruneError, TargetError};
use crate::text::TextError;
use std::error::Error;
use std::path::{Path, PathBuf};

/// Message of `e`, followed by those of its causes, in one line.
pub fn with_causes(e: &(dyn Error + 'static)) -> String {
    let mut message = e.to_string();
    let mut next = e.source();
    while let Some(cause) = next {
        message += &format!(": {cause}");
        next = cause.source();
    }
    message
}

/// Use of an importance matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImatrixUse {
    /// The importance matrix is written to a file.
    Output,
    /// The whole model is quantised.
    Quantise,
    /// Quantisation baselines are made.
    Baselines,
}

/// Error of a job. It leaves no files behind, and the source is unchanged.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
#[non_exhaustive]
pub enum JobError {
    #[error("cannot use {}", path.display())]
    Model { path: PathBuf, source: ModelError },
    #[error(
        "{} was trained for {n_ctx_train} tokens, and calibration windows of {n_ctx} are asked for; use shorter windows",
        path.display()
    )]
    WindowsTooLong { path: PathBuf, n_ctx: usize, n_ctx_train: usize },
    #[error("cannot collect the calibration windows")]
    Calibrate(#[from] CalibrateError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("cannot use {}", path.display())]
    Evaluate { path: PathBuf, source: EvaluateError },
    #[error(transparent)]
    Prune(PruneError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(
        "{}: tensor {tensor} is {ty} already, and would be rounded a second time; quantise from an F16 source", path.display()
    )]
    Quantised { path: PathBuf, tensor: String, ty: Type },
    #[error(
        "{}: no importance matrix is made of mixtures of experts; llama-imatrix makes one, and llama-quantize quantises with it", path.display()
    )]
    OfExperts { path: PathBuf, wanted: ImatrixUse },
    #[error("{}: no gradients go through a mixture of experts, so it cannot be recovered", .0.display())]
    NoWayBack(PathBuf),
    #[error(
        "no sparsity gives {limit}{}",
        least.map_or(": nothing can be removed".into(), |(percent, value)| format!(": {percent} % gives {value:.4}"))
    )]
    Limit { limit: QualityLimit, least: Option<(u32, f64)> },
    #[error("cannot prune to the size asked for")]
    Target(#[source] TargetError),
    #[error("the memory limit is too low")]
    NoRoom(#[source] NoRoom),
    #[error("a device has too little memory")]
    NoRoomOnDevice(#[source] NoRoom),
    #[error("cannot quantise the source")]
    Quantise(#[source] GgmlError),
    #[error("{} is the input itself; choose another name", .0.display())]
    SameFile(PathBuf),
    #[error("{} is not what the pruned file was made from: {problem}", path.display())]
    OtherModel { path: PathBuf, problem: String },
    #[error("{} is two outputs of this run; choose another name for one", .0.display())]
    SameOutput(PathBuf),
    #[error("{} is read by this run, and would be written over; choose another name for the output", .0.display())]
    AlsoRead(PathBuf),
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    #[error("{} exists already, and is no package, which alone is replaced; choose another name", .0.display())]
    NoPackage(PathBuf),
    #[error("{} has no place in the package {}, which is made as a whole; choose another name for one", path.display(), folder.display())]
    InPackage { path: PathBuf, folder: PathBuf },
    #[error("{} is where another run keeps its checkpoint right now; wait for it, or name another folder", .0.display())]
    StateBusy(PathBuf),
    #[error("{} holds the checkpoint of an unfinished run; resume it, or remove the folder", .0.display())]
    StateExists(PathBuf),
    #[error(
        "{} holds the checkpoint of another run: there \"{then}\", here \"{now}\"; remove the folder or name another", path.display()
    )]
    StateMismatch { path: PathBuf, then: String, now: String },
    #[error("{}: {problem}", path.display())]
    BadOutput { path: PathBuf, problem: &'static str },
    #[error("cannot write {}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("the result does not load: {0}")]
    DoesNotLoad(String),
    /// libllama failed on a file that its message names.
    #[error(transparent)]
    Llama(GgmlError),
    #[error(
        "the result loads, but llama.cpp's perplexity on it is {file:.2} and ours of the pruned model {own:.2}; nothing was written, please report this"
    )]
    Disagrees { file: f64, own: f64 },
    #[error("{}: the weights in the file do not do what was measured: {said}", path.display())]
    Miswritten { path: PathBuf, said: String },
    #[error("{} was not written by putri-gguf: it has no putri.version", .0.display())]
    NotOurs(PathBuf),
    #[error("{}: {n} of the checks failed", path.display())]
    Faults { path: PathBuf, n: usize },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}", path.display())]
    Stats { path: PathBuf, source: UsageError },
    #[error("interrupted")]
    Interrupted,
}

impl JobError {
    /// Error that libllama does not load the written file, which does not have its own name yet.
    pub(super) fn does_not_load(e: GgmlError) -> JobError {
        JobError::DoesNotLoad(match e {
            GgmlError::Load { reason, .. } => format!("llama.cpp {reason}"),
            other => other.to_string(),
        })
    }

    /// Error `source` of the file at `path`, which `source` may name itself.
    pub(super) fn evaluating(path: &Path, source: EvaluateError) -> JobError {
        match source {
            EvaluateError::Llama(e @ GgmlError::Load { .. }) => JobError::Llama(e),
            EvaluateError::Text(e) => JobError::Text(e),
            source => JobError::Evaluate { path: path.into(), source },
        }
    }
}

impl From<PruneError> for JobError {
    fn from(e: PruneError) -> JobError {
        match e {
            PruneError::Interrupted => JobError::Interrupted,
            other => JobError::Prune(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ollama::OllamaError;

    fn io() -> std::io::Error {
        std::io::Error::other("the disk is gone")
    }

    fn path() -> PathBuf {
        "a.gguf".into()
    }

    #[test]
    fn each_cause_is_said_once() {
        let missing = || GgufError::MissingKey("x.y".into());
        let failed = || GgmlError::Llama("went away".into());
        let of_jobs: [(JobError, &str); 11] = [
            (JobError::Model { path: path(), source: missing().into() }, "key x.y is missing"),
            (JobError::Calibrate(failed().into()), "llama.cpp went away"),
            (JobError::Calibrate(TextError::Io { path: path(), source: io() }.into()), "the disk is gone"),
            (JobError::Text(TextError::Io { path: path(), source: io() }), "the disk is gone"),
            (JobError::Evaluate { path: path(), source: failed().into() }, "llama.cpp went away"),
            (JobError::Prune(io().into()), "the disk is gone"),
            (JobError::Gguf(GgufError::Io { path: path(), source: io() }), "the disk is gone"),
            (JobError::Gguf(GgufError::Tensor { name: "t".into(), source: failed() }), "llama.cpp went away"),
            (JobError::Target(TargetError::Already), "the source is no larger"),
            (JobError::Quantise(failed()), "llama.cpp went away"),
            (JobError::Io { path: path(), source: io() }, "the disk is gone"),
        ];
        for (e, cause) in &of_jobs {
            let said = with_causes(e);
            assert_eq!(said.matches(cause).count(), 1, "{said}");
            assert!(!said.contains('\n') && !said.ends_with('.'), "{said}");
        }
        for e in [OllamaError::Io { path: path(), source: io() }, OllamaError::Program(io())] {
            assert_eq!(with_causes(&e).matches("the disk is gone").count(), 1, "{e:?}");
        }
    }
}
