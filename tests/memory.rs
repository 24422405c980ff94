//! Memory that llama.cpp needs to run a model, before and after pruning: predicted, reported, and measured.

mod common;

use common::cli::Cli;
use common::smollm2;
use common::test_model::TestModel;
use putri_gguf::ggml::{RunMemory, Type, repacked_bytes, run_memory, silence_logs, taken_memory};
use putri_gguf::gguf::GgufFile;
use putri_gguf::model::{KvCache, Model};
use std::path::Path;

const QUICK: [&str; 7] = ["--ctx-size", "64", "--chunks", "8", "--threads", "1", "-q"];

/// Rounding of libllama's log, which has two decimals, for each of up to two caches.
const LOGGED: f64 = 0.011 * (1 << 20) as f64;

fn foreseen(path: &Path, n_ctx: usize) -> u64 {
    let h = Model::open(path).unwrap().hparams;
    KvCache::new(&h, &h.blocks).bytes(n_ctx)
}

fn about(a: u64, b: u64) -> bool {
    (a as f64 - b as f64).abs() <= LOGGED
}

/// Checks that no allocation is larger than foreseen.
fn agree(a: &RunMemory, b: &RunMemory) -> bool {
    a.weights == b.weights && about(a.kv_cache, b.kv_cache) && about(a.compute, b.compute)
}

#[test]
fn simulated_memory_is_what_is_allocated() {
    let path = smollm2();
    for n_ctx in [512, 3000, 8192] {
        let (simulated, taken) = (run_memory(&path, n_ctx).unwrap(), taken_memory(&path, n_ctx).unwrap());
        assert!(agree(&simulated, &taken), "{n_ctx}: {simulated:?} {taken:?}");
        assert!(about(simulated.kv_cache, foreseen(&path, n_ctx)), "{n_ctx}: {simulated:?}");
    }
}

#[test]
fn caches_are_foreseen_in_every_family() {
    silence_logs();
    let cli = Cli::new();
    let path = cli.path("in.gguf");
    let mut found = vec![("llama", TestModel::default()), ("gemma3", TestModel::gemma3())];
    found.extend(TestModel::variants());
    for (name, small) in found {
        small.write(&path);
        for n_ctx in [200, 4096] {
            let memory = run_memory(&path, n_ctx).unwrap();
            let kv = foreseen(&path, n_ctx);
            assert!(about(memory.kv_cache, kv), "{name}, {n_ctx} tokens: {kv} foreseen, {memory:?}");
        }
    }
}

#[test]
fn what_the_result_takes_to_run_is_within_what_was_asked_for() {
    silence_logs();
    let cli = Cli::new();
    let blocks = vec![(4, 2, 512); 4];
    let small = TestModel { ty: Type::Q8_0, blocks, ..TestModel::default() };
    small.write(&cli.path("in.gguf"));
    for n_ctx in [256, 4096] {
        let before = run_memory(&cli.path("in.gguf"), n_ctx).unwrap();
        // Compute buffers keep about the same size, so only the rest shrinks.
        let target = before.compute + (before.weights + before.kv_cache) * 3 / 4;
        let (ram, ctx) = (target.to_string(), n_ctx.to_string());
        let args = [
            "in.gguf",
            "out.gguf",
            "--force",
            "--target-ram",
            &ram,
            "--target-ctx",
            &ctx,
            "--report",
            "r.json",
        ];
        let said = cli.ok(&[&args[..], &QUICK].concat());
        let after = taken_memory(&cli.path("out.gguf"), n_ctx).unwrap();
        assert!(after.total() <= target, "{after:?} in {target}");
        // The tolerance is a step of all widths together, and the parts assumed constant: compute buffers and
        // the header.
        let header = GgufFile::open(&cli.path("in.gguf")).unwrap().n_bytes() - before.weights;
        let step = 4 * 32 * 3 * small.n_embd as u64 * 9 / 8;
        let slack = step + header + 8192 + before.compute - after.compute;
        assert!(after.total() + slack >= target, "{after:?} is much less than {target}");
        assert!(said.contains(&format!("to run {n_ctx} tokens")), "{said}");
        let r: serde_json::Value =
            serde_json::from_slice(&std::fs::read(cli.path("r.json")).unwrap()).unwrap();
        let asked = run_memory(&cli.path("out.gguf"), n_ctx).unwrap();
        assert_eq!(r["running"]["after"]["bytes"], asked.total());
        let caches = r["running"]["kv_caches"].as_array().unwrap();
        let same = caches.iter().find(|c| c["ctx_size"] == n_ctx).unwrap();
        assert!(about(same["after"].as_u64().unwrap(), asked.kv_cache));
    }
    cli.fails(
        &[&["in.gguf", "new.gguf", "--target-ram", "1M"][..], &QUICK].concat(),
        1,
        &["too small", "to compute in", "of keys and values for 256 tokens"],
    );
}

#[test]
fn what_is_left_still_goes_through_the_faster_kernels() {
    silence_logs();
    let cli = Cli::new();
    let blocks = vec![(4, 2, 1024); 4];
    TestModel { ty: Type::Q4_0, n_embd: 256, blocks, ..TestModel::default() }.write(&cli.path("in.gguf"));
    for share in ["0.2", "0.45"] {
        let args = ["in.gguf", "out.gguf", "--force", "--sparsity", share];
        cli.ok(&[&args[..], &QUICK].concat());
        // These are the matrices in blocks that llama.cpp reorders for its kernels, if it does so on this
        // processor.
        let [before, after] = ["in.gguf", "out.gguf"].map(|name| {
            let path = cli.path(name);
            let file = GgufFile::open(&path).unwrap();
            let matrices = file.tensors().iter().filter(|t| t.name.starts_with("blk.") && t.ty == Type::Q4_0);
            let bytes: usize = matrices.map(|t| t.n_bytes()).sum();
            (repacked_bytes(&path).unwrap(), bytes as u64)
        });
        // Tensors are padded there, in total by less than a matrix of an FFN.
        let all_of = |(repacked, bytes): (u64, u64)| repacked.abs_diff(bytes) < 60_000;
        println!("{before:?} {after:?}");
        assert!(before.0 == 0 || all_of(before), "{before:?}");
        assert!(after.0 == 0 && before.0 == 0 || all_of(after), "{after:?}");
        assert!(after.1 < before.1);
    }
}
