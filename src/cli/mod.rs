//! Command line: parsing, execution and exit codes.

mod args;
mod experts;
mod extras;
mod hints;
mod logger;
mod recover;
mod reference;
mod resolve;
mod values;

pub use args::{Args, Cli, Command, DeviceArgs, EvalArgs, RecoverArgs};
pub use recover::resolve_recover;
pub use resolve::{nested_name, resolve, resolve_eval, stored};
pub use values::threads;

use anyhow::Context;
use clap::{CommandFactory, Parser};
use extras::Extras;
use putri_gguf::ollama::{self, OllamaError};
use putri_gguf::report::{
    Progress, Timings, checks_json, checks_table, devices_table, dry_run_table, eval_json, eval_table,
    inspection_json, inspection_table, plain, shell_word, tell,
};
use putri_gguf::{Job, JobError, Nested, Outcome, VerifyJob, ggml, with_causes};
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit code if the requested quality cannot be reached.
const MISSED: u8 = 3;

/// Exit code if the model is written and verified, but an additional output failed.
const BESIDE: u8 = 4;

/// Exit code of an interruption by the user, as in shells.
const INTERRUPTED: u8 = 130;

/// Parses the arguments, runs the command, and maps the result to an exit code.
/// The codes are 0 written and verified, 1 failed, 2 usage, 3 quality limit out of reach, 4 written but an
/// additional output failed, 130 interrupted.
pub fn main() -> ExitCode {
    // Logs are silenced first, because the text of --version starts the engine's backends, which log.
    ggml::silence_logs();
    ggml::install_abort_handler(|message, logged| {
        let why = if message.contains("RPC") {
            "another machine went away, or its ggml is of another version"
        } else if logged.contains("insufficient memory") || logged.contains("failed to allocate") {
            "out of memory"
        } else {
            "llama.cpp stopped on an inconsistency in the model or in our use of it"
        };
        let logged = if logged.is_empty() { String::new() } else { format!(" ({logged})") };
        // The path of the engine's source at compile time does not help the user.
        let message = message.rsplit_once("/ggml/src/").map_or(message, |(_, rest)| rest);
        say_error(&format!("{why}: {message}{logged}"));
        putri_gguf::remove_temporary();
        ggml::exit_now(1);
    });
    ggml::install_out_of_memory_handler(|n_bytes| {
        // The message needs no new string, because there may be no memory for one.
        let _ = writeln!(
            std::io::stderr(),
            "error: out of memory: {n_bytes} bytes more cannot be had; --max-memory does with less, --dry-run says what a run takes"
        );
        putri_gguf::remove_temporary();
        ggml::exit_now(1);
    });
    ggml::let_large_writes_fail();
    // Usage errors have the exit code 2, help and version 0.
    let cli = match Cli::try_parse_from(as_clap_has_it(std::env::args_os().collect())) {
        Ok(cli) => cli,
        // Help and version are requested output.
        Err(text) if !text.use_stderr() => return ended(show(&text.render().to_string())),
        // The typed text is untrusted, too.
        Err(e) => {
            e.render().to_string().lines().for_each(|line| tell(&plain(line)));
            return ExitCode::from(2);
        }
    };
    if cli.verbose {
        logger::show_logs();
    }
    ggml::install_fault_handler(|file| {
        say_error(&format!("{file}: became shorter, or could not be read any more, while it was in use"));
        putri_gguf::remove_temporary();
    });
    let done = match (cli.command, cli.prune) {
        (Some(Command::Inspect { input, json }), _) => {
            let text = |found| if json { inspection_json(&found) + "\n" } else { inspection_table(&found) };
            let found = located(input).and_then(|path| Ok(putri_gguf::inspect(&path)?));
            found.and_then(|found| show(&text(found)))
        }
        (Some(Command::Eval(args)), _) => measure(args),
        (Some(Command::Recover(args)), _) => recover(*args),
        (Some(Command::Verify { model, source, threads, json, quiet }), _) => {
            check(model, source, threads, json, quiet)
        }
        (Some(Command::Devices { rpc }), _) => {
            join(&rpc).and_then(|()| show(&devices_table(&ggml::devices(), ggml::gave_up())))
        }
        (Some(Command::RpcServer { host, port, threads: n }), _) => threads(n)
            .map_err(Failed::Usage)
            .and_then(|n| ggml::serve(&format!("{host}:{port}"), n).map_err(|e| Failed::Machine(e.into()))),
        (Some(Command::Completions { shell }), _) => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "putri-gguf", &mut text);
            // clap_complete 4.6 names a program with a hyphen in two ways for bash, so that commands complete
            // nothing.
            show(&String::from_utf8_lossy(&text).replace("putri__subcmd__gguf", "putri__gguf"))
        }
        (Some(Command::Man), _) => {
            let mut text = Vec::new();
            // Writing into memory does not fail.
            let command = Cli::command().version(env!("CARGO_PKG_VERSION"));
            let _ = clap_mangen::Man::new(command).render(&mut text);
            show(&String::from_utf8_lossy(&text))
        }
        (Some(Command::Reference), _) => show(&reference::reference(Cli::command())),
        (None, Some(args)) => prune(args, &cli.devices),
        (None, None) => unreachable!("clap demands a command or what to prune"),
    };
    ended(done)
}

/// Reports the error, if there is one, and returns the exit code of the process.
fn ended(done: Result<(), Failed>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed::Usage(e)) => {
            say_error(&e.to_string());
            ExitCode::from(2)
        }
        Err(Failed::Job(JobError::Interrupted)) => {
            tell("interrupted; nothing was written");
            ExitCode::from(INTERRUPTED)
        }
        Err(Failed::Interrupted(folder)) => {
            let folder = shell_word(&folder.to_string_lossy());
            let goes_on = format!("--state-dir {folder} --resume goes on from here");
            tell(&plain(&format!("interrupted; no output was written, and {goes_on}")));
            ExitCode::from(INTERRUPTED)
        }
        Err(Failed::Job(e)) => {
            say_error(&said(&e));
            if matches!(e, JobError::Limit { .. }) { ExitCode::from(MISSED) } else { ExitCode::FAILURE }
        }
        Err(Failed::Machine(e)) => {
            say_error(&hinted(format!("{e:#}"), hints::of_command(&e)));
            ExitCode::FAILURE
        }
        Err(Failed::Beside(all)) => {
            all.iter().for_each(|e| say_error(e));
            ExitCode::from(BESIDE)
        }
    }
}

/// Rewrites llama.cpp's short flags of more than one letter, and its flag that is a command, to arguments
/// that clap supports.
fn as_clap_has_it(mut args: Vec<OsString>) -> Vec<OsString> {
    for arg in &mut args {
        match arg.to_str() {
            Some("-ngl") => *arg = "--n-gpu-layers".into(),
            Some("-dev") => *arg = "--device".into(),
            _ => {}
        }
    }
    if let Some(at) = args.iter().position(|arg| arg == "--list-devices") {
        args.remove(at);
        args.insert(1, "devices".into());
    }
    args
}

/// Message of a job's error with its causes and a hint.
fn said(e: &JobError) -> String {
    hinted(with_causes(e), hints::hint(e).as_deref())
}

fn hinted(message: String, hint: Option<&str>) -> String {
    match hint {
        Some(hint) => format!("{message}; {hint}"),
        None => message,
    }
}

/// Prints an error as one line.
fn say_error(problem: &str) {
    tell(&format!("error: {}", plain(problem)));
}

/// Reason why there is no result, or only a part of it.
enum Failed {
    /// The arguments are invalid.
    Usage(anyhow::Error),
    /// The work failed.
    Job(JobError),
    /// The user interrupted the work; the checkpoint is in this folder.
    Interrupted(PathBuf),
    /// The machine lacks something that the command needs.
    Machine(anyhow::Error),
    /// The models are written, but additional outputs failed.
    Beside(Vec<String>),
}

impl Failed {
    /// Error of additional outputs that failed, if there are any.
    fn beside(missing: Vec<String>) -> Result<(), Failed> {
        if missing.is_empty() { Ok(()) } else { Err(Failed::Beside(missing)) }
    }
}

impl From<OllamaError> for Failed {
    fn from(e: OllamaError) -> Failed {
        Failed::Machine(e.into())
    }
}

impl From<JobError> for Failed {
    fn from(e: JobError) -> Failed {
        Failed::Job(e)
    }
}

/// Prunes a model and reports the result.
fn prune(mut args: Args, devices: &DeviceArgs) -> Result<(), Failed> {
    let stored = stored(&args.input)?;
    if let Some(stored) = &stored {
        args.input.clone_from(&stored.model);
    }
    let (quiet, timings, dry, json) = (args.quiet, args.timings, args.dry_run, args.json);
    let (nested, to_ollama) = (args.nested.clone(), args.ollama_create.clone());
    let shares: Vec<Option<f64>> =
        nested.as_ref().map_or(vec![None], |shares| shares.iter().copied().map(Some).collect());
    let extras: Vec<Extras> = shares.into_iter().map(|share| Extras::new(&args, share)).collect();
    join(&devices.rpc)?;
    let job = resolve(args, devices).map_err(Failed::Usage)?;
    let n_threads = job.settings.n_threads;
    let stop = ready(n_threads).map_err(Failed::Machine)?;
    extras::check_all(&extras, &job)?;
    to_ollama.as_deref().map_or(Ok(()), |name| ollama::can_create(name, &job.output, stored.as_ref()))?;
    if dry {
        let rate = || ggml::product_rate().ok();
        return show(&dry_run_table(&putri_gguf::dry_run(&job)?, rate()));
    }
    let mut progress = if json { Progress::events(stop) } else { Progress::new(quiet, stop) };
    if let Some(shares) = nested {
        let result_at = |&sparsity: &f64| Nested {
            sparsity,
            output: nested_name(&job.output, sparsity),
            imatrix_out: job.imatrix_out.as_ref().map(|path| nested_name(path, sparsity)),
        };
        let results: Vec<Nested> = shares.iter().map(result_at).collect();
        let (mut extras, mut missing) = (extras.iter(), Vec::new());
        let result = putri_gguf::run_nested(&job, &results, &mut progress, |job, outcome| {
            missing
                .extend(extras.next().map(|e| e.make(job, outcome, stored.as_ref(), "")).unwrap_or_default());
            Ok(())
        });
        progress.finish();
        // The error of the last result is reported last.
        missing.iter().filter(|_| result.is_err()).for_each(|e| say_error(e));
        result?;
        return Failed::beside(missing);
    }
    let (outcome, timed) = run_timed(&job, &mut progress, timings)?;
    let mut missing = extras[0].make(&job, &outcome, stored.as_ref(), &timed);
    if let Some(name) = to_ollama
        && let Err(e) = ollama::create(&name, &outcome.output, stored.as_ref())
    {
        missing.push(match e {
            OllamaError::Create { .. } => e.to_string(),
            e => {
                let why = hinted(with_causes(&e), hints::of_ollama(&e));
                format!("{} is written, but no model in Ollama: {why}", outcome.output.display())
            }
        });
    }
    Failed::beside(missing)
}

/// Runs the job. Also returns a table of the time that each stage took, if `timings` asks for it.
fn run_timed(job: &Job, progress: &mut Progress, timings: bool) -> Result<(Outcome, String), Failed> {
    let mut watched = Timings::new(progress);
    let result = putri_gguf::run(job, &mut watched);
    let stages = watched.finish();
    progress.finish();
    let outcome = result.map_err(|e| match (e, &job.state) {
        (JobError::Interrupted, Some(keep)) => Failed::Interrupted(keep.folder.clone()),
        (e, _) => Failed::Job(e),
    })?;
    let rate = timings.then(|| ggml::product_rate().ok()).flatten();
    let n_threads = job.settings.n_threads;
    let table = |rate| format!("\n{}", stages.table(rate, n_threads, outcome.forecast.as_ref()));
    let timed = rate.map(table).unwrap_or_default();
    Ok((outcome, timed))
}

/// Goes on with the recovery of a pruned model.
fn recover(mut args: RecoverArgs) -> Result<(), Failed> {
    args.source = located(args.source)?;
    let (quiet, timings, dry, json) = (args.quiet, args.timings, args.dry_run, args.json);
    let extras = Extras::of_recovery(&args);
    join(&args.devices.rpc)?;
    let job = resolve_recover(args).map_err(Failed::Usage)?;
    let stop = ready(job.settings.n_threads).map_err(Failed::Machine)?;
    extras::check_all(std::slice::from_ref(&extras), &job)?;
    if dry {
        let rate = || ggml::product_rate().ok();
        return show(&dry_run_table(&putri_gguf::dry_run(&job)?, rate()));
    }
    let mut progress = if json { Progress::events(stop) } else { Progress::new(quiet, stop) };
    let (outcome, timed) = run_timed(&job, &mut progress, timings)?;
    Failed::beside(extras.make(&job, &outcome, None, &timed))
}

/// Adds the devices of other machines to those of this one.
fn join(servers: &[String]) -> Result<(), Failed> {
    servers.iter().try_for_each(|s| ggml::add_server(s)).context("--rpc").map_err(Failed::Machine)
}

/// Path of a model, which may be in the store of a local Ollama.
fn located(input: PathBuf) -> Result<PathBuf, Failed> {
    Ok(stored(&input)?.map_or(input, |stored| stored.model))
}

/// Evaluates a model and prints the figures.
fn measure(mut args: EvalArgs) -> Result<(), Failed> {
    args.model = located(args.model)?;
    args.base = args.base.map(located).transpose()?;
    let (quiet, json) = (args.quiet, args.json);
    join(&args.devices.rpc)?;
    let job = resolve_eval(args).map_err(Failed::Usage)?;
    let stop = ready(job.n_threads).map_err(Failed::Machine)?;
    let mut progress = Progress::new(quiet, stop);
    let result = putri_gguf::eval(&job, &mut progress);
    progress.finish();
    let found = result?;
    show(&if json { eval_json(&found, job.protocol) + "\n" } else { eval_table(&found, job.protocol) })
}

/// Verifies a pruned file and prints the checks.
fn check(
    model: PathBuf,
    source: Option<PathBuf>,
    n_threads: Option<usize>,
    json: bool,
    quiet: bool,
) -> Result<(), Failed> {
    let source = source.map(located).transpose()?;
    let job = VerifyJob { model, source, n_threads: threads(n_threads).map_err(Failed::Usage)? };
    let stop = ready(job.n_threads).map_err(Failed::Machine)?;
    let mut progress = Progress::new(quiet || json, stop);
    let result = putri_gguf::verify(&job, &mut progress);
    progress.finish();
    let checks = result?;
    show(&if json { checks_json(&checks) + "\n" } else { checks_table(&checks) })?;
    match checks.iter().filter(|c| c.found.is_err()).count() {
        0 => Ok(()),
        n => Err(JobError::Faults { path: job.model, n }.into()),
    }
}

/// Prepares threads and the handling of Ctrl-C. The first Ctrl-C raises the returned flag.
fn ready(n_threads: usize) -> anyhow::Result<Arc<AtomicBool>> {
    let stop = stop_on_interrupt().context("cannot watch for Ctrl-C")?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build_global();
    pool.with_context(|| format!("cannot start {n_threads} threads"))?;
    Ok(stop)
}

/// Prints a result. A reader that closes the pipe early is no error; a failed write is one.
fn show(text: &str) -> Result<(), Failed> {
    print(text).context("cannot write to standard output").map_err(Failed::Machine)
}

fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}

/// Returns a flag that the first Ctrl-C raises; the second ends the process.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>, ctrlc::Error> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let on_signal = move || {
        if flag.swap(true, Ordering::Relaxed) {
            putri_gguf::remove_temporary();
            ggml::exit_now(INTERRUPTED);
        }
        tell("\nstopping after this step; Ctrl-C again stops now");
    };
    ggml::keeping_ignored(|| ctrlc::set_handler(on_signal))?;
    Ok(stop)
}
