//! Tests by topic, in one binary, because each binary links llama.cpp once more.
//!
//! Tests that read counters or set handlers of the whole process have their own binaries beside this one.

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod calibrate;
mod degenerate;
mod eval;
mod experts;
mod forward;
mod gradient;
mod heads;
mod imatrix;
mod inspect;
mod job;
mod limits;
mod mixture_jobs;
mod mixtures;
mod ollama;
mod package;
mod post_norms;
mod progress;
mod prune;
mod readme;
mod recover;
mod report;
mod requant;
mod resample;
mod resume;
#[cfg(unix)]
mod runs;
mod slices;
mod split;
mod target;
mod text;
mod tune;
mod types;
mod verify;
