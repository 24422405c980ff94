//! Progress messages during a run; a run survives their loss.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::silence_logs;
use serde_json::Value as Json;
use std::process::{Command, Stdio};

const QUICK: [&str; 6] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1"];
const PRUNE: [&str; 4] = ["in.gguf", "out.gguf", "--sparsity", "0.4"];

fn cli() -> Cli {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    cli
}

/// Steps of a run with these arguments.
fn steps(cli: &Cli, args: &[&str]) -> Vec<Json> {
    let text = cli.ok(&[args, &["--json"], &QUICK].concat());
    let events = text.lines().map(|l| serde_json::from_str::<Json>(l).unwrap());
    events.filter(|e| e["event"] == "step").collect()
}

/// Values of `key` at steps of `stage`.
fn at<'a>(steps: &'a [Json], stage: &str, key: &str) -> Vec<&'a Json> {
    steps.iter().filter(|e| e["stage"] == stage).map(|e| &e[key]).collect()
}

#[test]
fn steps_hold_the_time_left_of_stage_and_run() {
    let cli = cli();
    let one = steps(&cli, &PRUNE);
    for key in ["seconds_left", "run_seconds_left"] {
        let left = at(&one, "blocks", key);
        assert_eq!(left.len(), 4);
        assert!(left.iter().all(|s| s.as_f64().is_some_and(|s| (0.0..600.0).contains(&s))), "{left:?}");
    }
    assert_eq!(at(&one, "blocks", "seconds_left")[3], &Json::from(0.0));
    // The run's time left covers all of several results; in a search, it covers the present one.
    let nested = steps(&cli, &["in.gguf", "n.gguf", "--nested", "0.3,0.5"]);
    let left = at(&nested, "blocks", "run_seconds_left");
    assert!(left.len() == 8 && left.iter().all(|s| s.is_f64()), "{left:?}");
    TestModel { blocks: vec![(4, 2, 256); 7], ..TestModel::gemma3() }.write(&cli.path("in.gguf"));
    let searched = steps(&cli, &["in.gguf", "s.gguf", "--max-ppl-ratio", "1.2"]);
    let left = at(&searched, "blocks", "result_seconds_left");
    assert!(!left.is_empty() && left.iter().all(|s| s.is_f64()), "{left:?}");
    assert!(searched.iter().all(|e| e.get("run_seconds_left").is_none()), "{searched:?}");
}

/// Prunes with `stderr` as the error output.
#[cfg(unix)]
fn with_stderr(cli: &Cli, stderr: impl Into<Stdio>) {
    let status = Command::new(env!("CARGO_BIN_EXE_putri-gguf"))
        .current_dir(cli.dir.path())
        .args([&PRUNE[..], &QUICK, &["--force"]].concat())
        .stdout(Stdio::null())
        .stderr(stderr)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
#[cfg(unix)]
fn a_reader_that_goes_away_ends_no_run() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    with_stderr(&cli(), writer);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_under_the_log_ends_no_run() {
    with_stderr(&cli(), std::fs::File::options().write(true).open("/dev/full").unwrap());
}
