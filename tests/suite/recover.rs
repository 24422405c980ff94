//! Recovery: all kept weights learn from the source, and the file holds what was gained.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use crate::common::{Silent, compare_logits, logits, our_logits};
use putri_gguf::calibrate::Windows;
use putri_gguf::ggml::silence_logs;
use putri_gguf::gguf::{GgufFile, Value};
use putri_gguf::model::Model;
use putri_gguf::pipeline::{Among, Moves, Pruned, RecoverBudget, RecoverSettings, Settings, run};
use putri_gguf::spill::SpillStore;
use putri_gguf::train::AdamState;
use std::path::Path;

/// Windows of text-like tokens to fit to, and some held out.
fn windows(n_ctx: usize, n_fit: usize, n_held_out: usize) -> Windows {
    let n = (n_fit + n_held_out) * n_ctx;
    let tokens = (0..n).map(|i| 3 + ((i * i * 31 + i * 7919) % 250) as i32).collect();
    Windows { n_ctx, tokens, n_fit, n_held_out, n_self: 0 }
}

fn pruned(model: &Model, windows: &Windows, recover: RecoverSettings) -> Pruned {
    let settings = Settings { sparsity: 0.4, recover, ..Settings::default() };
    run(model, model, windows, &settings, &mut (), &mut Silent).unwrap()
}

/// Mean KL divergence from the dense model on the held-out windows.
fn divergence(path: &Path, model: &Model, windows: &Windows, outcome: &Pruned) -> f64 {
    let held_out = windows.tokens_of(windows.n_fit..windows.n_windows());
    let of_window = |tokens: &[i32]| {
        let dense = our_logits(path, tokens);
        let own = logits(model, tokens, 1, |il| outcome.plan.block(model, il).unwrap());
        compare_logits(&dense, &own, model.matrix(&model.output).unwrap().n_out).1
    };
    held_out.chunks_exact(windows.n_ctx).map(of_window).sum::<f64>() / windows.n_held_out as f64
}

fn check(small: &TestModel, recover: RecoverSettings) {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    small.write(&path);
    let model = Model::open(&path).unwrap();
    let windows = windows(64, 24, 4);
    let plain = pruned(&model, &windows, RecoverSettings::default());
    let with = |rate| RecoverSettings {
        budget: Some(RecoverBudget::Tokens(40_000)),
        rate,
        tokens: Some(512),
        ..recover.clone()
    };
    let recovered = pruned(&model, &windows, with(0.01));
    let [before, after] = [&plain, &recovered].map(|o| divergence(&path, &model, &windows, o));
    println!("{}: held-out divergence {before:.4} to {after:.4}", small.arch);
    assert!(after < 0.9 * before, "{}: {before} to {after}", small.arch);

    // This rate is too high for any improvement.
    let kept = pruned(&model, &windows, with(100.0));
    assert_eq!(divergence(&path, &model, &windows, &kept), before, "{}: not undone", small.arch);
}

#[test]
fn a_llama_comes_closer() {
    check(&TestModel::default(), RecoverSettings::default());
}

#[test]
fn a_gemma3_comes_closer_among_likely_tokens() {
    check(&TestModel::gemma3(), RecoverSettings { among: Among::Likely, ..RecoverSettings::default() });
}

#[test]
fn every_way_to_move_comes_closer() {
    for moves in [Moves::Full(AdamState::Bf16), Moves::Full(AdamState::Factored), Moves::LowRank(8)] {
        check(&TestModel::default(), RecoverSettings { moves, ..RecoverSettings::default() });
    }
}

/// Arguments of a short recovery of `pruned.gguf` to `out.gguf`.
const SHORT: [&str; 13] = [
    "recover",
    "pruned.gguf",
    "out.gguf",
    "--source",
    "in.gguf",
    "--tokens",
    "100k",
    "--ctx-size",
    "64",
    "--chunks",
    "48",
    "--rate",
    "0.003",
];

#[test]
fn a_pruned_file_goes_on_as_often_as_wanted() {
    let cli = Cli::new();
    let llama = TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() };
    let qwen2 = TestModel { arch: "qwen2", biases: true, ..llama.clone() };
    for small in [llama, qwen2, TestModel::gemma3()] {
        small.write(&cli.path("in.gguf"));
        let short = ["--ctx-size", "64", "--chunks", "8", "--force"];
        cli.ok(&[&["in.gguf", "pruned.gguf", "--sparsity", "0.4"][..], &short].concat());
        let source = std::fs::read(cli.path("in.gguf")).unwrap();
        let foreseen = cli.ok(&[&SHORT[..], &["--dry-run"]].concat());
        assert!(foreseen.contains("recover, rounding") && foreseen.contains("attn_q"), "{foreseen}");
        for _ in 0..2 {
            let before = GgufFile::open(&cli.path("pruned.gguf")).unwrap();
            cli.ok(&[&SHORT[..], &["--force"]].concat());
            let after = GgufFile::open(&cli.path("out.gguf")).unwrap();
            let tensors = |file: &GgufFile| {
                file.tensors().iter().map(|t| (t.name.clone(), t.ty, t.ne.clone())).collect::<Vec<_>>()
            };
            assert_eq!(tensors(&before), tensors(&after), "{}", small.arch);
            assert!(
                matches!(after.get("putri.recover_tokens"), Some(Value::U64(n)) if *n > 0),
                "{}",
                small.arch
            );
            let checks = cli.ok(&["verify", "out.gguf", "--source", "in.gguf"]);
            assert!(checks.contains("recorded"), "{checks}");
            drop((before, after));
            std::fs::rename(cli.path("out.gguf"), cli.path("pruned.gguf")).unwrap();
        }
        assert!(std::fs::read(cli.path("in.gguf")).unwrap() == source, "the source is never written");
    }
}

#[test]
fn a_run_recovers_at_its_end() {
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let base = ["in.gguf", "out.gguf", "--sparsity", "0.4", "--ctx-size", "64", "--chunks", "24", "--force"];
    let trained = || GgufFile::open(&cli.path("out.gguf")).unwrap().get("putri.recover_tokens").cloned();
    cli.ok(&base);
    assert_eq!(trained(), None);
    cli.ok(&[&base[..], &["--recover", "20k"]].concat());
    assert!(matches!(trained(), Some(Value::U64(n)) if n > 0), "{:?}", trained());
    // A limit of time counts as steps.
    cli.ok(&[&base[..], &["--recover", "3s"]].concat());
}

#[test]
fn other_models_and_amounts_are_refused() {
    let cli = Cli::new();
    TestModel::default().write(&cli.path("pruned.gguf"));
    let others = [
        (TestModel { n_vocab: 300, ..TestModel::default() }, "vocabulary"),
        (TestModel { n_embd: 128, ..TestModel::default() }, "n_embd"),
    ];
    for (other, part) in others {
        other.write(&cli.path("in.gguf"));
        cli.fails(&SHORT, 1, &["in.gguf is not what the pruned file was made from", part]);
    }
    TestModel::default().write(&cli.path("in.gguf"));
    let often = ["recover", "pruned.gguf", "out.gguf", "--source", "in.gguf", "--tokens", "often"];
    cli.fails(&often, 2, &["--tokens"]);
    cli.fails(&["recover", "pruned.gguf", "in.gguf", "--source", "in.gguf", "--force"], 1, &["in.gguf"]);
    cli.fails(
        &["pruned.gguf", "o.gguf", "--sparsity", "0.2", "--method", "paper", "--recover", "1k"],
        2,
        &["--recover"],
    );
}

#[test]
fn what_lies_in_files_moves_alike() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    TestModel::default().write(&path);
    let model = Model::open(&path).unwrap();
    let windows = windows(64, 8, 2);
    let found = [SpillStore::default(), SpillStore::in_files(dir.path().into())].map(|spill| {
        let budget = Some(RecoverBudget::Tokens(2048));
        let recover = RecoverSettings { budget, tokens: Some(512), ..RecoverSettings::default() };
        let settings = Settings { sparsity: 0.4, recover, spill, ..Settings::default() };
        let pruned = run(&model, &model, &windows, &settings, &mut (), &mut Silent).unwrap();
        let matrices = pruned.plan.blocks.iter().flat_map(|b| &b.matrices).flatten();
        matrices.map(|q| q.bytes.to_vec()).collect::<Vec<_>>()
    });
    assert!(found[0] == found[1]);
}
