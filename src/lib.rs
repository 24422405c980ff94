//! Structured pruning of GGUF language models: [`Job`] in, [`Outcome`] out.
//!
//! The library does all that the command `putri-gguf` does. It removes attention heads and feed-forward neurons, or experts
//! of mixtures of experts, refits what is kept, and writes a GGUF that stock llama.cpp and Ollama run. The source is only
//! read; the output appears when it is complete and verified.
//!
//! # Pruning
//!
//! A [`Job`] says what to prune, where the result goes, what to calibrate on ([`Recipe`]) and how ([`Settings`]). An
//! [`Observer`] is told how far the work is, and can stop it.
//!
//! ```no_run
//! use putri_gguf::{Job, Observer, Settings, run};
//!
//! /// Prints the stages.
//! struct Stages;
//!
//! impl Observer for Stages {
//!     fn stage(&mut self, name: &str, _steps: usize) {
//!         println!("{name}");
//!     }
//!
//!     fn step(&mut self, _done: usize, _note: &str) {}
//! }
//!
//! # fn main() -> Result<(), putri_gguf::JobError> {
//! let mut job = Job::new("in.gguf", "out.gguf");
//! job.settings = Settings { sparsity: 0.2, ..job.settings };
//! job.recipe.files = vec!["notes.txt".into()];
//! job.recipe.self_share = 0.5;
//! let outcome = run(&job, &mut Stages)?;
//! let quality = outcome.quality.expect("something was pruned");
//! println!("{} bytes, KL divergence {:.4} nats", outcome.after.bytes, quality.held_out.kl.mean);
//! # Ok(())
//! # }
//! ```
//!
//! [`run_nested`] prunes at several sparsities on one calibration, [`dry_run`] says what a job will need, and
//! [`QualityLimit`] asks for the largest sparsity that stays within a limit.
//!
//! # Looking, measuring, checking
//!
//! ```no_run
//! # fn main() -> Result<(), putri_gguf::JobError> {
//! let found = putri_gguf::inspect("in.gguf".as_ref())?;
//! println!("{}: up to {:.2} of its layers can be removed", found.arch, found.reachable);
//! # Ok(())
//! # }
//! ```
//!
//! [`eval`] measures a file with llama.cpp, by itself or beside another; [`verify`] checks a pruned file against its source
//! and against what it predicted when it was made.
//!
//! # Threads
//!
//! Passes and algebra run on rayon's global pool. A program that wants another number of threads than there are cores
//! builds that pool first, and sets `n_threads` of [`Settings`] to the same number for llama.cpp.
//!
//! # Errors
//!
//! Every function returns a [`JobError`], which names the file, key or tensor at fault. An error leaves its causes to
//! [`std::error::Error::source`]; [`with_causes`] joins them to one line.
//!
//! # What is not here
//!
//! The other modules are public for the tests and benchmarks of this repository, and may change with every version.
#![warn(missing_docs, unreachable_pub)]
#![deny(unsafe_code)]

#[doc(hidden)]
pub mod assemble;
#[doc(hidden)]
pub mod calibrate;
#[doc(hidden)]
pub mod evaluate;
#[doc(hidden)]
pub mod forward;
#[doc(hidden)]
#[allow(unsafe_code)]
pub mod ggml;
#[doc(hidden)]
pub mod gguf;
mod job;
#[doc(hidden)]
pub mod model;
#[doc(hidden)]
pub mod numeric;
#[doc(hidden)]
pub mod observe;
pub mod ollama;
pub mod package;
#[doc(hidden)]
mod parallel;
pub mod pipeline;
#[doc(hidden)]
pub mod prune;
pub mod report;
#[doc(hidden)]
pub mod requant;
#[doc(hidden)]
pub mod spill;
#[doc(hidden)]
pub mod text;
#[doc(hidden)]
pub mod train;

pub use calibrate::{CalibrateError, Recipe, Windows};
pub use evaluate::{EvaluateError, Evaluation, Protocol, Speed};
pub use ggml::{Device, FileType, GgmlError, Offload, RunMemory, Type, silence_logs};
pub use gguf::GgufError;
pub use job::{
    BlocksDryRun, Check, DryRun, EvalJob, EvalOutcome, ExpertsDryRun, ExpertsOutcome, ImatrixUse, Inspection,
    Job, JobError, KeepState, Nested, Outcome, Quality, QualityLimit, QuantBaseline, Quantise, RUN_CTX,
    Removable, Running, Samples, Size, VerifyJob, calibration, check_distinct, check_output, dry_run, eval,
    inspect, remove_temporary, run, run_nested, verify, with_causes, write_whole,
};
pub use model::{Arch, BlockShape, Family, FfnUnit, Heads, KvCache, ModelError};
pub use numeric::{Kl, Metrics};
pub use pipeline::{
    BlockSettings, Calibration, Forecast, HeadSettings, Loss, Method, NoRoom, Observer, PlannedStage,
    PruneError, ResampleSettings, SensitivitySettings, Settings, StageForecast, Target, TargetError,
    TensorTypes, TuneSettings, WidthSettings,
};
pub use prune::NeuronCriterion;
pub use spill::SpillStore;
pub use text::{Encoding, TextError};
