//! `verify` accepts sound files and detects the faults of a wrong assembly or a bad disk.

use crate::common::cli::Cli;
use crate::common::smollm2;
use crate::common::test_model::TestModel;
use putri_gguf::ggml::{Type, silence_logs};
use putri_gguf::gguf::{GgufFile, OutTensor, TensorData, Value, write_gguf};
use std::borrow::Cow;
use std::path::Path;

const QUICK: [&str; 7] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1", "-q"];

/// Writes a copy of `source` with the metadata that `value` returns and the bytes that `data` returns by
/// name.
fn edited(
    source: &GgufFile,
    target: &Path,
    value: impl Fn(&str, &Value) -> Value,
    data: impl Fn(&str, &[u8]) -> Option<Vec<u8>>,
) {
    let metadata: Vec<_> = source.metadata().iter().map(|(k, v)| (k.clone(), value(k, v))).collect();
    let tensors: Vec<OutTensor> = source
        .tensors()
        .iter()
        .map(|t| {
            let bytes = data(&t.name, source.data(t)).map_or(Cow::Borrowed(source.data(t)), Cow::Owned);
            OutTensor {
                name: t.name.clone(),
                ty: t.ty,
                ne: t.ne.clone(),
                data: TensorData::made(move || Ok(bytes.clone())),
            }
        })
        .collect();
    write_gguf(&mut std::fs::File::create(target).unwrap(), target, &metadata, &tensors).unwrap();
}

#[test]
fn sound_files_are_believed() {
    silence_logs();
    let cli = Cli::new();
    let wide =
        |arch| TestModel { arch, ty: Type::Q8_0, blocks: vec![(4, 2, 256); 4], ..TestModel::default() };
    let mixture = |arch| TestModel {
        experts: Some([8, 2, 0]),
        ..TestModel { blocks: vec![(4, 2, 96); 4], ..wide(arch) }
    };
    for (small, more) in [
        (wide("llama"), &["--sparsity", "0.5"][..]),
        (TestModel { ty: Type::F32, ..wide("llama") }, &["--sparsity", "0.3", "--method", "paper"]),
        (TestModel { ty: Type::F16, ..wide("llama") }, &["--sparsity", "0.3", "--type", "Q4_0"]),
        (TestModel { biases: true, ..wide("qwen2") }, &["--sparsity", "0.5"]),
        (wide("qwen3"), &["--sparsity", "0.5"]),
        (TestModel { fused_qkv: true, ..wide("phi3") }, &["--sparsity", "0.5"]),
        (TestModel { ty: Type::Q4_0, ..TestModel::gemma3() }, &["--sparsity", "0.3"]),
        (TestModel { tied: false, ..mixture("llama") }, &["--sparsity", "0.4"]),
        (mixture("qwen3moe"), &["--sparsity", "0.4", "--experts", "narrow"]),
    ] {
        small.write(&cli.path("in.gguf"));
        cli.ok(&[&["in.gguf", "out.gguf", "--force"][..], more, &QUICK].concat());
        let said = cli.ok(&["verify", "out.gguf", "--source", "in.gguf", "-t", "1", "-q"]);
        println!("{} {more:?}\n{said}", small.arch);
        assert!(said.lines().count() == 6 && !said.contains("WRONG"), "{}: {said}", small.arch);
        assert!(cli.ok(&["verify", "out.gguf", "-q", "-t", "1"]).contains("when it was made"));
    }
    cli.fails(&["verify", "in.gguf", "-q"], 1, &["in.gguf", "not written by putri-gguf"]);
    let json = cli.ok(&["verify", "out.gguf", "--json", "-t", "1"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["checks"].as_array().unwrap().iter().all(|c| c["ok"] == true), "{json}");
}

#[test]
fn matrices_that_are_encoded_anew_are_no_fault() {
    silence_logs();
    let cli = Cli::new();
    let small = TestModel { arch: "qwen3", blocks: vec![(4, 2, 256); 4], ..TestModel::default() };
    small.write(&cli.path("f32.gguf"));
    // V has a wider type, as in a mix of types; openelm has one matrix for Q, K and V.
    crate::common::retype(&GgufFile::open(&cli.path("f32.gguf")).unwrap(), &cli.path("in.gguf"), |name| {
        let wide = name.contains("attn_v") && name.ends_with("weight");
        let matrix = name.ends_with("weight") && !name.contains("norm");
        if wide { Some(Type::Q8_0) } else { matrix.then_some(Type::Q4_0) }
    });
    cli.ok(&[&["in.gguf", "out.gguf", "--sparsity", "0.4"][..], &QUICK].concat());
    let out = GgufFile::open(&cli.path("out.gguf")).unwrap();
    assert_eq!(out.get_str("general.architecture").unwrap(), Some("openelm"));
    assert_eq!(out.get("putri.check.exact"), Some(&Value::Bool(false)));
    let said = cli.ok(&["verify", "out.gguf", "--source", "in.gguf", "-t", "1", "-q"]);
    println!("{said}");
}

/// Swaps two runs of `n` bytes.
fn swapped(bytes: &[u8], n: usize, a: usize, b: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for i in 0..n {
        bytes.swap(a * n + i, b * n + i);
    }
    bytes
}

/// Inserts faults into `good.gguf`, which was made of `in.gguf`, and expects `verify` to detect each.
fn faults_are_caught(cli: &Cli) {
    let source = GgufFile::open(&cli.path("in.gguf")).unwrap();
    let good = GgufFile::open(&cli.path("good.gguf")).unwrap();
    let arch = good.get_str("general.architecture").unwrap().unwrap().to_string();
    let shape = |name: &str| good.find(name).unwrap().ne.clone();
    let row = |name: &str| good.find(name).map(|t| t.ty.row_bytes(t.ne[0])).unwrap();
    let last = good.tensors().iter().filter(|t| t.name.ends_with("ffn_down.weight")).count() - 1;
    let name = |role: &str| format!("blk.{last}.{role}.weight");
    let (down, gate, q, k) = (name("ffn_down"), name("ffn_gate"), name("attn_q"), name("attn_k"));
    let same = |_: &str, v: &Value| v.clone();
    let whole = |_: &str, _: &[u8]| None;
    let verify = |parts: &[&str]| {
        let args = ["verify", "bad.gguf", "--source", "in.gguf", "-q", "-t", "1"];
        let out = cli.run(&args);
        let (stdout, stderr) = (
            String::from_utf8_lossy(&out.stdout).into_owned(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        );
        assert_eq!(out.status.code(), Some(1), "{parts:?}: {stdout}{stderr}");
        assert_eq!(stderr.lines().filter(|l| l.starts_with("error:")).count(), 1, "{stderr}");
        let wrong: Vec<&str> = stdout.lines().filter(|l| l.contains("WRONG")).collect();
        println!("{}{stderr}", wrong.iter().map(|l| format!("{l}\n")).collect::<String>());
        for part in parts {
            assert!(
                wrong.iter().any(|l| l.starts_with(part)) || stderr.contains(part),
                "{part}: {stdout}{stderr}"
            );
        }
    };
    let tensor = |at: &str, change: &dyn Fn(&[u8]) -> Vec<u8>, parts: &[&str]| {
        edited(&good, &cli.path("bad.gguf"), same, |name, bytes| (name == at).then(|| change(bytes)));
        verify(parts);
    };
    // The columns of ffn_down are in another order than the rows of gate and up. Whole blocks of them are
    // swapped, so that the test is the same for every type.
    let block = good.find(&down).unwrap().ty.block_size().max(32);
    let part = good.find(&down).unwrap().ty.row_bytes(block);
    let turned = |bytes: &[u8]| -> Vec<u8> {
        bytes
            .chunks_exact(row(&down))
            .flat_map(|r| swapped(r, part, 0, shape(&down)[0] / block - 1))
            .collect()
    };
    tensor(&down, &turned, &["predictions"]);
    // A row of gate belongs to another neuron than that of up.
    tensor(&gate, &|b| swapped(b, row(&gate), 3, 7), &["rows"]);
    // Two heads of Q, or K, are swapped; a head's rows are mixed with another's.
    let head = source.find("blk.0.attn_q.weight").map(|_| 16.max(good_head_dim(&good, &arch))).unwrap();
    let n_kv = shape(&k)[1] / head;
    let n_head = shape(&q)[1] / head;
    if n_kv > 1 {
        tensor(&k, &|b| swapped(b, row(&k) * head, 0, 1), &["predictions", "rows"]);
        let per_group = n_head / n_kv;
        tensor(&q, &|b| swapped(b, row(&q) * head, 0, per_group), &["predictions", "rows"]);
        tensor(&q, &|b| swapped(b, row(&q), 0, per_group * head), &["rows"]);
    }
    // ffn_down is twice as large as expected, or smaller, as with a ridge of the wrong scale.
    let floats = good.floats(good.find(&down).unwrap(), 0..shape(&down)[1]).unwrap();
    let ty = good.find(&down).unwrap().ty;
    let scaled = |by: f32| {
        ty.quantize(&floats.iter().map(|v| v * by).collect::<Vec<_>>(), shape(&down)[0], None).unwrap()
    };
    tensor(&down, &|_| scaled(2.0), &["predictions"]);
    tensor(&down, &|_| scaled(0.9), &["predictions"]);
    // A weight is NaN.
    tensor(
        "output_norm.weight",
        &|b| [&f32::NAN.to_le_bytes()[..], &b[4..]].concat(),
        &["output_norm.weight"],
    );
    // Metadata that was not updated.
    let key = |at: &str, to: &dyn Fn(&Value) -> Value, parts: &[&str]| {
        let at = format!("{arch}.{at}");
        edited(&good, &cli.path("bad.gguf"), |k, v| if k == at { to(v) } else { v.clone() }, whole);
        verify(parts);
    };
    let U32(head_dim) = good.get(&format!("{arch}.attention.key_length")).unwrap().into();
    key("attention.key_length", &|_| Value::U32(head_dim * 2), &["attention"]);
    key("feed_forward_length", &|_| Value::U32(256), &["ffn_"]);
    key("attention.head_count_kv", &|_| Value::U32(1), &["attn_"]);
    key("rope.freq_base", &|_| Value::F32(500.0), &["predictions"]);
    key("attention.layer_norm_rms_epsilon", &|_| Value::F32(0.5), &["predictions"]);
    // Statements of the file about itself.
    let about = |at: &str, to: Value, part: &str| {
        edited(&good, &cli.path("bad.gguf"), |k, v| if k == at { to.clone() } else { v.clone() }, whole);
        verify(&[part]);
    };
    about("putri.sparsity_reached", Value::F32(0.9), "sizes");
    about("putri.source.sha256", Value::Str("00".repeat(32).into()), "source");
}

struct U32(u32);

impl From<&Value> for U32 {
    fn from(v: &Value) -> U32 {
        match v {
            Value::U32(n) => U32(*n),
            other => panic!("{other:?}"),
        }
    }
}

fn good_head_dim(file: &GgufFile, arch: &str) -> usize {
    let U32(n) = file.get(&format!("{arch}.attention.key_length")).unwrap().into();
    n as usize
}

#[test]
fn faults_in_a_small_file_are_caught() {
    silence_logs();
    for ty in [Type::F32, Type::Q8_0] {
        let cli = Cli::new();
        TestModel { ty, blocks: vec![(8, 4, 256); 4], ..TestModel::default() }.write(&cli.path("in.gguf"));
        cli.ok(&[&["in.gguf", "good.gguf", "--sparsity", "0.3"][..], &QUICK].concat());
        faults_are_caught(&cli);
    }
}

#[test]
fn faults_in_smollm2_are_caught() {
    silence_logs();
    let cli = Cli::new();
    std::os::unix::fs::symlink(smollm2(), cli.path("in.gguf")).unwrap();
    std::fs::write(cli.path("text.txt"), crate::common::TEXT.repeat(3)).unwrap();
    let args =
        ["in.gguf", "good.gguf", "--sparsity", "0.1", "-f", "text.txt", "--self-share", "0", "--tune", "0"];
    cli.ok(&[&args[..], &["-c", "128", "--chunks", "3", "-t", "1", "-q"]].concat());
    faults_are_caught(&cli);
}
