//! Gradients, compared with finite differences of the forward pass.

use crate::common::test_model::{Rng, TestModel};
use putri_gguf::forward::{BlockGradient, BlockOutputs, Forward, Head, MatrixGradient, OnTheWay};
use putri_gguf::ggml::Token;
use putri_gguf::model::{BlockMatrix, BlockVector, BlockWeights, Matrix, Model};
use std::sync::Arc;

const N_CTX: usize = 40;
const N_WINDOWS: usize = 3;

/// Small model, the reference that it is compared with, and some windows.
struct Setting {
    forward: Forward,
    model: Model,
    blocks: Vec<BlockWeights>,
    tokens: Vec<Token>,
    /// Final residual stream of the reference.
    dense: Vec<f32>,
    /// Tokens that losses cover, if not all.
    among: Option<Vec<u32>>,
}

impl Setting {
    fn new(small: &TestModel) -> Setting {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.gguf");
        small.write(&path);
        let model = Model::open(&path).unwrap();
        let forward = Forward::new(&model, N_CTX, 1).unwrap();
        let tokens: Vec<Token> = (0..N_WINDOWS * N_CTX).map(|i| 3 + (i * i * 7919 % 250) as i32).collect();
        let blocks: Vec<_> = (0..model.hparams.n_layer()).map(|il| model.block(il).unwrap()).collect();
        let mut s = Setting { forward, model, blocks, tokens, dense: Vec::new(), among: None };
        s.dense = s.streams().pop().unwrap();
        // At the reference itself, the gradient would be 0.
        let mut rng = Rng(5);
        for w in &mut s.blocks {
            for matrix in [&mut w.ffn_down, &mut w.attn_output] {
                Arc::make_mut(&mut matrix.data).iter_mut().for_each(|v| *v += 0.05 * rng.uniform());
            }
        }
        s
    }

    /// Residual stream before each block and after the last.
    fn streams(&mut self) -> Vec<Vec<f32>> {
        let mut streams = vec![self.forward.embed(&self.model, &self.tokens).unwrap()];
        for w in &self.blocks {
            let block = self.forward.upload(w).unwrap();
            let x = &streams[streams.len() - 1];
            let mut y = vec![0.0; x.len()];
            self.forward.stream(&block, x, &mut y).unwrap();
            streams.push(y);
        }
        streams
    }

    fn head(&self) -> Head {
        match &self.among {
            Some(tokens) => self.forward.head_of(&self.model, tokens).unwrap(),
            None => self.forward.head(&self.model).unwrap(),
        }
    }

    /// Σ KL(reference ‖ own) over all positions, in 64-bit floats from the logits on.
    fn loss(&mut self) -> f64 {
        let head = self.head();
        let n_vocab = head.n_vocab();
        let own = self.streams().pop().unwrap();
        let [p, q] = [&self.dense, &own].map(|x| {
            let mut out = Vec::new();
            self.forward.logits(&head, x, |_, rows| out.extend_from_slice(rows)).unwrap();
            out
        });
        let rows = p.chunks_exact(n_vocab).zip(q.chunks_exact(n_vocab));
        rows.map(|(p, q)| kl(&log_softmax(p), &log_softmax(q))).sum()
    }

    fn gradients(&mut self) -> Vec<(BlockGradient, MatrixGradient)> {
        let streams = self.streams();
        let own_head = self.head();
        let dense_head = self.among.is_some().then(|| self.head());
        let last = &streams[self.blocks.len()];
        let grad = self.forward.divergence_gradient(&own_head, dense_head.as_ref(), last, &self.dense);
        let mut grad = grad.unwrap();
        let mut all = vec![(BlockGradient::default(), MatrixGradient::default()); self.blocks.len()];
        for (il, w) in self.blocks.iter().enumerate().rev() {
            let block = self.forward.upload(w).unwrap();
            let (vectors, matrices) = &mut all[il];
            let found = OnTheWay { vectors: Some(vectors), matrices: Some(matrices), groups: None };
            self.forward.block_gradient(&block, &streams[il], &mut grad, found).unwrap();
        }
        all
    }
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
    row.iter().map(|v| f64::from(*v) - sum.ln()).collect()
}

/// KL divergence between logarithms of probabilities.
fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

fn check(name: &str, small: &TestModel) {
    check_setting(name, Setting::new(small));
}

fn check_setting(name: &str, mut s: Setting) {
    let gradients = s.gradients();
    let mut rng = Rng(9);
    for (il, (vectors, matrices)) in gradients.iter().enumerate() {
        for (v, found) in BlockVector::ALL.into_iter().zip(vectors) {
            let Some(at) = s.blocks[il].vector(v).map(<[f32]>::to_vec) else {
                continue;
            };
            if v.of_attention() && s.blocks[il].shape.n_head_kv == 0 {
                continue;
            }
            let what = format!("{name}, block {il}, {v:?}");
            check_slope(&what, &mut s, &at, found, &mut rng, |s, new| s.blocks[il].set_vector(v, new));
        }
        for (m, found) in BlockMatrix::ALL.into_iter().zip(matrices) {
            let Some(old) = s.blocks[il].clone().take_matrix(m) else {
                assert!(found.is_empty(), "{name}, block {il}, {m:?}");
                continue;
            };
            let what = format!("{name}, block {il}, {m:?}");
            check_slope(&what, &mut s, &old.data, found, &mut rng, |s, new| {
                s.blocks[il].set_matrix(m, Matrix::new(old.n_in, old.n_out, new));
            });
        }
    }
}

/// Checks that the loss changes along a random direction from `at` as the gradient `found` says. `set` sets
/// other values.
fn check_slope(
    what: &str,
    s: &mut Setting,
    at: &[f32],
    found: &[f32],
    rng: &mut Rng,
    set: impl Fn(&mut Setting, Vec<f32>),
) {
    assert_eq!(found.len(), at.len(), "{what}");
    let direction = rng.vec(at.len(), 1.0);
    let derived: f64 = found.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
    let norm = |v: &[f32]| v.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
    // Rounding would hide smaller steps.
    let h = (0.05 * norm(at)).max(0.1) / norm(&direction);
    let mut loss_at = |by: f64| {
        let moved = at.iter().zip(&direction).map(|(v, d)| v + by as f32 * d).collect();
        set(s, moved);
        s.loss()
    };
    let mut slope = |h: f64| (loss_at(h) - loss_at(-h)) / (2.0 * h);
    let (measured, wider) = (slope(h), slope(2.0 * h));
    set(s, at.to_vec());
    // Typical derivative along a random direction.
    let typical = norm(found) * norm(&direction) / (found.len() as f64).sqrt();
    println!("{what}: {measured:.5} measured, {derived:.5} derived");
    // The difference between two step sizes is rounding or curvature of the loss.
    let off = (measured - derived).abs() - (measured - wider).abs();
    assert!(typical > 0.0 && off < 0.02 * typical.max(derived.abs()), "{what}: {off}");
}

/// Checks the worth of groups against blocks without them.
/// The FFNs are set to 0, so that only the gradient after the block reaches attention.
fn check_groups(name: &str, small: &TestModel) {
    let mut s = Setting::new(small);
    let n_embd = small.n_embd;
    let streams = s.streams();
    let mut rng = Rng(11);
    for (il, (w, x)) in s.blocks.iter_mut().zip(&streams).enumerate() {
        Arc::make_mut(&mut w.ffn_down.data).fill(0.0);
        let (block, grad) = (s.forward.upload(w).unwrap(), rng.vec(x.len(), 1.0));
        let mut groups = Vec::new();
        let found = OnTheWay { groups: Some(&mut groups), ..OnTheWay::default() };
        s.forward.block_gradient(&block, x, &mut grad.clone(), found).unwrap();

        let n_kv = w.shape.n_head_kv;
        assert_eq!(groups.len(), s.tokens.len() * n_kv, "{name}, block {il}");
        let heads = s.forward.attn_out_input(&block, x, None).unwrap();
        let row = heads.len() / s.tokens.len();
        let out_of = |heads: &[f32]| {
            let mut out = vec![0.0; x.len()];
            let wanted = BlockOutputs { out: Some(&mut out), ..BlockOutputs::default() };
            s.forward.from_attn_out_input(&block, x, heads, wanted).unwrap();
            out
        };
        let whole = if n_kv > 0 { out_of(&heads) } else { Vec::new() };
        let size = (groups.iter().map(|v| v * v).sum::<f32>() / groups.len().max(1) as f32).sqrt();
        for group in 0..n_kv {
            let mut others = heads.clone();
            let width = row / n_kv;
            others.chunks_exact_mut(row).for_each(|r| r[group * width..][..width].fill(0.0));
            let without = out_of(&others);
            let tokens = grad.chunks(n_embd).zip(whole.chunks(n_embd).zip(without.chunks(n_embd)));
            for (i, (grad, (whole, without))) in tokens.enumerate() {
                let lost = grad.iter().zip(whole.iter().zip(without)).map(|(g, (a, b))| g * (a - b));
                let (expected, found) = (lost.sum::<f32>(), groups[i * n_kv + group]);
                let off = (expected - found).abs();
                assert!(
                    off < 1e-3 * size,
                    "{name}, block {il}, group {group}, token {i}: {found} {expected}"
                );
            }
        }
    }
}

#[test]
fn groups_are_worth_what_is_missing_without_them() {
    let blocks = vec![(4, 2, 96), (2, 1, 64), (0, 0, 32), (6, 3, 160)];
    check_groups("deci", &TestModel { arch: "deci", blocks, ..TestModel::default() });
    check_groups("gemma3", &TestModel::gemma3());
    let many =
        TestModel { arch: "gemma2", head_dim: 8, blocks: vec![(120, 120, 64)], ..TestModel::default() };
    check_groups("many groups", &many);
    for (name, small) in TestModel::variants() {
        check_groups(name, &small);
    }
}

#[test]
fn llama_blocks() {
    check("plain", &TestModel::default());
    check("biases, untied", &TestModel { biases: true, tied: false, ..TestModel::default() });
    check("rope_freqs", &TestModel { rope_freqs: true, ..TestModel::default() });
    check("gqa 6:1", &TestModel { blocks: vec![(6, 1, 64); 2], ..TestModel::default() });
}

#[test]
fn uneven_blocks() {
    let blocks = vec![(4, 2, 96), (2, 1, 64), (0, 0, 32), (6, 3, 160)];
    check("deci", &TestModel { arch: "deci", blocks, ..TestModel::default() });
}

#[test]
fn families_of_one_row() {
    for (name, small) in TestModel::variants() {
        check(name, &small);
    }
}

#[test]
fn losses_among_some_tokens() {
    for small in
        [TestModel::default(), TestModel { tied: false, ..TestModel::default() }, TestModel::gemma3()]
    {
        let s = Setting::new(&small);
        check_setting(small.arch, Setting { among: Some(vec![3, 200, 17, 90, 91]), ..s });
    }
}

#[test]
fn gemma3_blocks() {
    check("gemma3", &TestModel::gemma3());
}

/// Checks that KL(p(x) ‖ p(x + h d)) = ½ h² dᵀ F d for a small step h, with F estimated from curvature
/// samples.
#[test]
fn curvature_samples_are_the_curvature_of_the_divergence() {
    const SAMPLES: usize = 6000;
    for small in
        [TestModel::default(), TestModel { tied: false, ..TestModel::default() }, TestModel::gemma3()]
    {
        let mut s = Setting::new(&small);
        let n_embd = small.n_embd;
        let last = s.streams().pop().unwrap();
        let head = s.forward.head(&s.model).unwrap();
        let n_vocab = head.n_vocab();
        let mut rng = Rng(3);
        for position in [0, N_CTX / 2] {
            let x = &last[position * n_embd..][..n_embd];
            let many = x.repeat(SAMPLES);
            let samples = s.forward.curvature_sample(&head, &many, || rng.next_u64()).unwrap();
            for _ in 0..3 {
                let d = rng.vec(n_embd, 1.0);
                let dot = |g: &[f32]| g.iter().zip(&d).map(|(g, d)| f64::from(g * d)).sum::<f64>();
                let sum: f64 = samples.chunks_exact(n_embd).map(|g| dot(g).powi(2)).sum();
                let sampled = sum / SAMPLES as f64;
                let size = |v: &[f32]| v.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
                let h = 0.02 * size(x) / size(&d);
                let step = |h: f64| x.iter().zip(&d).map(|(x, d)| x + h as f32 * d).collect::<Vec<_>>();
                let mut rows = Vec::new();
                let streams = [x.to_vec(), step(h), step(-h)].concat();
                s.forward.logits(&head, &streams, |_, logits| rows.extend_from_slice(logits)).unwrap();
                let [p, plus, minus] = std::array::from_fn(|i| log_softmax(&rows[i * n_vocab..][..n_vocab]));
                let measured = (kl(&p, &plus) + kl(&p, &minus)) / (h * h);
                println!("{}, {position}: {measured:.6} measured, {sampled:.6} sampled", small.arch);
                // A mean of 6000 squares is usually off by 2 %.
                assert!((measured - sampled).abs() < 0.1 * measured, "{}", small.arch);
            }
        }
    }
}
