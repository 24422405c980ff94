//! Models that are split into several files.

use crate::common::cli::Cli;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::{LlamaModel, Type, silence_logs};
use putri_gguf::gguf::{GgufFile, OutTensor, Value, write_gguf};

const N_PARTS: usize = 3;
const QUICK: [&str; 7] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1", "-q"];

fn part(prefix: &str, i: usize) -> String {
    format!("{prefix}-{:05}-of-{N_PARTS:05}.gguf", i + 1)
}

/// Splits `in.gguf` into parts as llama-gguf-split does: metadata in the first, tensors in order.
fn cut(cli: &Cli, prefix: &str, claims: usize) {
    let whole = GgufFile::open(&cli.path("in.gguf")).unwrap();
    let each = whole.tensors().len().div_ceil(N_PARTS);
    for (i, tensors) in whole.tensors().chunks(each).enumerate() {
        let mut metadata = if i == 0 { whole.metadata().to_vec() } else { Vec::new() };
        metadata.extend([
            ("split.no".into(), Value::U16(i as u16)),
            ("split.count".into(), Value::U16(N_PARTS as u16)),
            ("split.tensors.count".into(), Value::I32(claims as i32)),
        ]);
        let tensors: Vec<_> = tensors.iter().map(|t| OutTensor::copy(&whole, t)).collect();
        let path = cli.path(&part(prefix, i));
        write_gguf(&mut std::fs::File::create(&path).unwrap(), &path, &metadata, &tensors).unwrap();
    }
}

fn split_model(ty: Type) -> Cli {
    silence_logs();
    let cli = Cli::new();
    let small = TestModel { ty, blocks: vec![(4, 2, 256); 3], ..TestModel::default() };
    small.write(&cli.path("in.gguf"));
    cut(&cli, "m", small.layout().len());
    cli
}

#[test]
fn parts_are_pruned_as_the_whole_is() {
    let cli = split_model(Type::Q8_0);
    let first = part("m", 0);
    // llama.cpp joins these parts.
    LlamaModel::load(&cli.path(&first)).unwrap();
    for (input, output) in [("in.gguf", "a.gguf"), (&first, "b.gguf")] {
        cli.ok(&[&[input, output, "--sparsity", "0.4"][..], &QUICK].concat());
    }
    let [a, b] = ["a.gguf", "b.gguf"].map(|f| GgufFile::open(&cli.path(f)).unwrap());
    let without_source = |f: &GgufFile| -> Vec<(String, Value)> {
        f.metadata().iter().filter(|(k, _)| k != "putri.source.sha256").cloned().collect()
    };
    assert_eq!(without_source(&a), without_source(&b));
    for (x, y) in a.tensors().iter().zip(b.tensors()) {
        assert_eq!((&x.name, &x.ne), (&y.name, &y.ne));
        assert!(a.data(x) == b.data(y), "{}", x.name);
    }
    assert!(cli.ok(&["inspect", &first]).contains("deci"));
}

#[test]
fn nothing_removed_the_parts_become_one() {
    let cli = split_model(Type::F32);
    cli.ok(&[&part("m", 0), "out.gguf", "--sparsity", "0"]);
    let [a, b] = ["in.gguf", "out.gguf"].map(|f| std::fs::read(cli.path(f)).unwrap());
    assert!(a == b);
}

#[test]
fn parts_can_be_quantised() {
    let cli = split_model(Type::F32);
    cli.ok(&[&[&part("m", 0), "out.gguf", "--sparsity", "0.3", "--type", "q8_0"][..], &QUICK].concat());
    assert!(GgufFile::open(&cli.path("out.gguf")).unwrap().tensors().iter().any(|t| t.ty == Type::Q8_0));
}

#[test]
fn parts_can_stay_parts() {
    let cli = split_model(Type::Q8_0);
    let first = part("m", 0);
    cli.ok(&[&[&first, "whole.gguf", "--sparsity", "0.4"][..], &QUICK].concat());
    for (output, prefix) in [("out.gguf", "out"), ("b-00001-of-00003.gguf", "b")] {
        let text = cli.ok(&[&[&first, output, "--sparsity", "0.4", "--keep-split"][..], &QUICK].concat());
        assert_eq!(text.lines().last().unwrap(), part(prefix, 0));
        let [a, b] = ["whole.gguf", &part(prefix, 0)].map(|f| GgufFile::open(&cli.path(f)).unwrap());
        assert_eq!(b.paths().count(), N_PARTS);
        assert_eq!(a.metadata(), b.metadata());
        for (x, y) in a.tensors().iter().zip(b.tensors()) {
            assert_eq!((&x.name, &x.ne), (&y.name, &y.ne));
            assert!(a.data(x) == b.data(y), "{}", x.name);
        }
        assert_eq!(a.tensors().len(), b.tensors().len());
        let sizes: Vec<u64> = b.bytes().map(|p| p.len() as u64).collect();
        assert!(sizes.iter().all(|n| *n < a.n_bytes() / 2), "{sizes:?}");
        LlamaModel::load(&cli.path(&part(prefix, 0))).unwrap();
    }
    let left: Vec<_> =
        cli.listing().into_iter().filter(|(p, _)| p.to_string_lossy().contains("parts")).collect();
    assert!(left.is_empty(), "{left:?}");
    // An existing part is detected before any work.
    std::fs::remove_file(cli.path(&part("out", 0))).unwrap();
    let args = [&first, "out.gguf", "--sparsity", "0.4", "--keep-split"];
    cli.fails(&[&args[..], &QUICK].concat(), 1, &[&part("out", 1), "--force"]);
}

#[test]
fn what_is_no_whole_is_refused_by_name() {
    let cli = split_model(Type::F32);
    let [first, second, third] = std::array::from_fn(|i| part("m", i));
    let prune = |input: &str, more: &[&str], parts: &[&str]| {
        cli.fails(&[&[input, "out.gguf", "--sparsity", "0.3"][..], more, &QUICK].concat(), 1, parts);
    };
    prune(&second, &[], &["part 2 of 3", "give the first", &first]);
    cli.fails(&[&first, &third, "--sparsity", "0.3", "--force"], 1, &[&third]);
    std::fs::rename(cli.path(&first), cli.path("first.gguf")).unwrap();
    prune("first.gguf", &[], &["part 1 of 3", "must end in -00001-of-00003.gguf"]);
    std::fs::rename(cli.path("first.gguf"), cli.path(&first)).unwrap();
    std::fs::rename(cli.path(&third), cli.path("third.gguf")).unwrap();
    prune(&first, &[], &[&third]);
    std::fs::copy(cli.path(&second), cli.path(&third)).unwrap();
    prune(&first, &[], &[&third, "part 3 of 3"]);
    cut(&cli, "n", 1000);
    prune(&part("n", 0), &[], &["there should be 1000"]);
}
