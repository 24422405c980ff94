//! The crate's own forward pass, compared with libllama's on the same file.

use crate::common::test_model::TestModel;
use crate::common::{TEXT, compare_logits, last_stream, libllama_logits, our_logits, smollm2};
use putri_gguf::forward::{Forward, Head};
use putri_gguf::ggml::{LlamaModel, Type, silence_logs};
use putri_gguf::gguf::{GgufFile, Value};
use putri_gguf::model::Model;

fn check_small(name: &str, small: &TestModel) {
    check_window(name, small, 200);
}

fn check_window(name: &str, small: &TestModel, n_tokens: i32) {
    let (max, kl) = compare_window(name, small, n_tokens);
    // libllama keeps K and V in 16 bits; this changes the third digit of the logits (of size about 5).
    assert!(max < 0.06 && kl < 2e-5, "{name}: largest difference {max}, KL divergence {kl}");
}

fn compare_window(name: &str, small: &TestModel, n_tokens: i32) -> (f32, f64) {
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    small.write(&path);
    let tokens: Vec<i32> = (0..n_tokens).map(|i| 3 + (i * 7919) % 250).collect();
    let ours = our_logits(&path, &tokens);
    let theirs = libllama_logits(&path, &tokens);
    let (max, kl) = compare_logits(&theirs, &ours, small.n_vocab);
    println!("{name}: largest difference {max:.2e}, KL divergence {kl:.2e}");
    (max, kl)
}

#[test]
fn small_models_agree_with_libllama() {
    check_small("plain", &TestModel::default());
    check_small("biases", &TestModel { biases: true, ..TestModel::default() });
    check_small("untied", &TestModel { tied: false, ..TestModel::default() });
    check_small("rope_freqs", &TestModel { rope_freqs: true, ..TestModel::default() });
    check_small("mha", &TestModel { blocks: vec![(4, 4, 128); 2], ..TestModel::default() });
    check_small("gqa 6:1", &TestModel { blocks: vec![(6, 1, 64); 2], ..TestModel::default() });
    check_small("fused", &TestModel { fused_qkv: true, biases: true, ..TestModel::default() });
    check_small("head_dim", &TestModel { head_dim: 32, ..TestModel::default() });
}

#[test]
fn rope_scaling_agrees_with_libllama() {
    let with = |ty: &str, more: Vec<(&'static str, Value)>| TestModel {
        extra: [vec![("rope.scaling.type", Value::Str(ty.into()))], more].concat(),
        ..TestModel::default()
    };
    let factor = ("rope.scaling.factor", Value::F32(4.0));
    check_small("linear", &with("linear", vec![factor.clone()]));
    check_small("none", &with("none", vec![factor.clone()]));
    let orig = ("rope.scaling.original_context_length", Value::U32(64));
    check_small("yarn", &with("yarn", vec![factor.clone(), orig]));
    let attn = ("rope.scaling.attn_factor", Value::F32(1.2));
    check_small("attn_factor", &with("linear", vec![factor, attn]));
}

#[test]
fn blocks_of_different_shapes_agree_with_libllama() {
    let blocks = vec![(4, 2, 96), (2, 1, 64), (0, 0, 32), (6, 3, 160), (0, 0, 64)];
    check_small("deci", &TestModel { arch: "deci", blocks, ..TestModel::default() });
    let blocks = vec![(4, 2, 96), (2, 1, 64), (6, 3, 160)];
    check_small("openelm", &TestModel { arch: "openelm", fused_qkv: true, blocks, ..TestModel::default() });
}

#[test]
fn gemma3_agrees_with_libllama() {
    let gemma = TestModel::gemma3();
    let with = |change: Vec<(&'static str, Value)>| TestModel {
        extra: [gemma.extra.clone(), change].concat(),
        ..gemma.clone()
    };
    check_small("gemma3", &gemma);
    // The window is longer than a slice of queries, and has keys that no query of the last slice sees.
    check_window("long", &gemma, 700);
    check_small("untied", &TestModel { tied: false, ..gemma.clone() });
    check_small("no window, no cap", &TestModel { extra: Vec::new(), ..gemma.clone() });
    check_small("biases", &TestModel { biases: true, ..gemma.clone() });
    check_small(
        "head_dim",
        &TestModel { head_dim: 32, n_embd: 64, blocks: vec![(3, 1, 64); 7], ..gemma.clone() },
    );
    let pattern = "attention.sliding_window_pattern";
    check_small(
        "pattern 2",
        &with(vec![(pattern, Value::U32(2)), ("rope.freq_base_swa", Value::F32(500.0))]),
    );
    check_small("every block slides", &with(vec![(pattern, Value::U32(0))]));
    // GGUF type 7 is bool.
    let each = Value::Array { ty: 7, bytes: vec![0, 1, 1, 0, 0, 1, 0], len: 7 };
    check_small("pattern per block", &with(vec![(pattern, each)]));
    let stretched =
        [("rope.scaling.type", Value::Str("linear".into())), ("rope.scaling.factor", Value::F32(8.0))];
    check_small("stretched where it does not slide", &with(stretched.to_vec()));
    let yarn = [("rope.scaling.type", Value::Str("yarn".into())), ("rope.scaling.factor", Value::F32(4.0))];
    check_small("yarn", &with(yarn.to_vec()));
    check_small("scale by width", &TestModel { n_embd: 32, blocks: vec![(4, 2, 32); 62], ..gemma.clone() });
}

#[test]
fn families_of_one_row_agree_with_libllama() {
    for (name, small) in TestModel::variants() {
        check_small(name, &small);
    }
    // These features exist only in models of a certain depth: a scale by width, and a window.
    check_small(
        "gemma2 27B",
        &TestModel { arch: "gemma2", blocks: vec![(4, 2, 32); 46], n_embd: 32, ..TestModel::default() },
    );
    let extra = vec![("attention.sliding_window", Value::U32(24))];
    check_small(
        "exaone4 32B",
        &TestModel { arch: "exaone4", blocks: vec![(4, 2, 32); 64], extra, ..TestModel::default() },
    );
}

#[test]
fn mixtures_of_experts_agree_with_libllama() {
    for (name, small) in TestModel::mixtures() {
        // A token on the border between two experts may choose the other, so single logits say nothing.
        let (_, kl) = compare_window(name, &small, 200);
        assert!(kl < 2e-5, "{name}: KL divergence {kl}");
    }
}

#[test]
fn quantised_weights_agree_with_libllama() {
    for ty in [Type::Q8_0, Type::F16, Type::BF16] {
        // libllama also rounds the activations for quantised kernels: a wider bound.
        silence_logs();
        let small = TestModel { ty, ..TestModel::default() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.gguf");
        small.write(&path);
        let tokens: Vec<i32> = (0..100).map(|i| 3 + (i * 104729) % 250).collect();
        let (max, kl) =
            compare_logits(&libllama_logits(&path, &tokens), &our_logits(&path, &tokens), small.n_vocab);
        println!("{ty}: largest difference {max:.2e}, KL divergence {kl:.2e}");
        assert!(kl < 2e-3, "{ty}: KL divergence {kl}");
    }
}

#[test]
fn smollm2_agrees_with_libllama() {
    silence_logs();
    let path = smollm2();
    let vocab = LlamaModel::load_vocab(&path).unwrap();
    let tokens = vocab.vocab().tokenize(TEXT, false).unwrap();
    let theirs = libllama_logits(&path, &tokens);
    let ours = our_logits(&path, &tokens);
    let (max, kl) = compare_logits(&theirs, &ours, vocab.vocab().n_tokens());
    println!("SmolLM2: largest difference {max:.3}, KL divergence {kl:.2e}");
    // The file is Q4_1: libllama rounds activations to eight bits for it; the crate does not.
    assert!(max < 2.0 && kl < 5e-3, "largest difference {max}, KL divergence {kl}");
}

#[test]
fn smollm2_with_f32_weights_agrees_with_libllama_closely() {
    // With the same weights in floating point, libllama does not round activations. The remaining differences
    // are its 16-bit KV cache and the order of sums.
    silence_logs();
    let source = GgufFile::open(&smollm2()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f32.gguf");
    crate::common::rewrite(&source, &path, |_| true, Some(Type::F32));

    let vocab = LlamaModel::load_vocab(&path).unwrap();
    let tokens = vocab.vocab().tokenize(TEXT, false).unwrap();
    let ours = our_logits(&path, &tokens);
    let (max, kl) = compare_logits(&libllama_logits(&path, &tokens), &ours, vocab.vocab().n_tokens());
    println!("SmolLM2 in F32: largest difference {max:.4}, KL divergence {kl:.2e}");
    assert!(max < 0.1 && kl < 1e-5, "largest difference {max}, KL divergence {kl}");
}

#[test]
fn tokens_are_drawn_as_often_as_libllama_says() {
    const DRAWS: usize = 4000;
    silence_logs();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    TestModel::default().write(&path);
    let tokens: Vec<i32> = (0..20).map(|i| 3 + (i * 7919) % 250).collect();
    let model = Model::open(&path).unwrap();
    let (forward, x) = last_stream(&model, &tokens, 1, |il| model.block(il).unwrap());
    let (head, theirs) = (forward.head(&model).unwrap(), libllama_logits(&path, &tokens));
    let at: Vec<f64> = (0..DRAWS).map(|i| (i as f64 + 0.5) / DRAWS as f64).collect();
    for (row, logits) in x.chunks_exact(forward.n_embd()).zip(theirs.chunks_exact(head.n_vocab())) {
        let drawn = forward.draw(&head, &row.repeat(DRAWS), &at).unwrap();
        let sum: f64 = logits.iter().map(|v| f64::from(*v).exp()).sum();
        for (token, logit) in logits.iter().enumerate() {
            let expected = f64::from(*logit).exp() / sum * DRAWS as f64;
            let found = drawn.iter().filter(|t| **t as usize == token).count() as f64;
            // libllama's logits come from K and V in 16 bits.
            assert!((found - expected).abs() < 1.5 + 0.02 * expected, "{token}: {found} {expected}");
        }
    }
}

#[test]
fn a_head_of_some_tokens_has_their_logits() {
    for small in
        [TestModel::default(), TestModel { tied: false, ..TestModel::default() }, TestModel::gemma3()]
    {
        check_head_of_some(&small);
    }
}

fn check_head_of_some(small: &TestModel) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.gguf");
    small.write(&path);
    let tokens: Vec<i32> = (0..20).map(|i| 3 + (i * 7919) % 250).collect();
    let model = Model::open(&path).unwrap();
    let (forward, x) = last_stream(&model, &tokens, 1, |il| model.block(il).unwrap());
    let logits = |forward: &Forward, head: &Head| {
        let mut all = Vec::new();
        forward.logits(head, &x, |_, rows| all.extend_from_slice(rows)).unwrap();
        all
    };
    let whole = forward.head(&model).unwrap();
    let all = logits(&forward, &whole);
    for some in [vec![0u32], vec![7, 3, 200], (0..whole.n_vocab() as u32).collect()] {
        let part = forward.head_of(&model, &some).unwrap();
        let found = logits(&forward, &part);
        let expected =
            all.chunks_exact(whole.n_vocab()).flat_map(|row| some.iter().map(|&t| row[t as usize]));
        assert_eq!(part.n_vocab(), some.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5 * (1.0 + expected.abs()), "{found} {expected}");
        }
    }
}
