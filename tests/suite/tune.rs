//! Final tuning of norms and biases: the result is closer to the dense model on held-out text.

use crate::common::test_model::TestModel;
use crate::common::{Silent, compare_logits, logits, our_logits};
use putri_gguf::calibrate::Windows;
use putri_gguf::ggml::silence_logs;
use putri_gguf::model::{BlockMatrix, BlockVector, Model};
use putri_gguf::pipeline::{Pruned, Settings, TuneSettings, run};
use std::path::Path;

/// Windows of text-like tokens to fit to, and some held out.
fn windows(n_ctx: usize, n_fit: usize, n_held_out: usize) -> Windows {
    let n = (n_fit + n_held_out) * n_ctx;
    let tokens = (0..n).map(|i| 3 + ((i * i * 31 + i * 7919) % 250) as i32).collect();
    Windows { n_ctx, tokens, n_fit, n_held_out, n_self: 0 }
}

fn pruned(model: &Model, windows: &Windows, settings: &Settings) -> Pruned {
    let settings = Settings { sparsity: 0.4, ..settings.clone() };
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

fn check(small: &TestModel, windows: &Windows, biases: bool) {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    small.write(&path);
    let model = Model::open(&path).unwrap();
    let with = |passes, rate| Settings {
        tune: TuneSettings { passes, rate, tokens: 256, ..TuneSettings::default() },
        ..Settings::default()
    };
    let plain = pruned(&model, windows, &with(0, 0.005));
    // The resampled text is of another kind than the held-out text, which slows convergence.
    let tuned = pruned(&model, windows, &with(8, 0.005));
    let [before, after] = [&plain, &tuned].map(|o| divergence(&path, &model, windows, o));
    println!("{}: held-out divergence {before:.4} to {after:.4}", small.arch);
    assert!(after < 0.99 * before, "{}: {before} to {after}", small.arch);
    for (a, b) in plain.plan.blocks.iter().zip(&tuned.plan.blocks) {
        assert_eq!((&a.groups, &a.neurons), (&b.groups, &b.neurons));
        let down = [a, b].map(|plan| &plan.matrix(BlockMatrix::FfnDown).unwrap().bytes);
        assert!(down[0][..] == down[1][..]);
        assert!(a.vector(BlockVector::FfnNorm).is_none() && b.vector(BlockVector::FfnNorm).is_some());
        assert_eq!(b.vector(BlockVector::FfnDownBias).is_some(), biases);
        assert!(!b.groups.is_empty() || b.vector(BlockVector::AttnNorm).is_none());
    }

    // This rate is too high for any improvement.
    let wild = with(1, 100.0);
    let kept = pruned(&model, windows, &wild);
    assert_eq!(divergence(&path, &model, windows, &kept), before, "{}: not undone", small.arch);
    assert_eq!(kept.held_out, plain.held_out);
}

#[test]
fn a_llama_comes_closer() {
    check(&TestModel::default(), &windows(64, 12, 4), true);
}

#[test]
fn a_gemma3_comes_closer() {
    check(&TestModel::gemma3(), &windows(64, 12, 4), false);
}

#[test]
fn windows_too_long_for_gradients_are_cut() {
    check(&TestModel::default(), &windows(600, 3, 1), true);
    // One token of the text is left over.
    check(&TestModel::default(), &windows(601, 3, 1), true);
}
