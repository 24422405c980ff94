//! Resampled copies of the calibration windows.

use crate::common::Silent;
use crate::common::test_model::TestModel;
use putri_gguf::calibrate::Windows;
use putri_gguf::ggml::silence_logs;
use putri_gguf::model::Model;
use putri_gguf::pipeline::{Pruned, ResampleSettings, Settings, run};

fn pruned(model: &Model, resample_copies: usize, resample_share: f64) -> Pruned {
    let (n_ctx, n_fit, n_held_out) = (64, 40, 4);
    let n = (n_fit + n_held_out) * n_ctx;
    let tokens = (0..n).map(|i| 3 + ((i * i * 31 + i * 7919) % 250) as i32).collect();
    let windows = Windows { n_ctx, tokens, n_fit, n_held_out, n_self: 0 };
    let resample = ResampleSettings { copies: resample_copies, share: resample_share };
    let settings = Settings { sparsity: 0.4, resample, ..Settings::default() };
    run(model, model, &windows, &settings, &mut (), &mut Silent).unwrap()
}

/// Checks that only resampled copies with other tokens change the result.
/// Copies without resampled tokens repeat the same text, however many there are. Each set of resampled copies
/// has other tokens.
#[test]
fn only_other_tokens_make_a_difference() {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    for small in [TestModel::default(), TestModel::mixtures().remove(0).1] {
        small.write(&path);
        let model = Model::open(&path).unwrap();
        let none = pruned(&model, 0, 0.5);
        let [other, others] = [1, 2].map(|resample_copies| pruned(&model, resample_copies, 0.5));
        let apart = |a: &Pruned, b: &Pruned| {
            let [a, b] = [a, b].map(|p| p.held_out.kl.mean);
            (a - b).abs() / a
        };
        println!("{}: {:.2e}, {:.2e}", small.arch, apart(&none, &other), apart(&other, &others));
        for resample_copies in 1..=2 {
            let same = pruned(&model, resample_copies, 0.0);
            assert!(apart(&none, &same) < 1e-5, "{}: {:?}, {:?}", small.arch, none.held_out, same.held_out);
        }
        assert!(apart(&none, &other) > 1e-4, "{}: {:?}", small.arch, other.held_out);
        assert!(apart(&other, &others) > 1e-4, "{}: {:?}", small.arch, others.held_out);

        // Blocks are fitted to resampled copies, but the allocation is measured on the windows.
        let shapes = |o: &Pruned| -> Vec<_> {
            o.plan.blocks.iter().map(|b| (b.groups.clone(), b.experts.len(), b.neurons.len())).collect()
        };
        let criterion = |o: &Pruned| o.provenance.iter().find(|(key, _)| *key == "neuron_criterion").cloned();
        assert_eq!(shapes(&none), shapes(&other), "{}", small.arch);
        assert_eq!(
            (criterion(&none), &none.block_losses),
            (criterion(&other), &other.block_losses),
            "{}",
            small.arch
        );
    }
}
