//! Interrupted runs end with the same result as an undisturbed one.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::calibrate::Recipe;
use putri_gguf::ggml::silence_logs;
use putri_gguf::gguf::{GgufFile, Value, write_gguf};
use putri_gguf::model::FfnUnit;
use putri_gguf::pipeline::{Method, Observer, RecoverBudget, RecoverSettings, Settings};
use putri_gguf::prune::NeuronCriterion;
use putri_gguf::{Job, JobError, KeepState, run};
use std::cell::Cell;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Observer that stops the work after it was asked a number of times.
struct StopsAfter(Cell<usize>);

impl Observer for StopsAfter {
    fn stage(&mut self, _: &str, _: usize) {}
    fn step(&mut self, _: usize, _: &str) {}
    fn interrupted(&self) -> bool {
        self.0.set(self.0.get().saturating_sub(1));
        self.0.get() == 0
    }
}

fn job(folder: &Path, method: Method) -> Job {
    let n_threads = 1;
    Job {
        recipe: Recipe { n_ctx: 64, n_windows: 8, n_threads, n_parallel: 8, ..Recipe::default() },
        settings: Settings { sparsity: 0.5, method, n_threads, ..Settings::default() },
        ..Job::new(folder.join("in.gguf"), folder.join("out.gguf"))
    }
}

#[test]
fn interrupted_anywhere_a_run_ends_in_the_same_bytes() {
    silence_logs();
    let cli = Cli::new();
    let llama = TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() };
    let parallel = TestModel { arch: "falcon", fused_qkv: true, ..llama.clone() };
    let mixture = TestModel { experts: Some([8, 2, 0]), blocks: vec![(4, 2, 64); 4], ..llama.clone() };
    let variants = [
        (&llama, Method::Putri, FfnUnit::Neuron),
        (&llama, Method::Paper, FfnUnit::Neuron),
        (&parallel, Method::Putri, FfnUnit::Neuron),
        (&mixture, Method::Putri, FfnUnit::Expert),
        (&mixture, Method::Putri, FfnUnit::Neuron),
    ];
    for (small, method, moe_unit) in variants {
        small.write(&cli.path("in.gguf"));
        let mut job = job(cli.dir.path(), method);
        job.settings.moe_unit = moe_unit;
        if std::ptr::eq(small, &llama) && method == Method::Putri {
            let budget = Some(RecoverBudget::Tokens(512));
            job.settings.recover =
                RecoverSettings { budget, tokens: Some(128), ..RecoverSettings::default() };
        }
        if small.experts.is_some() {
            // The blocks cannot give up half of such narrow experts.
            job.settings.sparsity = 0.4;
            job.settings.experts.refine = 1;
        }
        run(&job, &mut StopsAfter(Cell::new(usize::MAX))).unwrap();
        let undisturbed = std::fs::read(&job.output).unwrap();
        let state = cli.path("state");
        job.state = Some(KeepState { folder: state.clone(), resume: true });
        // Each interruption is tested alone, and one after another.
        for one_by_one in [false, true] {
            let mut n_stopped = 0;
            for patience in (2..).step_by(3) {
                std::fs::remove_file(&job.output).unwrap();
                let ended = run(&job, &mut StopsAfter(Cell::new(patience)));
                match ended {
                    Ok(_) => {}
                    Err(JobError::Interrupted) => n_stopped += 1,
                    Err(e) => panic!("{method:?} after {patience}: {}", putri_gguf::with_causes(&e)),
                }
                let ready = ended.is_ok();
                if !ready && !one_by_one {
                    run(&job, &mut StopsAfter(Cell::new(usize::MAX))).unwrap();
                }
                if job.output.exists() {
                    assert!(
                        std::fs::read(&job.output).unwrap() == undisturbed,
                        "{method:?} after {patience}"
                    );
                    assert!(!state.exists(), "a finished run leaves no state");
                } else {
                    std::fs::write(&job.output, "").unwrap();
                }
                if ready {
                    break;
                }
            }
            assert!(n_stopped > 5, "only {n_stopped} interruptions");
        }
        std::fs::remove_file(&job.output).unwrap();
    }
}

#[test]
fn neurons_go_by_what_a_run_found_best_or_was_told() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let mut job = job(cli.dir.path(), Method::Putri);
    let undisturbed = |job: &Job| {
        run(job, &mut StopsAfter(Cell::new(usize::MAX))).unwrap();
        let bytes = std::fs::read(&job.output).unwrap();
        let file = GgufFile::open(&job.output).unwrap();
        let neurons: Vec<Vec<u8>> = (0..4)
            .map(|il| file.data(file.find(&format!("blk.{il}.ffn_up.weight")).unwrap()).to_vec())
            .collect();
        std::fs::remove_file(&job.output).unwrap();
        (bytes, neurons, file.get("putri.neuron_criterion").cloned())
    };
    let named = |criterion: NeuronCriterion| Some(Value::Str(criterion.name().into()));
    let told = NeuronCriterion::ALL.map(|criterion| {
        job.settings.criterion = Some(criterion);
        undisturbed(&job)
    });
    assert!(told[0].1 != told[1].1, "both ways keep the same neurons");
    assert_eq!([&told[0].2, &told[1].2], [&named(NeuronCriterion::ALL[0]), &named(NeuronCriterion::ALL[1])]);
    job.settings.criterion = None;
    let found = undisturbed(&job);
    // A checkpoint that names the other criterion leads to the other result.
    let best = told.iter().position(|bytes| *bytes == found).expect("it goes one way or the other");
    job.state = Some(KeepState { folder: cli.path("state"), resume: true });
    let criterion = cli.path("state/criterion.gguf");
    for patience in (2..).take_while(|_| !criterion.exists()) {
        // Every run starts from the beginning; otherwise the last could go from before the choice to the end.
        drop(std::fs::remove_dir_all(cli.path("state")));
        assert!(matches!(run(&job, &mut StopsAfter(Cell::new(patience))), Err(JobError::Interrupted)));
    }
    assert!(!cli.path("state/block-000.gguf").exists());
    // If widths or criterion are missing, they are computed again with the same result.
    let kept = cli.path("kept");
    for lost in ["widths.gguf", "criterion.gguf"] {
        drop(std::fs::remove_dir_all(&kept));
        std::fs::create_dir(&kept).unwrap();
        for file in std::fs::read_dir(cli.path("state")).unwrap().map(Result::unwrap) {
            std::fs::copy(file.path(), kept.join(file.file_name())).unwrap();
        }
        std::fs::remove_file(kept.join(lost)).unwrap();
        let job = Job { state: Some(KeepState { folder: kept.clone(), resume: true }), ..job.clone() };
        assert!(undisturbed(&job) == found, "without {lost}");
    }
    let written = GgufFile::open(&criterion).unwrap().get("criterion").cloned();
    assert_eq!(written, named(NeuronCriterion::ALL[best]));
    let say = |name: &str| {
        let mut file = std::fs::File::create(&criterion).unwrap();
        write_gguf(&mut file, &criterion, &[("criterion".into(), Value::Str(name.into()))], &[]).unwrap();
    };
    say("taste");
    let error = run(&job, &mut StopsAfter(Cell::new(usize::MAX))).unwrap_err().to_string();
    assert!(error.contains("criterion.gguf") && error.contains("begin anew"), "{error}");
    say(NeuronCriterion::ALL[1 - best].name());
    assert!(undisturbed(&job) == told[1 - best]);
}

#[test]
fn killed_a_run_ends_in_the_same_bytes() {
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 6], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let common = ["--sparsity", "0.5", "-c", "64", "--chunks", "8", "-t", "1", "-q"];
    cli.ok(&[&["in.gguf", "whole.gguf"][..], &common].concat());
    let whole = std::fs::read(cli.path("whole.gguf")).unwrap();
    let args = [&["in.gguf", "out.gguf", "--state-dir", "state", "--resume"][..], &common].concat();
    let mut n_killed = 0;
    for wait in (30..).step_by(30) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_putri-gguf"))
            .current_dir(cli.dir.path())
            .args(&args)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        child.kill().unwrap();
        let finished = child.wait().unwrap().success();
        // An output is complete, even if the run was killed while it cleaned up.
        if let Ok(bytes) = std::fs::read(cli.path("out.gguf")) {
            assert!(bytes == whole);
            assert!(!finished || !cli.path("state").exists(), "a finished run leaves no state");
            break;
        }
        assert!(!finished);
        n_killed += 1;
    }
    assert!(n_killed > 0);
}

#[test]
fn a_state_that_did_not_fit_on_the_disk_is_not_taken_for_one() {
    // A limit on file sizes simulates a full disk, as in `bad_input.rs`: the first block does not fit.
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let common = ["--sparsity", "0.25", "-c", "64", "--chunks", "8", "-t", "1", "-q"];
    cli.ok(&[&["in.gguf", "whole.gguf"][..], &common].concat());
    let args = [&["in.gguf", "out.gguf", "--state-dir", "state", "--resume"][..], &common].concat();
    let out = Command::new("sh")
        .current_dir(cli.dir.path())
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_putri-gguf")])
        .args(&args)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("block-000.gguf") && stderr.contains("too large"), "{stderr}");
    assert!(cli.path("state/widths.gguf").exists() && !cli.path("state/block-000.gguf").exists());
    cli.ok(&args);
    let [a, b] = ["whole.gguf", "out.gguf"].map(|f| std::fs::read(cli.path(f)).unwrap());
    assert!(a == b);
}

#[test]
fn what_a_killed_run_was_writing_is_not_left_behind() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() }.write(&cli.path("in.gguf"));
    std::fs::create_dir(cli.path("state")).unwrap();
    std::fs::write(cli.path("state/unfinished.part"), "half of a bl").unwrap();
    let mut job = job(cli.dir.path(), Method::Putri);
    job.state = Some(KeepState { folder: cli.path("state"), resume: false });
    run(&job, &mut StopsAfter(Cell::new(usize::MAX))).unwrap();
    assert!(!cli.path("state").exists());
}

#[test]
fn a_state_is_only_taken_over_on_the_same_terms() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let mut job = job(cli.dir.path(), Method::Putri);
    job.state = Some(KeepState { folder: cli.path("state"), resume: true });
    let windows = cli.path("state/windows.gguf");
    for patience in (5..).step_by(5).take_while(|_| !windows.exists()) {
        assert!(matches!(run(&job, &mut StopsAfter(Cell::new(patience))), Err(JobError::Interrupted)));
    }
    let common = ["-c", "64", "--chunks", "8", "-q", "--state-dir", "state"];
    let fails = |more: &[&str], parts: &[&str]| {
        cli.fails(&[&["in.gguf", "out.gguf"][..], &common, more].concat(), 1, parts);
    };
    fails(&["--sparsity", "0.5"], &["state", "unfinished", "--resume"]);
    fails(&["--sparsity", "0.4", "--resume"], &["another run", "sparsity: 0.5", "sparsity: 0.4"]);
    fails(&["--sparsity", "0.5", "--resume", "--seed", "2"], &["another run", "seed: 1", "seed: 2"]);
    // Damage is detected.
    let bytes = std::fs::read(&windows).unwrap();
    std::fs::write(&windows, &bytes[..bytes.len() / 2]).unwrap();
    fails(&["--sparsity", "0.5", "--resume"], &["windows.gguf"]);
    std::fs::write(&windows, bytes).unwrap();
    // Without its terms, the rest of the checkpoint is not usable.
    let quarter = ["--sparsity", "0.25"];
    cli.ok(&[&["in.gguf", "expected.gguf", "-c", "64", "--chunks", "8", "-q"][..], &quarter].concat());
    let kept = cli.listing_of("state");
    std::fs::remove_file(cli.path("state/run.txt")).unwrap();
    cli.ok(&[&["in.gguf", "quarter.gguf"][..], &common, &quarter].concat());
    let [a, b] = ["expected.gguf", "quarter.gguf"].map(|f| std::fs::read(cli.path(f)).unwrap());
    assert!(a == b);
    std::fs::create_dir(cli.path("state")).unwrap();
    kept.iter().for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
    // The number of threads is not one of the terms.
    cli.ok(&[&["in.gguf", "out.gguf"][..], &common, &["--sparsity", "0.5", "--resume", "-t", "2"]].concat());
}

#[test]
fn two_runs_do_not_share_a_state() {
    let cli = Cli::new();
    TestModel { n_embd: 128, blocks: vec![(8, 4, 512); 6], ..TestModel::default() }
        .write(&cli.path("in.gguf"));
    let args =
        ["--sparsity", "0.3", "-c", "64", "--chunks", "16", "-t", "1", "--state-dir", "state", "--resume"];
    let mut first = Command::new(env!("CARGO_BIN_EXE_putri-gguf"))
        .current_dir(cli.dir.path())
        .args(["in.gguf", "out.gguf", "-q"])
        .args(args)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    while !cli.path("state/windows.gguf").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let second = cli.run(&[&["in.gguf", "other.gguf", "-q"][..], &args].concat());
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(second.status.code() == Some(1) && said.contains("another run keeps its checkpoint"), "{said}");
    // A killed run releases the folder.
    first.kill().unwrap();
    first.wait().unwrap();
    cli.ok(&[&["in.gguf", "out.gguf", "-q"][..], &args].concat());
    assert!(!cli.path("state").exists());
}
