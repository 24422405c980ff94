//! Structured pruning of GGUF language models: [`Job`] in, [`Outcome`] out.
//!
//! The modules, in the order in which data flows through them: [`gguf`], [`model`], [`calibrate`],
//! [`forward`] and [`prune`] under the control of [`pipeline`], [`requant`], [`assemble`], [`evaluate`],
//! [`report`]. [`ggml`] is the safe interface to the engine.
#![warn(missing_docs)]
#![deny(unsafe_code)]

pub mod assemble;
pub mod calibrate;
pub mod evaluate;
pub mod forward;
#[allow(unsafe_code)]
pub mod ggml;
pub mod gguf;
mod job;
pub mod model;
pub mod numeric;
pub mod ollama;
pub mod package;
pub mod pipeline;
pub mod prune;
pub mod report;
pub mod requant;
pub mod spill;
pub mod text;

pub use job::{
    Check, DryRun, EvalJob, EvalOutcome, ImatrixUse, Inspection, Job, JobError, KeepState, Nested, Outcome,
    Quality, QualityLimit, QuantBaseline, Quantise, RUN_CTX, Running, Samples, Size, VerifyJob, calibration,
    check_distinct, check_output, dry_run, eval, inspect, remove_temporary, run, run_nested, verify,
    with_causes, write_whole,
};
