//! What can go wrong, in the words that a user sees.

use super::Limit;
use crate::calibrate::CalibrateError;
use crate::evaluate::EvaluateError;
use crate::ggml::{GgmlError, Type};
use crate::gguf::GgufError;
use crate::model::ModelError;
use crate::pipeline::{NoRoom, PruneError, TargetError};
use crate::text::TextError;
use std::path::{Path, PathBuf};

/// Why a job failed. Nothing is left behind, and the source is as it was.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum JobError {
    #[error("{}: {source}", path.display())]
    Model { path: PathBuf, source: ModelError },
    #[error("calibration: {0}")]
    Calibrate(#[from] CalibrateError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("{}: {source}", path.display())]
    Evaluate { path: PathBuf, source: EvaluateError },
    #[error(transparent)]
    Prune(PruneError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(
        "{}: tensor {tensor} is {ty} already, and --type would round it again; take an F16 source, or say --allow-requantize", path.display()
    )]
    Quantised { path: PathBuf, tensor: String, ty: Type },
    #[error(
        "{0} needs an importance matrix, which is not made of mixtures of experts; llama-quantize and llama-imatrix do that"
    )]
    OfExperts(&'static str),
    #[error(
        "no sparsity gives {limit}{}",
        least.map_or(": nothing can be removed".into(), |(percent, value)| format!(": {percent} % gives {value:.4}"))
    )]
    Limit { limit: Limit, least: Option<(u32, f64)> },
    #[error("the size asked for: {0}")]
    Target(TargetError),
    #[error("--max-memory: {0}")]
    NoRoom(NoRoom),
    #[error("--device: {0}")]
    NoRoomOnDevice(NoRoom),
    #[error("--type: {0}")]
    Quantise(GgmlError),
    #[error("{} is the input itself; choose another name", .0.display())]
    SameFile(PathBuf),
    #[error("{} is two outputs of this run; choose another name for one", .0.display())]
    SameOutput(PathBuf),
    #[error("{} is read by this run, and would be written over; choose another name for the output", .0.display())]
    AlsoRead(PathBuf),
    #[error("{} exists; --force replaces it", .0.display())]
    Exists(PathBuf),
    #[error("{} is there, and no package: --force replaces those only; choose another name", .0.display())]
    NoPackage(PathBuf),
    #[error("{} has no place in the package {}, which is made as a whole; choose another name for one", path.display(), folder.display())]
    InPackage { path: PathBuf, folder: PathBuf },
    #[error("{} is where another run keeps its state right now; wait for it, or name another folder", .0.display())]
    StateBusy(PathBuf),
    #[error("{} holds the state of an unfinished run; --resume goes on with it, or remove the folder", .0.display())]
    StateExists(PathBuf),
    #[error(
        "{} holds the state of another run: there \"{then}\", here \"{now}\"; remove the folder or name another", path.display()
    )]
    StateMismatch { path: PathBuf, then: String, now: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("the result does not load: {0}")]
    DoesNotLoad(String),
    /// libllama, on a file that it names.
    #[error(transparent)]
    Llama(GgmlError),
    #[error(
        "the result loads, but llama.cpp's perplexity on it is {file:.2} and ours of the pruned model {own:.2}; nothing was written"
    )]
    Disagrees { file: f64, own: f64 },
    #[error("{}: the weights in the file do not do what was measured: {said}", path.display())]
    Miswritten { path: PathBuf, said: String },
    #[error("{} was not written by putri-gguf: it has no putri.version", .0.display())]
    NotOurs(PathBuf),
    #[error("{}: {n} of the checks failed", path.display())]
    Faults { path: PathBuf, n: usize },
    #[error("interrupted")]
    Interrupted,
}

impl JobError {
    /// libllama does not load what was written, which has no name of its own yet.
    pub(super) fn does_not_load(e: GgmlError) -> JobError {
        JobError::DoesNotLoad(match e {
            GgmlError::Load { reason, .. } => format!("llama.cpp {reason}"),
            other => other.to_string(),
        })
    }

    /// What `source` says of the file at `path`, which it may name itself.
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
