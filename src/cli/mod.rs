//! The command line: what was typed, and what it means.

mod args;
mod resolve;

pub use args::{Cli, Command};
pub use resolve::resolve;

use clap::Parser;
use putri_gguf::report::{Progress, Timings, dry_run_table, inspection_json, inspection_table, summary};
use putri_gguf::{JobError, ggml};
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Interrupted by the user, as shells count it.
const INTERRUPTED: u8 = 130;

/// Parses, runs, and maps the result to an exit code: 0 written and verified, 1 failed, 2 usage,
/// 130 interrupted.
pub fn main() -> ExitCode {
    // clap prints usage errors itself and exits with 2; help and version with 0.
    let cli = Cli::parse();
    ggml::silence_logs();
    ggml::install_abort_handler(|message| {
        eprintln!("error: llama.cpp stopped on an inconsistency in the model or in our use of it: {message}");
        putri_gguf::remove_temporary();
        std::process::exit(1);
    });
    let args = match (cli.command, cli.prune) {
        (Some(Command::Inspect { input, json }), _) => {
            let text = |found| if json { inspection_json(&found) + "\n" } else { inspection_table(&found) };
            return show(putri_gguf::inspect(&input).map(text));
        }
        (None, Some(args)) => args,
        (None, None) => unreachable!("clap demands a command or what to prune"),
    };
    let (quiet, timings, dry) = (args.quiet, args.timings, args.dry_run);
    let job = match resolve(args) {
        Ok(job) => job,
        Err(e) => {
            eprintln!("error: {e}");
            return ExitCode::from(2);
        }
    };
    let stop = match stop_on_interrupt() {
        Ok(stop) => stop,
        Err(e) => {
            eprintln!("error: cannot watch for Ctrl-C: {e}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(e) = rayon::ThreadPoolBuilder::new().num_threads(job.settings.n_threads).build_global() {
        eprintln!("error: cannot start {} threads: {e}", job.settings.n_threads);
        return ExitCode::FAILURE;
    }
    if dry {
        let rate = || ggml::product_rate(job.settings.n_threads).ok();
        return show(putri_gguf::dry_run(&job).map(|found| dry_run_table(&found, rate())));
    }
    let mut progress = Progress::new(quiet, stop);
    let mut watched = Timings::new(&mut progress);
    let result = putri_gguf::run(&job, &mut watched);
    let stages = watched.finish();
    progress.finish();
    match result {
        Ok(outcome) => {
            // The job is done; that nobody reads the summary does not make it a failure.
            let mut text = summary(&outcome);
            if timings && let Ok(rate) = ggml::product_rate(job.settings.n_threads) {
                text += &format!("\n{}", stages.table(rate, outcome.forecast.as_ref()));
            }
            let _ = writeln!(std::io::stdout(), "{text}{}", job.output.display());
            ExitCode::SUCCESS
        }
        Err(JobError::Interrupted) => {
            match &job.state {
                Some(keep) => eprintln!(
                    "interrupted; no output was written, and --state-dir {} --resume goes on from here",
                    keep.folder.display()
                ),
                None => eprintln!("interrupted; nothing was written"),
            }
            ExitCode::from(INTERRUPTED)
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what was found.
fn show(found: Result<String, JobError>) -> ExitCode {
    match found {
        Ok(text) => {
            let _ = write!(std::io::stdout(), "{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

/// A flag that the first Ctrl-C raises; the second ends the process.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>, ctrlc::Error> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            putri_gguf::remove_temporary();
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("\nstopping after this step; Ctrl-C again stops now");
    })?;
    Ok(stop)
}
