//! Degenerate numbers: activations without variance, too few tokens, weights out of range.
//!
//! The result is finite, and llama.cpp agrees with the prediction of the crate's own forward pass, or there
//! is no result and one line gives the reason.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::{Type, silence_logs};
use putri_gguf::gguf::{GgufFile, OutTensor, TensorData, write_gguf};
use std::borrow::Cow;

/// Writes `small` with the values of its tensors changed in place by `change`.
fn write(cli: &Cli, small: &TestModel, change: impl Fn(&str, &[usize], &mut Vec<f32>)) {
    let tensors = small.tensors().into_iter().map(|(name, ty, ne, mut values)| {
        change(&name, &ne, &mut values);
        let bytes = ty.quantize(&values, ne[0], None).unwrap();
        OutTensor { name, ty, ne, data: TensorData::made(move || Ok(Cow::Owned(bytes.clone()))) }
    });
    let tensors: Vec<OutTensor> = tensors.collect();
    let path = cli.path("in.gguf");
    write_gguf(&mut std::fs::File::create(&path).unwrap(), &path, &small.metadata(), &tensors).unwrap();
}

/// Prunes the model; the command itself verifies the result, which must hold finite numbers.
fn prunes(cli: &Cli, name: &str, args: &[&str]) -> String {
    let common = ["in.gguf", "out.gguf", "--force", "--sparsity", "0.4", "-t", "1", "-q"];
    let said = cli.ok(&[&common[..], args].concat());
    let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
    for t in out.tensors() {
        let floats = out.floats(t, 0..t.n_rows()).unwrap();
        assert!(floats.iter().all(|v| v.abs() < 1e6), "{name}: {}", t.name);
    }
    let notes: Vec<&str> = said.lines().filter(|l| l.starts_with("note:")).collect();
    println!("{name}: {notes:?}");
    said
}

const SHORT: [&str; 4] = ["-c", "64", "--chunks", "8"];

#[test]
fn neurons_that_never_fire() {
    silence_logs();
    let cli = Cli::new();
    let small = TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() };
    // The affected neurons are some of a block, all of a block, and all of all blocks.
    let dead = |share: usize, block: &'static str| {
        move |name: &str, ne: &[usize], values: &mut Vec<f32>| {
            if name.contains("ffn_gate") && name.contains(block) {
                let n = ne[1] * share / 100 * ne[0];
                values[..n].fill(0.0);
            }
        }
    };
    for (name, share, block) in
        [("half are dead", 50, "blk"), ("a block is dead", 100, "blk.1."), ("all are dead", 100, "blk")]
    {
        write(&cli, &small, dead(share, block));
        prunes(&cli, name, &SHORT);
    }
}

#[test]
fn heads_that_say_nothing() {
    silence_logs();
    let cli = Cli::new();
    let small = TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() };
    for part in ["attn_v", "attn_output", "attn_q"] {
        write(&cli, &small, |name, _, values| {
            if name.contains(part) {
                values.fill(0.0);
            }
        });
        prunes(&cli, part, &SHORT);
    }
}

#[test]
fn activations_that_do_not_vary() {
    silence_logs();
    let cli = Cli::new();
    let small = TestModel { blocks: vec![(4, 2, 256); 3], tied: false, ..TestModel::default() };
    // All tokens have the same embedding, so that the residual stream is the same everywhere.
    write(&cli, &small, |name, ne, values| {
        if name.contains("token_embd") {
            let first = values[..ne[0]].to_vec();
            values.chunks_exact_mut(ne[0]).for_each(|row| row.copy_from_slice(&first));
        }
    });
    prunes(&cli, "one embedding", &SHORT);
    // The text consists of one letter.
    small.write(&cli.path("in.gguf"));
    std::fs::write(cli.path("a.txt"), "a".repeat(4000)).unwrap();
    let text = ["-f", "a.txt", "--self-share", "0"];
    prunes(&cli, "one token", &[&SHORT[..], &text].concat());
    // The residual stream is 0.
    write(&cli, &small, |name, _, values| {
        if name.contains("token_embd") {
            values.fill(0.0);
        }
    });
    let said = prunes(&cli, "nothing", &SHORT);
    assert!(said.contains("block 1, ffn_down: its inputs do not vary"), "{said}");
}

#[test]
fn fewer_tokens_than_neurons() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 512); 3], ..TestModel::default() }.write(&cli.path("in.gguf"));
    for (name, args) in [
        ("16 tokens", ["-c", "16", "--chunks", "1"]),
        ("64 tokens", ["-c", "32", "--chunks", "2"]),
        ("as many as neurons", ["-c", "64", "--chunks", "8"]),
    ] {
        let said = prunes(&cli, name, &args);
        assert!(said.contains("perplexity"), "{said}");
    }
}

#[test]
fn weights_at_the_ends_of_their_range() {
    silence_logs();
    let cli = Cli::new();
    let small = TestModel { ty: Type::F16, blocks: vec![(4, 2, 256); 3], ..TestModel::default() };
    // Half precision just holds some of these scales, and rounds others to 0.
    for (name, factor) in [("large", 2e3f32), ("tiny", 1e-7)] {
        write(&cli, &small, |tensor, _, values| {
            if tensor.contains("ffn_down") {
                values.iter_mut().for_each(|v| *v *= factor);
            }
        });
        prunes(&cli, name, &SHORT);
    }
    // One neuron has such large activations that its map is not representable in half precision once it
    // compensates for others.
    write(&cli, &small, |tensor, ne, values| {
        if tensor.contains("ffn_down") {
            values.chunks_exact_mut(ne[0]).for_each(|row| row[0] = 6e4);
        }
        if tensor.contains("ffn_up") {
            values[..ne[0]].iter_mut().for_each(|v| *v *= 1e-4);
        }
    });
    let args = ["in.gguf", "out.gguf", "--force", "--sparsity", "0.4", "-t", "1", "-q"];
    let out = cli.run(&[&args[..], &SHORT].concat());
    let stderr = String::from_utf8_lossy(&out.stderr);
    println!("half precision: {:?} {stderr}", out.status.code());
    assert!(
        out.status.success() || (out.status.code() == Some(1) && stderr.lines().count() == 1),
        "{stderr}"
    );
}

#[test]
fn a_bad_result_says_so() {
    silence_logs();
    let cli = Cli::new();
    TestModel { blocks: vec![(4, 2, 256); 3], ..TestModel::default() }.write(&cli.path("in.gguf"));
    let args = ["in.gguf", "out.gguf", "--sparsity", "0.8", "-c", "64", "--chunks", "8", "-t", "1", "-q"];
    let said = cli.ok(&args);
    assert!(said.contains("note: 80 % pruned without training afterwards"), "{said}");
}
