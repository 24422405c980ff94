//! Moments of a map with a norm between it and the residual stream.

use crate::common::test_model::{Rng, TestModel};
use putri_gguf::forward::{BlockOutputs, Collect, Forward};
use putri_gguf::model::{BlockWeights, Matrix, Model};
use putri_gguf::numeric::Moments;
use putri_gguf::prune::refit;

const N_CTX: usize = 128;
const N_WINDOWS: usize = 4;

/// Block of a small Gemma 3, its forward pass, its input, and a factor per token.
struct Setting {
    forward: Forward,
    w: BlockWeights,
    x: Vec<f32>,
    scales: Vec<f32>,
}

impl Setting {
    fn new() -> Setting {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.gguf");
        TestModel::gemma3().write(&path);
        let model = Model::open(&path).unwrap();
        let forward = Forward::new(&model, N_CTX, 1).unwrap();
        let tokens: Vec<i32> = (0..N_WINDOWS * N_CTX).map(|i| 3 + (i * i * 7919 % 250) as i32).collect();
        let x = forward.embed(&model, &tokens).unwrap();
        let scales = (0..tokens.len()).map(|i| 0.5 + (i % 5) as f32 / 4.0).collect();
        Setting { forward, w: model.block(1).unwrap(), x, scales }
    }

    /// Residual stream in the middle of block `w` and after it.
    fn run(&mut self, w: &BlockWeights) -> [Vec<f32>; 2] {
        let block = self.forward.upload(w).unwrap();
        let (mut mid, mut out) = (vec![0.0; self.x.len()], vec![0.0; self.x.len()]);
        self.forward.block(&block, &self.x, Some(&mut mid), &mut out).unwrap();
        [mid, out]
    }
}

/// Copy of `m` with every value changed by up to `by`.
fn perturbed(m: &Matrix, by: f32) -> Matrix {
    let noise = Rng(11).vec(m.data.len(), by);
    Matrix::new(m.n_in, m.n_out, m.data.iter().zip(noise).map(|(v, n)| v + n).collect())
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn moments_are_those_of_the_map() {
    let mut s = Setting::new();
    let n_embd = s.forward.n_embd();
    let block = s.forward.upload(&s.w).unwrap();
    let map = s.w.attn_output.clone();
    let target: Vec<f32> = s.x.iter().enumerate().map(|(i, v)| v + (i % 7) as f32 / 3.0).collect();
    let mut found = s.forward.gathering(&block, map.n_in, map.n_out).unwrap();
    let collect = Collect { target: Some(&target), scales: &s.scales, into: &mut found };
    let a = s.forward.attn_out_input(&block, &s.x, Some(collect)).unwrap();
    let found = found.finish();

    let w = s.w.clone();
    let [own, _] = s.run(&w);
    let g = w.attn_post_norm.unwrap();
    let ridge = 0.01 * g.iter().map(|g| g * g).sum::<f32>() / g.len() as f32;
    let mut expected = Moments::new(map.n_in, map.n_out);
    for (t, a) in a.chunks_exact(map.n_in).enumerate() {
        let y = map.data.chunks_exact(map.n_in).map(|row| row.iter().zip(a).map(|(w, a)| w * a).sum::<f32>());
        let rms = (y.map(|y| y * y).sum::<f32>() / n_embd as f32 + 1e-5).sqrt();
        let scale = s.scales[t] / rms;
        let x: Vec<f32> = a.iter().map(|a| a * scale).collect();
        let i = t * n_embd..(t + 1) * n_embd;
        let errors = target[i.clone()].iter().zip(&own[i]).zip(&g);
        let r: Vec<f32> = errors.map(|((t, o), g)| (t - o) * rms * g / (g * g + ridge) * scale).collect();
        for (i, row) in expected.gram.rows_mut().into_iter().enumerate() {
            row.iter_mut().zip(&x[i..]).for_each(|(sum, xj)| *sum += f64::from(x[i] * xj));
        }
        for (row, r) in expected.cross.chunks_exact_mut(map.n_in).zip(&r) {
            row.iter_mut().zip(&x).for_each(|(sum, x)| *sum += f64::from(r * x));
        }
        let weighted = |v: &[f32]| v.iter().map(|v| v * scale).collect::<Vec<_>>();
        expected.add_sums(&weighted(&x), &weighted(&r), f64::from(scale).powi(2));
    }
    let close = |name: &str, found: &[f64], expected: &[f64]| {
        let size = expected.iter().map(|v| v * v).sum::<f64>().sqrt();
        let off = found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        println!("{name}: {:.1e} of {size:.3}", off / size);
        assert!(off < 1e-5 * size, "{name} is off by {off} of {size}");
    };
    for i in 0..map.n_in {
        close("gram", found.gram.row(i), expected.gram.row(i));
    }
    close("cross", &found.cross, &expected.cross);
    close("x", &found.x, &expected.x);
    close("r", &found.r, &expected.r);
    close("weight", &[found.weight], &[expected.weight]);
}

#[test]
fn refitting_brings_the_stream_to_its_target() {
    let mut s = Setting::new();
    let w = s.w.clone();
    let all = |m: &Matrix| (0..m.n_in).collect::<Vec<_>>();

    let moved = BlockWeights { attn_output: perturbed(&w.attn_output, 0.05), ..w.clone() };
    let ([before, _], [target, _]) = (s.run(&w), s.run(&moved));
    let block = s.forward.upload(&w).unwrap();
    let mut moments = s.forward.gathering(&block, w.attn_output.n_in, w.attn_output.n_out).unwrap();
    let collect = Collect { target: Some(&target), scales: &s.scales, into: &mut moments };
    s.forward.attn_out_input(&block, &s.x, Some(collect)).unwrap();
    let new = refit(&w.attn_output, &moments.finish(), 1.0, &all(&w.attn_output), 1e-6).unwrap().weights;
    let [after, _] = s.run(&BlockWeights { attn_output: new, ..w.clone() });
    let left = distance(&after, &target) / distance(&before, &target);
    println!("attn_output: {left:.3} of the error is left");
    assert!(left < 0.1, "{left} of the error is left");

    let moved = BlockWeights { ffn_down: perturbed(&w.ffn_down, 0.05), ..w.clone() };
    let ([_, before], [_, target]) = (s.run(&w), s.run(&moved));
    let mut moments = s.forward.gathering(&block, w.ffn_down.n_in, w.ffn_down.n_out).unwrap();
    let heads = s.forward.attn_out_input(&block, &s.x, None).unwrap();
    let collect = Collect { target: Some(&target), scales: &s.scales, into: &mut moments };
    let wanted = BlockOutputs { moments: Some(collect), ..BlockOutputs::default() };
    s.forward.from_attn_out_input(&block, &s.x, &heads, wanted).unwrap();
    let new = refit(&w.ffn_down, &moments.finish(), 1.0, &all(&w.ffn_down), 1e-6).unwrap().weights;
    let [_, after] = s.run(&BlockWeights { ffn_down: new, ..w });
    let left = distance(&after, &target) / distance(&before, &target);
    println!("ffn_down: {left:.3} of the error is left");
    assert!(left < 0.1, "{left} of the error is left");
}
