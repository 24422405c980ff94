//! The last adjustment of norms and biases: closer to the dense model on text that it did not see.

mod common;

use common::small::Small;
use common::{compare_logits, logits, our_logits};
use putri_gguf::calibrate::Windows;
use putri_gguf::forward::Precision;
use putri_gguf::ggml::silence_logs;
use putri_gguf::model::{BlockVector, Model};
use putri_gguf::pipeline::{Observer, Outcome, Settings, run};
use std::path::Path;

const N_CTX: usize = 64;

struct Silent;

impl Observer for Silent {
    fn stage(&mut self, _: &str, _: usize) {}
    fn step(&mut self, _: usize, _: &str) {}
}

/// Twelve windows of something like text to fit on, and four to judge by.
fn windows() -> Windows {
    let (n_fit, n_held_out) = (12, 4);
    let tokens =
        (0..(n_fit + n_held_out) * N_CTX).map(|i| 3 + (i * i * 31 + i * 7919) as i32 % 250).collect();
    Windows { n_ctx: N_CTX, tokens, n_fit, n_held_out, n_self: 0 }
}

fn pruned(model: &Model, windows: &Windows, settings: &Settings) -> Outcome {
    let settings = Settings { sparsity: 0.4, precision: Precision::F32, ..settings.clone() };
    run(model, model, windows, &settings, &mut Silent).unwrap()
}

/// Mean KL divergence from the dense model on the held-out windows.
fn divergence(path: &Path, model: &Model, windows: &Windows, outcome: &Outcome) -> f64 {
    let held_out = windows.tokens_of(windows.n_fit..windows.n_windows());
    let of_window = |tokens: &[i32]| {
        let dense = our_logits(path, tokens, Precision::F32);
        let own = logits(model, tokens, Precision::F32, |il| outcome.plan.block(model, il).unwrap());
        compare_logits(&dense, &own, model.matrix(&model.output).unwrap().n_out).1
    };
    held_out.chunks_exact(N_CTX).map(of_window).sum::<f64>() / windows.n_held_out as f64
}

fn check(small: &Small, biases: bool) {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    small.write(&path);
    let (model, windows) = (Model::open(&path).unwrap(), windows());
    let settings = Settings { tune_tokens: 4 * N_CTX, ..Settings::default() };
    let plain = pruned(&model, &windows, &Settings { tune: 0, ..settings.clone() });
    let tuned = pruned(&model, &windows, &Settings { tune: 4, ..settings.clone() });
    let [before, after] = [&plain, &tuned].map(|o| divergence(&path, &model, &windows, o));
    println!("{}: held-out divergence {before:.4} to {after:.4}", small.arch);
    assert!(after < 0.99 * before, "{}: {before} to {after}", small.arch);
    for (a, b) in plain.plan.blocks.iter().zip(&tuned.plan.blocks) {
        assert_eq!((&a.groups, &a.neurons), (&b.groups, &b.neurons));
        assert_eq!(a.ffn_down.as_ref().unwrap().bytes, b.ffn_down.as_ref().unwrap().bytes);
        assert!(a.vector(BlockVector::FfnNorm).is_none() && b.vector(BlockVector::FfnNorm).is_some());
        assert_eq!(b.vector(BlockVector::FfnDownBias).is_some(), biases);
        assert!(!b.groups.is_empty() || b.vector(BlockVector::AttnNorm).is_none());
    }

    // A rate at which nothing good can come of it.
    let wild = Settings { tune: 1, tune_rate: 100.0, ..settings };
    let kept = pruned(&model, &windows, &wild);
    assert_eq!(divergence(&path, &model, &windows, &kept), before, "{}: not undone", small.arch);
    assert_eq!(kept.pruned_ppl, plain.pruned_ppl);
}

#[test]
fn a_llama_comes_closer() {
    check(&Small::default(), true);
}

#[test]
fn a_gemma3_comes_closer() {
    check(&Small::gemma3(), false);
}
