//! Experts against their definition.

mod common;

use common::small::{Rng, Small};
use putri_gguf::forward::{ExpertUse, Forward};
use putri_gguf::model::{Matrix, Model};
use putri_gguf::prune::busiest;

fn product(m: &Matrix, x: &[f64]) -> Vec<f64> {
    let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
    m.data.chunks_exact(m.n_in).map(dot).collect()
}

fn feed_forward([gate, up, down]: [&Matrix; 3], x: &[f64]) -> Vec<f64> {
    let h: Vec<f64> =
        product(gate, x).iter().zip(product(up, x)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    product(down, &h)
}

#[test]
fn each_token_goes_through_those_it_chooses() {
    const N_CTX: usize = 40;
    for (name, small) in Small::mixtures() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.gguf");
        small.write(&path);
        let model = Model::open(&path).unwrap();
        let (h, w) = (&model.hparams, model.block(1).unwrap());
        let mut forward = Forward::new(&model, N_CTX, 1).unwrap();
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
            let mean = mid.iter().map(|v| f64::from(v * v)).sum::<f64>() / h.n_embd as f64;
            let rms = (mean + f64::from(h.norm_eps)).sqrt();
            let x: Vec<f64> = mid.iter().zip(norm).map(|(v, w)| f64::from(v * w) / rms).collect();
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
        for n in [1, n_expert / 2, n_expert] {
            let mean = |i: usize| expected.energy[i] / expected.n_tokens[i].max(1) as f64;
            let kept = busiest(&used.energy, &used.n_tokens, n);
            let least = kept.iter().map(|&i| mean(i)).fold(f64::INFINITY, f64::min);
            let others = (0..n_expert).filter(|i| !kept.contains(i));
            assert!(kept.len() == n && kept.is_sorted());
            assert!(others.map(mean).all(|m| m <= least + 1e-6), "{name}: {kept:?}");
        }
    }
}
