//! Importance matrix of a pruned model.

use crate::common::Silent;
use crate::common::cli::Cli;
use crate::common::test_model::{Rng, TestModel};
use putri_gguf::calibrate::Windows;
use putri_gguf::forward::{BlockOutputs, Collect, Forward};
use putri_gguf::ggml::{Type, silence_logs};
use putri_gguf::gguf::{GgufFile, Value};
use putri_gguf::model::Model;
use putri_gguf::pipeline::{Plan, Settings, input_squares};

/// Σ (x / rms(x) · w)² over the rows of `x`.
fn normed_squares(x: &[f32], w: &[f32], eps: f64) -> Vec<f64> {
    let mut sums = vec![0.0; w.len()];
    for row in x.chunks_exact(w.len().max(1)) {
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / w.len() as f64;
        for ((s, v), w) in sums.iter_mut().zip(row).zip(w) {
            *s += f64::from(*v).powi(2) / (mean + eps) * f64::from(*w).powi(2);
        }
    }
    sums
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-3 * (1e-6 + b.abs()), "{a} {b}");
    }
}

#[test]
fn squares_are_those_of_the_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let blocks = vec![(4, 2, 96), (0, 0, 64), (2, 1, 64)];
    TestModel { arch: "deci", blocks, biases: true, ..TestModel::default() }.write(&path);
    let model = Model::open(&path).unwrap();
    let mut rng = Rng(5);
    let (n_ctx, n_fit) = (24, 3);
    let tokens: Vec<i32> = (0..n_ctx * (n_fit + 1)).map(|_| 3 + (rng.next_u64() % 250) as i32).collect();
    let windows = Windows { n_ctx, tokens, n_fit, n_held_out: 1, n_self: 0 };
    let s = Settings::default();
    let got = input_squares(&model, &Plan::whole(&model), &windows, &s, &mut Silent).unwrap();

    let forward = Forward::new(&model, n_ctx, 1).unwrap();
    let mut x = forward.embed(&model, windows.tokens_of(0..n_fit)).unwrap();
    let eps = f64::from(model.hparams.norm_eps);
    for (il, got) in got.iter().enumerate() {
        let w = model.block(il).unwrap();
        let block = forward.upload(&w).unwrap();
        close(&got.qkv, &normed_squares(&x, w.attn_norm.as_deref().unwrap_or_default(), eps));
        // These are the diagonals of the Gram matrices that pruning collects.
        let scales = vec![1.0; n_ctx * n_fit];
        let [mut at_heads, mut at_neurons] =
            [w.attn_output.n_in, w.ffn_down.n_in].map(|n| forward.gathering(&block, n, 0).unwrap());
        let collect = Collect { target: None, scales: &scales, into: &mut at_heads };
        let heads = forward.attn_out_input(&block, &x, Some(collect)).unwrap();
        let (mut mid, mut out) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        let collect = Collect { target: None, scales: &scales, into: &mut at_neurons };
        let wanted = BlockOutputs { mid: Some(&mut mid), out: Some(&mut out), moments: Some(collect) };
        forward.from_attn_out_input(&block, &x, &heads, wanted).unwrap();
        close(&got.attn_output, &at_heads.finish().gram.diagonal());
        close(&got.ffn, &normed_squares(&mid, w.ffn_norm.as_ref().unwrap(), eps));
        close(&got.ffn_down, &at_neurons.finish().gram.diagonal());
        x = out;
    }
}

#[test]
fn it_is_written_beside_the_model_in_its_shapes() {
    silence_logs();
    let cli = Cli::new();
    for (arch, fused_qkv) in [("llama", false), ("llama", true), ("qwen3", false)] {
        let small = TestModel {
            arch,
            ty: Type::Q4_0,
            blocks: vec![(4, 2, 256); 3],
            fused_qkv,
            ..TestModel::default()
        };
        small.write(&cli.path("in.gguf"));
        let args = ["in.gguf", "out.gguf", "--sparsity", "0.4", "--imatrix-out", "imatrix.gguf", "--force"];
        cli.ok(&[&args[..], &["--ctx-size", "64", "--chunks", "8", "--threads", "1"]].concat());
        let (model, imatrix) = (
            GgufFile::open(&cli.path("out.gguf")).unwrap(),
            GgufFile::open(&cli.path("imatrix.gguf")).unwrap(),
        );
        assert_eq!(imatrix.get("general.type"), Some(&Value::Str("imatrix".into())));
        assert_eq!(imatrix.get("imatrix.chunk_count"), Some(&Value::U32(8)));
        assert_eq!(imatrix.get("imatrix.chunk_size"), Some(&Value::U32(64)));
        let matrices: Vec<_> =
            model.tensors().iter().filter(|t| t.name.starts_with("blk.") && t.ne.len() == 2).collect();
        assert_eq!(imatrix.tensors().len(), 2 * matrices.len());
        for m in matrices {
            let sums = imatrix.find(&format!("{}.in_sum2", m.name)).unwrap();
            assert_eq!((sums.ty, sums.n_elements()), (Type::F32, m.ne[0]), "{}", m.name);
            let values = imatrix.floats(sums, 0..1).unwrap();
            assert!(values.iter().all(|v| v.is_finite() && *v > 0.0), "{}", m.name);
            let counts = imatrix.find(&format!("{}.counts", m.name)).unwrap();
            assert_eq!(imatrix.floats(counts, 0..1).unwrap(), [512.0]);
        }
    }
}

#[test]
fn its_name_is_checked_before_anything_costs_time() {
    let cli = Cli::new();
    TestModel::default().write(&cli.path("in.gguf"));
    std::fs::write(cli.path("there.gguf"), "x").unwrap();
    let try_name = |name: &str, parts: &[&str]| {
        let before = cli.listing();
        cli.fails(&["in.gguf", "out.gguf", "--sparsity", "0.3", "--imatrix-out", name], 1, parts);
        assert_eq!(cli.listing(), before);
    };
    try_name("in.gguf", &["in.gguf", "input"]);
    try_name("out.gguf", &["out.gguf", "is two outputs"]);
    try_name("./out.gguf", &["out.gguf", "is two outputs"]);
    try_name("there.gguf", &["there.gguf", "--force"]);
    try_name("nowhere/i.gguf", &["nowhere"]);
}
