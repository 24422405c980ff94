//! Runs survive the loss of their terminal, reader or log, and report it if they cannot continue.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const PRUNE: &str =
    "in.gguf out.gguf --sparsity 0.25 -c 64 --chunks 8 -t 1 --resample-copies 0 --tune 0 --force";

fn with_model() -> Cli {
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() }.write(&cli.path("in.gguf"));
    cli
}

/// Runs a line of shell in which `$P` is the command.
fn sh(cli: &Cli, line: &str) -> Output {
    Command::new("bash")
        .current_dir(cli.dir.path())
        .args(["-c", line])
        .env("P", env!("CARGO_BIN_EXE_putri-gguf"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn code(out: &Output) -> Option<i32> {
    out.status.code()
}

/// Lines on stderr that report errors.
fn errors(out: &Output) -> Vec<String> {
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!stderr.contains("panicked") && !stderr.contains("backtrace"), "{stderr}");
    stderr.lines().filter(|line| line.starts_with("error:")).map(str::to_string).collect()
}

#[test]
fn signals_that_are_ignored_stay_ignored() {
    let cli = with_model();
    for (signal, number) in [("HUP", 1), ("TERM", 15), ("INT", 2)] {
        // The signal is ignored, as by nohup; it arrives during the work.
        let line = format!(
            "trap '' {signal}; $P {PRUNE} 2>log & p=$!; \
             for i in $(seq 400); do grep -q heads log 2>/dev/null && break; sleep 0.05; done; \
             kill -{signal} $p; wait $p"
        );
        let out = sh(&cli, &line);
        assert_eq!(code(&out), Some(0), "{signal}: {}", std::fs::read_to_string(cli.path("log")).unwrap());
        // If it is not ignored, it ends the run. These tests may have been started with signals ignored.
        let run = Command::new("bash")
            .current_dir(cli.dir.path())
            .args([
                "-c",
                &format!(
                    "exec env --default-signal $P {} -q",
                    PRUNE.replace("-c 64 --chunks 8", "-c 128 --chunks 2000")
                ),
            ])
            .env("P", env!("CARGO_BIN_EXE_putri-gguf"))
            .stderr(Stdio::piped())
            .spawn();
        let mut run = run.unwrap();
        std::thread::sleep(Duration::from_millis(700));
        Command::new("kill").args([format!("-{number}"), run.id().to_string()]).status().unwrap();
        let mut said = String::new();
        run.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(run.wait().unwrap().code(), Some(130), "{signal}: {said}");
        assert!(said.contains("interrupted; nothing was written"), "{said}");
    }
}

#[test]
fn a_run_outlives_who_reads_its_progress() {
    let cli = with_model();
    // The reader stops after the first line; the disk of the log is full.
    for line in [format!("$P {PRUNE} 2> >(head -1 >/dev/null)"), format!("$P {PRUNE} 2>/dev/full")] {
        std::fs::remove_file(cli.path("out.gguf")).ok();
        let out = sh(&cli, &line);
        assert_eq!(code(&out), Some(0), "{line}");
        assert!(cli.path("out.gguf").exists(), "{line}");
    }
    // An error has its exit code even if its message cannot be written.
    assert_eq!(code(&sh(&cli, "$P nowhere.gguf out.gguf --sparsity 0.2 2>/dev/full")), Some(1));
    assert_eq!(code(&sh(&cli, &format!("$P {PRUNE} -q | true; exit ${{PIPESTATUS[0]}}"))), Some(0));
}

#[test]
fn what_cannot_be_printed_is_no_success() {
    let cli = with_model();
    for line in ["$P inspect in.gguf", "$P completions bash", "$P man", "$P devices"] {
        let out = sh(&cli, &format!("{line} >/dev/full"));
        assert_eq!(code(&out), Some(1), "{line}");
        assert!(errors(&out)[0].contains("standard output"), "{:?}", errors(&out));
    }
    // The model is complete, and the message says so.
    let out = sh(&cli, &format!("$P {PRUNE} -q >/dev/full"));
    assert_eq!(code(&out), Some(4));
    let said = errors(&out);
    assert!(said.len() == 1 && said[0].contains("out.gguf is written, but not this summary"), "{said:?}");
    assert!(cli.path("out.gguf").exists());
}

#[test]
fn what_cannot_be_made_beside_the_model_is_said_and_the_rest_is_made() {
    let cli = with_model();
    // The report becomes impossible during the run, because its folder is deleted.
    std::fs::create_dir(cli.path("gone")).unwrap();
    let args = PRUNE.replace("--force", "--report gone/r.json --modelfile --package p");
    let args = args.replace("--chunks 8", "--chunks 64");
    let line = format!(
        "$P {args} 2>log & p=$!; \
         for i in $(seq 400); do [ -s log ] && break; sleep 0.02; done; rmdir gone; wait $p"
    );
    let out = sh(&cli, &line);
    let log = std::fs::read_to_string(cli.path("log")).unwrap();
    assert_eq!(code(&out), Some(4), "{log}");
    let said: Vec<&str> = log.lines().filter(|l| l.starts_with("error:")).collect();
    assert!(
        said.len() == 1 && said[0].contains("out.gguf is written, but not its report: cannot write gone"),
        "{log}"
    );
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(stdout.contains("perplexity") && stdout.ends_with("out.gguf\n"), "{stdout}");
    assert!(cli.path("out.Modelfile").exists() && cli.path("p/SHA256SUMS").exists());
}

#[test]
fn a_limit_on_file_sizes_is_an_error() {
    let cli = with_model();
    let before = cli.listing().len();
    let out = sh(&cli, &format!("ulimit -f 64; $P {PRUNE} -q"));
    assert_eq!(code(&out), Some(1), "{:?}", out.status.signal());
    let said = errors(&out);
    assert!(said.len() == 1 && said[0].contains("too large"), "{said:?}");
    assert_eq!(cli.listing().len(), before, "something was left behind");
}

#[test]
fn too_little_memory_is_an_error() {
    let cli = with_model();
    let before = cli.listing().len();
    let mut last = String::new();
    // Matrix products take buffers of the size of the processor's cache, which may be several hundred MiB.
    let enough = (2..64).map(|i| i * 32_768).find(|kib| {
        let out = sh(&cli, &format!("ulimit -v {kib}; $P {PRUNE} -q"));
        last = format!("{:?}: {}", code(&out), String::from_utf8_lossy(&out.stderr));
        if code(&out) == Some(0) {
            return true;
        }
        // The dynamic linker may run out of memory before the process starts.
        let begun = !String::from_utf8_lossy(&out.stderr).contains("error while loading shared libraries");
        if begun && code(&out) != Some(127) {
            assert_eq!(code(&out), Some(1), "{kib} KiB: {}", String::from_utf8_lossy(&out.stderr));
            let said = errors(&out);
            assert_eq!(said.len(), 1, "{kib} KiB: {}", String::from_utf8_lossy(&out.stderr));
            assert_eq!(cli.listing().len(), before, "something was left behind");
        }
        false
    });
    assert!(enough.is_some(), "{last}");
}

#[test]
fn nothing_waits_for_a_pipe_to_be_written() {
    let cli = with_model();
    assert!(Command::new("mkfifo").arg(cli.path("pipe.gguf")).status().unwrap().success());
    let start = Instant::now();
    for args in [&["inspect", "pipe.gguf"][..], &["pipe.gguf", "o.gguf", "--sparsity", "0.2"]] {
        let out = sh(&cli, &format!("timeout 20 $P {}", args.join(" ")));
        assert!(code(&out) == Some(1) && errors(&out)[0].contains("pipe"), "{:?}", errors(&out));
    }
    assert!(start.elapsed() < Duration::from_secs(20));
}
