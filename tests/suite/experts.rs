//! Experts, compared with their definition.

use crate::common::test_model::{Rng, TestModel};
use putri_gguf::forward::{Block, ExpertUse, Forward};
use putri_gguf::model::{BlockWeights, Matrix, Model};
use putri_gguf::prune::{top_by_router_weighted_norm, top_by_weight_norm};

fn product(m: &Matrix, x: &[f64]) -> Vec<f64> {
    let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
    m.data.chunks_exact(m.n_in).map(dot).collect()
}

fn neurons([gate, up]: [&Matrix; 2], x: &[f64]) -> Vec<f64> {
    product(gate, x).iter().zip(product(up, x)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

fn feed_forward([gate, up, down]: [&Matrix; 3], x: &[f64]) -> Vec<f64> {
    product(down, &neurons([gate, up], x))
}

/// Input of the experts for a token's residual stream.
fn normed(mid: &[f32], norm: &[f32], eps: f32) -> Vec<f64> {
    let mean = mid.iter().map(|v| f64::from(v * v)).sum::<f64>() / mid.len() as f64;
    let rms = (mean + f64::from(eps)).sqrt();
    mid.iter().zip(norm).map(|(v, w)| f64::from(v * w) / rms).collect()
}

/// Checks that the tokens that choose each expert are those that go through it.
/// Also checks that the Gram matrix at its `ffn_down` is the sum of the squares of its neurons over these
/// tokens, each with its factor.
fn moments_are_those_of_its_tokens(
    forward: &Forward,
    block: &Block,
    w: &BlockWeights,
    mid: &[f32],
    name: &str,
) {
    let (n_embd, n_ff) = (forward.n_embd(), w.shape.n_ff);
    let e = w.experts.as_ref().unwrap();
    let chosen = forward.choices(block, mid).unwrap();
    let mut used = ExpertUse::new(e.down.len());
    forward.experts(block, mid, &mut vec![0.0; mid.len()], Some(&mut used)).unwrap();
    assert_eq!(chosen.iter().map(Vec::len).collect::<Vec<_>>(), used.n_tokens, "{name}");
    let norm = w.ffn_norm.as_ref().unwrap();
    for (i, tokens) in chosen.iter().enumerate().filter(|(_, tokens)| !tokens.is_empty()) {
        let stream: Vec<f32> =
            tokens.iter().flat_map(|&(t, _)| &mid[t * n_embd..][..n_embd]).copied().collect();
        let scales: Vec<f32> = tokens.iter().map(|&(t, weight)| weight * (1.0 + t as f32)).collect();
        let mut moments = forward.gathering(block, n_ff, 0).unwrap();
        forward.expert_moments(block, i, &stream, &scales, &mut moments).unwrap();
        let moments = moments.finish();
        assert_eq!(moments.n_tokens, tokens.len());
        let mut gram = vec![0.0; n_ff * n_ff];
        for (mid, scale) in stream.chunks_exact(n_embd).zip(&scales) {
            let h = neurons([&e.gate[i], &e.up[i]], &normed(mid, norm, 1e-5));
            for (row, a) in gram.chunks_exact_mut(n_ff).zip(&h) {
                row.iter_mut().zip(&h).for_each(|(sum, b)| *sum += a * b * f64::from(*scale).powi(2));
            }
        }
        let size = (0..n_ff).map(|j| gram[j * n_ff + j]).fold(0.0, f64::max);
        for (j, row) in gram.chunks_exact(n_ff).enumerate() {
            for (k, expected) in row.iter().enumerate().skip(j) {
                let off = (moments.gram.get(j, k) - expected).abs();
                assert!(off < 1e-5 * size, "{name}, expert {i}, {j} {k}: {off} of {size}");
            }
        }
    }
}

#[test]
fn the_heaviest_neurons_have_the_largest_weights() {
    let mut rng = Rng(3);
    for (n_embd, n_ff) in [(3, 5), (8, 40)] {
        let mut matrix = |n_in, n_out| Matrix::new(n_in, n_out, rng.vec(n_in * n_out, 1.0));
        let (gate, up, down) = (matrix(n_embd, n_ff), matrix(n_embd, n_ff), matrix(n_ff, n_embd));
        let norm = |m: &Matrix| m.data.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let size = |j: usize| {
            norm(&gate.select_rows(&[j])) * norm(&up.select_rows(&[j])) * norm(&down.select_cols(&[j]))
        };
        for n in [1, n_ff / 2, n_ff] {
            let kept = top_by_weight_norm(&gate, &up, &down, n);
            let least = kept.iter().map(|&j| size(j)).fold(f64::INFINITY, f64::min);
            assert!(kept.len() == n && kept.is_sorted());
            assert!((0..n_ff).filter(|j| !kept.contains(j)).all(|j| size(j) <= least));
        }
    }
}

#[test]
fn each_token_goes_through_those_it_chooses() {
    const N_CTX: usize = 40;
    for (name, small) in TestModel::mixtures() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.gguf");
        small.write(&path);
        let model = Model::open(&path).unwrap();
        let (h, w) = (&model.hparams, model.block(1).unwrap());
        let forward = Forward::new(&model, N_CTX, 1).unwrap();
        let block = forward.upload(&w).unwrap();
        let mid = Rng(8).vec(N_CTX * h.n_embd, 1.0);
        let n_expert = w.shape.n_expert;
        let (mut out, mut used) = (vec![0.0; mid.len()], ExpertUse::new(n_expert));
        forward.experts(&block, &mid, &mut out, Some(&mut used)).unwrap();

        let e = w.experts.as_ref().unwrap();
        let mut expected = ExpertUse::new(n_expert);
        let norm = w.ffn_norm.as_ref().unwrap();
        let mut off = 0.0f64;
        for (mid, out) in mid.chunks_exact(h.n_embd).zip(out.chunks_exact(h.n_embd)) {
            let x = normed(mid, norm, h.norm_eps);
            let chances: Vec<f64> = product(&e.router, &x).iter().map(|z| z.exp()).collect();
            let sum: f64 = chances.iter().sum();
            let mut chosen: Vec<(f64, usize)> = chances.iter().map(|c| c / sum).zip(0..).collect();
            chosen.sort_by(|a, b| b.0.total_cmp(&a.0));
            chosen.truncate(h.experts.unwrap().n_used);
            if h.family.traits().experts.unwrap().normed {
                let sum: f64 = chosen.iter().map(|c| c.0).sum();
                chosen.iter_mut().for_each(|c| c.0 /= sum);
            }
            let mut added = vec![0.0; h.n_embd];
            for (weight, i) in chosen {
                let y = feed_forward([&e.gate[i], &e.up[i], &e.down[i]], &x);
                expected.energy[i] += weight * y.iter().map(|v| v * v).sum::<f64>().sqrt();
                expected.n_tokens[i] += 1;
                added.iter_mut().zip(y).for_each(|(a, y)| *a += weight * y);
            }
            if let Some(s) = &e.shared {
                let gate = s.scale.as_ref().map_or(1.0, |scale| {
                    let z: f64 = scale.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum();
                    1.0 / (1.0 + (-z).exp())
                });
                let y = feed_forward([&s.gate, &s.up, &s.down], &x);
                added.iter_mut().zip(y).for_each(|(a, y)| *a += gate * y);
            }
            for ((m, a), o) in mid.iter().zip(added).zip(out) {
                off = off.max((f64::from(*m) + f64::from(h.residual_scale) * a - f64::from(*o)).abs());
            }
        }
        println!("{name}: {off:.1e} off");
        assert!(off < 1e-4, "{name}: {off}");
        assert_eq!(used.n_tokens, expected.n_tokens, "{name}");
        for (a, b) in used.energy.iter().zip(&expected.energy) {
            assert!((a - b).abs() < 1e-4 * b.max(1.0), "{name}: {a} {b}");
        }
        moments_are_those_of_its_tokens(&forward, &block, &w, &mid, name);
        for n in [1, n_expert / 2, n_expert] {
            let mean = |i: usize| expected.energy[i] / expected.n_tokens[i].max(1) as f64;
            let kept = top_by_router_weighted_norm(&used.energy, &used.n_tokens, n);
            let least = kept.iter().map(|&i| mean(i)).fold(f64::INFINITY, f64::min);
            let others = (0..n_expert).filter(|i| !kept.contains(i));
            assert!(kept.len() == n && kept.is_sorted());
            assert!(others.map(mean).all(|m| m <= least + 1e-6), "{name}: {kept:?}");
        }
    }
}
